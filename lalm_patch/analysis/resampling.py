"""Bootstrap over clusters: everything that is not independent (a speaker's clips) is drawn together.

A mean recovery rate is a sum over samples divided by their number, and a ratio of means a sum of gains divided by a sum
of gaps. Both are ratios of sums over clusters, so one resampling serves both: how often each cluster was drawn, times
its sums.

The intervals are percentile intervals widened for few clusters: their levels come from Student's t with one degree of
freedom less than there are clusters (the expanded percentile interval of Hesterberg 2015, The American Statistician
69:4, 371-386). Plain ones are too narrow with few clusters. BCa corrects for skew too, but is undefined where all samples
agree, as they do where recovery is 0 or 1 by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

FloatArray = NDArray[np.float64]

DRAWS = 2000
CONFIDENCE = 0.95

_BLOCK = 4_000_000
"""Numbers a block of resampled means may hold: some tens of MB."""


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: NaN where it does not exist.
        low, high: interval; NaN where it cannot be estimated (fewer than two clusters).
        n: samples behind it.
        groups: clusters (speakers, recordings) behind it.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "undefined"
        if np.isnan(self.low):
            return f"{self.value:z.2f} (no interval: fewer than two groups)"
        return f"{self.value:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"


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
        return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def draws(n_clusters: int, seed: int, n_draws: int = DRAWS) -> FloatArray:
    """How often each cluster is drawn [1 + draw, cluster]; the first row is the data as they are."""
    times = np.ones((1 + n_draws, n_clusters))
    if n_clusters:
        rng = np.random.default_rng(seed)
        times[1:] = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_draws)
    return times


def joint_means(parts: Sequence[ClusterSums], seed: int, n_draws: int = DRAWS) -> list[FloatArray]:
    """Resampled means [1 + draw, cell] of several runs, the first row being the estimates.

    Runs that share clusters (two models on the same clips) draw them together, so that their difference is a paired
    one; runs that share none draw independently.
    """
    shared = len(parts) > 1 and len(np.unique(np.concatenate([part.names for part in parts]))) < sum(
        len(part.names) for part in parts
    )
    if not shared:
        return [part.means(draws(len(part.names), seed + index, n_draws)) for index, part in enumerate(parts)]
    everyone = np.unique(np.concatenate([part.names for part in parts]))
    times = draws(len(everyone), seed, n_draws)
    return [part.means(times[:, np.searchsorted(everyone, part.names)]) for part in parts]


def levels(n_clusters: int, confidence: float) -> tuple[float, float]:
    """Quantiles of the resampled values that make the interval; see the module's text."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1, got {confidence}")
    if n_clusters < 2:
        return np.nan, np.nan
    tail = float(norm.cdf(sqrt(n_clusters / (n_clusters - 1)) * t.ppf((1 - confidence) / 2, n_clusters - 1)))
    return tail, 1 - tail


def interval(values: FloatArray, n_clusters: int, confidence: float = CONFIDENCE) -> tuple[FloatArray, FloatArray]:
    """Interval of each cell from resampled values [1 + draw, ...]; draws in which a value does not exist are left out.

    NaN with fewer than two clusters, and where fewer than half of the draws have a value.
    """
    drawn = values[1:]
    nothing = np.full(drawn.shape[1:], np.nan)
    if n_clusters < 2 or not drawn.size:
        return nothing, nothing.copy()
    missing = np.isnan(drawn)
    enough = missing.mean(axis=0) < 0.5
    found = np.full((2, *drawn.shape[1:]), np.nan)
    quantile = np.nanquantile if missing[:, enough].any() else np.quantile
    if enough.any():
        found[:, enough] = quantile(drawn[:, enough], levels(n_clusters, confidence), axis=0)
    return found[0], found[1]


def estimate(values: FloatArray, n: int, n_clusters: int, confidence: float = CONFIDENCE) -> Estimate:
    """One number from its resampled values [1 + draw], the first being the number itself."""
    low, high = interval(values[:, None], n_clusters, confidence)
    return Estimate(float(values[0]), float(low[0]), float(high[0]), n, n_clusters)


def ratio_intervals(
    clusters: ClusterSums, confidence: float, seed: int, n_draws: int
) -> tuple[FloatArray, FloatArray, FloatArray, NDArray[np.int64]]:
    """Mean, lower end, upper end and number of clusters of every cell.

    Cells that the same clusters have are resampled together, and only from the clusters that have them. One draw serves
    all cells of such a block, so the intervals of neighbouring layers are comparable.
    """
    mean = clusters.means(np.ones((1, len(clusters.names))))[0]
    low, high = np.full((2, mean.size), np.nan)
    has = clusters.weights != 0
    patterns, pattern = np.unique(has, axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        rows = np.flatnonzero(patterns[:, index])
        if len(rows) < 2:
            continue
        times = draws(len(rows), seed, n_draws)
        cells = np.flatnonzero(pattern.ravel() == index)
        for part in np.array_split(cells, 1 + len(cells) * len(times) // _BLOCK):
            block = np.ix_(rows, part)
            some = ClusterSums(clusters.names[rows], clusters.sums[block], clusters.weights[block], clusters.n)
            low[part], high[part] = interval(some.means(times), len(rows), confidence)
    return mean, low, high, has.sum(axis=0)
