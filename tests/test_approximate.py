"""Approximate engines: what first order has to give, whatever the weights; and the licence to draw their cells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import load, noise
from scipy import stats

import lalm_patch
from lalm_patch.analysis import about, fusion, licence, mean_recovery, with_metric
from lalm_patch.checks import from_json
from lalm_patch.engine import ApproximateEngine, ReplayEngine
from lalm_patch.errors import ConfigError, DataError, ModelError
from lalm_patch.figures import plot_clip, plot_layers, plot_run
from lalm_patch.interventions.grids import Grid, Place, make_grid
from lalm_patch.interventions.patches import Cut, Intervention, Patch, Site
from lalm_patch.interventions.spans import Spans
from lalm_patch.models import LALM, Encoding
from lalm_patch.report import make_report
from lalm_patch.settings import APPROXIMATE
from lalm_patch.stimuli import Prompt

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")

SITES = (Site.RESID, Site.ATTN, Site.MLP, Site.HEAD)


def pair(lalm: LALM, prompt: Prompt) -> tuple[Encoding, Encoding]:
    sound = noise(1.0)
    return lalm.encode(sound, prompt, "chat"), lalm.encode(np.zeros_like(sound), prompt, "chat")


def grid_at(lalm: LALM, encoding: Encoding, site: Site, granularity: str = "token") -> Grid:
    return make_grid(
        granularity, encoding.tokens, range(lalm.num_layers), Place(site, 1, lalm.num_layers, lalm.num_heads)
    )


def between(target: Encoding, source: Encoding, share: float) -> Encoding:
    """The target run, a share of the way to the source run."""
    embeds = target.inputs_embeds + share * (source.inputs_embeds - target.inputs_embeds)
    return replace(target, inputs_embeds=embeds, overwritten=True)


@pytest.mark.parametrize("rule", ["attribution", "integrated_gradients"])
@pytest.mark.parametrize("site", SITES)
def test_the_error_is_of_second_order(rule: str, site: Site, lalm: LALM, prompt: Prompt) -> None:
    """A source run a hundredth of the way off: a tenth of that has a hundredth of the error."""
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    errors, totals, sizes = [], [], []
    for share in (3e-2, 3e-3):
        near, grid = between(silent, clean, share), grid_at(lalm, clean, site)
        exact = ReplayEngine(lalm)
        found = ApproximateEngine(lalm, exact, rule, 2).sweep(near, silent, grid, ids)
        true = exact.sweep(near, silent, grid, ids)
        unpatched = exact.base(near, silent, ids)
        errors.append(np.abs(found.option_logits - true.option_logits).max())
        sizes.append(np.abs(true.option_logits - unpatched.option_logits[1]).max())
        totals.append(np.abs(found.logsumexp - true.logsumexp).max())
    assert errors[0] < 0.1 * sizes[0]
    assert errors[1] < 0.03 * errors[0] + 2e-5  # rounding
    assert totals[1] < 0.03 * totals[0] + 4e-5
    assert sizes[1] > 5e-4


def test_integrated_gradients_are_complete(lalm: LALM, prompt: Prompt) -> None:
    """Of all that enters the decoder they add up to the difference of the runs (Sundararajan et al., 2017)."""
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    place = Place(Site.EMBED, 1, 1, lalm.num_heads, spans=Spans(None, 10_000))
    grid = make_grid("audio", clean.tokens, range(1), place)
    exact = ReplayEngine(lalm)
    base = exact.base(clean, silent, ids)
    errors = []
    for steps in (2, 8, 32):
        found = ApproximateEngine(lalm, exact, "integrated_gradients", steps).sweep(clean, silent, grid, ids)
        errors.append(float(np.abs(found.option_logits[0] - base.option_logits[0]).max()))
        assert found.probabilities.sum() <= 1
    moved = float(np.abs(base.option_logits[0] - base.option_logits[1]).max())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01 * moved
    np.testing.assert_allclose(found.logsumexp[0], base.logsumexp[0], atol=0.02 * moved)


@pytest.mark.parametrize("rule", APPROXIMATE)
def test_heads_add_up_to_the_attention(rule: str, lalm: LALM, prompt: Prompt) -> None:
    """The output projection is linear and has no bias that differs: its heads' effects are the attention's."""
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    engine = ApproximateEngine(lalm, ReplayEngine(lalm), rule, 3)
    before = engine.base(clean, silent, ids).option_logits[1]
    heads, whole = (
        engine.sweep(clean, silent, grid_at(lalm, clean, site, "layer"), ids).option_logits - before
        for site in (Site.HEAD, Site.ATTN)
    )
    summed = heads.reshape(lalm.num_layers, lalm.num_heads, -1).sum(1)
    np.testing.assert_allclose(summed, whole, atol=1e-4 * max(1, float(np.abs(whole).max())))
    assert np.abs(whole).max() > 1e-3


def test_relevance_is_the_gradient_of_a_model_with_frozen_factors(lalm: LALM, prompt: Prompt) -> None:
    """The forward pass is the ordinary one; gradient times state adds up to the logit at every layer (conservation)."""
    _, silent = pair(lalm, prompt)
    engine = ApproximateEngine(lalm, ReplayEngine(lalm), "relevance", 1)
    places = [(layer, site) for layer in range(lalm.num_layers) for site in (Site.ATTN, Site.MLP, Site.RESID)]
    with torch.no_grad():
        plain, last = engine._run(silent, silent.inputs_embeds, places)
        frozen, frozen_last = engine._run(silent, silent.inputs_embeds, places, relevance=True)
    for one, other in zip([*plain, last], [*frozen, frozen_last], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    embeds = silent.inputs_embeds.clone().requires_grad_(True)
    with torch.enable_grad():
        states, last = engine._run(silent, embeds, places, relevance=True)
        logit = lalm.logits(last, gradient=True)[0, 5]
    conserved = []
    for (_, site), state in zip(places, states, strict=True):
        if site is Site.RESID:
            (gradient,) = torch.autograd.grad(logit, state, retain_graph=True)
            conserved.append(float((gradient * state).sum().detach()))
    # Relevance is conserved from layer to layer down from the logit, up to biases, which have none of their own here.
    decoder = lalm.decoder_module
    biased = any(name.endswith("bias") and bool(value.any()) for name, value in decoder.named_parameters())
    if not biased:
        np.testing.assert_allclose(conserved, float(logit.detach()), rtol=2e-3, atol=1e-3)
    assert np.isfinite(conserved).all()
    (ordinary,) = torch.autograd.grad(lalm.logits(engine._run(silent, embeds, [])[1], gradient=True)[0, 5], embeds)
    (relevance,) = torch.autograd.grad(logit, embeds)
    assert float((ordinary - relevance).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["qwen_audio", "desta2", "desta25"])
def test_native_families_are_approximated_alike(family: str, native_folders: dict[str, Path], prompt: Prompt) -> None:
    lalm = load(native_folders[family], family)
    clean, silent = pair(lalm, prompt)
    ids = lalm.target_ids(prompt, "chat")
    near, grid = between(silent, clean, 1e-3), grid_at(lalm, clean, Site.RESID)
    exact = ReplayEngine(lalm)
    true = exact.sweep(near, silent, grid, ids).option_logits
    size = np.abs(true - exact.base(near, silent, ids).option_logits[1]).max()
    found = ApproximateEngine(lalm, exact, "attribution", 1).sweep(near, silent, grid, ids).option_logits
    assert np.abs(found - true).max() < 0.1 * size
    for rule in APPROXIMATE:
        again = ApproximateEngine(lalm, exact, rule, 2).sweep(clean, silent, grid, ids)
        assert np.isfinite(again.option_logits).all()
        assert (again.probabilities.sum(axis=1) <= 1 + 1e-6).all()


def test_what_engines_cannot_approximate(lalm: LALM, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, silent = pair(lalm, prompt)
    engine = ApproximateEngine(lalm, ReplayEngine(lalm), "attribution", 1)
    text = clean.tokens.text_positions
    for cell in (Intervention(cuts=[Cut(0, text[1:], text[:1])]), Intervention([Patch(0, (1,), Site.TOWER)])):
        with pytest.raises(ModelError, match="expected no cuts, no site tower"):
            engine.sweep(clean, silent, Grid(("cell",), {"cell": np.arange(1)}, (cell,)), (1, 2))
    layer = lalm.decoder_module.layers[1]  # type: ignore[index]
    monkeypatch.delitem(layer._modules, "post_attention_layernorm")
    with pytest.raises(ModelError, match=r"layer 1 of .* has no post_attention_layernorm; engine=attribution"):
        ApproximateEngine(lalm, ReplayEngine(lalm), "relevance", 1)


# --- the licence ---------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[("attribution", "token"), ("relevance", "layer"), ("integrated_gradients", "audio")]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[xr.Dataset, Path]:
    """A run of an approximation, and its folder of outputs."""
    rule, granularity = request.param
    folder = tmp_path_factory.mktemp("runs")
    outcome = lalm_patch.trace(
        f"engine={rule}",
        f"granularity={granularity}",
        "attr=animal",
        "data.limit=9",
        "engine.steps=3",
        f"outputs={folder}",
    )
    assert outcome.dataset is not None
    found = licence(outcome.dataset)
    assert f"licence  {found}; mean error of the rate" in outcome.summary
    return outcome.dataset, folder


def test_every_run_says_how_well_it_approximates(run: tuple[xr.Dataset, Path]) -> None:
    dataset, _ = run
    found = licence(dataset)
    assert found is not None
    kept = dataset.isel(sample=np.flatnonzero(dataset["kept"]))
    # Recomputed with plain xarray and numpy.
    gap = kept.p_clean - kept.p_corrupted
    exact, near = (
        ((kept[name] - kept.p_corrupted) / gap).transpose("sample", "layer", ...) for name in ("p_exact", "p_patched")
    )
    known = np.isfinite(exact.values)
    per_clip = known.reshape(len(known), -1).sum(1)
    assert (per_clip == np.minimum(16, np.isfinite(near.values).reshape(len(known), -1).sum(1))).all()
    assert (found.cells, found.clips) == (known.sum(), len(known))
    assert found.pearson == pytest.approx(np.corrcoef(exact.values[known], near.values[known])[0, 1], abs=1e-5)
    assert found.spearman == pytest.approx(stats.spearmanr(exact.values[known], near.values[known])[0], abs=1e-3)
    assert found.error == pytest.approx(float(np.abs(exact - near).mean()), abs=1e-5)
    assert about(dataset).approximation == str(found)
    assert all(check.passed for check in from_json(dataset.attrs["checks"]))
    assert "rank_patched" not in dataset
    assert "rank_clean" in dataset


def test_the_exact_cells_are_those_of_an_exact_run(run: tuple[xr.Dataset, Path], tmp_path: Path) -> None:
    dataset, _ = run
    settings = json.loads(dataset.attrs["settings"])
    exact = lalm_patch.trace(
        f"granularity={settings['granularity']['name']}", "attr=animal", "data.limit=9", f"outputs={tmp_path}"
    ).dataset
    assert exact is not None
    order = dataset["p_patched"].dims
    true, beside = exact["p_patched"].transpose(*order).values, dataset["p_exact"].values
    known = np.isfinite(beside)
    np.testing.assert_allclose(beside[known], true[known], atol=1e-5)
    assert licence(exact) is None


def test_nothing_is_drawn_without_a_licence(run: tuple[xr.Dataset, Path], tmp_path: Path) -> None:
    dataset, _ = run
    kept = str(dataset["sample"].values[dataset["kept"].values][0])
    few = dataset.assign(p_exact=dataset["p_exact"].where(False))
    for bare in (dataset.drop_vars("p_exact"), few):
        for drawn in (
            lambda bare=bare: plot_run(bare, tmp_path),
            lambda bare=bare: mean_recovery(bare),
            lambda bare=bare: plot_clip(bare, kept, np.zeros(16_000), tmp_path),
            lambda bare=bare: (
                plot_layers([bare], tmp_path) if about(bare).granularity == "layer" else mean_recovery(bare)
            ),
        ):
            with pytest.raises(DataError, match=r"only approximates, and this result has 0 exact cells.*licence_cells"):
                drawn()
        assert "without licence" in about(bare).title
    assert not list(tmp_path.iterdir())


def test_other_metrics_have_a_licence_of_their_own(run: tuple[xr.Dataset, Path]) -> None:
    dataset, _ = run
    margin = with_metric(dataset, "logit_margin")
    found, before = licence(margin), licence(dataset)
    assert found is not None
    assert before is not None
    assert found.cells == before.cells
    assert found.error != before.error
    with pytest.raises(DataError, match=r"has no rank_patched: .*an approximation"):
        with_metric(dataset, "rank")


def test_the_page_shows_it(run: tuple[xr.Dataset, Path]) -> None:
    dataset, folder = run
    assert str(licence(dataset)) in make_report(folder, audio=False).read_text()


def test_a_run_without_kept_clips_needs_none(run: tuple[xr.Dataset, Path]) -> None:
    dataset, _ = run
    none = dataset.assign(kept=dataset["kept"] & False)
    assert licence(none) is None
    assert np.isnan(mean_recovery(none)["mean"]).all()


def test_too_few_exact_cells(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"this result has \d exact cells"):
        lalm_patch.trace("engine=attribution", "engine.licence_cells=1", "data.limit=5", f"outputs={tmp_path}")
    # What was computed is kept: the result is there, it is only not drawn.
    assert len(list(tmp_path.glob("*/result.nc"))) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("site.window=2",), r"engine=attribution approximates .* not site.window=2: use engine=auto"),
        (("granularity=audio", "site=tower"), "not site=tower"),
        (("granularity=edge", "site=attn", "direction=noising"), "not granularity=edge"),
        (("backend=ndif",), "not backend=ndif"),
        (("metric=rank",), "not metric=rank"),
        (("engine.licence_cells=0",), "engine.licence_cells=0: expected a whole number from 1"),
    ],
)
def test_what_an_approximation_is_not_asked(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lalm_patch.compose("engine=attribution", *overrides)


def test_dry_run_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lalm_patch.run import dry_run

    text = dry_run(lalm_patch.compose("engine=integrated_gradients", "attr=gender", "granularity=token"))
    assert "integrated_gradients, approximate: 24 backward passes per clip and 16 exact cells by replay" in text


def test_depth_of_an_approximate_curve_is_told(run: tuple[xr.Dataset, Path]) -> None:
    dataset, _ = run
    assert np.isnan(fusion(dataset).depth.value) == (about(dataset).granularity == "window")
