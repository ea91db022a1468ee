"""Other metrics from what is stored: by their definitions, and through everything that is built on the probability."""

from __future__ import annotations

from pathlib import Path

import commands
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import entropy

import lalm_patch
from lalm_patch.analysis import METRICS, about, check_claims, fusion, mean_recovery, with_metric
from lalm_patch.engine import DirectEngine
from lalm_patch.errors import DataError
from lalm_patch.interventions.grids import layer_grid
from lalm_patch.models import LALM
from lalm_patch.report import make_report
from lalm_patch.stimuli import Attribute, Prompt, load_demo

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metric")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, xr.Dataset]:
    found = {}
    for direction in ("denoising", "noising"):
        overrides = ("attr=animal", "data.limit=9", f"direction={direction}", f"outputs={folder}")
        found[direction] = lalm_patch.trace(*overrides).dataset
    return {name: dataset for name, dataset in found.items() if dataset is not None}


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_probability_is_what_the_run_reports(runs: dict[str, xr.Dataset], direction: str) -> None:
    run = runs[direction]
    again = with_metric(run, "probability")
    for name in ("p_clean", "p_corrupted", "p_patched", "recovery_rate"):
        np.testing.assert_allclose(again[name], run[name], atol=1e-5)


def test_metrics_by_their_definitions(runs: dict[str, xr.Dataset]) -> None:
    run = runs["denoising"]
    values = {name: with_metric(run, name) for name in METRICS}
    for index in np.flatnonzero(run["kept"].values)[:3]:
        answer = list(run["option"].values).index(str(run["label"].values[index]))
        logits = run["option_logit_patched"].values[index].astype(float)
        total = run["logsumexp_patched"].values[index].astype(float)
        others = np.delete(logits, answer, axis=1)
        expected = {
            "probability": np.exp(logits[:, answer] - total),
            "log_probability": logits[:, answer] - total,
            "logit_margin": logits[:, answer] - others.max(axis=1),
            "option_probability": 1 / (1 + np.exp(others - logits[:, [answer]]).sum(axis=1)),
        }
        for name, numbers in expected.items():
            np.testing.assert_allclose(values[name]["p_patched"].values[index], numbers, rtol=1e-6)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", list(METRICS))
def test_identities_hold_for_every_metric(runs: dict[str, xr.Dataset], direction: str, name: str) -> None:
    """Where nothing is exchanged that matters the rate is 0, and from the last planted layer on it is 1."""
    run = with_metric(runs[direction], name)
    kept = run.isel(sample=np.flatnonzero(run["kept"]))
    rates = kept["recovery_rate"].transpose("sample", "layer").values
    defined = (kept["p_clean"] > kept["p_corrupted"]).values
    assert defined.any()
    np.testing.assert_allclose(rates[defined][:, :4], 0, atol=1e-4)
    np.testing.assert_allclose(rates[defined][:, 6:], 1, atol=1e-4)
    assert np.isnan(rates[~defined]).all()
    shown = mean_recovery(run)
    assert shown["mean"].notnull().all()
    assert 3 < fusion(run).depth.value < 6


