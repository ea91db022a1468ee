"""The licence of an approximation: how well its cells agree with exact ones that the same run computed.

A run with an approximate engine computes a few random cells of every clip exactly, too (`p_exact`). Nothing is drawn,
and no mean taken, of approximate cells without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from lalm_patch.errors import DataError
from lalm_patch.settings import APPROXIMATE
from lalm_patch.tracing.metrics import share_moved

FEWEST = 10
"""Exact cells without which agreement cannot be told."""


@dataclass(frozen=True)
class Licence:
    """Agreement of approximate with exact recovery rates, over cells of all clips.

    Attributes:
        engine: which approximation.
        pearson: correlation; NaN where either is the same in all cells.
        spearman: correlation of the ranks; likewise.
        error: mean absolute difference of the rates.
        cells: how many were compared.
        clips: of how many clips.
    """

    engine: str
    pearson: float
    spearman: float
    error: float
    cells: int
    clips: int

    def __str__(self) -> str:
        return (
            f"{self.engine.replace('_', ' ')}: r = {self.pearson:.2f}, rho = {self.spearman:.2f} with {self.cells} "
            f"exact cells of {self.clips} clips"
        )


def licence(dataset: xr.Dataset) -> Licence | None:
    """The licence of a run's dataset; None for an exact run, and where no clip counts.

    Raises:
        DataError: approximate cells, and fewer than `FEWEST` exact ones beside them.
    """
    engine = str(dataset.attrs.get("engine", ""))
    if (engine not in APPROXIMATE and "p_exact" not in dataset) or not bool(dataset["kept"].any()):
        return None
    if "p_exact" not in dataset:
        raise DataError(_refusal(engine, 0))
    direction = str(dataset.attrs.get("direction", "denoising"))
    clean, corrupted, exact, patched = xr.broadcast(
        *(dataset[name].astype(float) for name in ("p_clean", "p_corrupted", "p_exact", "p_patched"))
    )
    rates = [share_moved(cells.values, clean.values, corrupted.values, direction) for cells in (exact, patched)]
    known = np.isfinite(rates[0]) & np.isfinite(rates[1])
    true, guessed = (rate[known] for rate in rates)
    if len(true) < FEWEST:
        raise DataError(_refusal(engine, len(true)))
    clips = known.any(axis=tuple(axis for axis, dim in enumerate(exact.dims) if dim != "sample"))
    flat = np.ptp(true) == 0 or np.ptp(guessed) == 0
    pearson, spearman = (
        (np.nan, np.nan) if flat else (stats.pearsonr(true, guessed)[0], stats.spearmanr(true, guessed)[0])
    )
    error = float(np.abs(true - guessed).mean())
    return Licence(engine, float(pearson), float(spearman), error, len(true), int(clips.sum()))


def _refusal(engine: str, cells: int) -> str:
    return (
        f"engine={engine} only approximates, and this result has {cells} exact cells to compare with, expected "
        f"{FEWEST} at least: run it again with a larger engine.licence_cells or data.limit, or with engine=auto"
    )
