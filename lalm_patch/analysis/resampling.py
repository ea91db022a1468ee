"""Bootstrap over clusters: everything that is not independent (a speaker's clips) is drawn together.

A mean recovery rate is a sum over samples divided by their number, and a ratio of means a sum of gains divided by a sum
of gaps. Both are ratios of sums over clusters, so one resampling serves both: how often each cluster was drawn, times
its sums.

The intervals are bias-corrected and accelerated (BCa, Efron 1987), with the acceleration from leaving out one cluster
at a time, since recovery is skewed. Two things make them wider than that, both of no weight where clusters are many and
alike:

- The draws spread less than the estimate does, by a known factor for clusters of one size (Hesterberg 2015, The
  American Statistician 69:4, 371-386) and by more where a few large clusters carry much of the weight. The standard
  error from leaving out one cluster at a time allows for both (the jackknife or CR3 variance: MacKinnon, Nielsen and
  Webb 2023, Journal of Econometrics 232:2, 272-299); normal deviates are stretched by its ratio to the draws'
  standard deviation.
- Student's t stands in for the normal. Its degrees of freedom are one less than the clusters, or fewer where few
  clusters make most of the variance: as many as give the variance of a variance that the kurtosis of the left-out
  values implies (Satterthwaite 1946; kurtosis by its unbiased estimate G2, Joanes and Gill 1998).

Draws of clusters never go beyond the largest and the smallest of them, which with few clusters is not far enough.
Therefore, with up to `FEW` clusters, an interval also holds Student's: the estimate and its standard error times
Student's t, both as above.

Where all samples agree, as they do where recovery is 0 or 1 by construction, nothing is corrected and the interval is
that one value. benchmarks/coverage.py measures how often they hold the truth.

With few groups nothing can make an interval honest: see `fewest_groups` for when there is none, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

FloatArray = NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95

FEW = 30
"""Clusters up to which an interval holds Student's too."""

_BLOCK = 4_000_000
"""Numbers a block of resampled means may hold: some tens of MB."""


