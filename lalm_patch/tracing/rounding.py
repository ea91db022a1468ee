"""How far a run's numbers are from float32, measured on its own clips.

A model in half precision computes each probability with an error that no comparison of two engines in the same
precision shows: both are wrong alike. So some cells of a few clips, and their clean and corrupted runs, are computed
again in plain float32 with the same weights. What is stored is these numbers; errors are worked out from them, see
`lalm_patch.analysis.precision`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lalm_patch.engine import ApproximateEngine, DirectEngine, Engine, ReplayEngine
from lalm_patch.models import LALM
from lalm_patch.models.proof import Pair, in_float32
from lalm_patch.settings import EngineSettings
from lalm_patch.tracing.samples import OpenedClip, exact_cells, readout_arrays


class Rounding:
    """Measures a model's rounding, and says what differences it explains.

    Args:
        lalm: the model.
        engine: what computes the run's cells.
        settings: the run's.
        pair: what was found at load.
        seed: of the choice of cells.

    Attributes:
        tolerance: largest difference in probability that rounding explains, by what was measured up to now.
    """

    def __init__(self, lalm: LALM, engine: Engine, settings: EngineSettings, pair: Pair, seed: int) -> None:
        self.lalm = lalm
        self.tolerance = pair.tolerance
        self._pair, self._settings, self._seed = pair, settings, seed
        self._approximate = isinstance(engine, ApproximateEngine)
        inner = engine.exact if isinstance(engine, ApproximateEngine) else engine
        replayed = isinstance(inner, ReplayEngine)
        self._engine: Engine = (
            ReplayEngine(lalm, settings.pack_tokens, settings.memory_budget) if replayed else DirectEngine(lalm)
        )

    def bound(self, clip: OpenedClip, difference: float) -> float:
        """The bound for a difference in probability between two ways to compute the same of a clip.

        A difference above what was measured on other clips is looked into: the direct engine's own error is measured on
        this clip, and may explain it.
        """
        if difference > self.tolerance and not self.lalm.exact and self._pair.given is None:
            cells = self._chosen(clip, 2)

            def computed(first: OpenedClip) -> np.ndarray:
                direct = DirectEngine(self.lalm)
                bases = clip.read.base(direct, first.source, first.target).probabilities
                _, some = exact_cells(direct, first.source, first.target, clip.grid, cells, clip.read)
                return np.concatenate([bases, some.probabilities])

            found = computed(clip)
            with self.lalm.exactly():
                self._pair.measured(found, computed(self._in_float32(clip)))
            self.tolerance = self._pair.tolerance
        return self.tolerance

    def measured(self, clip: OpenedClip) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Clean and corrupted run and some cells in float32, as a sample's arrays and what its record says of them.

        Of an approximation only the two runs: its cells are off by more than rounding.
        """
        chosen = self._chosen(clip, 0 if self._approximate else self._settings.float32_cells)
        with self.lalm.exactly():
            exact = self._in_float32(clip)
            base = clip.read.base(self._engine, exact.source, exact.target)
            arrays = readout_arrays("float32_base", base.rows(slice(None, None, -1)) if clip.noising else base, (2,))
            cells: list[int] = []
            if len(chosen):
                cells, found = exact_cells(self._engine, exact.source, exact.target, clip.grid, chosen, clip.read)
                arrays |= readout_arrays("float32", found, (len(found),))
        kept = ("_option_logits", "_logsumexp")
        return {name: array for name, array in arrays.items() if name.endswith(kept)}, {"float32_cells": cells}

    def _chosen(self, clip: OpenedClip, count: int) -> np.ndarray:
        """Indices of cells, the same in every clip with as many: then their mean error is known, too."""
        cells = len(clip.grid.cells)
        return np.random.default_rng([self._seed, 32]).choice(cells, min(count, cells), replace=False)

    def _in_float32(self, clip: OpenedClip) -> OpenedClip:
        clean, corrupted = (in_float32(self.lalm, encoding) for encoding in (clip.clean, clip.corrupted))
        return replace(clip, clean=clean, corrupted=corrupted)