def test_the_page_says_which_metric_it_shows(runs: dict[str, xr.Dataset], folder: Path) -> None:
    page = make_report(folder, audio=False, metric="logit_margin").read_text()
    assert "demo, animal, logit margin" in page
    assert "right answer's logit margin" in page
    other = with_metric(runs["denoising"], "logit_margin")
    assert about(other).departs == "logit margin"
    assert all(part.number is None for finding in check_claims([other]) for part in finding.parts)
    with pytest.raises(ValueError, match="expected one of probability, log_probability"):
        with_metric(other, "bits")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_rank_and_divergence_are_of_the_clean_run(runs: dict[str, xr.Dataset], direction: str) -> None:
    """Recomputed from whole logits; the clean run is the reference in both directions."""
    run = runs[direction]
    settings = lalm_patch.compose("attr=animal", f"direction={direction}")
    lalm = LALM.load(settings.model)
    attribute = Attribute(**{**vars(settings.attr), "options": tuple(settings.attr.options)})
    index = int(np.flatnonzero(run["kept"].values)[0])
    name = str(run["sample"].values[index])
    record = next(record for record in load_demo(attribute) if record.id == name)
    prompt = Prompt.from_attribute(attribute)
    waveform = record.waveform()
    clean, silent = (lalm.encode(sound, prompt, "chat") for sound in (waveform, np.zeros_like(waveform)))
    with torch.no_grad():
        p, q = (lalm.module(**one.inputs).logits[0, -1].double().softmax(-1).numpy() for one in (clean, silent))
    assert float(run["kl_clean"][index]) == pytest.approx(0, abs=1e-5)
    assert float(run["kl_corrupted"][index]) == pytest.approx(entropy(p, q), rel=1e-4)
    answer = lalm.target_ids(prompt, "chat")[attribute.options.index(record.label)]
    for which, probabilities in (("clean", p), ("corrupted", q)):
        assert int(run[f"rank_{which}"][index]) == 1 + int((probabilities > probabilities[answer]).sum())
    source, target = (silent, clean) if direction == "noising" else (clean, silent)
    grid = layer_grid(clean.tokens, range(lalm.num_layers))
    slow = DirectEngine(lalm).sweep(source, target, grid, lalm.target_ids(prompt, "chat"))
    assert slow.divergence is not None
    assert slow.option_rank is not None
    column = 1 if direction == "noising" else 0
    np.testing.assert_allclose(run["kl_patched"][index], slow.divergence[:, column], atol=2e-5)
    ranks = slow.option_rank[:, attribute.options.index(record.label)]
    np.testing.assert_array_equal(run["rank_patched"][index], ranks)


def test_a_run_without_them_says_so(runs: dict[str, xr.Dataset]) -> None:
    older = runs["denoising"].drop_vars([name for name in runs["denoising"] if str(name).startswith(("kl_", "rank_"))])
    for name in ("kl", "rank"):
        with pytest.raises(DataError, match=f"the run has no {name}_clean.*backend=local"):
            with_metric(older, name)


def test_a_run_draws_the_metrics_it_is_asked_for_and_is_not_run_again(tmp_path: Path) -> None:
    first = lalm_patch.trace("attr=gender", "data.limit=4", "metric=logit_margin", f"outputs={tmp_path}")
    folder = first.files[0].parent
    written = (folder / "result.nc").stat().st_mtime_ns
    assert {path.name for path in folder.glob("figure*.png")} == {"figure.png", "figure-logit_margin.png"}
    assert "logit margin clean" in first.summary
    every = lalm_patch.trace("attr=gender", "data.limit=4", "metric=all", f"outputs={tmp_path}")
    assert (folder / "result.nc").stat().st_mtime_ns == written
    expected = {"figure.png", *(f"figure-{name}.png" for name in METRICS if name != "probability")}
    assert {path.name for path in every.files if path.suffix == ".png"} == expected
    assert "p(right) clean" in every.summary
    dataset = every.dataset
    assert dataset is not None
    drawn = np.array([float(row.split(",")[1]) for row in (folder / "figure-kl.csv").read_text().splitlines()[1:]])
    np.testing.assert_allclose(drawn, mean_recovery(with_metric(dataset, "kl"))["mean"], atol=1e-6)


def test_a_sweep_over_metrics_of_one_run_is_refused(tmp_path: Path) -> None:
    found = commands.run(tmp_path, *commands.LALM_PATCH, "-m", "metric=rank,kl", f"outputs={tmp_path}")
    assert found.returncode == 1
    text = found.stdout + found.stderr
    assert "metrics kl, rank are all read from one run" in text
    assert "metric=all" in text
    assert "Traceback" not in text
    assert not list(tmp_path.glob("*/result.nc"))