def fewest_groups(confidence: float = CONFIDENCE) -> int:
    """Groups without which no interval is given: the smallest k with 2 / 2^k <= 1 - confidence; at 95 %, 6.

    An interval holds the values that a test at its level does not reject. With k groups the exact two-sided sign-flip
    test has no p-value below 2 / 2^k: with fewer groups it rejects nothing, so only the whole line would be honest.
    Seen from the bootstrap: draws of groups stay between the smallest and the largest group, and k groups all lie on
    one side of their population's median with probability 2 / 2^k; with more of that than 1 - confidence, no choice of
    draws can hold the truth as often as is said.

    Raises:
        ValueError: a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: expected a share between 0 and 1, such as 0.95")
    return max(2, ceil(log2(2 / (1 - confidence)) - 1e-9))


def too_few(groups: int, confidence: float = CONFIDENCE) -> str:
    """Why so few groups have no interval, in words; empty where they are enough."""
    fewest = fewest_groups(confidence)
    return f"too few groups: {groups}, expected at least {fewest}" if groups < fewest else ""


def unanimous(groups: NDArray[np.int64], confidence: float = CONFIDENCE) -> FloatArray:
    """Lower end of the interval of a share of which all groups say 1 (Clopper and Pearson 1934, n successes of n).

    There draws know no spread, and their interval would be the one value 1; with three groups this is 0.29, with 40
    groups 0.91. It holds for the share of groups all of whose clips say 1, which is at most the share of clips. Of a
    share of which all say 0, the upper end is one minus this.

    Args:
        groups: how many there are [...]; of none nothing is known, and the end is 0.
        confidence: of the two-sided interval.
    """
    return np.asarray(np.where(groups > 0, ((1 - confidence) / 2) ** (1 / np.maximum(groups, 1)), 0.0))


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: NaN where it does not exist.
        low, high: interval; NaN where there is none, see `reason`.
        n: samples behind it.
        groups: clusters (speakers, recordings) behind it.
        reason: why there is no interval; else empty.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int
    reason: str = ""

    def __str__(self) -> str:
        return with_interval(self.value, self.low, self.high, self.reason)


def with_interval(value: float, low: float, high: float, reason: str) -> str:
    """A number and its interval as text; where there is none, the reason in its place."""
    if np.isnan(value):
        return "undefined"
    if np.isnan(low) or np.isnan(high):
        return f"{value:z.2f} (no interval{f', {reason}' if reason else ''})"
    return f"{value:z.2f} [{low:z.2f}, {high:z.2f}]"


@dataclass(frozen=True)
class ClusterSums:
    """Sums over the samples of each cluster.

    Attributes:
        names: of the clusters.
        sums: numerators [cluster, cell].
        weights: denominators [cluster, cell]: numbers of samples for a mean, sums of gaps for a ratio of means.
        n: samples.
    """

    names: NDArray[np.str_]
    sums: FloatArray
    weights: FloatArray
    n: int

    @classmethod
    def of(cls, values: FloatArray, names: NDArray[np.str_], weights: FloatArray | None = None) -> ClusterSums:
        """From numerators (and weights, else 1 each) [sample, cell] with the cluster's name of each sample.

        Cells that are NaN are left out of both sums.
        """
        present = ~np.isnan(values)
        known, cluster = np.unique(names.astype(str), return_inverse=True)
        each = present.astype(np.float64) if weights is None else np.where(present, weights, 0.0)
        sums, totals = np.zeros((2, len(known), values.shape[1]))
        np.add.at(sums, cluster, np.where(present, values, 0.0))
        np.add.at(totals, cluster, each)
        return cls(known, sums, totals, len(values))

    def means(self, times: FloatArray) -> FloatArray:
        """Ratios [draw, cell] for how often each cluster was drawn [draw, cluster]; NaN where nothing was."""
        top, bottom = times @ self.sums, times @ self.weights
        return np.asarray(np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0))


@dataclass(frozen=True)
class Resampled:
    """A number, or an array of numbers, with its resampled values.

    Attributes:
        values: [row, ...]: row 0 from the data as they are, then one row per cluster left out, then the draws.
        left_out: number of rows with one cluster left out.
        n: samples behind it.
        groups: clusters behind it; the smaller number where two runs are compared.
    """

    values: FloatArray
    left_out: int
    n: int
    groups: int

    @property
    def drawn(self) -> FloatArray:
        """The draws [draw, ...]."""
        return self.values[1 + self.left_out :]

    def interval(self, confidence: float = CONFIDENCE) -> tuple[FloatArray, FloatArray]:
        """Interval of each cell [...]; draws in which a value does not exist are left out.

        NaN with fewer clusters than `fewest_groups`, where no more than half of the draws have a value, and where there
        is none without one of the clusters.

        Raises:
            ValueError: a confidence that is not between 0 and 1.
        """
        enough = self.groups >= fewest_groups(confidence)
        cells = self.values.reshape(len(self.values), -1)
        found = np.full((2, cells.shape[1]), np.nan)
        drawn = np.sort(cells[1 + self.left_out :], axis=0)
        count = (~np.isnan(drawn)).sum(axis=0)
        missing = np.isnan(cells[: 1 + self.left_out]).any(axis=0)
        some = np.flatnonzero((count * 2 > len(drawn)) & ~missing)
        if enough and some.size:
            drawn, count = drawn[:, some], count[some]
            shift = _bias(drawn, cells[0, some], count)
            acceleration, freedom, error = _shape(cells[1 : 1 + self.left_out, some], self.groups)
            spread = np.nanstd(drawn, axis=0)
            stretch = np.divide(error, spread, out=np.zeros_like(error), where=spread > 0)
            student = t.ppf((1 + confidence) / 2, freedom)
            half = np.maximum(stretch, sqrt(self.groups / (self.groups - 1))) * student
            for row, z in enumerate((-half, half)):
                moved = shift + z
                level = norm.cdf(shift + moved / np.maximum(1 - acceleration * moved, 1e-3))
                found[row, some] = _sorted_quantile(drawn, count, level)
            if self.groups <= FEW:
                found[0, some] = np.minimum(found[0, some], cells[0, some] - student * error)
                found[1, some] = np.maximum(found[1, some], cells[0, some] + student * error)
        shape = self.values.shape[1:]
        return found[0].reshape(shape), found[1].reshape(shape)

    def student_p(self) -> float:
        """Two-sided p-value of the one number [row] being 0, by Student's t with the standard error and the degrees of
        freedom of the intervals; 1 where the number does not exist without one of the clusters."""
        value, left_out = float(self.values[0]), self.values[1 : 1 + self.left_out, None]
        if value == 0 or self.groups < 2 or np.isnan(left_out).any():
            return 1.0
        _, freedom, error = _shape(left_out, self.groups)
        return float(2 * t.sf(abs(value) / error[0], freedom[0])) if error[0] > 0 else 0.0

    def estimate(self, confidence: float = CONFIDENCE) -> Estimate:
        """The one number [row] as an estimate."""
        low, high = self.interval(confidence)
        reason = too_few(self.groups, confidence)
        if not reason and np.isnan(low) and not np.isnan(self.values[0]):
            reason = "the number does not exist without some of the groups"
        return Estimate(float(self.values[0]), float(low), float(high), self.n, self.groups, reason)


def _bias(drawn: FloatArray, value: FloatArray, count: NDArray[np.int64]) -> FloatArray:
    """How far the median of the draws is from the estimate, in standard deviations; ties count half."""
    share = ((drawn < value).sum(axis=0) + 0.5 * (drawn == value).sum(axis=0)) / count
    return np.asarray(norm.ppf(np.clip(share, 0.5 / count, 1 - 0.5 / count)))


def _shape(left_out: FloatArray, groups: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Acceleration, degrees of freedom and standard error of each cell, from its values with one cluster left out.

    The acceleration is the values' skewness over 6 sqrt(n), the degrees of freedom 2 n / (G2 + 2) with the excess
    kurtosis G2, the standard error the jackknife's. All are 0 (degrees of freedom: n - 1) where a value is missing.

    Args:
        left_out: [cluster, cell].
        groups: clusters behind the estimate: no more degrees of freedom than one less.
    """
    n = len(left_out)
    usable = np.where(np.isnan(left_out).any(axis=0), 0.0, left_out)
    away = usable.mean(axis=0) - usable
    square = (away**2).sum(axis=0)
    spread = square > 0
    acceleration = np.divide((away**3).sum(axis=0), 6 * square**1.5, out=np.zeros_like(square), where=spread)
    freedom = np.full(square.shape, groups - 1.0)
    if n > 3:
        excess = np.divide(n * (away**4).sum(axis=0), square**2, out=np.ones_like(square), where=spread) - 3
        unbiased = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * excess + 6)
        freedom = np.clip(2 * n / np.maximum(unbiased + 2, 1e-9), 1, freedom)
    return np.asarray(acceleration), np.asarray(freedom), np.sqrt((n - 1) / n * square)


