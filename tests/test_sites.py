"""Sites inside a layer, windows of layers: both engines, against plain hooks and against each other."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engines import TOLERANCE, encodings, likely_tokens, load

import lalm_patch
from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import about, check_claims, fusion
from lalm_patch.checks import from_json
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.choose import site_adds_up
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.interventions.grids import Grid, Place, make_grid
from lalm_patch.interventions.patches import Intervention, Patch, Site
from lalm_patch.models import LALM, Encoding
from lalm_patch.models.proof import make_pair
from lalm_patch.report import make_report
from lalm_patch.stimuli import Prompt

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")


@pytest.fixture(scope="module", params=["qwen2_audio", "voxtral"])
def lalm(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> LALM:
    return load(checkpoints[request.param], request.param)


def place(lalm: LALM, site: Site, window: int = 1) -> Place:
    return Place(site, window, lalm.num_layers, lalm.num_heads)


def grid_of(interventions: list[Intervention]) -> Grid:
    return Grid(("cell",), {"cell": np.arange(len(interventions))}, tuple(interventions))


def module_at(lalm: LALM, layer: int, site: Site) -> torch.nn.Module:
    decoder_layer = lalm.decoder_module.layers[layer]
    names = {Site.ATTN: "self_attn", Site.MLP: "mlp", Site.HEAD: "self_attn.o_proj", Site.RESID: ""}
    found: torch.nn.Module = decoder_layer.get_submodule(names[site])
    return found


def hook_logits(lalm: LALM, clean: Encoding, corrupted: Encoding, patch: Patch) -> torch.Tensor:
    """The same patch by PyTorch's hooks alone."""
    module, where = module_at(lalm, patch.layer, patch.site), list(patch.positions)
    kept: list[torch.Tensor] = []
    enters = patch.site is Site.HEAD
    size = module.in_features // lalm.num_heads if enters else 0  # type: ignore[operator]
    within = slice(patch.head * size, (patch.head + 1) * size) if patch.head is not None else slice(None)

    def states(value: object) -> torch.Tensor:
        found = value[0] if isinstance(value, tuple) else value
        assert isinstance(found, torch.Tensor)
        return found

    def write(old: torch.Tensor) -> torch.Tensor:
        new = old.clone()
        new[:, where, within] = kept[0][:, where, within]
        return new

    def keep(_module: object, inputs: object, output: object = None) -> None:
        kept.append(states(inputs if enters else output).clone())

    def change(_module: object, inputs: object, output: object = None) -> object:
        if enters:
            return (write(states(inputs)),)
        return (write(states(output)), *output[1:]) if isinstance(output, tuple) else write(states(output))

    for hook, encoding in ((keep, clean), (change, corrupted)):
        register = module.register_forward_pre_hook if enters else module.register_forward_hook
        handle = register(hook)
        with torch.no_grad():
            logits = lalm.module(**encoding.inputs).logits[0, -1].float()
        handle.remove()
    return logits


