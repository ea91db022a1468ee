"""Permutation tests over groups against plain recomputation, scipy, and what few groups can say at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from math import comb

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import compare, object_effect
from lalm_patch.analysis.comparison import depth_difference, depth_permutation, depth_test
from lalm_patch.analysis.depth import crossing, crossing_slopes
from lalm_patch.analysis.permutation import (
    MOST_ENUMERATED,
    GroupTest,
    all_signs,
    all_splits,
    compare_groups,
    largest_of_many,
    with_floor,
)
from lalm_patch.analysis.recovery import curves_together, group_names
from lalm_patch.analysis.resampling import ClusterSums, FloatArray, resample

ONE = np.ones((1, 1))


def mean(means: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The number itself, of a single cell."""
    return means[:, 0], np.ones_like(means)


def one_each(values: FloatArray, names: str) -> ClusterSums:
    """One sample a group."""
    return ClusterSums.of(np.asarray(values, float)[:, None], np.array(list(names)))


def in_two_models(groups: int, seeds: tuple[int, int] = (0, 1)) -> list[xr.Dataset]:
    """Two models that do not differ, on the same groups, with noise of their own."""
    return [
        simulate(Planted(centre=8.0), seed, groups, name=(name, "gender"))
        for seed, name in zip(seeds, "ab", strict=True)
    ]


# --- against plain recomputation -----------------------------------------------------------------------------------


def depth_over_error(one: list[tuple[FloatArray, int]], two: list[tuple[FloatArray, int]], paired: bool) -> float:
    """Difference in crossing over its standard error from small steps in each group's weight; groups are (sum, n)."""
    layers = np.arange(len(one[0][0]), dtype=float)

    def number(run: list[tuple[FloatArray, int]], times: FloatArray) -> float:
        total = sum(t * s for t, (s, _) in zip(times, run, strict=True))
        weight = sum(t * n for t, (_, n) in zip(times, run, strict=True))
        return float(crossing(np.asarray(total / weight)[None], layers, 0.5)[0])

    influence = []
    for run in (one, two):
        steps = [np.eye(len(run))[k] * 1e-5 for k in range(len(run))]
        slopes = [(number(run, 1 + step) - number(run, 1 - step)) / 2e-5 for step in steps]
        influence.append(np.array(slopes) * np.sqrt(len(run) / (len(run) - 1)))
    squares = (
        ((influence[0] - influence[1]) ** 2).sum() if paired else (influence[0] ** 2).sum() + (influence[1] ** 2).sum()
    )
    return (number(one, np.ones(len(one))) - number(two, np.ones(len(two)))) / np.sqrt(squares)


def groups_of(run: xr.Dataset) -> dict[str, tuple[FloatArray, int]]:
    rates, names = run["recovery_rate"].values, run["group"].values.astype(str)
    return {name: (rates[names == name].sum(axis=0), int((names == name).sum())) for name in np.unique(names)}


def two_sided(found: list[float], own: float) -> float:
    margin = 1e-5 * max(1, abs(own))
    above, below = (sum(side) for side in zip(*[(x >= own - margin, x <= own + margin) for x in found], strict=True))
    return min(1.0, 2 * min(above, below) / len(found))


@pytest.mark.parametrize("groups", [3, 5])
def test_paired_runs_by_brute_force(groups: int) -> None:
    """Every way to exchange the two runs of a group, one by one, with a standard error found by small steps."""
    a, b = in_two_models(groups, (3, 4))
    one, two = groups_of(a), groups_of(b)
    found = []
    for exchanged in product((False, True), repeat=groups):
        sides = [(two[g], one[g]) if swap else (one[g], two[g]) for g, swap in zip(sorted(one), exchanged, strict=True)]
        found.append(depth_over_error([first for first, _ in sides], [second for _, second in sides], True))
    tested = depth_permutation(a, b)
    assert tested.p == pytest.approx(two_sided(found, found[0]))
    assert (tested.arrangements, tested.exact) == (2**groups, True)
    assert tested.floor == 2 / 2**groups


def test_unpaired_runs_by_brute_force() -> None:
    a, b = in_two_models(4, (5, 6))
    b = b.isel(sample=b["group"].values != "speaker3")
    b = b.assign_coords(group=("sample", np.array([f"other {name}" for name in b["group"].values], object)))
    every = [*groups_of(a).values(), *groups_of(b).values()]
    found = [
        depth_over_error([every[k] for k in inside], [every[k] for k in range(7) if k not in inside], False)
        for inside in combinations(range(7), 4)
    ]
    tested = depth_permutation(a, b)
    assert tested.p == pytest.approx(two_sided(found, found[0]))
    assert tested.arrangements == comb(7, 4)
    assert tested.floor == 2 / 35
    assert "4 and 3 groups dealt anew" in tested.method


