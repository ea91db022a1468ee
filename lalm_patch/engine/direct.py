"""The direct engine: the definition of every cell, one nnsight trace and one whole forward pass each.

It starts from the audio and uses nothing that any other engine computes. It is the oracle, and is not optimised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import nnsight
import numpy as np
import torch
from torch import Tensor

from lalm_patch.engine.cuts import check_cuts, masks
from lalm_patch.engine.direct_paths import DirectPaths
from lalm_patch.engine.interface import Progress, ignore_progress
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.sites import columns, layer_at, overwrite, states_at
from lalm_patch.engine.sources import given, mixed, run_places
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import Intervention, Origin, Patch, RunPlace, Site
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
        return self.cells(source, target, grid.cells, option_ids, progress, references, grid.arrays)

    def cells(
        self,
        source: Encoding,
        target: Encoding,
        interventions: Sequence[Intervention],
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
        references: Tensor | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> Readout:
        """One row per intervention: the target run with what the intervention's patches put in.

        Divergences are known where the two runs' logits [2, vocabulary] are given. `arrays` are those of the grid that
        the interventions come from.
        """
        if any(intervention.cuts for intervention in interventions):
            check_cuts(self.lalm)
        states: dict[RunPlace, Tensor] = {}
        needed = run_places(interventions)
        for origin, encoding in ((Origin.OTHER, source), (Origin.OWN, target)):
            places = {(place.layer, place.site) for place in needed if place.origin is origin}
            found = self.states(encoding, places) if places else {}
            states |= {RunPlace(origin, *place): of_place for place, of_place in found.items()}
        paths = None
        if any(intervention.path is not None for intervention in interventions):
            paths = DirectPaths(self.lalm, source, target, interventions, self.states)
        rows = []
        for intervention in interventions:
            if intervention.path is not None and paths is not None:
                rows.append(paths.logits(intervention.path))
            else:
                rows.append(self._patched(target, intervention, states, arrays or {}))
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

    def _patched(
        self,
        target: Encoding,
        intervention: Intervention,
        states: Mapping[RunPlace, Tensor],
        arrays: Mapping[str, np.ndarray],
    ) -> Tensor:
        layers: list[Any] = self.lalm.layers
        masked = masks(self.lalm, intervention.cuts, len(target.tokens))
        steps = sorted({*masked, *(patch.layer for patch in intervention.patches if patch.site is not Site.TOWER)})
        with torch.no_grad(), self.lalm.traced.trace(**target.inputs):
            for patch in intervention.in_tower:
                self._write(patch, states, arrays)
            self.lalm.enter(target)
            for layer in steps:
                # What enters the layer comes first, then its attention's mask, then what is inside and leaves it.
                for patch in intervention.at(layer):
                    if patch.site is Site.EMBED:
                        self._write(patch, states, arrays)
                if layer in masked:
                    args, kwargs = layers[layer].self_attn.inputs
                    layers[layer].self_attn.inputs = args, kwargs | {"attention_mask": masked[layer]}
                for patch in intervention.at(layer):
                    if patch.site is not Site.EMBED:
                        self._write(patch, states, arrays)
            logits = self.lalm.traced.output.logits[:, -1].clone().save()
        return self.lalm.scaled(torch.as_tensor(logits))

    def _write(self, patch: Patch, states: Mapping[RunPlace, Tensor], arrays: Mapping[str, np.ndarray]) -> None:
        """Inside a trace: what a patch puts in, where it belongs; states are [1, positions, width]."""
        where, head, place = list(patch.positions), columns(self.lalm, patch.head), patch.taken_from
        layer = layer_at(self.lalm, patch.layer, patch.site)
        if patch.plain:
            assert place is not None
            overwrite(layer, patch.site, head, where, states[place][0, where, head])
            return
        there = states_at(layer, patch.site)
        here = there[0, where, head].clone()
        if place is None:
            put = given(patch, there, head, arrays)
        else:
            put = states[place][0, list(patch.taken_positions), head].to(here)
        overwrite(layer, patch.site, head, where, mixed(here, put, patch.source.mix, arrays))