def test_direct_engine_equals_plain_hooks_at_every_site(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    text = clean.tokens.text_positions
    patches = [Patch(1, text, site) for site in (Site.ATTN, Site.MLP, Site.RESID)]
    patches += [Patch(0, text, Site.HEAD, 1), Patch(2, (text[-1],), Site.HEAD, 0)]
    ids = likely_tokens(lalm, clean, corrupted)
    rows = DirectEngine(lalm).cells(clean, corrupted, [Intervention([patch]) for patch in patches], ids)
    base = DirectEngine(lalm).base(clean, corrupted, ids)
    for row, patch in enumerate(patches):
        expected = hook_logits(lalm, clean, corrupted, patch)
        np.testing.assert_allclose(rows.option_logits[row], expected[list(ids)], atol=1e-5)
        assert (rows.option_logits[row] != base.option_logits[1]).any()  # the patch did something


@pytest.mark.parametrize("site", [Site.RESID, Site.ATTN, Site.MLP, Site.HEAD])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("granularity", ["layer", "token"])
def test_replay_equals_direct_at_every_site(
    lalm: LALM, prompt: Prompt, site: Site, window: int, granularity: str
) -> None:
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    grid = make_grid(granularity, clean.tokens, range(lalm.num_layers), place(lalm, site, window))
    chosen = np.random.default_rng(0).choice(len(grid.cells), min(24, len(grid.cells)), replace=False)
    slow = DirectEngine(lalm).cells(clean, corrupted, [grid.cells[i] for i in chosen], ids).probabilities
    for pack_tokens in (40, 3000):
        fast = ReplayEngine(lalm, pack_tokens).sweep(clean, corrupted, grid, ids).probabilities[chosen]
        np.testing.assert_allclose(fast, slow, atol=TOLERANCE)
    assert np.ptp(slow, axis=0).max() > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cells_that_mix_sites(checkpoints: dict[str, Path], prompt: Prompt, attention: str) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio", attn_implementation=attention)
    clean, corrupted = encodings(lalm, prompt)
    text = clean.tokens.text_positions
    cells = [
        Intervention([Patch(2, text[2:5], Site.MLP), Patch(0, text, Site.HEAD, 1), Patch(1, (text[-1],))]),
        Intervention([Patch(1, (text[0],), Site.ATTN), Patch(1, (text[4],), Site.MLP), Patch(1, (text[6],))]),
        Intervention([Patch(0, text)]),
        Intervention([Patch(2, text, Site.HEAD, head) for head in range(lalm.num_heads)]),
    ]
    ids = likely_tokens(lalm, clean, corrupted)
    fast = ReplayEngine(lalm).sweep(clean, corrupted, grid_of(cells), ids)
    slow = DirectEngine(lalm).cells(clean, corrupted, cells, ids)
    np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=TOLERANCE)


def test_all_heads_are_the_attention_and_its_parts_make_the_layer(lalm: LALM, prompt: Prompt) -> None:
    """Heads add up to attention. Attention and MLP outputs of a layer that both runs enter alike make its output."""
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    text = clean.tokens.text_positions
    for layer in range(lalm.num_layers):
        heads = Intervention([Patch(layer, text, Site.HEAD, head) for head in range(lalm.num_heads)])
        attention = Intervention([Patch(layer, text, Site.ATTN)])
        rows = ReplayEngine(lalm).sweep(clean, corrupted, grid_of([heads, attention]), ids).probabilities
        np.testing.assert_allclose(rows[0], rows[1], atol=TOLERANCE)
    # Text enters layer 0 alike in both runs: the prompt is the same.
    both = Intervention([Patch(0, text, Site.ATTN), Patch(0, text, Site.MLP)])
    whole = Intervention([Patch(0, text)])
    rows = ReplayEngine(lalm).sweep(clean, corrupted, grid_of([both, whole]), ids).probabilities
    np.testing.assert_allclose(rows[0], rows[1], atol=TOLERANCE)


def test_a_window_to_the_top_with_all_sites_restores_the_clean_run(lalm: LALM, prompt: Prompt) -> None:
    """Attention and MLP outputs of every layer at the last position are all that the last position is made of."""
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    last = (len(clean.tokens) - 1,)
    everything = Intervention(
        Patch(layer, last, site) for layer in range(lalm.num_layers) for site in (Site.ATTN, Site.MLP)
    )
    engine = ReplayEngine(lalm)
    base = engine.base(clean, corrupted, ids).probabilities
    (row,) = engine.sweep(clean, corrupted, grid_of([everything]), ids).probabilities
    np.testing.assert_allclose(row, base[0], atol=TOLERANCE)