# --- against scipy -------------------------------------------------------------------------------------------------


def test_paired_means_are_scipys_sign_flip_test() -> None:
    """Of equally large groups, dividing by the standard error changes no order: it is the test of the sum."""
    rng = np.random.default_rng(2)
    first, second = rng.exponential(size=(2, 9))
    names = "abcdefghi"
    expected = stats.permutation_test((first - second,), np.mean, permutation_type="samples", n_resamples=np.inf)
    tested = compare_groups(one_each(first, names), one_each(second, names), mean)
    assert tested.p == pytest.approx(expected.pvalue)


def test_paired_ranks_are_scipys_wilcoxon_test() -> None:
    """Sign flips of signed ranks are Wilcoxon's test, whose exact p-values scipy has from a recursion."""
    difference = np.random.default_rng(5).normal(0.4, 1, 8)
    ranks = np.sign(difference) * stats.rankdata(np.abs(difference))
    names = "abcdefgh"
    tested = compare_groups(one_each(ranks, names), one_each(np.zeros(8), names), mean)
    assert tested.p == pytest.approx(stats.wilcoxon(difference, method="exact").pvalue)


def test_unpaired_means_are_scipys_test_of_welchs_statistic() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.exponential(size=5), rng.exponential(size=4)

    def welch(x: FloatArray, y: FloatArray, axis: int) -> FloatArray:
        error = x.var(axis=axis, ddof=1) / x.shape[axis] + y.var(axis=axis, ddof=1) / y.shape[axis]
        return np.asarray((x.mean(axis=axis) - y.mean(axis=axis)) / np.sqrt(error))

    expected = stats.permutation_test((first, second), welch, n_resamples=np.inf, vectorized=True)
    tested = compare_groups(one_each(first, "abcde"), one_each(second, "vwxy"), mean)
    assert tested.p == pytest.approx(expected.pvalue)
    assert tested.floor == pytest.approx(2 / comb(9, 4))


