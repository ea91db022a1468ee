"""At which depth audio is fused, and how abruptly: numbers read off a curve of mean recovery over layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lalm_patch.analysis.recovery import layer_curves
from lalm_patch.analysis.resampling import CONFIDENCE, DRAWS, Estimate, FloatArray, Resampled, resample
from lalm_patch.analysis.run_info import about


@dataclass(frozen=True)
class Fusion:
    """Where along the layers recovery returns.

    Attributes:
        depth: layer at which mean recovery first passes half of its value at the last patched layer.
        share: the same as a share of the decoder's depth: 0 the first layer, 1 the last.
        width: layers between passing 10 % and 90 % of the final value; small is abrupt.
        settled: layer at which 90 % is passed.
    """

    depth: Estimate
    share: Estimate
    width: Estimate
    settled: Estimate


def crossing(curves: FloatArray, layers: FloatArray, level: float) -> FloatArray:
    """First layer at which each curve reaches `level` times its final value, interpolated linearly.

    Args:
        curves: recovery [curve, layer].
        layers: numbers of the layers, ascending.
        level: share of the final value.

    Returns:
        [curve]; the first layer where the curve starts above the level, NaN where its final value is not positive.
    """
    index, part, _ = _passed(curves, level)
    before = np.maximum(index - 1, 0)
    found = layers[before] + part * (layers[index] - layers[before])
    return np.where(np.isnan(part), np.nan, found)


def crossing_slopes(curves: FloatArray, layers: FloatArray, level: float) -> tuple[FloatArray, FloatArray]:
    """`crossing`, and how it changes with each layer's recovery: [curve], [curve, layer]; 0 where it does not exist."""
    index, part, rise = _passed(curves, level)
    before, rows = np.maximum(index - 1, 0), np.arange(len(curves))
    per_rise = np.divide(layers[index] - layers[before], rise, out=np.zeros(len(curves)), where=rise > 0)
    per_rise, share = np.where(np.isnan(part), 0.0, per_rise), np.nan_to_num(part)
    slopes = np.zeros_like(curves)
    slopes[rows, before] -= (1 - share) * per_rise
    slopes[rows, index] -= share * per_rise
    slopes[:, -1] += level * per_rise
    return crossing(curves, layers, level), slopes


def _passed(curves: FloatArray, level: float) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """Where each curve [curve, layer] first reaches the level: index of the layer, the share of the way there from the
    layer before (NaN where it never does), and the rise between the two; the last two are 0 at the first layer."""
    final = curves[:, -1]
    target = level * final
    reached = curves >= target[:, None]
    index = reached.argmax(axis=1)
    before, rows = np.maximum(index - 1, 0), np.arange(len(curves))
    rise = curves[rows, index] - curves[rows, before]
    part = np.divide(target - curves[rows, before], rise, out=np.ones(len(curves)), where=rise != 0)
    part = np.where(index == 0, 0.0, part)
    return index, np.where((final > 0) & reached.any(axis=1), part, np.nan), rise


def fusion(dataset: xr.Dataset, confidence: float = CONFIDENCE, n_draws: int = DRAWS) -> Fusion:
    """Depth, width and settling of a run, with intervals over groups.

    Of a token-wise run the curve is that of the last token. The numbers are those of the mean curve: the mean of single
    clips' depths is another thing, and not robust, since single curves cross half of their final value by accident.
    What attention or an MLP adds in one layer does not pile up towards a final value: there the numbers are NaN.
    """
    run = about(dataset)
    if not run.cumulative:
        kept = int(dataset["kept"].sum())
        return Fusion(*[Estimate(np.nan, np.nan, np.nan, kept, 0)] * 4)
    curves = resample(layer_curves(dataset), run.seed, n_draws)
    layers = dataset["layer"].values.astype(np.float64)
    depth, tenth, settled = (crossing(curves.values, layers, level) for level in (0.5, 0.1, 0.9))

    def found(values: FloatArray) -> Estimate:
        return Resampled(values, curves.left_out, curves.n, curves.groups).estimate(confidence)

    return Fusion(found(depth), found(depth / max(run.layers - 1, 1)), found(settled - tenth), found(settled))