def _sorted_quantile(ordered: FloatArray, count: NDArray[np.int64], level: FloatArray) -> FloatArray:
    """A quantile of its own level in each column; values ascend, NaN after the first `count`."""
    place = level * (count - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, count - 1)
    columns = np.arange(ordered.shape[1])
    low, high = ordered[below, columns], ordered[above, columns]
    return np.asarray(low + (place - below) * (high - low))


def draws(n_clusters: int, seed: int, n_draws: int = DRAWS) -> FloatArray:
    """How often each cluster counts [1 + left out + draw, cluster]: once; all but one of them; as drawn."""
    times = np.ones((1 + n_clusters + n_draws, n_clusters))
    if n_clusters:
        times[1 : 1 + n_clusters] -= np.eye(n_clusters)
        rng = np.random.default_rng(seed)
        times[1 + n_clusters :] = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_draws)
    return times


def resample(clusters: ClusterSums, seed: int, n_draws: int = DRAWS) -> Resampled:
    """Resampled means [row, cell] of one run."""
    n_clusters = len(clusters.names)
    return Resampled(clusters.means(draws(n_clusters, seed, n_draws)), n_clusters, clusters.n, n_clusters)


def resample_together(parts: Sequence[ClusterSums], seed: int, n_draws: int = DRAWS) -> list[Resampled]:
    """Resampled means [row, cell] of several runs, whose rows belong together.

    Runs that share clusters (two models on the same clips) draw them together, so that their difference is a paired
    one; runs that share none draw independently.
    """
    sizes = [len(part.names) for part in parts]
    groups, n = min(sizes), sum(part.n for part in parts)
    everyone = np.unique(np.concatenate([part.names for part in parts]))
    if len(everyone) < sum(sizes):
        times = draws(len(everyone), seed, n_draws)
        own = [times[:, np.searchsorted(everyone, part.names)] for part in parts]
    else:
        own = []
        for index, size in enumerate(sizes):
            mine = draws(size, seed + index, n_draws)
            before, after = np.ones((sum(sizes[:index]), size)), np.ones((sum(sizes[index + 1 :]), size))
            own.append(np.concatenate([mine[:1], before, mine[1 : 1 + size], after, mine[1 + size :]]))
    return [Resampled(part.means(times), len(everyone), n, groups) for part, times in zip(parts, own, strict=True)]


def ratio_intervals(
    clusters: ClusterSums, confidence: float, seed: int, n_draws: int
) -> tuple[FloatArray, FloatArray, FloatArray, NDArray[np.int64]]:
    """Mean, lower end, upper end and number of clusters of every cell; no interval below `fewest_groups` of them.

    Cells that the same clusters have are resampled together, and only from the clusters that have them. One draw serves
    all cells of such a block, so the intervals of neighbouring layers are comparable.
    """
    mean = clusters.means(np.ones((1, len(clusters.names))))[0]
    low, high = np.full((2, mean.size), np.nan)
    has = clusters.weights != 0
    patterns, pattern = np.unique(has, axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        rows = np.flatnonzero(patterns[:, index])
        if len(rows) < fewest_groups(confidence):
            continue
        cells = np.flatnonzero(pattern.ravel() == index)
        for part in np.array_split(cells, 1 + len(cells) * (n_draws + len(rows)) // _BLOCK):
            block = np.ix_(rows, part)
            some = ClusterSums(clusters.names[rows], clusters.sums[block], clusters.weights[block], clusters.n)
            low[part], high[part] = resample(some, seed, n_draws).interval(confidence)
    return mean, low, high, has.sum(axis=0)