def test_many_cells_are_scipys_sign_flip_test_where_there_is_one() -> None:
    sums = np.random.default_rng(0).normal(0.3, 1, (8, 1))
    expected = stats.permutation_test(
        (sums[:, 0],), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    statistic, adjusted, tested = largest_of_many(sums, np.ones(8, bool))
    assert adjusted[0] == tested.p == pytest.approx(expected.pvalue)
    assert statistic[0] == pytest.approx(sums.sum() / np.sqrt((sums**2).sum()))
    assert tested.floor == 1 / 2**8


# --- what few groups can say ---------------------------------------------------------------------------------------


def test_three_pairs_cannot_say_more_than_a_quarter() -> None:
    """Two runs as different as can be: twice the smaller share of 8 arrangements is never below 2 / 8."""
    apart = [simulate(Planted(centre=c), 0, 3, name=(n, "gender")) for c, n in ((4.0, "a"), (20.0, "b"))]
    (row,) = compare(apart)
    assert row.p == row.p_floor == 0.25
    assert row.p_text == "0.25 (its floor: 3 groups cannot give less)"
    assert (row.n, row.groups) == (sum(run.sizes["sample"] for run in apart), 3)
    assert "runs exchanged in 3 shared groups: all 8 arrangements" in row.test
    assert "p = 0.25 (its floor" in str(row)
    assert np.isnan([row.difference.low, row.difference.high]).all()
    assert "too few groups" in str(row.difference)


@pytest.mark.parametrize(("groups", "floor"), [(2, 0.5), (6, 2 / 64), (12, 2 / 4096), (13, 2 / 8192), (15, 2 / 10_000)])
def test_the_floor_of_paired_runs(groups: int, floor: float) -> None:
    names = "abcdefghijklmno"[:groups]
    tested = compare_groups(one_each(np.arange(groups) + 9.0, names), one_each(np.zeros(groups), names), mean)
    assert tested.floor == pytest.approx(floor)
    assert tested.p >= tested.floor
    assert tested.exact == (groups <= 12)
    assert ("random arrangements" in tested.limit) == (groups > 13)


def test_one_group_each_says_nothing() -> None:
    tested = compare_groups(one_each(ONE[0], "a"), one_each(ONE[0] * 5, "b"), mean)
    assert tested.p == tested.floor == 1.0


def test_partly_shared_groups_are_exchanged_and_the_others_dealt_anew() -> None:
    values = np.random.default_rng(0).normal(size=9)
    one, two = one_each(values[:5], "abcde"), one_each(values[5:], "deyz")
    tested = compare_groups(one, two, mean)
    assert tested.arrangements == 2**2 * comb(5, 3)
    assert "runs exchanged in 2 shared groups and 3 and 2 groups dealt anew" in tested.method
    found = []
    shared, alone = {"d": (values[3], values[5]), "e": (values[4], values[6])}, [*values[:3], *values[7:]]
    for swaps in product((0, 1), repeat=2):
        for inside in combinations(range(5), 3):
            first = {k: alone[k] for k in inside} | {
                g: pair[s] for (g, pair), s in zip(shared.items(), swaps, strict=True)
            }
            second = {k: alone[k] for k in range(5) if k not in inside}
            second |= {g: pair[1 - s] for (g, pair), s in zip(shared.items(), swaps, strict=True)}
            means = [sum(run.values()) / len(run) for run in (first, second)]
            out = [
                {k: (v - m) / len(run) * np.sqrt(len(run) / (len(run) - 1)) for k, v in run.items()}
                for run, m in zip((first, second), means, strict=True)
            ]
            error = sum((out[0].get(k, 0) - out[1].get(k, 0)) ** 2 for k in {*first, *second})
            found.append((means[0] - means[1]) / np.sqrt(error))
    assert tested.p == pytest.approx(two_sided(found, found[0]))


# --- what may not matter -------------------------------------------------------------------------------------------


def test_order_and_direction_of_runs_and_clips_do_not_matter() -> None:
    a, b = in_two_models(7)
    tested = depth_permutation(a, b)
    assert depth_permutation(b, a).p == pytest.approx(tested.p)
    assert depth_permutation(a.isel(sample=slice(None, None, -1)), b).p == pytest.approx(tested.p)
    renamed = [run.assign_coords(group=("sample", [f"z{name}" for name in run["group"].values])) for run in (a, b)]
    assert depth_permutation(*renamed).p == pytest.approx(tested.p)


def test_a_speakers_clips_move_together() -> None:
    """Every clip three times is no more evidence than once."""
    a, b = in_two_models(6)
    thrice = [run.isel(sample=np.repeat(np.arange(run.sizes["sample"]), 3)) for run in (a, b)]
    assert depth_permutation(*thrice).p == pytest.approx(depth_permutation(a, b).p)


def test_random_arrangements_come_close_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).normal([[0.6], [0.0]], 1, (2, 10))
    paired = [one_each(row, "abcdefghij") for row in values]
    apart = [one_each(values[0][:6], "abcdef"), one_each(values[1][:5], "vwxyz")]
    sums = np.random.default_rng(1).normal(0.2, 1, (9, 4))

    def all_p() -> list[GroupTest]:
        many = largest_of_many(sums, np.ones(9, bool))[2]
        return [compare_groups(*paired, mean), compare_groups(*apart, mean), many]

    exact = all_p()
    monkeypatch.setattr("lalm_patch.analysis.permutation.MOST_ENUMERATED", 1)
    for known, drawn in zip(exact, all_p(), strict=True):
        assert known.exact
        assert not drawn.exact
        assert drawn.arrangements == 10_000
        assert drawn.p == pytest.approx(known.p, abs=5 * np.sqrt(known.p / 10_000) + 2e-4)


def test_random_arrangements_repeat_with_their_seed() -> None:
    a, b = in_two_models(14)
    curves = curves_together([a, b])
    first, again, other = (depth_permutation(a, b, curves, seed, drawn=199) for seed in (0, 0, 1))
    assert first == again
    assert first.p != other.p


def test_every_arrangement_is_listed_once_the_datas_own_first() -> None:
    flips = all_signs(4)
    assert len({tuple(row) for row in flips}) == 16
    assert (flips[0] == 1).all()
    chosen = all_splits(3, 2)
    assert len({tuple(row) for row in chosen}) == comb(5, 2)
    assert chosen[0].tolist() == [True, True, True, False, False]
    assert (chosen.sum(axis=1) == 3).all()


def test_equal_runs_differ_by_nothing_in_every_arrangement() -> None:
    run = simulate(Planted(), 0, 8)
    assert depth_permutation(run, run).p == 1.0


# --- samples without groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_samples_without_groups_are_paired_by_their_id(seed: int) -> None:
    """As if each id were a group; the order of the other run's clips says nothing."""
    a, b = (run.isel(sample=slice(0, 6)) for run in in_two_models(6))
    grouped = [run.assign_coords(group=("sample", run["sample"].values)) for run in (a, b)]
    order = np.random.default_rng(seed).permutation(6)
    alone = [run.drop_vars("group") for run in (a, b.isel(sample=order))]
    assert group_names(alone[0]).tolist() == a["sample"].values.tolist()
    assert depth_permutation(*alone) == depth_permutation(*grouped)


