"""How precise a run's numbers are: what rounding did to them, against the same weights in float32.

A run that computes in less than float32 computes some cells of a few clips, and both runs of these, a second time in
float32 (`p_clean_float32`, `p_corrupted_float32`, `p_patched_float32`). The difference is its error. Errors of one clip
hang together, since all its cells share two runs; what counts for a mean over clips is what does not average out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import norm

from lalm_patch.tracing.metrics import error_of_probabilities, measured_as, share_moved


@dataclass(frozen=True)
class Precision:
    """Errors of a run's numbers, from clips that were computed twice; NaN of another metric than the probability.

    Attributes:
        probability: root mean square error of a probability, of clean, corrupted and patched runs of all clips, at
            most: with 90 % confidence, see `error_of_probabilities`.
        probability_largest: the largest of those that were computed twice.
        recovery: root mean square error of a recovery rate, of clips that count; NaN where none of these was
            measured.
        recovery_largest: the largest; likewise.
        mean: standard error that rounding leaves in a mean recovery rate over the clips that count; likewise.
        numbers: probabilities that were computed twice.
        clips: of how many clips.
    """

    probability: float
    probability_largest: float
    recovery: float
    recovery_largest: float
    mean: float
    numbers: int
    clips: int

    def __str__(self) -> str:
        if not self.numbers:
            return "rounding: unknown for this metric (it was measured for the probability)"
        text = f"rounding: a probability is off by {self.probability:.1g} at most (root mean square; largest seen "
        text += f"{self.probability_largest:.1g})"
        if np.isfinite(self.recovery):
            text += f", a recovery rate by {self.recovery:.1g} (largest {self.recovery_largest:.1g})"
        if np.isfinite(self.mean):
            text += f", a mean by {self.mean:.1g}"
        return f"{text}; {self.numbers} numbers of {self.clips} clips against float32"


def precision(dataset: xr.Dataset) -> Precision | None:
    """What rounding did to a run's numbers; None for a run that did not measure it (exact ones need not)."""
    if "p_clean_float32" not in dataset:
        return None
    size = dataset.sizes["sample"]
    exact, found = (
        np.concatenate([_rows(dataset[f"p_{run}{ending}"], size) for run in ("clean", "corrupted", "patched")], axis=1)
        for ending in ("_float32", "")
    )
    known = np.isfinite(exact) & np.isfinite(found)
    if not known.any() or dataset.attrs.get("metric", "probability") != "probability":
        return Precision(np.nan, np.nan, np.nan, np.nan, np.nan, 0, 0)
    errors = (found - exact)[known]
    rates = _rate_errors(dataset, found, exact)
    some = rates[np.isfinite(rates)]
    return Precision(
        probability=error_of_probabilities(found, exact),
        probability_largest=float(np.abs(errors).max()),
        recovery=_rms(some),
        recovery_largest=float(np.abs(some).max()) if some.size else np.nan,
        mean=error_of_a_mean(rates, int(dataset["kept"].sum())),
        numbers=int(known.sum()),
        clips=int(known.any(axis=1).sum()),
    )


def in_short(dataset: xr.Dataset) -> str:
    """What a caption says of a run's precision; empty for a run that computed in float32."""
    found = precision(dataset)
    if found is None:
        return f"rounding in {dataset.attrs['dtype']} not measured" if is_inexact(dataset) else ""
    if np.isfinite(found.mean):
        return f"rounding: a rate is off by {found.recovery:.1g}, a mean by {found.mean:.1g}"
    return "rounding of these rates is unknown"


def is_inexact(dataset: xr.Dataset) -> bool:
    """Whether a run says that it computed in less than float32."""
    precision = str(dataset.attrs.get("precision", "as_loaded"))
    return dataset.attrs.get("dtype") in ("bfloat16", "float16") and precision != "float32"


def error_of_a_mean(errors: NDArray[np.float64], n: int) -> float:
    """Standard error that rounding leaves in means over clips, as root mean square over cells.

    The part that clips have in common stays in a mean, the rest shrinks with the number of clips: with k errors of a
    cell, mean m and variance s^2, an unbiased estimate of the square of the common part is m^2 - s^2 / k.

    Args:
        errors: [clip, cell] of the clips that were measured; NaN where a cell was not.
        n: clips in the means.

    Returns:
        NaN without an error; with one clip its whole error, as nothing says that it averages out.
    """
    count = np.isfinite(errors).sum(axis=0)
    cells = errors[:, count > 0]
    if not cells.size:
        return np.nan
    several = errors[:, count > 1]
    if not several.size:
        return _rms(cells[np.isfinite(cells)])
    k = count[count > 1]
    square = np.nanmean(several, axis=0) ** 2
    variance = np.nanvar(several, axis=0, ddof=1)
    common = max(0.0, float((square - variance / k).mean()))
    return float(np.sqrt(common + variance.mean() / n))


def widened(means: xr.Dataset, dataset: xr.Dataset, confidence: float) -> xr.Dataset:
    """Means with intervals that hold what rounding left in them: the two errors are independent, their squares add.

    Args:
        means: with `mean`, `low`, `high`.
        dataset: the run's.
        confidence: of the intervals.

    Returns:
        The attribute `rounding` says in words what was done.
    """
    found = precision(dataset)
    if found is None:
        return means
    if not np.isfinite(found.mean):
        return means.assign_attrs(rounding="intervals are without the error of rounding, which is unknown")
    more = float(norm.ppf((1 + confidence) / 2)) * found.mean
    low = means["mean"] - np.hypot(means["mean"] - means["low"], more)
    high = means["mean"] + np.hypot(means["high"] - means["mean"], more)
    changed = {"low": low.assign_attrs(means["low"].attrs), "high": high.assign_attrs(means["high"].attrs)}
    return means.assign(changed).assign_attrs(rounding=f"intervals hold an error of {found.mean:.1g} from rounding")


def _rate_errors(dataset: xr.Dataset, found: NDArray[np.float64], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """Errors of recovery rates [clip, cell] of measured clips that count, from probabilities [clip, number]."""
    rows = np.flatnonzero(dataset["kept"].values & np.isfinite(exact[:, 0]))
    direction = measured_as(str(dataset.attrs.get("direction", "denoising")), dataset["recovery_rate"].dims)
    one, other = (
        share_moved(values[rows, 2:], values[rows, :1], values[rows, 1:2], direction) for values in (found, exact)
    )
    return np.asarray(one - other, np.float64)


def _rows(values: xr.DataArray, size: int) -> NDArray[np.float64]:
    return values.transpose("sample", ...).values.astype(np.float64).reshape(size, -1)


def _rms(errors: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(errors**2))) if errors.size else np.nan
