"""What clips with tiny gaps do to a mean recovery rate, and what `min_gap` does about it: bias and coverage.

    python benchmarks/unresolved.py

Clips have gaps between clean and corrupted run drawn evenly from 0 up, and every probability carries an error of
rounding. A run measures that error on a few of its clips, as a real one does, and leaves out the others' gaps that are
below `min_gap` times it. The truth is the mean recovery, without errors, of all clips that would count.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import xarray as xr
from common import Table, emit
from numpy.typing import NDArray

from lalm_patch.analysis.recovery import mean_over_samples
from lalm_patch.results.resolution import resolution
from lalm_patch.tracing.metrics import recovery_rate

SEED = 20261127
LARGEST_GAP, ERROR = 0.5, 0.01
"""The error is about what bfloat16 does to a trained decoder's probabilities."""
MEASURED_CLIPS, MEASURED_CELLS = 4, 16
MIN_GAP = 5.0

Array = NDArray[np.float64]


class Population:
    """Clips of which recovery hangs together with the gap, or does not.

    Args:
        related: whether clips with larger gaps recover more.
        rng: where draws come from.
    """

    def __init__(self, related: bool, rng: np.random.Generator) -> None:
        self.related, self.rng = related, rng

    def draw(self, clips: int) -> tuple[Array, Array, Array]:
        """True recovery [clip], and probabilities [clip, number] without and with error: clean, corrupted, cells."""
        rng = self.rng
        gap = rng.uniform(0, LARGEST_GAP, clips)
        rate = rng.beta(4, 2, clips)
        if self.related:
            rate = 0.5 * rate + 0.5 * gap / LARGEST_GAP
        corrupted = rng.uniform(0.05, 0.45, clips)
        others = rng.beta(4, 2, (clips, MEASURED_CELLS - 1))
        rates = np.concatenate([rate[:, None], others], axis=1)
        cells = corrupted[:, None] + gap[:, None] * rates
        exact = np.concatenate([(corrupted + gap)[:, None], corrupted[:, None], cells], axis=1)
        return rate, exact, exact + rng.normal(0, ERROR, exact.shape)

    def counted(self, clips: int, min_gap: float | None) -> tuple[Array, Array]:
        """Of the clips of one run that count: true recovery rates and those found."""
        rate, exact, found = self.draw(clips)
        known = np.full_like(exact, np.nan)
        known[:MEASURED_CLIPS] = exact[:MEASURED_CLIPS]
        gap = found[:, 0] - found[:, 1]
        kept = (gap > 0) & (gap >= resolution(found, known, "[]", min_gap).least)
        return rate[kept], recovery_rate(found[kept, 2], found[kept, 0], found[kept, 1])


def main() -> None:
    """Simulate and print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=int, default=2000)
    made.add_argument("--clips", type=int, default=48)
    made.add_argument("--json", type=Path)
    options = made.parse_args()
    options.clock, options.threads, options.dtype = "wall", 1, "float64"
    rows = [
        simulated(related, min_gap, options.runs, options.clips)
        for related in (False, True)
        for min_gap in (None, MIN_GAP)
    ]
    columns = [
        "recovery and gap",
        "min_gap",
        "truth",
        "bias",
        "+-",
        "coverage of 95 %",
        "root mean square error",
        "median width",
        "clips counted",
    ]
    title = f"A mean of ratios over {options.clips} clips with gaps from 0 to {LARGEST_GAP}, errors of {ERROR}"
    emit([Table(title, columns, rows, [f"{options.runs} simulated runs each, seed {SEED}."])], options)


def simulated(related: bool, min_gap: float | None, runs: int, clips: int) -> list[str | int | float]:
    """One row of the table."""
    population = Population(related, np.random.default_rng([SEED, related, min_gap is None]))
    truth = float(np.mean(np.concatenate([population.counted(clips, min_gap)[0] for _ in range(20_000)])))
    errors, covered, widths, counted = [], [], [], []
    for run in range(runs):
        _, found = population.counted(clips, min_gap)
        names = np.arange(len(found)).astype(str)
        mean = mean_over_samples(xr.DataArray(found, dims="sample"), names, seed=run)
        errors.append(float(mean["mean"]) - truth)
        covered.append(float(mean["low"]) <= truth <= float(mean["high"]))
        widths.append(float(mean["high"] - mean["low"]))
        counted.append(len(found))
    spread = 1.96 * float(np.std(errors)) / np.sqrt(runs)
    said = "larger gaps recover more" if related else "independent"
    limit = "null" if min_gap is None else f"{min_gap:g}"
    square = float(np.sqrt(np.mean(np.square(errors))))
    figures = [truth, float(np.mean(errors)), float(spread), float(np.mean(covered)), square, float(np.median(widths))]
    return [said, limit, *figures, float(np.mean(counted))]


if __name__ == "__main__":
    main()