def test_denoising_some_positions_is_noising_all_others(lalm: LALM, prompt: Prompt) -> None:
    """After a layer, some positions' states are one run's and all others the other's: one state, two descriptions."""
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    everywhere = range(len(clean.tokens))
    for layer, some in ((0, everywhere[-4:]), (1, everywhere[3:-2])):
        others = tuple(position for position in everywhere if position not in some)
        here, there = Intervention([Patch(layer, tuple(some))]), Intervention([Patch(layer, others)])
        denoised = DirectEngine(lalm).cells(clean, corrupted, [here], ids).probabilities
        noised = DirectEngine(lalm).cells(corrupted, clean, [there], ids).probabilities
        np.testing.assert_allclose(denoised, noised, atol=TOLERANCE)


@pytest.mark.parametrize("site", [Site.ATTN, Site.MLP, Site.HEAD])
def test_layers_that_add_something_else_fail_the_check_of_sites(lalm: LALM, prompt: Prompt, site: Site) -> None:
    pair = make_pair(lalm, prompt, "chat")
    ids = likely_tokens(lalm, pair.noise, pair.silence)
    assert site_adds_up(lalm, pair, ids, site).passed

    def neighbours(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 0.3 * output.mean(1, keepdim=True)

    handle = lalm.decoder_module.layers[1].register_forward_hook(neighbours)
    found = site_adds_up(lalm, pair, ids, site)
    handle.remove()
    assert not found.passed


def test_a_decoder_without_the_site_is_refused(lalm: LALM, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, corrupted = encodings(lalm, prompt)
    layer = lalm.decoder_module.layers[1]
    monkeypatch.delitem(layer._modules, "mlp")
    grid = make_grid("layer", clean.tokens, range(lalm.num_layers), place(lalm, Site.MLP))
    with pytest.raises(ModelError, match=r"site=mlp: layer 1 of .* has no mlp; site=resid works"):
        ReplayEngine(lalm).sweep(clean, corrupted, grid, (1, 2))


def test_patches_that_mean_nothing() -> None:
    for wrong in ({"site": Site.HEAD}, {"site": Site.ATTN, "head": 0}, {"site": Site.HEAD, "head": -1}):
        with pytest.raises(ValueError, match="the site head, and no other"):
            Patch(0, (1,), **wrong)  # type: ignore[arg-type]


SETTINGS = ("attr=gender", "data.limit=2", "granularity.layers=[0,3,4,6,7]", "engine.spot_checks=4")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("site", ["resid", "attn", "mlp", "head"])
@pytest.mark.parametrize(("granularity", "window"), [("layer", 1), ("layer", 3), ("token", 1), ("token", 2)])
def test_every_combination_runs_or_is_refused_before_the_run(
    tmp_path: Path, direction: str, site: str, granularity: str, window: int
) -> None:
    overrides = (f"direction={direction}", f"site={site}", f"granularity={granularity}", f"site.window={window}")
    if site == "head" and granularity == "token":
        with pytest.raises(ConfigError, match="use granularity=layer"):
            lalm_patch.compose(*SETTINGS, *overrides)
        return
    outcome = lalm_patch.trace(*SETTINGS, *overrides, f"outputs={tmp_path}")
    dataset = outcome.dataset
    assert dataset is not None
    info = about(dataset)
    assert (info.site, info.direction, info.window) == (site, direction, window)
    checks = {check.name: check for check in from_json(dataset.attrs["checks"])}
    assert all(check.passed for check in checks.values())
    assert ("site_adds_up" in checks) == (site != "resid")
    kept = dataset.isel(sample=np.flatnonzero(dataset["kept"]))
    assert kept.sizes["sample"]
    rates = kept["recovery_rate"].transpose("sample", "layer", ...)
    gap = kept["p_clean"] - kept["p_corrupted"]
    moved = (kept["p_clean"] - kept["p_patched"]) if direction == "noising" else kept["p_patched"] - kept["p_corrupted"]
    np.testing.assert_allclose(rates, (moved / gap).transpose("sample", "layer", ...), atol=1e-5)
    # Without attention in layers 0 to 3 and in 7, whatever text positions hold there is alike in both runs, or what
    # attention wrote into them below; the residual stream carries it, what a layer adds does not.
    below = 0 if window == 3 and site in ("attn", "head") else 2  # windows from layer 3 on reach the planted layers
    np.testing.assert_allclose(rates.isel(layer=0), 0, atol=1e-4)
    if window == 1:
        np.testing.assert_allclose(rates.isel(layer=slice(0, below)), 0, atol=1e-4)
    if site == "resid":
        last = rates.isel(layer=slice(-2, None))
        last = last.isel(token=-1) if granularity == "token" else last
        np.testing.assert_allclose(last, 1, atol=1e-4)
    if site in ("attn", "head"):
        np.testing.assert_allclose(rates.isel(layer=-1), 0, atol=1e-4)  # nothing comes from layer 7's attention
    if site == "head":
        assert dataset.sizes["head"] == 4
    assert all(path.stat().st_size for path in outcome.files)


def test_noising_is_denoising_with_the_runs_exchanged(checkpoints: dict[str, Path], prompt: Prompt) -> None:
    lalm = load(checkpoints["voxtral"], "voxtral")
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    grid = make_grid("token", clean.tokens, range(lalm.num_layers))
    fast = ReplayEngine(lalm).sweep(corrupted, clean, grid, ids).probabilities
    slow = DirectEngine(lalm).sweep(corrupted, clean, grid, ids).probabilities
    np.testing.assert_allclose(fast, slow, atol=TOLERANCE)


def test_a_server_exchanges_single_layers_of_the_residual_stream_only() -> None:
    for override in ("site=mlp", "direction=noising", "site.window=2"):
        with pytest.raises(ConfigError, match="use backend=local"):
            lalm_patch.compose("backend=ndif", override)
    with pytest.raises(ConfigError, match=r"site\.window=0: expected a whole number from 1"):
        lalm_patch.compose("site.window=0")


def test_other_sites_are_kept_from_what_is_said_of_the_papers_method() -> None:
    """No fusion depth of what a layer adds, and no claim checked on it."""
    runs = []
    for site, direction in (("resid", "denoising"), ("attn", "denoising"), ("resid", "noising")):
        run = simulate(Planted(layers=8, centre=4.0), 0, 6, name=("voxtral", "gender"))
        settings = json.loads(run.attrs["settings"]) | {"site": {"name": site}, "direction": {"name": direction}}
        runs.append(run.assign_attrs(settings=json.dumps(settings)))
    whole, attention, noising = runs
    assert [about(run).title for run in runs[1:]] == ["voxtral, gender, attn", "voxtral, gender, noising"]
    assert np.isnan(fusion(attention).depth.value)
    assert fusion(noising).depth == fusion(whole).depth
    tokens = simulate(Planted(layers=8, centre=4.0), 0, 6, token_wise=True, name=("voxtral", "gender"))
    other = tokens.assign_attrs(settings=json.dumps(json.loads(tokens.attrs["settings"]) | {"site": {"name": "mlp"}}))
    numbers = [part.number for finding in check_claims([attention, noising, other]) for part in finding.parts]
    assert numbers == [None] * len(numbers)
    assert any(part.number for finding in check_claims([attention, noising, other, tokens]) for part in finding.parts)


def test_the_report_shows_all_of_them(tmp_path: Path) -> None:
    for overrides in (("site=head",), ("site=attn", "direction=noising", "granularity=token"), ("site.window=2",)):
        lalm_patch.trace(*SETTINGS, *overrides, f"outputs={tmp_path}")
    lalm_patch.trace(*SETTINGS, "direction=noising", f"outputs={tmp_path}")
    page = make_report(tmp_path, audio=False).read_text()
    rates = {row["rate"] for row in csv.DictReader(io.StringIO((tmp_path / "figures/figure2.csv").read_text()))}
    assert rates == {"recovery rate", "share lost"}
    assert "Causal tracing: 4 runs, 1 model, 1 attribute<" in page
    assert "<td>token, attn, noising</td>" in page
    assert "<td>head</td>" in page
    for text in ("head 3", "demo, gender, attn, noising", "demo, gender, windows of 2 layers", "layer 6, head"):
        assert text in page
