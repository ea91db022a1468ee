"""Estimates, intervals and tests on simulated runs whose truth is known, and against plain recomputation."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binom, bootstrap
from scipy.stats import t as student

from benchmarks.coverage import measure
from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import (
    compare,
    fusion,
    mean_recovery,
    object_effect,
    peak_interval,
    ratio_of_means,
    segment_profiles,
)
from lalm_patch.analysis.depth import crossing
from lalm_patch.analysis.resampling import ClusterSums, resample, resample_together


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """The bar is 93 to 97 % over 1,000 runs (benchmarks/coverage.py); so few may stray as far as chance takes them."""
    runs = 120
    found = measure(runs, n_draws=400, n_flips=199)
    false_alarms = sum(found.pop("object effect found where there is none"))
    for name, hits in found.items():
        assert binom.ppf(0.001, runs, 0.93) <= sum(hits) <= binom.ppf(0.999, runs, 0.97), name
    assert false_alarms <= binom.ppf(0.999, runs, 0.05)


def test_planted_depth_and_width_are_found() -> None:
    for centre, scale in ((5.2, 0.6), (12.0, 2.5), (20.4, 0.4)):
        planted = Planted(centre=centre, scale=scale)
        found = fusion(simulate(planted, seed=1, groups=80))
        assert found.depth.value == pytest.approx(planted.crossing(0.5), abs=0.3)
        assert found.depth.low <= planted.crossing(0.5) <= found.depth.high
        assert found.share.value == pytest.approx(found.depth.value / 23)
        assert found.width.low <= planted.crossing(0.9) - planted.crossing(0.1) <= found.width.high


@pytest.mark.parametrize(
    ("curve", "half"),
    [
        ([0.0, 0.0, 1.0, 1.0], 1.5),
        ([0.0, 0.4, 0.6, 1.0], 1.5),
        ([0.7, 0.8, 0.9, 1.0], 0.0),
        ([0.0, 0.9, 0.1, 1.0], 5 / 9),  # the first passage counts
        ([0.0, 0.1, 0.2, 0.4], 2.0),  # half of the final value, not of 1
        ([0.0, 0.1, 0.1, 0.0], np.nan),
        ([0.0, 0.0, 0.0, -0.2], np.nan),
    ],
)
def test_crossing_by_hand(curve: list[float], half: float) -> None:
    found = crossing(np.array([curve]), np.arange(4.0), 0.5)
    np.testing.assert_allclose(found, [half])


def test_crossing_counts_in_layers_also_where_some_are_left_out() -> None:
    assert crossing(np.array([[0.0, 0.0, 1.0]]), np.array([0.0, 8.0, 12.0]), 0.5)[0] == 10.0


def test_planted_object_effect_is_found_where_it_is() -> None:
    found = object_effect(simulate(Planted(object_peak=0.2), seed=3, token_wise=True))
    assert abs(found.layer - 12) <= 1
    assert found.p < 0.01
    assert found.effect.low <= 0.2 <= found.effect.high + 0.02
    outside = object_effect(simulate(Planted(object_peak=0.2), seed=3, token_wise=True), window=(0.8, 1.0))
    assert outside.p > 0.05


def test_object_effect_against_scipy_on_one_layer() -> None:
    """With one layer to look at, max-T is the plain sign-flip test of the groups' sums."""
    from scipy.stats import permutation_test

    run = simulate(Planted(object_peak=0.03), seed=5, groups=30, token_wise=True).isel(layer=[9])
    found = object_effect(run, n_flips=20_000)
    kept = run.recovery_rate.isel(layer=0)
    roles = run.token_role.isel(sample=0).values
    difference = kept[:, roles == "object"].mean("token") - kept[:, np.isin(roles, ("early", "late"))].mean("token")
    sums = difference.groupby("group").sum().values
    expected = permutation_test(
        (sums,), np.sum, permutation_type="samples", alternative="greater", n_resamples=20_000, rng=1
    )
    assert found.p == pytest.approx(expected.pvalue, abs=0.015)
    assert float(found.profile["mean"][0]) == pytest.approx(float(difference.mean()))


def test_segment_profiles_by_hand() -> None:
    run = simulate(Planted(object_peak=0.3), seed=2, groups=10, token_wise=True)
    found = segment_profiles(run)
    roles = run.token_role.isel(sample=0).values
    for segment in ("early", "object", "late", "template", "last"):
        expected = run.recovery_rate.values[:, :, roles == segment].mean(axis=(0, 2))
        np.testing.assert_allclose(found["mean"].sel(segment=segment), expected)
    assert "transcript" not in found["segment"].values
    assert float(found["tokens"].sel(segment="object")) == 5


