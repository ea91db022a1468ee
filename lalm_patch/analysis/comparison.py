"""Differences in fusion depth between runs: models on one attribute, attributes of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import xarray as xr

from lalm_patch.analysis.depth import crossing
from lalm_patch.analysis.recovery import layer_curves
from lalm_patch.analysis.resampling import DRAWS, Estimate, FloatArray, Resampled, resample_together
from lalm_patch.analysis.run_info import about, variants


@dataclass(frozen=True)
class Comparison:
    """Two runs compared.

    Attributes:
        first, second: what is compared: two models or two attributes.
        within: what they have in common: the attribute or the model.
        granularity: of both runs.
        difference: fusion depth of the first minus the second, as shares of each decoder's depth.
        p: two-sided bootstrap p-value.
        p_adjusted: after Holm's correction for all comparisons made together.
    """

    first: str
    second: str
    within: str
    granularity: str
    difference: Estimate
    p: float
    p_adjusted: float


def compare(runs: Sequence[xr.Dataset], seed: int = 0, n_draws: int = DRAWS) -> list[Comparison]:
    """Compare the fusion depth of every two runs that share the granularity and either attribute or model.

    Of several runs of one model and attribute (other seeds, other prompts) only those are compared with another's that
    have the same of these settings.

    Runs on the same clips draw their groups together, so the difference is a paired one. The p-value is
    twice the smaller share of draws on one side of 0. Holm's method holds the family-wise error.
    """
    # Imported here: statsmodels takes a second, and a run without comparisons should not pay it.
    from statsmodels.stats.multitest import multipletests

    found: list[tuple[str, str, str, str, Estimate, float]] = []
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
        difference = depth_difference(a, b, seed, n_draws)
        if np.isnan(difference.values[0]) or difference.groups < 2:
            continue
        names = (one.attribute, two.attribute, one.model) if same_model else (one.model, two.model, one.attribute)
        if variant := its or others:
            names = (*names[:2], f"{names[2]}, {variant}")
        found.append((*names, one.granularity, difference.estimate(), two_sided_p(difference)))
    if not found:
        return []
    adjusted = multipletests([row[-1] for row in found], method="holm")[1]
    return [Comparison(*row, float(p)) for row, p in zip(found, adjusted, strict=True)]


def depth_difference(a: xr.Dataset, b: xr.Dataset, seed: int = 0, n_draws: int = DRAWS) -> Resampled:
    """Difference in fusion depth (share of depth) of two runs in which samples count."""
    one, two = resample_together([layer_curves(a), layer_curves(b)], seed, n_draws)
    values = depth_shares(a, one.values) - depth_shares(b, two.values)
    return Resampled(values, one.left_out, one.n, one.groups)


def depth_shares(run: xr.Dataset, means: FloatArray) -> FloatArray:
    """Fusion depth as a share of the decoder's depth, for each resampled curve [row, layer]."""
    layers = run["layer"].values.astype(np.float64)
    return crossing(means, layers, 0.5) / max(about(run).layers - 1, 1)


def two_sided_p(number: Resampled) -> float:
    """Twice the smaller share of draws on one side of 0, never 0 itself."""
    drawn = number.drawn[~np.isnan(number.drawn)]
    smaller = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(drawn))))