def test_other_clips_are_other_groups_though_they_stand_at_the_same_place() -> None:
    a, b = (run.isel(sample=slice(0, 4)).drop_vars("group") for run in in_two_models(4))
    b = b.assign_coords(sample=np.array([f"other {name}" for name in b["sample"].values], object))
    assert depth_permutation(a, b).arrangements == comb(8, 4)
    nameless = [run.drop_vars("sample") for run in (a, b)]
    assert depth_permutation(*nameless).arrangements == comb(8, 4)
    (row,) = compare(nameless)
    assert row.groups == 8


# --- equally deep, otherwise different ------------------------------------------------------------------------------


def test_the_reported_p_value_is_the_larger_of_two() -> None:
    """Student's by hand: the difference over the jackknife's error; degrees of freedom from 1 to groups - 1."""
    for seed in range(8):
        a, b = in_two_models(9, (seed, seed + 100))
        number = depth_difference(a, b)
        away = number.values[1:10] - number.values[1:10].mean()
        t = abs(number.values[0]) / np.sqrt(8 / 9 * (away**2).sum())
        student = number.student_p()
        assert 2 * stats.t.sf(t, 8) <= student <= 2 * stats.t.sf(t, 1)
        assert depth_test(a, b).p == max(depth_permutation(a, b).p, student)


def test_students_p_value_of_a_mean_is_scipys() -> None:
    """Of few and evenly spread values the degrees of freedom are one less than the groups."""
    values = np.array([0.1, 0.5, 0.9, 1.3, 1.7, 2.1]) - 0.4
    clusters = ClusterSums.of(values[:, None], np.arange(6).astype(str))
    means = resample(clusters, 0)
    number = replace(means, values=means.values[:, 0])
    assert number.student_p() == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert replace(number, values=number.values * 0).student_p() == 1.0
    assert (
        replace(number, values=np.where(np.arange(len(number.values)) == 3, np.nan, number.values)).student_p() == 1.0
    )


# --- the number that is tested -------------------------------------------------------------------------------------


def test_slopes_of_the_crossing_are_those_of_small_steps() -> None:
    rng = np.random.default_rng(0)
    curves = np.cumsum(rng.uniform(0, 1, (20, 7)), axis=1)
    layers = np.array([0.0, 1, 2, 4, 5, 8, 9])
    found, slopes = crossing_slopes(curves, layers, 0.5)
    np.testing.assert_array_equal(found, crossing(curves, layers, 0.5))
    for layer in range(7):
        step = 1e-6 * np.eye(7)[layer]
        expected = (crossing(curves + step, layers, 0.5) - crossing(curves - step, layers, 0.5)) / 2e-6
        np.testing.assert_allclose(slopes[:, layer], expected, atol=1e-5)


def test_decoders_of_different_depth_are_compared_at_shares_of_depth() -> None:
    """The number tested is the reported one: bringing both to common shares of depth moves no crossing."""
    runs = [
        simulate(Planted(layers=n, centre=c), 1, 8, name=(name, "gender"))
        for n, c, name in ((32, 16.0, "a"), (21, 14.0, "b"))
    ]
    seen: list[float] = []

    def record(one: ClusterSums, two: ClusterSums, measure: Callable[[FloatArray], tuple], *_: int) -> GroupTest:
        numbers = [measure(part.means(np.ones((1, 8))))[0][0] for part in (one, two)]
        seen.append(numbers[0] - numbers[1])
        return GroupTest(1.0, 1.0, "", "", 1, True)

    (row,) = compare(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lalm_patch.analysis.comparison.compare_groups", record)
        depth_permutation(*runs)
    assert seen == [pytest.approx(row.difference.value)]


def test_runs_on_other_cells_are_refused() -> None:
    two = replace(one_each(np.ones(2), "ab"), sums=np.ones((2, 3)), weights=np.ones((2, 3)))
    with pytest.raises(ValueError, match="expected the same cells"):
        compare_groups(one_each(np.ones(2), "ab"), two, mean)


def test_a_number_that_does_not_exist_has_no_p_value() -> None:
    flat = [run.assign(recovery_rate=run["recovery_rate"] * 0) for run in in_two_models(5)]
    tested = depth_permutation(*flat)
    assert np.isnan(tested.p)
    assert str(tested) == "undefined"


def test_the_option_test_has_a_floor_too() -> None:
    found = object_effect(simulate(Planted(object_peak=0.5), 0, 4, token_wise=True))
    assert found.p == found.p_floor == 1 / 16
    assert found.p_text == "0.0625 (its floor: 4 groups cannot give less)"
    assert float(found.profile["p_floor"]) == 1 / 16
    assert (found.profile["groups"] == 4).all()
    assert "sign-flip test" in found.test
    assert MOST_ENUMERATED == 4096


def test_only_a_p_value_at_its_floor_says_so() -> None:
    assert with_floor(0.3, 0.25, "3 groups") == "0.3"
    assert with_floor(0.0002, 0.0002, "9999 random arrangements").endswith("9999 random arrangements cannot give less)")
