"""A run says how precise it is, and does not count clips that it cannot resolve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import load
from scipy.stats import t
from test_engines import encodings, likely_tokens
from test_precision import opened, swept, with_outliers

import lalm_patch
from lalm_patch.analysis import exclusion_table, in_short, mean_recovery, precision
from lalm_patch.analysis.precision import error_of_a_mean
from lalm_patch.checks import Check, to_json
from lalm_patch.engine.choose import EXACT_STEPS, PROOF_STEPS, choose_engine
from lalm_patch.models.proof import ROUNDINGS, TOLERANCE, make_pair, passes, prove
from lalm_patch.results.resolution import resolution
from lalm_patch.settings import EngineSettings
from lalm_patch.stimuli import Prompt
from lalm_patch.tracing.metrics import error_of_probabilities

HALF_DEMO = ("attr=gender", "model.dtype=bfloat16", "data.limit=16", "engine.float32_cells=100000")


@pytest.mark.parametrize("mode", ["as_loaded", "stream"])
@pytest.mark.parametrize("place", ["none", "disk"])
def test_exactly_is_the_widened_model_and_leaves_no_trace(
    checkpoints: dict[str, Path], tmp_path: Path, prompt: Prompt, mode: str, place: str
) -> None:
    folder = with_outliers(checkpoints["qwen2_audio"], "qwen2_audio", tmp_path, torch.bfloat16)
    widened = opened(folder, "qwen2_audio", "as_loaded")
    widened.module.float()
    clean, corrupted = encodings(widened, prompt)
    ids = likely_tokens(widened, clean, corrupted)
    expected = swept(widened, prompt, ids)
    lalm = opened(folder, "qwen2_audio", mode, offload=place)
    before = swept(lalm, prompt, ids)
    with lalm.exactly():
        assert lalm.exact
        found = swept(lalm, prompt, ids)
    assert not lalm.exact
    after = swept(lalm, prompt, ids)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(before[0] - expected[0]).max() > 1e-4


def test_float32_weights_are_exact(checkpoints: dict[str, Path]) -> None:
    assert load(checkpoints["voxtral"], "voxtral").exact
    assert opened(checkpoints["voxtral"], "voxtral", "float32").exact
    assert not opened(checkpoints["voxtral"], "voxtral", "as_loaded").exact


def test_bounds_follow_from_the_direct_engine_s_own_error(
    checkpoints: dict[str, Path], tmp_path: Path, prompt: Prompt
) -> None:
    folder = with_outliers(checkpoints["qwen2_audio"], "qwen2_audio", tmp_path, torch.bfloat16)
    lalm = opened(folder, "qwen2_audio", "as_loaded")
    pair, told = make_pair(lalm, prompt, "chat"), list[str]()
    checks = {check.name: check for check in prove(lalm, pair, told.append)}
    base = pair.rounding
    assert base > 1e-4
    assert checks["restore_all"].bound == ROUNDINGS * base
    _, made = choose_engine(lalm, EngineSettings("auto"), pair, (1, 2), told=told.append)
    checks |= {check.name: check for check in made}
    assert pair.rounding >= base
    assert checks["replay_at_load"].bound == ROUNDINGS * pair.rounding
    assert checks["replay_in_float32"].bound == TOLERANCE
    assert checks["replay_in_float32"].passed
    assert len(told) == passes(exact=False) + PROOF_STEPS + EXACT_STEPS


def test_a_fault_that_constant_bounds_hid_is_found(
    checkpoints: dict[str, Path], prompt: Prompt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong replay whose error is below 0.05: by dtype alone it would pass in bfloat16."""
    from lalm_patch.engine import ReplayEngine

    lalm = opened(checkpoints["qwen2_audio"], "qwen2_audio", "as_loaded")
    right = ReplayEngine.sweep

    def wrong(self: Any, *args: Any, **keywords: Any) -> Any:
        found = right(self, *args, **keywords)
        found.option_logits[:] += 0.05
        return found

    monkeypatch.setattr(ReplayEngine, "sweep", wrong)
    pair = make_pair(lalm, prompt, "chat")
    prove(lalm, pair)
    engine, _ = choose_engine(lalm, EngineSettings("auto"), pair, likely_tokens(lalm, pair.noise, pair.silence))
    assert engine.name == "direct"
    assert 0.02 < float(caplog.text.partition("direct engine by ")[2].split()[0]) < 0.05


