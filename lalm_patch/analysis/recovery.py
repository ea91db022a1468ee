"""Mean recovery with intervals, as mean of ratios and as ratio of means, and where it is largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import xarray as xr

from lalm_patch.analysis.alignment import align_tokens, kept_samples
from lalm_patch.analysis.licence import licence
from lalm_patch.analysis.precision import widened
from lalm_patch.analysis.resampling import (
    CONFIDENCE,
    DRAWS,
    ClusterSums,
    Resampled,
    fewest_groups,
    ratio_intervals,
    resample,
    too_few,
    with_interval,
)
from lalm_patch.analysis.run_info import about

COLUMNS = ("head", "segment", "edge", "window", "source_layer", "ablated", "steering", "receiver_layer")
"""Dimensions whose columns are no curve over layers each with a place of its own in the text."""
SAME_PLATEAU = 1e-3
"""Means this close to the largest one count as tied: on a plateau, rounding would choose the layer otherwise."""


@dataclass(frozen=True)
class Cell:
    """Mean recovery at one place of a grid.

    Attributes:
        layer: decoder layer.
        mean: mean recovery rate over the kept samples.
        low, high: its interval; NaN where there is none, see `reason`.
        n: samples in the mean.
        token: column of the grid; None in a layer-wise run.
        text: what the token says; empty in a layer-wise run.
        role: role of the token; empty in a layer-wise run.
        column: what else the cell is of, `head 3` or `segment object`; empty in a layer-wise and a token-wise run.
        groups: groups (speakers, recordings) in the mean.
        reason: why there is no interval; else empty.
    """

    layer: int
    mean: float
    low: float
    high: float
    n: int
    token: int | None = None
    text: str = ""
    role: str = ""
    column: str = ""
    groups: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return with_interval(self.mean, self.low, self.high, self.reason)

    @property
    def place(self) -> str:
        """Where it is, for a sentence."""
        return f"layer {self.layer}, {self.column}" if self.column else f"layer {self.layer}"


@dataclass(frozen=True)
class Peak:
    """Where mean recovery is largest.

    Attributes:
        over_layers: over the layers; of a token-wise run, at the last token; of heads or segments, over these too.
        overall: over all cells of the grid.
        before_last: over the cells before the last token; None in a layer-wise run.
    """

    over_layers: Cell
    overall: Cell
    before_last: Cell | None

    @property
    def layer(self) -> int:
        """The layer of `over_layers`."""
        return self.over_layers.layer


def mean_recovery(
    dataset: xr.Dataset, confidence: float = CONFIDENCE, seed: int = 0, n_resamples: int = DRAWS
) -> xr.Dataset:
    """Mean recovery rate over the kept samples, with a bootstrap interval over groups.

    All samples with the same coordinate `group` (a speaker, a source recording) are drawn together, since they are not
    independent; the mean stays the mean over samples. Where every sample has a group of its own this is the ordinary
    bootstrap.

    Args:
        dataset: a run's dataset; token-wise ones go through `align_tokens`.
        confidence: of the interval.
        seed: of the draws.
        n_resamples: number of draws.

    Returns:
        `mean`, `low`, `high`, `n` (samples) and `groups` (clusters) along the grid's dimensions. Cells that a
        sample lacks (NaN) are left out, with their own n. No sample: the mean is NaN; fewer groups than
        `analysis.resampling.fewest_groups`: `low` and `high` are NaN, and the attribute `no_interval` says why.

    Raises:
        DataError: approximate cells without a licence, see `lalm_patch.analysis.licence`.
    """
    licence(dataset)  # no mean of approximate cells without one
    samples = align_tokens(dataset) if "token" in dataset["recovery_rate"].dims else kept_samples(dataset)
    found = mean_over_samples(samples["recovery_rate"], group_names(samples), confidence, seed, n_resamples)
    found = widened(found, dataset, confidence)
    kept = {"n_samples": dataset.sizes["sample"], "n_kept": samples.sizes["sample"]}
    alignment = {key: samples.attrs[key] for key in ("token_alignment",) if key in samples.attrs}
    return found.assign_attrs({**kept, **alignment})


def mean_over_samples(
    rates: xr.DataArray,
    names: np.ndarray,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    n_resamples: int = DRAWS,
) -> xr.Dataset:
    """Mean and interval over `sample` of any array (sample, ...), NaN left out; see `mean_recovery`.

    Args:
        rates: the values.
        names: group of each sample.
        confidence: of the interval.
        seed: of the draws.
        n_resamples: number of draws.
    """
    rates = rates.transpose("sample", ...)
    dims, shape = rates.dims[1:], rates.shape[1:]
    values = rates.values.astype(np.float64).reshape(rates.sizes["sample"], prod(shape))
    clusters = ClusterSums.of(values, names)
    mean, low, high, groups = ratio_intervals(clusters, confidence, seed, n_resamples)
    described = {
        "mean": (mean, "mean recovery rate over the kept samples", {"units": "1"}),
        "low": (low, f"lower end of the {confidence:.0%} interval", {"units": "1"}),
        "high": (high, f"upper end of the {confidence:.0%} interval", {"units": "1"}),
        "n": (clusters.weights.sum(axis=0).astype(np.int64), "samples in the mean", {}),
        "groups": (groups, "groups (speakers, recordings) the samples come from", {}),
    }
    variables = {
        name: (dims, array.reshape(shape), {"long_name": text, **units})
        for name, (array, text, units) in described.items()
    }
    coords = {name: coord for name, coord in rates.coords.items() if set(coord.dims) <= set(dims)}
    how = f"{confidence:.0%} BCa bootstrap over groups, {n_resamples} draws, seed {seed}"
    attributes: dict[str, Any] = {"interval": how, "confidence": confidence, "fewest_groups": fewest_groups(confidence)}
    if reason := too_few(int(groups.max(initial=0)), confidence):
        attributes["no_interval"] = reason
    return xr.Dataset(variables, coords, attributes)


def group_names(samples: xr.Dataset) -> np.ndarray:
    """Group of each sample; samples without one stand alone, by their id (coordinate `sample`), which is the same in
    all runs. Without ids they are numbered: that says nothing across runs, see `curves_together`."""
    for name in ("group", "sample"):
        if name in samples.coords:
            return samples[name].values.astype(str)
    return np.arange(samples.sizes["sample"]).astype(str)


def ratio_of_means(
    dataset: xr.Dataset, confidence: float = CONFIDENCE, seed: int = 0, n_resamples: int = DRAWS
) -> xr.Dataset:
    """Mean gain over mean gap: (mean p_patched - mean p_corrupted) / (mean p_clean - mean p_corrupted).

    Of a noising run mean loss over mean gap: (mean p_clean - mean p_patched) / (mean p_clean - mean p_corrupted).

    A mean of ratios gives a clip with a tiny gap the same weight as one with a large gap, and its ratio can be
    anything; here each clip counts in proportion to its gap. Where the two differ much, few clips decide the mean.

    Returns:
        `mean`, `low`, `high` and `groups` along `layer`, of a token- or segment-wise run at the last token; no
        interval where groups are few, as in `mean_recovery`.
    """
    kept = kept_samples(dataset)
    patched = kept["p_patched"].astype(np.float64)
    patched = at_last_token(kept, patched)
    clean, corrupted = kept["p_clean"].astype(np.float64), kept["p_corrupted"].astype(np.float64)
    moved = clean - patched if about(dataset).loses else patched - corrupted
    gain = moved.transpose("sample", "layer").values
    gap = (clean - corrupted).values
    clusters = ClusterSums.of(gain, group_names(kept), np.broadcast_to(gap[:, None], gain.shape))
    mean, low, high, groups = ratio_intervals(clusters, confidence, seed, n_resamples)
    text = "ratio of the mean gain to the mean gap in probability"
    found = (("mean", mean), ("low", low), ("high", high), ("groups", groups))
    variables = {name: ("layer", array) for name, array in found}
    return xr.Dataset(variables, {"layer": dataset["layer"]}, {"long_name": text})


def at_last_token(samples: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    """Values (sample, layer, token) at each sample's last token, or (sample, layer, segment) at the segment it is:
    (sample, layer); those of a layer-wise run are of all text positions and stay as they are."""
    if "segment" in values.dims:
        return values.sel(segment="last", drop=True)
    return values.where(samples["token_role"] == "last").max("token") if "token" in values.dims else values


def layer_curves(dataset: xr.Dataset) -> ClusterSums:
    """Recovery over layers of the kept samples, by group; of a token- or segment-wise run at the last token."""
    kept = kept_samples(dataset)
    rates = kept["recovery_rate"]
    rates = at_last_token(kept, rates)
    return ClusterSums.of(rates.transpose("sample", "layer").values.astype(np.float64), group_names(kept))


def curves_together(runs: Sequence[xr.Dataset]) -> list[ClusterSums]:
    """`layer_curves` of several runs, whose groups of the same name belong together.

    A run whose samples have neither groups nor ids shares none: a place in one run says nothing about the same place in
    another.
    """
    found = []
    for index, run in enumerate(runs):
        curves = layer_curves(run)
        if not {"group", "sample"} & set(run.coords):
            curves = replace(curves, names=np.array([f"run {index}, {name}" for name in curves.names], str))
        found.append(curves)
    return found


def peak_layer(dataset: xr.Dataset, recovery: xr.Dataset | None = None) -> Peak | None:
    """Where mean recovery is largest; the first layer in a tie (within `SAME_PLATEAU`).

    At the last token of the last layer, recovery is 1 by construction: `before_last` looks at the other tokens.

    Args:
        dataset: a run's dataset.
        recovery: its `mean_recovery`, where that is there already.

    Returns:
        None if no sample counts.
    """
    recovery = mean_recovery(dataset) if recovery is None else recovery
    if not recovery["mean"].notnull().any():
        return None
    if "token" not in recovery.dims:
        best = _largest(recovery)
        return Peak(best, best, None)
    last = recovery.isel(token=[-1])
    before = recovery.isel(token=slice(0, -1))
    elsewhere = _largest(before) if before["mean"].notnull().any() else None
    return Peak(_largest(last), _largest(recovery), elsewhere)


def peak_interval(dataset: xr.Dataset, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Layers between which the peak over layers lies, from the peaks of resampled curves; NaN if it cannot be said."""
    if about(dataset).granularity in COLUMNS:
        return np.nan, np.nan
    clusters = layer_curves(dataset)
    if not clusters.n:
        return np.nan, np.nan
    curves = resample(clusters, about(dataset).seed)
    first = (curves.values >= curves.values.max(axis=1, keepdims=True) - SAME_PLATEAU).argmax(axis=1)
    peaks = dataset["layer"].values[first].astype(np.float64)
    low, high = Resampled(peaks, curves.left_out, curves.n, curves.groups).interval(confidence)
    return float(low), float(high)


