"""How well a traced run finds what was planted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from lalm_patch.analysis import fusion, licence, mean_recovery
from lalm_patch.analysis.recovery import SAME_PLATEAU
from lalm_patch.truth.circuit import FloatArray

CARRIES, EMPTY = 0.05, 0.01
"""A cell is planted if its true recovery is at least the first (in size), empty if at most the second; between the two
it does not count for the ranking."""
NOTHING = 1e-9
"""A cell's true recovery is 0 if it is smaller, in size."""
WITHIN = 1.0
ROUNDING = 1e-4
"""Layers by which rounding may move a fusion depth past the end of an interval that has next to no width."""


@dataclass(frozen=True)
class Score:
    """What tracing made of one planted model. NaN: the question does not arise.

    Attributes:
        kept: clips that count.
        auroc: probability that a planted cell's mean recovery is larger (in size) than an empty cell's.
        layer: whether the largest cell (before the last token) is a planted one; of a layer-wise run, whether the
            steepest rise is in a planted layer.
        position: whether the position (or segment) of the largest cell before the last token is a planted one; of
            single heads, whether the head of the largest cell is; of paths, whether the largest cell is.
        depth: estimated fusion depth in layers.
        depth_error: distance of the estimate from the planted layers; infinite for an estimate that does not exist.
        covered: whether the interval holds the depth of the whole population of clips; NaN without an interval.
        width: of that interval, in layers; likewise.
        largest: largest mean recovery of any cell.
        paths: largest mean recovery at each planted position before the last, descending.
        agreement: of an approximation, the correlation of its recovery rates with exact ones.
        false: largest mean recovery, in size, of the cells whose true one is 0; NaN without such cells.
    """

    kept: int
    auroc: float
    layer: float
    position: float
    depth: float
    depth_error: float
    covered: float
    width: float
    largest: float
    paths: tuple[float, ...]
    agreement: float = np.nan
    false: float = np.nan

    @property
    def within(self) -> float:
        """Whether the depth is within one layer of the truth; NaN where there is none to be estimated."""
        return self.depth_error if np.isnan(self.depth_error) else float(self.depth_error <= WITHIN)


def score(run: xr.Dataset, expected: FloatArray, population: xr.Dataset | None = None) -> Score | None:
    """Score a run against the recovery that the truth implies.

    Args:
        run: dataset of a traced model.
        expected: true mean recovery in the shape of its grid; NaN where it is unknown.
        population: dataset of all the clips that the run's were drawn from; None: coverage is not asked for.

    Returns:
        None if no clip of the run counts.
    """
    recovery = mean_recovery(run)
    mean = recovery["mean"].transpose("layer", ...).values
    if not np.isfinite(mean).all():
        return None
    if {"head", "receiver_layer"} & set(recovery.dims):
        return _score_heads(run, mean.reshape(len(mean), -1), expected.reshape(len(mean), -1))
    by_place = mean.ndim > 1  # tokens or segments; the last of them is where the answer is read
    truth = expected[:, -1] if by_place else expected
    low, high = planted_depth(truth)
    depth = fusion(run).depth
    layer, position, paths = _top_cell(mean, expected) if by_place else (_steepest(mean, truth, low, high), np.nan, ())
    covered = np.nan
    if population is not None:
        whole = fusion(population).depth.value
        known = np.isfinite([depth.low, depth.high, whole]).all()
        covered = float(depth.low - ROUNDING <= whole <= depth.high + ROUNDING) if known else np.nan
    return Score(
        kept=int(run.kept.sum()),
        auroc=auroc(np.abs(mean), expected),
        layer=layer,
        position=position,
        depth=depth.value,
        depth_error=np.inf if np.isnan(depth.value) else max(low - depth.value, depth.value - high, 0.0),
        covered=covered,
        width=depth.high - depth.low,
        largest=float(mean.max()),
        paths=paths,
        agreement=_agreement(run),
        false=_false(mean, expected),
    )


def _agreement(run: xr.Dataset) -> float:
    found = licence(run)
    return np.nan if found is None else found.pearson


def _score_heads(run: xr.Dataset, mean: FloatArray, expected: FloatArray) -> Score:
    """Single heads [layer, head, or edge and head] and paths [layer, all else] have no curve that rises to 1: where is
    the largest cell?"""
    layer, head = np.unravel_index(int(mean.argmax()), mean.shape)
    planted = np.abs(expected) >= CARRIES
    found = (float(planted[layer].any()), float(planted[layer, head])) if planted.any() else (np.nan, np.nan)
    unasked = dict.fromkeys(("depth", "depth_error", "covered", "width"), np.nan)
    ranking = auroc(np.abs(mean), expected)
    largest, agreement = float(mean.max()), _agreement(run)
    false = _false(mean, expected)
    return Score(
        int(run.kept.sum()), ranking, *found, **unasked, largest=largest, paths=(), agreement=agreement, false=false
    )


def _false(mean: FloatArray, expected: FloatArray) -> float:
    """What is largest where nothing is; what is left of exp(-30) does not count."""
    nothing = np.abs(mean[np.abs(expected) < NOTHING])
    return float(nothing.max()) if nothing.size else np.nan


def auroc(values: FloatArray, expected: FloatArray) -> float:
    """Area under the ROC curve of values as a test for planted cells; NaN without cells of both kinds."""
    size = np.abs(expected)
    planted, empty = values[size >= CARRIES], values[size <= EMPTY]
    if not planted.size or not empty.size:
        return np.nan
    return float(mannwhitneyu(planted, empty).statistic / (planted.size * empty.size))


def planted_depth(expected: FloatArray) -> tuple[int, int]:
    """Layers between which the true curve [layer] passes half of its final value; they differ where it is unknown."""
    half = expected[-1] / 2
    high = int((expected >= half).argmax())
    below = np.flatnonzero(expected[:high] < half)
    return (int(below[-1]) + 1 if below.size else 0), high


def _steepest(mean: FloatArray, truth: FloatArray, low: int, high: int) -> float:
    """Whether the curve rises most where it has to."""
    found = int(np.diff(mean, prepend=0.0).argmax())
    if np.isnan(truth).any():
        return float(low <= found <= high)
    return float(found == np.diff(truth, prepend=0.0).argmax())


def _top_cell(mean: FloatArray, expected: FloatArray) -> tuple[float, float, tuple[float, ...]]:
    """Whether the largest cell before the last place is planted, whether its place is; recovery by planted place."""
    before, planted = mean[:, :-1], np.abs(expected[:, :-1]) >= CARRIES
    places = np.flatnonzero(planted.any(axis=0))
    if not places.size:
        return np.nan, np.nan, ()
    layer, place = np.argwhere(before >= before.max() - SAME_PLATEAU)[0]
    by_place: NDArray[np.float64] = before[:, places].max(axis=0)
    paths = tuple(sorted((float(value) for value in by_place), reverse=True))
    return float(planted[layer, place]), float(place in places), paths


def draw_run(population: xr.Dataset, clips: int, seed: int) -> xr.Dataset:
    """A run of clips drawn with replacement from a population's, each a group of its own.

    The mean over the population is then exactly what the run estimates.
    """
    rows = np.random.default_rng(seed).integers(population.sizes["sample"], size=clips)
    names: dict[str, Any] = {
        name: ("sample", np.array([f"draw{index}" for index in range(clips)], object)) for name in ("sample", "group")
    }
    return population.isel(sample=rows).assign_coords(names)
