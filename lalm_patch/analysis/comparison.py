"""Differences in fusion depth between runs: models on one attribute, attributes of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import xarray as xr

from lalm_patch.analysis.depth import crossing, crossing_slopes
from lalm_patch.analysis.permutation import DRAWN, GroupTest, compare_groups, with_floor
from lalm_patch.analysis.recovery import curves_together
from lalm_patch.analysis.resampling import DRAWS, ClusterSums, Estimate, FloatArray, Resampled, resample_together
from lalm_patch.analysis.run_info import about, variants

HALF = 0.5


@dataclass(frozen=True)
class Comparison:
    """Two runs compared.

    Attributes:
        first, second: what is compared: two models or two attributes.
        within: what they have in common: the attribute or the model.
        granularity: of both runs.
        difference: fusion depth of the first minus the second, as shares of each decoder's depth.
        p: two-sided p-value of a permutation test over groups; Student's where that is larger, see `depth_test`.
        p_adjusted: after Holm's correction for all comparisons made together.
        n: samples of both runs.
        groups: groups (speakers, recordings) of both runs, those that both have counted once.
        test: which test, in words.
        p_floor: smallest p that the number of groups allows, whatever the data: 0.25 with 3 groups that both runs have.
        p_limit: what the floor comes from, in words.
    """

    first: str
    second: str
    within: str
    granularity: str
    difference: Estimate
    p: float
    p_adjusted: float
    n: int
    groups: int
    test: str
    p_floor: float
    p_limit: str

    @property
    def p_text(self) -> str:
        """The p-value as text; at its floor it says so."""
        return with_floor(self.p, self.p_floor, self.p_limit)

    def __str__(self) -> str:
        return (
            f"{self.first} - {self.second} ({self.within}, {self.granularity}-wise): {self.difference}, "
            f"p = {self.p_text}, {self.p_adjusted:.3g} by Holm; n = {self.n}, {self.groups} groups; {self.test}"
        )


def compare(runs: Sequence[xr.Dataset], seed: int = 0, n_draws: int = DRAWS) -> list[Comparison]:
    """Compare the fusion depth of every two runs that share the granularity and either attribute or model.

    Of several runs of one model and attribute (other seeds, other prompts) only those are compared with another's that
    have the same of these settings.

    Runs on the same clips draw their groups together, so the difference is a paired one. The p-value is that of a
    permutation test over groups, see `depth_test` and `analysis.permutation`: groups that both runs have are exchanged
    between them, the others dealt anew. Samples without a group stand alone, and are paired by their id. Holm's method
    holds the family-wise error. Runs of a single group are not compared.
    """
    # Imported here: statsmodels takes a second, and a run without comparisons should not pay it.
    from statsmodels.stats.multitest import multipletests

    found: list[Comparison] = []
    for (a, its), (b, others) in combinations(zip(runs, variants(runs), strict=True), 2):
        one, two = about(a), about(b)
        same_model, same_attribute = one.model == two.model, one.attribute == two.attribute
        if one.granularity != two.granularity or same_model == same_attribute:
            continue
        if one.departs != two.departs or not one.cumulative:
            continue
        if its and others and its != others:
            continue  # they differ in more than the model or the attribute
        if not (a["kept"].any() and b["kept"].any()):
            continue
        curves = curves_together([a, b])
        difference = _difference(a, b, curves, seed, n_draws)
        if np.isnan(difference.values[0]) or difference.groups < 2:
            continue
        tested = depth_test(a, b, curves, seed)
        names = (one.attribute, two.attribute, one.model) if same_model else (one.model, two.model, one.attribute)
        if variant := its or others:
            names = (*names[:2], f"{names[2]}, {variant}")
        row = Comparison(
            *names,
            granularity=one.granularity,
            difference=difference.estimate(),
            p=tested.p,
            p_adjusted=tested.p,
            n=difference.n,
            groups=len(np.unique(np.concatenate([part.names for part in curves]))),
            test=tested.method,
            p_floor=tested.floor,
            p_limit=tested.limit,
        )
        found.append(row)
    if not found:
        return []
    adjusted = multipletests([row.p for row in found], method="holm")[1]
    return [replace(row, p_adjusted=float(p)) for row, p in zip(found, adjusted, strict=True)]


def depth_difference(a: xr.Dataset, b: xr.Dataset, seed: int = 0, n_draws: int = DRAWS) -> Resampled:
    """Difference in fusion depth (share of depth) of two runs in which samples count."""
    return _difference(a, b, curves_together([a, b]), seed, n_draws)


def _difference(a: xr.Dataset, b: xr.Dataset, curves: Sequence[ClusterSums], seed: int, n_draws: int) -> Resampled:
    one, two = resample_together(curves, seed, n_draws)
    return replace(one, values=depth_shares(a, one.values) - depth_shares(b, two.values))


def depth_test(
    a: xr.Dataset, b: xr.Dataset, curves: Sequence[ClusterSums] | None = None, seed: int = 0, drawn: int = DRAWN
) -> GroupTest:
    """Test that two runs have the same fusion depth (share of depth).

    The p-value is that of `depth_permutation`, or Student's where that is larger. The first is exact if the runs do not
    differ at all; where they are equally deep, but one is more abrupt or has more groups, it is too small with few
    groups, and Student's comes closer (benchmarks/false_positives.py measures both together). The latter's standard
    error is the intervals', from leaving out one group at a time.

    Args: as `depth_permutation`.
    """
    curves = curves_together([a, b]) if curves is None else curves
    tested = depth_permutation(a, b, curves, seed, drawn)
    student = _difference(a, b, curves, seed, 0).student_p()
    method = f"{tested.method}; or Student's t, if its p is larger"
    return replace(tested, p=tested.p if np.isnan(tested.p) else max(tested.p, student), method=method)


def depth_permutation(
    a: xr.Dataset, b: xr.Dataset, curves: Sequence[ClusterSums] | None = None, seed: int = 0, drawn: int = DRAWN
) -> GroupTest:
    """Permutation test that two runs have the same fusion depth (share of depth).

    Decoders of different depth are brought to common shares of depth: every curve is drawn as straight pieces between
    its layers, which leaves its fusion depth as it is.

    Args:
        a, b: runs in which samples count.
        curves: their `curves_together`, where these are there already.
        seed: of random arrangements.
        drawn: how many random ones, where not all are tried.
    """
    curves = curves_together([a, b]) if curves is None else curves
    shares = [_shares(run) for run in (a, b)]
    common = np.unique(np.concatenate(shares))
    parts = [_at(common, own, part) for own, part in zip(shares, curves, strict=True)]
    return compare_groups(parts[0], parts[1], lambda means: crossing_slopes(means, common, HALF), seed, drawn)


def _shares(run: xr.Dataset) -> FloatArray:
    """Share of the decoder's depth of each layer: [layer], ascending."""
    return np.asarray(run["layer"].values.astype(np.float64) / max(about(run).layers - 1, 1))


def _at(common: FloatArray, shares: FloatArray, part: ClusterSums) -> ClusterSums:
    """Sums [group, layer] at other shares of depth, by straight lines between those they are known at."""
    if np.array_equal(common, shares):
        return part
    sums, weights = (
        np.array([np.interp(common, shares, row) for row in rows]).reshape(len(rows), len(common))
        for rows in (part.sums, part.weights)
    )
    return replace(part, sums=sums, weights=weights)


def depth_shares(run: xr.Dataset, means: FloatArray) -> FloatArray:
    """Fusion depth as a share of the decoder's depth, for each resampled curve [row, layer]."""
    return crossing(means, _shares(run), HALF)