def test_what_a_run_says_of_itself_is_its_error(tmp_path: Path) -> None:
    """All cells are computed twice: the stored error is that of the run against another run in float32."""
    where = f"outputs={tmp_path}"
    loaded = lalm_patch.trace(*HALF_DEMO, "engine.precision=as_loaded", "engine.float32_clips=9", where)
    exact = lalm_patch.trace(*HALF_DEMO, "engine.precision=float32", where).dataset
    run = loaded.dataset
    assert "p_clean_float32" not in exact
    assert precision(exact) is None
    rows = np.flatnonzero(run["kept"].values)
    assert len(rows) >= 6  # fewer groups have no interval
    for name in ("p_clean", "p_corrupted", "p_patched"):
        np.testing.assert_allclose(run[f"{name}_float32"][rows], exact[name][rows], atol=2e-6)
    found = precision(run)
    assert found is not None
    errors = np.concatenate(
        [(run[name] - exact[name])[rows].values.ravel() for name in ("p_clean", "p_corrupted", "p_patched")]
    )
    assert found.probability == pytest.approx(np.sqrt(np.nanmean(errors**2)), rel=1e-2)
    assert found.probability_largest == pytest.approx(np.nanmax(np.abs(errors)), rel=1e-2)
    rates = (run["recovery_rate"] - exact["recovery_rate"])[rows].values
    assert found.recovery == pytest.approx(np.sqrt(np.nanmean(rates**2)), rel=1e-2)
    assert found.clips == len(rows)
    assert run.attrs["error_of_a_probability"] == pytest.approx(found.probability, rel=1e-6)
    assert "rounding: a probability is off by" in loaded.summary
    assert f"a mean by {found.mean:.1g}" in in_short(run)
    assert in_short(exact) == ""
    inside = mean_recovery(run)
    assert f"{found.mean:.1g}" in inside.attrs["rounding"]
    narrow = mean_recovery(run.drop_vars("p_clean_float32"))
    grown = (inside["high"] - inside["mean"]) ** 2 - (narrow["high"] - narrow["mean"]) ** 2
    known = np.isfinite(grown.values)
    assert known.sum() > 4
    np.testing.assert_allclose(grown.values[known], (1.959964 * found.mean) ** 2, rtol=1e-4, atol=1e-12)


def half_demo(tmp_path: Path, *overrides: str) -> xr.Dataset:
    what = ("attr=gender", "model.dtype=bfloat16", "data.limit=8", f"outputs={tmp_path}")
    dataset = lalm_patch.trace(*what, *overrides).dataset
    assert dataset is not None
    return dataset


def test_few_clips_are_measured(tmp_path: Path) -> None:
    run = half_demo(tmp_path, "engine.precision=stream", "engine.float32_clips=2", "engine.float32_cells=3")
    measured = np.isfinite(run["p_clean_float32"].values)
    assert measured.sum() == 2
    assert run["kept"].values[measured].all()
    cells = np.isfinite(run["p_patched_float32"].values)
    assert (cells.sum(axis=1) == np.where(measured, 3, 0)).all()
    assert (cells[measured] == cells[measured][0]).all()  # the same cells, so that a mean's error is known


def test_an_approximation_measures_its_two_runs_only(tmp_path: Path) -> None:
    run = half_demo(tmp_path, "engine.precision=as_loaded", "engine=attribution")
    assert np.isfinite(run["p_clean_float32"].values).sum() == min(4, int(run["kept"].sum()))
    assert not np.isfinite(run["p_patched_float32"].values).any()


def checks(**values: float) -> str:
    return to_json([Check.at_most(name, value, 1.0) for name, value in values.items()])


def test_resolution() -> None:
    found, exact = np.array([[0.5, 0.2, 0.3], [0.4, 0.1, 0.2]]), np.full((2, 3), np.nan)
    exact[:, 0] = 0.52, 0.36
    measured = resolution(found, exact, checks(noise_floor=0.5), 5.0)
    assert measured.error == pytest.approx(error_of_probabilities(found, exact))
    assert measured.least == pytest.approx(5 * measured.error)
    nothing = np.full_like(exact, np.nan)
    repeated = resolution(found, nothing, checks(noise_floor=1e-6, replay_at_load=2e-6, restore_all=0.3), 5.0)
    assert repeated.error == 2e-6
    assert repeated.least == pytest.approx(1e-5)
    assert resolution(found, nothing, checks(noise_floor=1e-6), None).least == 0
    faulty = to_json([Check.at_most("noise_floor", 1e-6, 1e-5), Check.at_most("replay_equals_direct", 0.2, 1e-5)])
    assert resolution(found, nothing, faulty, 5.0).error == 1e-6
    unknown = resolution(found, nothing, checks(restore_all=1e-6), 5.0)
    assert np.isnan(unknown.error)
    assert unknown.least == 0


