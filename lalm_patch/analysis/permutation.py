"""Permutation tests over groups: exact where the groups are few, by Monte Carlo where they are many.

A permutation test asks how often chance alone gives a number as far out as the one found. It arranges the data in all
the ways that would be as likely if nothing were there, and counts. With few groups there are few such ways, so there is
a smallest p-value that no data can go below: its floor, which stands beside every p-value. Groups move as wholes, so
clips of one speaker need not be independent. Three kinds of arrangement:

- two runs that share groups: each shared group may have its two runs exchanged, 2^k arrangements of k groups (of a
  difference of means this is the sign-flip test of the groups' differences);
- two runs with groups of their own: which groups belong to which run, C(a + b, a) arrangements of a and b groups;
- one difference per group, as likely positive as negative without an effect: 2^k arrangements of k groups' signs.

Two runs that share some of their groups use the first two together: shared groups are exchanged, the others dealt anew.
Nothing is left out, and the number tested is the one reported.

Two runs may be equally deep and still differ in how steep or how noisy they are. A difference itself would then be
compared with differences of another spread, so what is compared is the difference over its standard error, computed
anew in each arrangement: exact if the runs do not differ at all, and right with many groups if they differ in other
things than the one tested (Chung and Romano 2013, Annals of Statistics 41:2, 484-507; for pairs Konietschke and Pauly
2014, Statistics and Computing 24, 283-296). P-values from random arrangements count the data themselves and so are
never 0 (Phipson and Smyth 2010, Statistical Applications in Genetics and Molecular Biology 9:39).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

from lalm_patch.analysis.resampling import ClusterSums, FloatArray

MOST_ENUMERATED = 4096
"""Arrangements up to which all are tried: those of 12 groups' signs, or of 7 against 7 groups."""
DRAWN = 9999
"""Arrangements drawn at random beyond that."""
_SAME = 1e-6
"""Statistics this close (relative to the data's own, if that is above 1) count as equal: rounding must not make an
arrangement that changes nothing less extreme."""
_NOTHING = 1e-9
"""Differences this small are rounding, and standard errors are taken to be at least this large."""
_BLOCK = 4_000_000
"""Numbers that one array may hold while arrangements are tried: some tens of MB."""

Measure = Callable[[FloatArray], tuple[FloatArray, FloatArray]]
"""From means [arrangement, cell] to a number [arrangement] and its slopes [arrangement, cell]."""


@dataclass(frozen=True)
class GroupTest:
    """A p-value with what bounds it from below.

    Attributes:
        p: at least `floor`.
        floor: smallest p-value that the number of groups (or of random arrangements) allows, whatever the data.
        limit: what the floor comes from: `3 groups`, `9999 random arrangements`.
        method: what was arranged, in words.
        arrangements: how many arrangements were tried, the data's own among them.
        exact: whether these are all there are.
    """

    p: float
    floor: float
    limit: str
    method: str
    arrangements: int
    exact: bool

    def __str__(self) -> str:
        return with_floor(self.p, self.floor, self.limit)


def with_floor(p: float, floor: float, limit: str) -> str:
    """A p-value as text; one at its floor says that no data could have given less."""
    if np.isnan(p):
        return "undefined"
    at_floor = p <= floor * (1 + 1e-9)
    return f"{p:.3g}" + (f" (its floor: {limit} cannot give less)" if at_floor else "")


def all_signs(groups: int) -> FloatArray:
    """All signs of groups, 1 or -1: [2^groups, group], all 1 first."""
    bits = np.arange(2**groups)[:, None] >> np.arange(groups) & 1
    return np.asarray(1.0 - 2.0 * bits)


def random_signs(groups: int, rng: np.random.Generator, drawn: int) -> FloatArray:
    """Random signs of groups, 1 or -1: [1 + drawn, group], all 1 first."""
    found = rng.choice((1.0, -1.0), (1 + drawn, groups))
    found[0] = 1.0
    return found


def all_splits(first: int, second: int) -> NDArray[np.bool_]:
    """All ways to choose `first` of `first + second` groups: [way, group], the first ones first."""
    chosen = np.zeros((comb(first + second, first), first + second), bool)
    for row, inside in enumerate(combinations(range(first + second), first)):
        chosen[row, list(inside)] = True
    return chosen


