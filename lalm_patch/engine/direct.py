"""The direct engine: the definition of every cell, one nnsight trace and one whole forward pass each.

It starts from the audio and uses nothing that any other engine computes. It is the oracle, and is not optimised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import nnsight
import torch
from torch import Tensor

from lalm_patch.engine.readout import Readout
from lalm_patch.grids import Grid
from lalm_patch.interventions import Intervention
from lalm_patch.models import LALM, Encoding

Progress = Callable[[int], None]
"""Called with the number of cells that were just computed."""


def ignore_progress(cells: int) -> None:
    """Report to nobody."""


class DirectEngine:
    """Runs interventions one at a time through the whole model."""

    name = "direct"

    def __init__(self, lalm: LALM) -> None:
        self.lalm = lalm

    def base(self, clean: Encoding, corrupted: Encoding, option_ids: Sequence[int]) -> Readout:
        """The clean and the corrupted run: rows 0 and 1."""
        logits = torch.cat([self._logits(clean), self._logits(corrupted)])
        return Readout.of(logits, option_ids)

    def sweep(
        self,
        clean: Encoding,
        corrupted: Encoding,
        grid: Grid,
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
    ) -> Readout:
        """One row per cell of the grid, in the grid's order."""
        return self.cells(clean, corrupted, grid.cells, option_ids, progress)

    def cells(
        self,
        clean: Encoding,
        corrupted: Encoding,
        interventions: Sequence[Intervention],
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
    ) -> Readout:
        """One row per intervention: the corrupted run with the intervention's states taken from the clean run."""
        layers = {patch.layer for intervention in interventions for patch in intervention.patches}
        source = self.layer_outputs(clean, layers)
        rows = []
        for intervention in interventions:
            rows.append(self._patched(corrupted, intervention, source))
            progress(1)
        return Readout.of(torch.cat(rows), option_ids)

    def layer_outputs(self, encoding: Encoding, layers: Iterable[int]) -> dict[int, Tensor]:
        """Residual stream [1, positions, hidden] after the given layers of an unpatched run."""
        wanted = sorted(layers)
        with torch.no_grad(), self.lalm.traced.trace(**encoding.inputs):
            outputs = nnsight.save([self.lalm.layers[index].output.clone() for index in wanted])
        return dict(zip(wanted, outputs, strict=True))

    def _logits(self, encoding: Encoding) -> Tensor:
        with torch.no_grad(), self.lalm.traced.trace(**encoding.inputs):
            logits = self.lalm.traced.output.logits[:, -1].clone().save()
        return self.lalm.scaled(torch.as_tensor(logits))

    def _patched(self, corrupted: Encoding, intervention: Intervention, source: dict[int, Tensor]) -> Tensor:
        layers = self.lalm.layers
        with torch.no_grad(), self.lalm.traced.trace(**corrupted.inputs):
            for patch in intervention.patches:
                where = list(patch.positions)
                layers[patch.layer].output[:, where] = source[patch.layer][:, where]
            logits = self.lalm.traced.output.logits[:, -1].clone().save()
        return self.lalm.scaled(torch.as_tensor(logits))