def test_clips_that_cannot_be_resolved_are_in_the_ledger(tmp_path: Path) -> None:
    what = ("attr=gender", "model.dtype=bfloat16", "engine.precision=as_loaded", "data.limit=8", f"outputs={tmp_path}")
    run = lalm_patch.trace(*what).dataset
    gaps = (run["p_clean"] - run["p_corrupted"]).where(run["kept"], drop=True)
    between = float(gaps.min() + gaps.max()) / 2
    strict = lalm_patch.trace(*what, f"min_gap={between / run.attrs['error_of_a_probability']}")
    table = exclusion_table(strict.dataset)
    expected = int((gaps < between).sum())
    assert 0 < expected < len(gaps)
    assert int(table.sel(reason="unresolved").sum()) == expected
    assert json.loads(strict.dataset.attrs["n_excluded_by_reason"])["unresolved"] == expected
    assert f"unresolved {expected}" in strict.summary
    details = [str(text) for text in strict.dataset["exclusion_detail"].values if "its gap of" in str(text)]
    assert len(details) == expected
    loose = lalm_patch.trace(*what, "min_gap=null").dataset
    assert int(loose["kept"].sum()) == int(run["kept"].sum())
    xr.testing.assert_identical(loose["p_patched"], run["p_patched"])


def test_few_clips_speak_for_others() -> None:
    """Logits that are off by as much everywhere: four clips give the error of twenty, decided and undecided ones."""
    rng = np.random.default_rng(20261127)
    plain, scaled = [], []
    for _ in range(300):
        logits = rng.normal(0, 4, (20, 1)) + rng.normal(0, 1, (20, 18))
        exact, found = (1 / (1 + np.exp(-values)) for values in (logits, logits + rng.normal(0, 0.05, logits.shape)))
        known = np.where(np.arange(20)[:, None] < 4, exact, np.nan)
        true = np.sqrt(np.mean((found - exact) ** 2))
        plain.append(true / np.sqrt(np.mean((found - exact)[:4] ** 2)))
        scaled.append(true / error_of_probabilities(found, known))
        assert error_of_probabilities(found, exact) == pytest.approx(true)
    assert np.mean(np.array(scaled) <= 1.5) > 0.99 > np.mean(np.array(plain) <= 1.5)
    assert np.isnan(error_of_probabilities(found, np.full_like(found, np.nan)))


def test_the_upper_end_is_student_s() -> None:
    """By hand: probabilities that all move alike, so that squares are compared; two of three clips are known."""
    found = np.full((4, 3), 0.5)
    found[3, 2] = np.nan  # a clip that was not traced
    exact = np.array([[0.51, 0.49, 0.51], [0.53, 0.47, 0.53], [np.nan] * 3, [np.nan] * 3])
    squares = np.array([1e-4, 9e-4])
    error = np.sqrt((2 - 1) * np.var(squares[::-1]) * (1 - 2 / 3))
    assert error_of_probabilities(found, exact) ** 2 == pytest.approx(squares.mean() + t.ppf(0.9, 1) * error)
    assert error_of_probabilities(found[:2], exact[:2]) ** 2 == pytest.approx(squares.mean())
    assert error_of_probabilities(found[1:], exact[1:]) == pytest.approx(2 * 0.03)
    decided = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    assert error_of_probabilities(decided, decided) == 0


def test_error_of_a_mean() -> None:
    """Against the definition, by simulation: a common error stays, errors of single clips average out."""
    rng = np.random.default_rng(20261127)
    common, single, cells, n, k = 0.02, 0.05, 40, 24, 4
    true, stated = [], []
    for _ in range(300):
        shared = rng.normal(0, common, cells)
        errors = shared + rng.normal(0, single, (n, cells))
        true.append(np.mean(errors.mean(axis=0) ** 2))
        stated.append(error_of_a_mean(errors[:k], n) ** 2)
    expected = common**2 + single**2 / n
    assert np.mean(true) == pytest.approx(expected, rel=0.1)
    assert np.mean(stated) == pytest.approx(expected, rel=0.1)
    one = np.array([[0.3, np.nan, -0.4]])
    assert error_of_a_mean(one, 10) == pytest.approx(np.sqrt((0.09 + 0.16) / 2))
    assert np.isnan(error_of_a_mean(np.full((2, 3), np.nan), 10))
