"""Recovery by segment of the text, and whether the listed options carry more than the text around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from lalm_patch.analysis.alignment import kept_samples
from lalm_patch.analysis.permutation import DRAWN, largest_of_many, with_floor
from lalm_patch.analysis.recovery import group_names, mean_over_samples
from lalm_patch.analysis.resampling import CONFIDENCE, ClusterSums, Estimate, Resampled, resample
from lalm_patch.analysis.run_info import about

SEGMENTS = ("transcript", "early", "object", "late", "template", "last")
NEIGHBOURS = ("early", "late")


@dataclass(frozen=True)
class ObjectEffect:
    """Recovery at the listed options minus recovery at the neighbouring text.

    Attributes:
        layer: where the difference stands out most from its noise; -1 without a sample.
        effect: mean difference in that layer. The layer was chosen for it, so it is on the large side; the p-value
            takes the choice into account.
        p: probability of a difference that stands out as much in any of the layers looked at, if there is none.
        p_floor: smallest p that the number of groups allows, whatever the data: 1 / 2^groups.
        p_limit: what the floor comes from, in words.
        test: which test, in words.
        profile: (layer) mean difference with `low`, `high`, `n` (clips), `groups` and the p-value of each layer,
            adjusted for all of them; `p_floor`.
    """

    layer: int
    effect: Estimate
    p: float
    profile: xr.Dataset
    p_floor: float = np.nan
    p_limit: str = ""
    test: str = ""

    @property
    def p_text(self) -> str:
        """The p-value as text; at its floor it says so."""
        return with_floor(self.p, self.p_floor, self.p_limit)


def segment_profiles(dataset: xr.Dataset, confidence: float = CONFIDENCE) -> xr.Dataset:
    """Mean recovery of each segment over layers: each sample's mean over the segment's tokens, then over samples.

    Args:
        dataset: dataset of a token-wise run.
        confidence: of the intervals.

    Returns:
        `mean`, `low`, `high`, `n`, `groups` along (`segment`, `layer`), for the segments that occur, and `tokens`,
        the mean number of tokens in each.
    """
    kept = _token_wise(dataset)
    rates, counts = _by_role(kept)
    names = [role for role in SEGMENTS if bool((counts.sel(segment=role) > 0).any())]
    rates = rates.sel(segment=names)
    found = mean_over_samples(rates, group_names(kept), confidence, about(dataset).seed)
    return found.assign(tokens=counts.sel(segment=names).mean("sample"))


def object_effect(
    dataset: xr.Dataset, window: tuple[float, float] = (0.0, 1.0), seed: int = 0, n_flips: int = DRAWN
) -> ObjectEffect:
    """Test whether recovery at the option tokens exceeds that at the text around them, in any layer of a window.

    The neighbouring text is the early and the late prompt, each sample's mean over their tokens, without the last token
    and the template. The test flips the sign of each group's summed difference, since without an effect object and
    neighbours are as likely the other way round, and compares the largest statistic over the layers with its
    distribution under the flips (`analysis.permutation.largest_of_many`): all flips of up to 12 groups, else random
    ones.

    Args:
        dataset: dataset of a token-wise run.
        window: shares of depth between which layers are looked at.
        seed: of the flips.
        n_flips: number of random flips.
    """
    difference, names = object_difference(dataset, window)
    profile = mean_over_samples(difference, names, seed=seed)
    clusters = ClusterSums.of(difference.values.astype(np.float64), names)
    present = np.asarray((clusters.weights > 0).any(axis=1))
    statistic, adjusted, tested = largest_of_many(clusters.sums, present, seed, n_flips)
    profile["p"] = ("layer", adjusted, {"long_name": "one-sided p-value, adjusted for the layers looked at"})
    profile["p_floor"] = ((), tested.floor, {"long_name": "smallest p-value that the number of groups allows"})
    if not clusters.n or not profile.sizes["layer"] or bool(profile["mean"].isnull().all()):
        nothing = Estimate(np.nan, np.nan, np.nan, clusters.n, len(clusters.names))
        return ObjectEffect(-1, nothing, np.nan, profile)
    best = int(statistic.argmax())
    means = resample(clusters, seed)
    chosen = profile.isel(layer=best)
    effect = Resampled(means.values[:, best], means.left_out, int(chosen["n"]), int(chosen["groups"])).estimate()
    told = (tested.floor, tested.limit, tested.method)
    return ObjectEffect(int(chosen["layer"]), effect, float(adjusted[best]), profile, *told)


def object_difference(dataset: xr.Dataset, window: tuple[float, float] = (0.0, 1.0)) -> tuple[xr.DataArray, np.ndarray]:
    """Each kept sample's recovery at the option tokens minus that at the text around them, and the samples' groups.

    Returns:
        (sample, layer) for the layers whose share of depth lies in the window; NaN where a sample has no such tokens.
    """
    kept = _token_wise(dataset)
    rates, _ = _by_role(kept)
    around = _mean(kept, kept["token_role"].isin(NEIGHBOURS))
    share = dataset["layer"].values / max(about(dataset).layers - 1, 1)
    inside = np.flatnonzero((share >= window[0]) & (share <= window[1]))
    difference = (rates.sel(segment="object", drop=True) - around).isel(layer=inside)
    return difference.transpose("sample", "layer"), group_names(kept)


def _by_role(kept: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Each sample's mean recovery over the tokens of each role (sample, layer, segment), and their numbers."""
    roles = xr.DataArray(np.array(SEGMENTS, object), dims="segment", coords={"segment": np.array(SEGMENTS, object)})
    has = kept["token_role"] == roles
    return _mean(kept, has), has.sum("token")


def _mean(kept: xr.Dataset, has: xr.DataArray) -> xr.DataArray:
    """Each sample's mean over the tokens that `has` marks; NaN where it marks none."""
    total = (kept["recovery_rate"].astype(np.float64).fillna(0.0) * has).sum("token")
    count = has.sum("token")
    return total / count.where(count > 0)


def _token_wise(dataset: xr.Dataset) -> xr.Dataset:
    if "token" not in dataset["recovery_rate"].dims:
        raise ValueError("segments need the dataset of a token-wise run; this one has no dimension `token`")
    return kept_samples(dataset)
