"""Weights that are brought in layer by layer: the same numbers, and each weight read once per pass."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, noise
from test_engines import encodings, likely_tokens
from tiny_models import save_tiny_qwen2_audio, save_tiny_voxtral

import lalm_patch
from lalm_patch.config import compose
from lalm_patch.engine import DirectEngine, ReplayEngine, replay
from lalm_patch.engine.interface import Sweep
from lalm_patch.engine.passes import plan_passes
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.interventions.grids import Grid, layer_grid, make_grid, token_grid
from lalm_patch.interventions.patches import Intervention, Patch
from lalm_patch.models import LALM, Encoding
from lalm_patch.models.offload import Offloaded, rows_of_layers
from lalm_patch.stimuli import Prompt, silence

LAYERS = 6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of six decoder layers, as they are published: in shards, in half precision."""
    root = tmp_path_factory.mktemp("stored")
    folders = {}
    for name, save, dtype in (
        ("qwen2_audio", save_tiny_qwen2_audio, torch.bfloat16),
        ("voxtral", save_tiny_voxtral, torch.float16),
    ):
        whole = save(root / f"{name}_whole", layers=LAYERS)
        folders[name] = Path(shutil.copytree(whole, root / name))
        (folders[name] / "model.safetensors").unlink()
        lalm = load(whole, name)
        lalm.module.to(dtype).save_pretrained(folders[name], max_shard_size="150KB")
        assert len(list(folders[name].glob("*.safetensors"))) > 2
    return folders


@pytest.fixture(scope="module", params=["qwen2_audio", "voxtral"])
def pair(request: pytest.FixtureRequest, stored: dict[str, Path]) -> tuple[LALM, LALM]:
    """A model all in memory, and the same with its layers on disk."""
    family = request.param
    return tuple(load(stored[family], family, offload=offload) for offload in ("none", "disk"))  # type: ignore[return-value]


def offloaded(lalm: LALM) -> Offloaded:
    assert lalm.offloaded is not None
    return lalm.offloaded


def test_numbers_are_the_same(pair: tuple[LALM, LALM], prompt: Prompt) -> None:
    whole, away = pair
    assert len(offloaded(away).names) == LAYERS  # the encoder is small and stays
    for granularity in ("layer", "token"):
        found = {}
        for lalm in pair:
            clean, corrupted = encodings(lalm, prompt)
            grid = make_grid(granularity, clean.tokens, range(LAYERS))
            found[lalm] = ReplayEngine(lalm).sweep(clean, corrupted, grid, likely_tokens(whole, clean, corrupted))
        assert np.ptp(found[whole].probabilities, axis=0).max() > 1e-3
        np.testing.assert_array_equal(found[away].option_logits, found[whole].option_logits)
    some = Grid(("cell",), {"cell": np.arange(3)}, grid.cells[20:23])
    ids = likely_tokens(whole, clean, corrupted)
    direct = DirectEngine(away).sweep(clean, corrupted, some, ids)
    np.testing.assert_allclose(direct.probabilities, found[away].probabilities[20:23], atol=TOLERANCE)


def test_a_layer_is_there_only_while_it_computes(pair: tuple[LALM, LALM], prompt: Prompt) -> None:
    """What is kept of a layer that is away is made useless: who used it would give no number."""
    whole, away = pair
    clean, corrupted = encodings(whole, prompt)
    grid = layer_grid(clean.tokens, range(LAYERS))
    ids = likely_tokens(whole, clean, corrupted)
    expected = ReplayEngine(whole).sweep(clean, corrupted, grid, ids)
    kept = [one for layer in offloaded(away)._layers for one in layer]
    assert all(one.place is not None for one in kept)  # read from the file, not through memory
    before = [one.kept.clone() for one in kept]
    for one in kept:
        one.kept.fill_(float("nan"))
    try:
        found = ReplayEngine(away).sweep(clean, corrupted, grid, ids)
    finally:
        for one, weights in zip(kept, before, strict=True):
            one.kept.copy_(weights)
    np.testing.assert_array_equal(found.option_logits, expected.option_logits)