def test_ratio_of_means_weighs_clips_by_their_gap() -> None:
    run = simulate(Planted(), seed=4, groups=6)
    expected = (run.p_patched.mean("sample") - run.p_corrupted.mean()) / (run.p_clean.mean() - run.p_corrupted.mean())
    np.testing.assert_allclose(ratio_of_means(run)["mean"], expected)
    wild = run.copy(deep=True)  # a clip with next to no gap and an absurd ratio
    wild.p_clean[0] = wild.p_corrupted[0] + 1e-6
    wild.p_patched[0] = wild.p_corrupted[0] + 1e-4
    wild.recovery_rate[0] = 100.0
    assert abs(float(ratio_of_means(wild)["mean"][10] - ratio_of_means(run)["mean"][10])) < 0.1
    assert float(mean_recovery(wild)["mean"][10]) > 3


def test_comparisons_find_planted_differences_and_correct_for_their_number() -> None:
    runs = [
        simulate(Planted(centre=centre), seed=index, groups=30, name=(model, attribute))
        for index, (model, centre) in enumerate((("a", 8.0), ("b", 8.0), ("c", 15.0)))
        for attribute in ("gender", "emotion")
    ]
    found = compare(runs)
    assert len(found) == 2 * 3 + 3  # pairs of models per attribute, pairs of attributes per model
    for row in found:
        different = "c" in (row.first, row.second)
        assert (row.p_adjusted < 0.05) == different, row
        assert row.p_adjusted >= row.p
        if different:
            expected = -7 / 23 if row.second == "c" else 7 / 23
            assert row.difference.low <= expected <= row.difference.high


def test_runs_on_the_same_clips_are_compared_clip_by_clip() -> None:
    """Two models that agree on every clip differ by exactly nothing, in every draw."""
    run = simulate(Planted(), seed=0, name=("a", "gender"))
    other = simulate(Planted(), seed=0, name=("b", "gender"))
    (same,) = compare([run, other])
    assert (same.difference.low, same.difference.value, same.difference.high) == (0.0, 0.0, 0.0)
    assert same.p == 1.0


def test_shared_groups_are_drawn_together_and_others_apart() -> None:
    values = np.arange(5.0)[:, None]
    one = ClusterSums.of(values, np.array(list("abcde")))
    two = ClusterSums.of(values + 1, np.array(list("abcde")))
    apart = ClusterSums.of(values, np.array(list("vwxyz")))
    first, second = resample_together([one, two], seed=0)
    np.testing.assert_allclose(second.values - first.values, 1.0)
    first, second = resample_together([one, apart], seed=0)
    assert first.values.shape == second.values.shape
    assert abs(np.corrcoef(first.drawn[:, 0], second.drawn[:, 0])[0, 1]) < 0.1


def test_interval_of_a_normal_mean_is_students() -> None:
    """What the widened levels are for: with few groups of symmetric data the interval is that of Student's t."""
    n = 12
    values = np.random.default_rng(3).normal(size=n)
    values -= values.mean()
    values = np.concatenate([values, -values])[:, None]
    half = values.std(ddof=1) / np.sqrt(2 * n) * student.ppf(0.975, 2 * n - 1)
    found = resample(ClusterSums.of(values, np.arange(2 * n).astype(str)), seed=0, n_draws=40_000).interval()
    np.testing.assert_allclose(np.ravel(found), [-half, half], rtol=0.05)


def test_interval_of_many_skewed_values_is_scipys_bca() -> None:
    """With many groups the widening is next to nothing, and what remains is the ordinary BCa interval."""
    values = np.random.default_rng(1).exponential(size=300)
    expected = bootstrap((values,), np.mean, n_resamples=20_000, rng=1).confidence_interval
    clusters = ClusterSums.of(values[:, None], np.arange(300).astype(str))
    low, high = resample(clusters, seed=0, n_draws=20_000).interval()
    np.testing.assert_allclose([low[0], high[0]], expected, rtol=0.01)


def test_too_little_data_gives_no_interval_instead_of_a_narrow_one() -> None:
    alone = simulate(Planted(), seed=0, groups=1)
    found = fusion(alone)
    assert np.isfinite(found.depth.value)
    assert np.isnan([found.depth.low, found.depth.high]).all()
    assert "no interval" in str(found.depth)
    none = alone.isel(sample=[])
    assert np.isnan(fusion(none).depth.value)
    assert compare([none, none.assign_attrs(settings='{"model": {"name": "b"}}')]) == []
    empty = simulate(Planted(), seed=0, groups=1, token_wise=True).isel(sample=[])
    assert np.isnan(object_effect(empty).p)


def test_peak_interval_holds_the_peak() -> None:
    run = simulate(Planted(layers=12, centre=4.0), seed=0)
    rates = run.recovery_rate.copy()
    rates[:, 7] += 0.5
    low, high = peak_interval(run.assign(recovery_rate=rates))
    assert (low, high) == (7, 7)


def test_analysis_needs_no_torch() -> None:
    code = "import lalm_patch.analysis, sys; assert not {'torch', 'transformers', 'nnsight'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
