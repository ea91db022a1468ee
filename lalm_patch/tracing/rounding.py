"""How far a run's numbers are from float32, measured on its own clips.

A model in half precision computes each probability with an error that no comparison of two engines in the same
precision shows: both are wrong alike. So some cells of a few clips, and their clean and corrupted runs, are computed
again in plain float32 with the same weights. What is stored is these numbers; errors are worked out from them, see
`lalm_patch.analysis.precision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lalm_patch.engine import ApproximateEngine, DirectEngine, Engine, ReplayEngine
from lalm_patch.engine.interface import Sweep
from lalm_patch.engine.whole_answers import read_bases, read_sweeps
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
    """

    def __init__(self, lalm: LALM, engine: Engine, settings: EngineSettings, pair: Pair, seed: int) -> None:
        self.lalm = lalm
        self._pair, self._seed = pair, seed
        self._cells = 0 if isinstance(engine, ApproximateEngine) else settings.float32_cells
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
        if difference > self._pair.tolerance and not self.lalm.exact and self._pair.given is None:
            cells = self._chosen(clip, 2)

            def computed(first: OpenedClip) -> np.ndarray:
                direct = DirectEngine(self.lalm)
                bases = clip.read.base(direct, first.source, first.target).probabilities
                _, some = exact_cells(direct, first.source, first.target, clip.grid, cells, clip.read)
                return np.concatenate([bases, some.probabilities])

            found = computed(clip)
            with self.lalm.exactly():
                self._pair.measured(found, computed(self._in_float32(clip)))
        return self._pair.tolerance

    def measured(self, clips: Sequence[OpenedClip]) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Clean and corrupted run and some cells of clips in float32, as samples' arrays and what their records say.

        Of an approximation only the two runs: its cells are off by more than rounding.
        """
        if not clips:
            return []
        chosen = [np.sort(self._chosen(clip, self._cells)) for clip in clips]
        with self.lalm.exactly():
            exact = [self._in_float32(clip) for clip in clips]
            bases = read_bases(self._engine, [(clip.read, clip.source, clip.target) for clip in exact])
            swept = []
            if self._cells:
                grids = [clip.grid.chosen(cells) for clip, cells in zip(clips, chosen, strict=True)]
                sweeps = [
                    (clip.read, Sweep(clip.source, clip.target, grid, ()))
                    for clip, grid in zip(exact, grids, strict=True)
                ]
                swept = read_sweeps(self._engine, sweeps)
        found = []
        for number, (clip, base) in enumerate(zip(clips, bases, strict=True)):
            arrays = readout_arrays("float32_base", base.rows(slice(None, None, -1)) if clip.noising else base, (2,))
            if swept:
                arrays |= readout_arrays("float32", swept[number], (len(swept[number]),))
            kept = {name: array for name, array in arrays.items() if name.endswith(("_option_logits", "_logsumexp"))}
            found.append((kept, {"float32_cells": chosen[number].tolist()}))
        return found

    def _chosen(self, clip: OpenedClip, count: int) -> np.ndarray:
        """Indices of cells, the same in every clip with as many: then their mean error is known, too."""
        cells = len(clip.grid.cells)
        return np.random.default_rng([self._seed, 32]).choice(cells, min(count, cells), replace=False)

    def _in_float32(self, clip: OpenedClip) -> OpenedClip:
        clean, corrupted = (in_float32(self.lalm, encoding) for encoding in (clip.clean, clip.corrupted))
        return replace(clip, clean=clean, corrupted=corrupted)