def _largest(recovery: xr.Dataset) -> Cell:
    means = recovery["mean"].transpose("layer", ...).values
    first = np.argwhere(means >= np.nanmax(means) - SAME_PLATEAU)[0]
    return _cell(recovery.isel(dict(zip(recovery["mean"].dims, first.tolist(), strict=True))))


def _cell(place: xr.Dataset) -> Cell:
    texts: dict[str, Any] = {}
    if "token" in place.coords:
        texts = {"token": int(place["token"]), "text": str(place["token_text"].item())}
        texts["role"] = str(place["token_role"].item())
    if names := [str(name) for name in place.coords if name in COLUMNS]:
        texts["column"] = f"{names[0]} {place[names[0]].item()}"
    mean, low, high = (float(place[name]) for name in ("mean", "low", "high"))
    groups = int(place["groups"])
    reason = too_few(groups, float(place.attrs.get("confidence", CONFIDENCE)))
    return Cell(int(place["layer"]), mean, low, high, int(place["n"]), **texts, groups=groups, reason=reason)


def over_layers(recovery: xr.Dataset) -> list[Cell]:
    """Mean recovery layer by layer, of a token-wise run at the last token, of heads or segments the largest of each
    layer; from `mean_recovery`."""
    line = recovery.isel(token=-1) if "token" in recovery.dims else recovery
    layers = [line.isel(layer=index) for index in range(line.sizes["layer"])]
    for column in (str(dim) for dim in line.dims if dim in COLUMNS):
        layers = [
            layer.isel({column: int(np.nan_to_num(layer["mean"].values, nan=-np.inf).argmax())}) for layer in layers
        ]
    return [_cell(layer) for layer in layers]