def random_splits(first: int, second: int, rng: np.random.Generator, drawn: int) -> NDArray[np.bool_]:
    """Random ways to choose `first` of `first + second` groups: [1 + drawn, group], the first ones first."""
    own = np.arange(first + second) < first
    chosen = rng.permuted(np.tile(own, (1 + drawn, 1)), axis=1)
    chosen[0] = own
    return chosen


def compare_groups(
    one: ClusterSums, two: ClusterSums, measure: Measure, seed: int = 0, drawn: int = DRAWN
) -> GroupTest:
    """Two-sided test that a number read off the means of two runs is the same in both.

    Whole groups are exchanged or dealt anew, see above; the statistic is the difference over its standard error, the
    latter from the groups' influence on the two numbers (the delta method). The p-value is twice the smaller share of
    arrangements on one side, at most 1, as in `scipy.stats.permutation_test`. Arrangements in which the number does not
    exist count as extreme on both sides, which can only make p larger.

    Args:
        one, two: sums of each group on the same cells [group, cell]; groups of the same name belong together.
        measure: the number and how it changes with the means.
        seed: of random arrangements.
        drawn: how many random ones, where there are more than `MOST_ENUMERATED`.

    Raises:
        ValueError: the runs' cells differ.
    """
    if one.sums.shape[1] != two.sums.shape[1]:
        raise ValueError(
            f"runs of {one.sums.shape[1]} and {two.sums.shape[1]} cells: expected the same cells; bring both to common "
            "layers first"
        )
    names = np.unique(np.concatenate([one.names, two.names]))
    has = [np.isin(names, part.names) for part in (one, two)]
    both, alone = has[0] & has[1], (has[0] & ~has[1], has[1] & ~has[0])
    shared, first, second = (int(which.sum()) for which in (both, *alone))
    total = 2**shared * comb(first + second, first)
    exact = total <= MOST_ENUMERATED
    kept = _all_kept(both, alone) if exact else _random_kept(both, alone, seed, drawn)
    parts = [_over(part, names) for part in (one, two)]
    rows = -(-len(kept) * max(2 * len(names), one.sums.shape[1]) // _BLOCK)
    found = np.concatenate([_statistic(parts[0], parts[1], measure, part) for part in np.array_split(kept, rows or 1)])
    missing, margin = np.isnan(found), _SAME * max(1.0, abs(float(found[0])))
    sides = [int((missing | side).sum()) for side in (found >= found[0] - margin, found <= found[0] + margin)]
    by_groups, by_number = min(1.0, 2 / total), min(1.0, 2 / len(found))
    floor = max(by_groups, by_number)
    p = np.nan if missing[0] else min(1.0, max(floor, 2 * min(sides) / len(found)))
    arranged = " and ".join(
        filter(
            None,
            [
                f"runs exchanged in {shared} shared groups" if shared else "",
                f"{first} and {second} groups dealt anew to the runs" if first + second else "",
            ],
        )
    )
    how = f"all {total}" if exact else f"{len(found)} of {total:.3g}"
    limit = _groups(len(names)) if by_groups >= by_number else f"{drawn} random arrangements"
    method = f"permutation test, {arranged}: {how} arrangements"
    return GroupTest(p, floor, limit, method, len(found), exact)


def _groups(number: int) -> str:
    return f"{number} group{'' if number == 1 else 's'}"


def _all_kept(both: NDArray[np.bool_], alone: tuple[NDArray[np.bool_], NDArray[np.bool_]]) -> FloatArray:
    """Whether each group keeps its run, 1 or 0: [arrangement, group], every arrangement once, the data's own first."""
    first, second = (int(which.sum()) for which in alone)
    stays, belongs = all_signs(int(both.sum())) > 0, all_splits(first, second)
    rows = [index.ravel() for index in np.indices((len(stays), len(belongs)))]
    return _put(stays[rows[0]], belongs[rows[1]], both, alone)


def _random_kept(
    both: NDArray[np.bool_], alone: tuple[NDArray[np.bool_], NDArray[np.bool_]], seed: int, drawn: int
) -> FloatArray:
    """The same, of random arrangements after the data's own."""
    rng = np.random.default_rng(seed)
    first, second = (int(which.sum()) for which in alone)
    stays = random_signs(int(both.sum()), rng, drawn) > 0
    return _put(stays, random_splits(first, second, rng, drawn), both, alone)


def _put(
    stays: NDArray[np.bool_],
    belongs: NDArray[np.bool_],
    both: NDArray[np.bool_],
    alone: tuple[NDArray[np.bool_], NDArray[np.bool_]],
) -> FloatArray:
    """Arrangements of shared groups and of the others, in the places of the groups."""
    kept = np.ones((len(stays), len(both)))
    first = int(alone[0].sum())
    kept[:, both] = stays
    kept[:, alone[0]], kept[:, alone[1]] = belongs[:, :first], ~belongs[:, first:]
    return kept


def _statistic(one: ClusterSums, two: ClusterSums, measure: Measure, kept: FloatArray) -> FloatArray:
    """Difference over its standard error [arrangement]; both runs' sums have a row for every group [group, cell]."""
    moved = 1.0 - kept
    numbers, influences = [], []
    for mine, theirs, part in ((kept, moved, one), (moved, kept, two)):
        groups = int((part.weights != 0).any(axis=1).sum())
        total = mine @ one.weights + theirs @ two.weights
        means = np.divide(mine @ one.sums + theirs @ two.sums, total, out=np.full_like(total, np.nan), where=total != 0)
        number, slopes = measure(means)
        steep = np.divide(slopes, total, out=np.zeros_like(total), where=total != 0)
        level = steep * np.nan_to_num(means)
        influence = sum(
            where * (steep @ data.sums.T - level @ data.weights.T) for where, data in ((mine, one), (theirs, two))
        )
        numbers.append(number)
        influences.append(influence * sqrt(groups / max(groups - 1, 1)))
    difference = numbers[0] - numbers[1]
    error = np.sqrt(((influences[0] - influences[1]) ** 2).sum(axis=1))
    return np.asarray(np.where(np.abs(difference) <= _NOTHING, 0.0, difference / np.maximum(error, _NOTHING)))


def _over(part: ClusterSums, names: NDArray[np.str_]) -> ClusterSums:
    """The same sums with a row for every name, zeros for groups that the run lacks."""
    sums, weights = np.zeros((2, len(names), part.sums.shape[1]))
    rows = np.searchsorted(names, part.names)
    sums[rows], weights[rows] = part.sums, part.weights
    return ClusterSums(names, sums, weights, part.n)


def largest_of_many(
    sums: FloatArray, present: NDArray[np.bool_], seed: int = 0, drawn: int = DRAWN
) -> tuple[FloatArray, FloatArray, GroupTest]:
    """One-sided sign-flip test of many cells at once, allowing for having looked at all of them.

    The signs of whole groups are flipped, since without an effect a group's differences are as likely the other way
    round. Each cell's statistic, its sum over groups divided by the root of their squares' sum, is compared with the
    largest one of any cell under the flips (max-T: Westfall and Young 1993, Resampling-Based Multiple Testing).

    Args:
        sums: of differences [group, cell].
        present: which groups have data in any cell [group]; the others say nothing and are not flipped.
        seed: of random flips.
        drawn: how many random ones, where there are more than `MOST_ENUMERATED`.

    Returns:
        Statistic [cell], adjusted p-value [cell], and the test of the largest statistic.
    """
    sums = sums[present]
    groups = len(sums)
    spread = np.sqrt((sums**2).sum(axis=0))
    unit = np.divide(sums, spread, out=np.zeros_like(sums), where=spread > 0)
    exact = 2**groups <= MOST_ENUMERATED
    flips = all_signs(groups) if exact else random_signs(groups, np.random.default_rng(seed), drawn)
    statistic = unit.sum(axis=0)
    largest = (flips @ unit).max(axis=1, initial=-np.inf)
    by_groups, by_number = 0.5**groups, 1 / len(flips)
    floor = max(by_groups, by_number)
    adjusted = np.maximum((largest[:, None] >= statistic - _SAME).sum(axis=0) / len(flips), floor)
    limit = _groups(groups) if by_groups >= by_number else f"{drawn} random arrangements"
    how = f"all {2**groups}" if exact else f"{len(flips)} of {2.0**groups:.3g}"
    method = f"one-sided sign-flip test, largest statistic over layers, {_groups(groups)}: {how} arrangements"
    p = float(adjusted.min(initial=1.0))
    return statistic, adjusted, GroupTest(p, floor, limit, method, len(flips), exact)
