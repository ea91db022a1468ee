"""Attention knockout: both engines, against plain transformers; the settings, and what a run of it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import load, noise
from tiny_models import save_tiny_qwen2_audio

import lalm_patch
from lalm_patch.analysis import about, mean_recovery, peak_layer
from lalm_patch.analysis.early_text import accuracy_without_early_audio
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.cuts import check_cuts
from lalm_patch.engine.suffix_attention import attend_plainly
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.interventions.grids import Grid, Place, early_text_only_grid, make_grid
from lalm_patch.interventions.patches import Cut, Intervention, Patch, Site
from lalm_patch.interventions.segments import edge, edge_names
from lalm_patch.models import LALM, Encoding
from lalm_patch.report import make_report
from lalm_patch.stimuli import Prompt

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")

TOLERANCE = 1e-5
KNOCKOUT = ("attr=gender", "data.limit=6", "direction=noising")


def pair(lalm: LALM, prompt: Prompt) -> tuple[Encoding, Encoding]:
    sounds = noise(1.0), np.zeros(16_000, np.float32)
    clean, silent = (lalm.encode(sound, prompt, "chat") for sound in sounds)
    return clean, silent


def grid_of(cells: list[Intervention]) -> Grid:
    return Grid(("cell",), {"cell": np.arange(len(cells))}, tuple(cells))


def random_cells(lalm: LALM, text: tuple[int, ...], audio: tuple[int, ...], count: int) -> list[Intervention]:
    """Cuts between random positions, of all or of single heads, in several layers, with patches among them."""
    rng = np.random.default_rng(4)
    cells = []
    for _ in range(count):
        cuts = []
        for _ in range(rng.integers(1, 4)):
            targets = sorted(rng.choice(text[1:], rng.integers(1, 5), replace=False).tolist())
            others = [p for p in (*audio, *text) if p not in targets and p < targets[-1]]
            sources = sorted(rng.choice(others, rng.integers(1, len(others)), replace=False).tolist())
            head = None if rng.random() < 0.5 else int(rng.integers(lalm.num_heads))
            cuts.append(Cut(int(rng.integers(lalm.num_layers)), tuple(targets), tuple(sources), head))
        place = (int(rng.integers(lalm.num_layers)), (int(rng.choice(text)),))
        cells.append(Intervention([Patch(*place, Site.MLP)] if rng.random() < 0.4 else [], cuts))
    return cells


def test_replay_cuts_what_direct_cuts(lalm: LALM, prompt: Prompt) -> None:
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    grid = grid_of(random_cells(lalm, clean.tokens.text_positions, clean.tokens.audio_positions, 24))
    slow = DirectEngine(lalm).sweep(silent, clean, grid, ids)
    for pack_tokens in (2048, 40):
        fast = ReplayEngine(lalm, pack_tokens).sweep(silent, clean, grid, ids)
        np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=TOLERANCE)
        np.testing.assert_allclose(fast.option_logits, slow.option_logits, atol=1e-4)
    base = DirectEngine(lalm).base(silent, clean, ids).option_logits[1]
    # A cut in the last layer that does not concern the last position changes nothing.
    assert (np.abs(slow.option_logits - base).max(axis=1) > 1e-3).sum() >= 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cuts_are_masks_of_plain_transformers(attention: str, tmp_path: Path, prompt: Prompt) -> None:
    """The same edges removed by hand, in a mask that is the same in every layer and head."""
    lalm = load(save_tiny_qwen2_audio(tmp_path / "tiny"), "qwen2_audio", attn_implementation=attention)
    clean, silent = pair(lalm, prompt)
    ids = list(lalm.target_ids(prompt, "chat"))
    for name in ("audio-text", "audio-last", "object-last"):
        cell = Intervention(cuts=[edge(clean.tokens, name, layer) for layer in range(lalm.num_layers)])
        for engine in (DirectEngine(lalm), ReplayEngine(lalm)):
            found = engine.sweep(silent, clean, grid_of([cell]), ids).option_logits[0]
            length = len(clean.tokens)
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            seen[torch.tensor(cell.cuts[0].targets)[:, None], torch.tensor(cell.cuts[0].sources)] = False
            mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
            with torch.no_grad():
                out = lalm.decoder_module(
                    inputs_embeds=clean.inputs_embeds, attention_mask=mask, position_ids=clean.position_ids
                )
            np.testing.assert_allclose(found, lalm.logits(out.last_hidden_state[:, -1])[0, ids], atol=1e-5)


def test_the_audio_cut_for_all_text_is_the_audio_masked_out(lalm: LALM, prompt: Prompt) -> None:
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    grid = early_text_only_grid(clean.tokens, range(lalm.num_layers))
    found = DirectEngine(lalm).sweep(silent, clean, grid, ids).option_logits[-1]
    mask = torch.ones(1, len(clean.tokens), dtype=torch.long)
    mask[0, list(clean.tokens.audio_positions)] = 0
    with torch.no_grad():
        out = lalm.decoder_module(
            inputs_embeds=clean.inputs_embeds, attention_mask=mask, position_ids=clean.position_ids
        )
        expected = lalm.logits(out.last_hidden_state[:, -1])[0, list(ids)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Whatever was heard is then without effect.
    other = DirectEngine(lalm).sweep(clean, silent, grid, ids).option_logits[-1]
    np.testing.assert_allclose(found, other, atol=1e-5)


def test_all_heads_one_by_one_are_the_layer(lalm: LALM, prompt: Prompt) -> None:
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    whole = [edge(clean.tokens, "audio-text", layer) for layer in range(lalm.num_layers)]
    cells = [Intervention(cuts=[cut]) for cut in whole]
    heads = [
        Intervention(cuts=[Cut(cut.layer, cut.targets, cut.sources, head) for head in range(lalm.num_heads)])
        for cut in whole
    ]
    found = ReplayEngine(lalm).sweep(silent, clean, grid_of(cells + heads), ids).option_logits
    np.testing.assert_allclose(found[: len(cells)], found[len(cells) :], atol=TOLERANCE)


def test_grids_of_edges(lalm: LALM, prompt: Prompt) -> None:
    tokens = lalm.encode(noise(1.0), prompt, "chat").tokens
    place = Place(Site.ATTN, 2, lalm.num_layers, lalm.num_heads, knockout=True)
    grid = make_grid("edge", tokens, range(lalm.num_layers), place)
    assert tuple(grid.coords["edge"]) == edge_names(tokens.segments)
    by_layer = dict(zip([(x, y) for x in grid.coords["layer"] for y in grid.coords["edge"]], grid.cells, strict=True))
    cuts = by_layer[0, "object-last"].cuts
    assert [cut.layer for cut in cuts] == [0, 1]
    assert {tokens.roles[p] for p in cuts[0].sources} == {"object"}
    assert cuts[0].targets == (len(tokens) - 1,)
    assert [cut.layer for cut in by_layer[lalm.num_layers - 1, "audio-text"].cuts] == [lalm.num_layers - 1]
    heads = Place(Site.HEAD, 1, lalm.num_layers, lalm.num_heads, knockout=True, edges=("audio-last",))
    single = make_grid("edge", tokens, [1], heads)
    assert single.dims == ("layer", "head")
    assert [cell.cuts[0].head for cell in single.cells] == list(range(lalm.num_heads))


def test_a_cut_that_changes_nothing_or_leaves_nothing_is_refused() -> None:
    for targets, sources in (((3,), (3,)), ((2,), (5,)), ((), (1,)), ((3, 2), (1,))):
        with pytest.raises(ValueError, match=r"overlap|anyway|ascending"):
            Cut(0, targets, sources)
    with pytest.raises(ValueError, match="from 0"):
        Cut(-1, (2,), (1,))


def test_a_query_that_sees_nothing_adds_nothing() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 4), torch.randn(1, 5, 4)
    blocked = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    blocked[:, :, 1] = True
    out, total = attend_plainly(query, key, key, 0.5, blocked=blocked)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 4))
    assert bool(torch.isneginf(total[:, :, 1]).all())
    whole, _ = attend_plainly(query, key, key, 0.5)
    torch.testing.assert_close(out[:, :, [0, 2]], whole[:, :, [0, 2]])


def test_a_decoder_without_masks_is_refused(checkpoints: dict[str, Path]) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    layer = lalm.decoder_module.layers[1]  # type: ignore[index]
    layer.self_attn = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"layer 1 of .* has no self_attn that takes an attention_mask"):
        check_cuts(lalm)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("granularity=edge",),
            "expected direction=noising and site=attn or head, got direction=denoising, site=resid",
        ),
        (("granularity=edge", "direction=noising"), "site=attn or head"),
        (("granularity=early_text_only", "direction=noising", "site=head"), "site=attn, got"),
        (("granularity=early_text_only", "direction=noising", "site=attn", "site.window=2"), "site.window=2, use 1"),
        (("granularity=edge", "direction=noising", "site=head"), "name it"),
        (("granularity=edge", "direction=noising", "site=attn", "granularity.edges=[sound-last]"), "is no edge"),
        (("granularity=edge", "direction=noising", "site=attn", "granularity.edges=[last-object]"), "comes before"),
        (("granularity=edge", "direction=noising", "site=attn", "granularity.edges=[early-text]"), "audio-text"),
        (("granularity=token", "+granularity.edges=[audio-last]"), "goes with granularity=edge"),
        (("granularity=edge", "direction=noising", "site=attn", "backend=ndif"), "use backend=local"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lalm_patch.compose(*overrides)


def test_an_edge_the_prompt_lacks_is_refused(tmp_path: Path) -> None:
    overrides = (*KNOCKOUT, "granularity=edge", "site=attn", "granularity.edges=[audio-last,transcript-last]")
    with pytest.raises(ConfigError, match=r"no edge transcript-last; it has audio-early, .*audio-text, early-last"):
        lalm_patch.trace(*overrides, f"outputs={tmp_path}")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("knockout")
    for overrides in (
        ("granularity=edge", "site=attn", "site.window=2"),
        ("granularity=edge", "site=head", "granularity.edges=[audio-last]"),
        ("granularity=early_text_only", "site=attn"),
    ):
        lalm_patch.trace(*KNOCKOUT, *overrides, f"outputs={folder}")
    return folder


def opened(outputs: Path, pattern: str) -> xr.Dataset:
    (file,) = outputs.glob(f"{pattern}/result.nc")
    return xr.open_dataset(file)


def test_runs_of_edges(outputs: Path) -> None:
    """Attention is planted in layers 4 to 6: elsewhere there is nothing to cut."""
    edges = opened(outputs, "*edge-attn*")
    assert about(edges).granularity == "edge"
    mean = mean_recovery(edges)["mean"]
    np.testing.assert_allclose(mean.sel(layer=[0, 1, 2, 7]), 0, atol=1e-4)  # windows of two layers
    assert float(mean.sel(layer=slice(3, 6)).max()) > 0.1
    peak = peak_layer(edges)
    assert peak is not None
    assert "edge " in peak.over_layers.place
    heads = opened(outputs, "*edge-head*")
    assert heads.recovery_rate.dims == ("sample", "layer", "head")
    np.testing.assert_allclose(mean_recovery(heads)["mean"].sel(layer=[0, 1, 2, 3, 7]), 0, atol=1e-4)


def test_early_text_only(outputs: Path) -> None:
    run = opened(outputs, "*early_text_only*")
    table = accuracy_without_early_audio(run)
    kept = run.isel(sample=np.flatnonzero(run.kept.values))
    logits = kept.option_logit_patched.values
    right = kept.option.values[logits.argmax(-1)] == kept.label.values[:, None]
    np.testing.assert_allclose(table["accuracy"], right.mean(axis=0))
    np.testing.assert_allclose(table["accuracy"].sel(layer=slice(0, 3)), 1)
    positions, audio = kept.positions.values.astype(float), kept.audio_positions.values
    text = positions - kept.first_text_position.values
    share = np.mean(text * audio / (positions * (positions + 1) / 2))
    np.testing.assert_allclose(table["saved"], share * np.arange(1, 9) / 8)
    # From the last layer that attends on, the text has never heard the clip.
    lost = mean_recovery(run)["mean"]
    np.testing.assert_allclose(lost.sel(layer=slice(0, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(lost.sel(layer=7), lost.sel(layer=6), atol=1e-6)
    with pytest.raises(ValueError, match="early_text_only"):
        accuracy_without_early_audio(opened(outputs, "*edge-head*"))


def test_knockouts_are_on_the_page(outputs: Path) -> None:
    page = make_report(outputs, audio=False).read_text()
    for text in ("edge audio-last", "no audio for early text", "Causal tracing: 3 runs"):
        assert text in page


@pytest.mark.parametrize("family", ["qwen_audio", "desta2", "desta25"])
def test_native_families_are_cut_alike(family: str, request: pytest.FixtureRequest, prompt: Prompt) -> None:
    files = request.getfixturevalue("qwen_folder" if family == "qwen_audio" else f"{family}_files")
    lalm = load(files if family == "qwen_audio" else files.location, family)
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    base = DirectEngine(lalm).base(silent, clean, ids).option_logits[1]
    for site, window, edges in ((Site.ATTN, 2, ()), (Site.HEAD, 1, ("audio-last",))):
        place = Place(site, window, lalm.num_layers, lalm.num_heads, True, edges)
        grid = make_grid("edge", clean.tokens, range(lalm.num_layers), place)
        fast = ReplayEngine(lalm).sweep(silent, clean, grid, ids).option_logits
        slow = DirectEngine(lalm).sweep(silent, clean, grid, ids).option_logits
        np.testing.assert_allclose(fast, slow, atol=1e-4)
        assert np.abs(slow - base).max() > 0.1