def clips(lalm: LALM, prompt: Prompt, count: int) -> list[tuple[Encoding, Encoding]]:
    """Clips of noise, and silence that they have in common."""
    silent = lalm.encode(silence(noise(1.0)), prompt, "chat")
    return [(lalm.encode(noise(1.0, seed), prompt, "chat"), silent) for seed in range(count)]


@pytest.mark.parametrize("kept", [True, False])
def test_weights_are_read_once_per_pass(
    pair: tuple[LALM, LALM], prompt: Prompt, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base runs and all cells of a batch of clips: two passes, whether or not the base runs are kept."""
    _, away = pair
    encoded = clips(away, prompt, 3)
    sweeps = [Sweep(*both, token_grid(both[0].tokens, range(LAYERS)), (1, 2)) for both in encoded]
    if not kept:
        monkeypatch.setattr(replay, "KEPT_SHARE", 0.0)
    engine = ReplayEngine(away)
    before = list(offloaded(away).reads)
    engine.bases([(*both, (1, 2)) for both in encoded])
    together = engine.sweeps(sweeps)
    reads = [after - first for after, first in zip(offloaded(away).reads, before, strict=True)]
    assert max(reads) == 2
    alone = [ReplayEngine(away).sweep(s.source, s.target, s.grid, s.option_ids) for s in sweeps]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.option_logits, other.option_logits, atol=TOLERANCE)
    assert np.ptp([one.logsumexp[0] for one in alone]) > 2 * TOLERANCE  # the clips are not one and the same


def test_direct_reads_each_weight_once_per_forward_pass(pair: tuple[LALM, LALM], prompt: Prompt) -> None:
    _, away = pair
    clean, corrupted = encodings(away, prompt)
    cells = layer_grid(clean.tokens, range(LAYERS)).cells[1:4]
    before = list(offloaded(away).reads)
    DirectEngine(away).cells(clean, corrupted, cells, (1, 2))
    reads = [after - first for after, first in zip(offloaded(away).reads, before, strict=True)]
    assert max(reads) == 1 + len(cells)


@pytest.mark.parametrize("family", ["qwen_audio", "desta2", "desta25"])
def test_native_families(family: str, native_folders: dict[str, Path], prompt: Prompt) -> None:
    found = []
    for offload in ("none", "disk"):
        lalm = LALM.load(
            compose(
                f"model={family}",
                f"model.id={native_folders[family]}",
                f"model.offload={offload}",
                "model.dtype=float32",
                "model.device=cpu",
                "attr=gender",
            ).model
        )
        clean, corrupted = encodings(lalm, prompt)
        grid = layer_grid(clean.tokens, range(lalm.num_layers))
        found.append(ReplayEngine(lalm).sweep(clean, corrupted, grid, (1, 2)).option_logits)
    np.testing.assert_array_equal(*found)


def test_a_weight_that_was_changed_in_memory_is_not_read_from_the_file(stored: dict[str, Path]) -> None:
    lalm = load(stored["qwen2_audio"], "qwen2_audio", dtype="bfloat16")
    weight = lalm.decoder_module.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(2)
    away = Offloaded(lalm.module, torch.device("cpu"), {}, on_disk=True)
    expected = weight.clone()
    away.bring_in(lalm.decoder_module.layers[2])
    assert torch.equal(lalm.decoder_module.layers[2].mlp.down_proj.weight, expected)


def test_a_file_that_is_cut_meanwhile_is_named(stored: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored["qwen2_audio"], tmp_path / "cut"))
    lalm = load(folder, "qwen2_audio", dtype="bfloat16", offload="disk")
    place = offloaded(lalm)._layers[-1][-1].place
    assert place is not None
    with place.path.open("r+b") as file:
        file.truncate(place.offset + 4)
    with pytest.raises(ModelError, match=f"{place.path.name}: ends where weights are expected"):
        offloaded(lalm).bring_in(lalm.decoder_module.layers[LAYERS - 1])


def test_weights_that_are_no_numbers_are_named_when_they_come(stored: dict[str, Path]) -> None:
    lalm = load(stored["qwen2_audio"], "qwen2_audio", dtype="bfloat16")
    with torch.no_grad():
        lalm.decoder_module.layers[3].self_attn.o_proj.weight[0, 0] = float("inf")
    away = Offloaded(lalm.module, torch.device("cpu"), {}, on_disk=True, where="the folder")
    away.bring_in(lalm.decoder_module.layers[2])
    with pytest.raises(ModelError, match=r"the folder: 1 weights hold infinite.*layers\.3\.self_attn\.o_proj\.weight"):
        away.bring_in(lalm.decoder_module.layers[3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.offload=cpu", "model.device=cpu"), "model.offload=cpu keeps a GPU's layers"),
        (("model.offload=disk", "model.device_map=auto"), "both place the weights"),
        (("model.offload=disk", "engine=attribution"), "not model.offload=disk"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LALM.load(compose("model=demo", "attr=gender", *overrides).model)


def test_a_run_from_disk_and_in_batches_is_the_run(tmp_path: Path) -> None:
    """Excluded clips among them, in batches that do not divide their number; what is shared is not another run."""
    what = ("model=demo", "attr=gender", "granularity=token", "data.limit=7")
    runs = [
        lalm_patch.trace(*what, f"outputs={tmp_path / str(number)}", *more)
        for number, more in enumerate(((), ("model.offload=disk",), ("engine.clips=3",)))
    ]
    first = runs[0].dataset
    assert 0 < int(first.kept.sum()) < 7
    for other in runs[1:]:
        assert other.files[0].parent.name == runs[0].files[0].parent.name
        np.testing.assert_array_equal(other.dataset.exclusion, first.exclusion)
        for name in ("p_clean", "p_patched", "option_logit_patched"):
            np.testing.assert_allclose(other.dataset[name], first[name], atol=TOLERANCE)


def test_rows_of_layers_are_the_outermost_lists() -> None:
    inner = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    layer = torch.nn.Module()
    layer.experts = inner
    whole = torch.nn.Module()
    whole.tower = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]))
    whole.layers = torch.nn.ModuleList([layer])
    assert [name for name, _ in rows_of_layers(whole)] == ["tower.0.0", "tower.0.1", "layers.0"]


# --- passes --------------------------------------------------------------------------------------------------------


def random_cells(seed: int) -> Iterator[Intervention]:
    """Cells that start at random layers and positions of 12."""
    generator = np.random.default_rng(seed)
    for _ in range(40):
        yield Intervention([Patch(int(generator.integers(LAYERS)), (int(generator.integers(12)),))])


@pytest.mark.parametrize("most", [1, 12, 60, 10_000])
def test_passes_hold_every_cell_once_and_no_more_than_fit(most: int) -> None:
    cells = [tuple(random_cells(seed)) for seed in (0, 1)]
    passes = plan_passes([(own, 12) for own in cells], LAYERS, most)
    found = [(number, index) for part in passes for number, chosen in part.items() for index in chosen]
    assert sorted(found) == [(number, index) for number in (0, 1) for index in range(40)]
    entries = [
        [cells[number][index].entry_layer for number, chosen in part.items() for index in chosen] for part in passes
    ]
    assert all(max(low) <= min(high) for low, high in itertools.pairwise(entries))  # those that go longest come first
    for part, layers in zip(passes, entries, strict=True):
        size = sum(
            1 if cells[number][index].entry_layer == LAYERS else 12 - cells[number][index].first_position
            for number, chosen in part.items()
            for index in chosen
        )
        assert size <= most or len(layers) == 1
    if most == 10_000:
        assert len(passes) == 1


def test_the_last_layer_computes_last_positions_alone(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    rows: list[int] = []
    engine = ReplayEngine(lalm)
    engine.base(clean, corrupted, (1, 2))
    handle = lalm.decoder_module.layers[-1].mlp.register_forward_pre_hook(lambda _m, x: rows.append(x[0].shape[1]))
    try:
        engine.sweep(clean, corrupted, grid, (1, 2))
    finally:
        handle.remove()
    through_it = sum(cell.entry_layer < lalm.num_layers for cell in grid.cells)
    assert sum(rows) == through_it


def test_progress_goes_on_while_a_pass_does(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    told: list[int] = []
    ReplayEngine(lalm, 100).sweep(clean, corrupted, grid, (1, 2), told.append)
    assert sum(told) == len(grid.cells)
    assert len(told) > 10
    assert max(told) < len(grid.cells) / 3
