"""The direct engine: the definition of every cell, one nnsight trace and one whole forward pass each.

It starts from the audio and uses nothing that any other engine computes. It is the oracle, and is not optimised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from lalm_patch.engine.cuts import check_cuts, masks
from lalm_patch.engine.interface import Progress, ignore_progress
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.sites import columns, layer_at, overwrite, states_at
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import Intervention, Patch, Site
from lalm_patch.models import LALM, Encoding


class DirectEngine:
    """Runs interventions one at a time through the whole model."""

    name = "direct"

    def __init__(self, lalm: LALM) -> None:
        self.lalm = lalm
        self._base: tuple[Encoding, Encoding, Tensor] | None = None

    def base(self, source: Encoding, target: Encoding, option_ids: Sequence[int]) -> Readout:
        """See `Engine.base`."""
        logits = self._base_logits(source, target)
        return Readout.of(logits, option_ids, logits)

    def sweep(
        self,
        source: Encoding,
        target: Encoding,
        grid: Grid,
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
    ) -> Readout:
        """See `Engine.sweep`."""
        references = self._base_logits(source, target)
        return self.cells(source, target, grid.cells, option_ids, progress, references)

    def cells(
        self,
        source: Encoding,
        target: Encoding,
        interventions: Sequence[Intervention],
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
        references: Tensor | None = None,
    ) -> Readout:
        """One row per intervention: the target run with the intervention's states taken from the source run.

        Divergences are known where the two runs' logits [2, vocabulary] are given.
        """
        places = {(patch.layer, patch.site) for intervention in interventions for patch in intervention.patches}
        if any(intervention.cuts for intervention in interventions):
            check_cuts(self.lalm)
        states = self.states(source, places) if places else {}
        rows = []
        for intervention in interventions:
            rows.append(self._patched(target, intervention, states))
            progress(1)
        return Readout.of(torch.cat(rows), option_ids, references)

    def states(self, encoding: Encoding, places: Iterable[tuple[int, Site]]) -> dict[tuple[int, Site], Tensor]:
        """States [1, positions, width] of an unpatched run at the given (layer, site)."""
        order = list(Site)
        wanted = sorted(places, key=lambda place: (place[1] is not Site.TOWER, place[0], order.index(place[1])))
        in_tower = [place for place in wanted if place[1] is Site.TOWER]
        in_decoder = wanted[len(in_tower) :]
        with torch.no_grad(), self.lalm.traced.trace(**encoding.inputs):
            heard = nnsight.save([states_at(layer_at(self.lalm, *place), place[1]).clone() for place in in_tower])
            self.lalm.enter(encoding)
            found = nnsight.save([states_at(layer_at(self.lalm, *place), place[1]).clone() for place in in_decoder])
        return dict(zip(wanted, [*heard, *found], strict=True))

    def remember(self, source: Encoding, target: Encoding, logits: Tensor) -> None:
        """Take over the logits [2, vocabulary] of two unpatched runs of the whole model."""
        self._base = source, target, logits

    def _base_logits(self, source: Encoding, target: Encoding) -> Tensor:
        """Logits [2, vocabulary] of the two unpatched runs; of the last pair of encodings they are known."""
        if self._base is None or self._base[0] is not source or self._base[1] is not target:
            self._base = source, target, torch.cat([self._logits(source), self._logits(target)])
        return self._base[2]

    def _logits(self, encoding: Encoding) -> Tensor:
        with torch.no_grad(), self.lalm.traced.trace(**encoding.inputs):
            self.lalm.enter(encoding)
            logits = self.lalm.traced.output.logits[:, -1].clone().save()
        return self.lalm.scaled(torch.as_tensor(logits))

    def _patched(self, target: Encoding, intervention: Intervention, states: dict[tuple[int, Site], Tensor]) -> Tensor:
        layers: list[Any] = self.lalm.layers
        masked = masks(self.lalm, intervention.cuts, len(target.tokens))
        steps = sorted({*masked, *(patch.layer for patch in intervention.patches if patch.site is not Site.TOWER)})
        with torch.no_grad(), self.lalm.traced.trace(**target.inputs):
            for patch in intervention.in_tower:
                self._write(patch, states)
            self.lalm.enter(target)
            for layer in steps:
                # What enters the layer comes first, then its attention's mask, then what is inside and leaves it.
                for patch in intervention.at(layer):
                    if patch.site is Site.EMBED:
                        self._write(patch, states)
                if layer in masked:
                    args, kwargs = layers[layer].self_attn.inputs
                    layers[layer].self_attn.inputs = args, kwargs | {"attention_mask": masked[layer]}
                for patch in intervention.at(layer):
                    if patch.site is not Site.EMBED:
                        self._write(patch, states)
            logits = self.lalm.traced.output.logits[:, -1].clone().save()
        return self.lalm.scaled(torch.as_tensor(logits))

    def _write(self, patch: Patch, states: dict[tuple[int, Site], Tensor]) -> None:
        """Inside a trace: put a patch's states, [1, positions, width] by layer and site, where they belong."""
        where, head = list(patch.positions), columns(self.lalm, patch.head)
        chosen = states[patch.layer, patch.site][0, where, head]
        overwrite(layer_at(self.lalm, patch.layer, patch.site), patch.site, head, where, chosen)
