"""The replay engine: the direct engine's numbers with the shared work removed.

Everything a patched run has in common with the corrupted run is taken from there: the audio tower, the layers below the
first patched one, the positions before the first patched one (causal attention). What is left of each cell is a suffix
of the sequence through the upper layers; the suffixes of all cells that start at the same layer go through together.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers import DynamicCache

from lalm_patch.engine.cuts import blocked_edges, check_cuts
from lalm_patch.engine.interface import Progress, ignore_progress
from lalm_patch.engine.memory import GIB, free_budget, is_out_of_memory, tokens_within
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.sites import check_sites, columns, overwrite, states_at
from lalm_patch.engine.suffix_attention import Blocked, KeyValue, SuffixLayout, suffix_attention_in
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import Intervention, Site
from lalm_patch.models import LALM, Encoding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _SourceRun:
    """The run that states are taken from: states [positions from `first` on, width] of each site, layer by layer, and
    logits [1, vocabulary]."""

    first: int
    states: dict[Site, list[Tensor]]
    logits: Tensor


@dataclass(frozen=True)
class _TargetRun:
    """The run into which they are put: what enters each layer and leaves the last one, [positions from `first` on,
    hidden] each, the logits, and every layer's keys and values for all positions."""

    first: int
    entering: list[Tensor]
    logits: Tensor
    prefix: list[KeyValue]


@dataclass(frozen=True)
class _Pack:
    """Cells that share a forward pass: all enter at `layer`, with their indices in the grid."""

    layer: int
    indices: tuple[int, ...]
    cells: tuple[Intervention, ...]


_Write = tuple[int, Site, slice, Tensor, Tensor]
"""Layer, site, columns of the head, indices into the pack, states."""


class ReplayEngine:
    """Runs interventions of a grid in packs.

    Args:
        lalm: the model.
        pack_tokens: most suffix positions in one pack; more needs memory, fewer needs more passes.
        memory_budget: what a pack may take, in GiB; None: a share of the memory that is free when a sweep starts.
    """

    name = "replay"

    def __init__(self, lalm: LALM, pack_tokens: int = 2048, memory_budget: float | None = None) -> None:
        self.lalm = lalm
        self.pack_tokens = pack_tokens
        self.memory_budget = memory_budget
        self._sites: set[Site] = {Site.RESID}
        self._first: int | None = None
        self._source: tuple[Encoding, _SourceRun] | None = None
        self._target: tuple[Encoding, _TargetRun] | None = None

    def base(self, source: Encoding, target: Encoding, option_ids: Sequence[int]) -> Readout:
        """See `Engine.base`."""
        logits = torch.cat([self._source_run(source).logits, self._target_run(target).logits])
        return Readout.of(logits, option_ids, logits)

    def sweep(
        self,
        source: Encoding,
        target: Encoding,
        grid: Grid,
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
    ) -> Readout:
        """See `Engine.sweep`; ModelError, too, if not even a single cell fits into memory."""
        self._sites |= {patch.site for cell in grid.cells for patch in cell.patches}
        if Site.TOWER in self._sites:
            raise ModelError("replay starts behind the audio encoder: expected sites of the decoder, use engine=direct")
        check_sites(self.lalm, self._sites)
        # States are kept from the first text position on, or from the first audio position that is patched.
        earliest = min((cell.first_position for cell in grid.cells), default=len(target.tokens))
        self._first = min(earliest, target.tokens.text_positions[0])
        if any(cell.cuts for cell in grid.cells):
            check_cuts(self.lalm)
        source_run, target_run = self._source_run(source), self._target_run(target)
        length = len(target.tokens)
        budget = free_budget(self.lalm.decoder_module) if self.memory_budget is None else self.memory_budget * GIB
        tokens = min(self.pack_tokens, tokens_within(budget, self.lalm, length))
        parts = []
        waiting = list(self._packs(grid.cells, length, tokens))[::-1]
        with suffix_attention_in(self.lalm.decoder_module):
            while waiting:
                pack = waiting.pop()
                readout = self._attempt(pack, source_run, target_run, target, option_ids)
                if readout is None:
                    self._make_smaller(pack, waiting, length)
                    continue
                parts.append((pack.indices, readout))
                progress(len(pack.indices))
        return Readout.scatter(parts)

    def _attempt(
        self,
        pack: _Pack,
        source_run: _SourceRun,
        target_run: _TargetRun,
        target: Encoding,
        option_ids: Sequence[int],
    ) -> Readout | None:
        """A pack's readout, or None when memory does not suffice."""
        try:
            references = torch.cat([source_run.logits, target_run.logits])
            return Readout.of(self._run_pack(pack, source_run, target_run, target), option_ids, references)
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
            if not is_out_of_memory(error):
                raise
            if len(pack.cells) == 1:
                raise ModelError(
                    f"out of memory with a single cell of {len(target.tokens)} positions in a pack: {error}; "
                    "use a device with more memory, a smaller model.dtype or shorter clips"
                ) from error
            return None

    def _make_smaller(self, pack: _Pack, waiting: list[_Pack], length: int) -> None:
        """Halve the size of packs after one did not fit: it and all that `waiting` holds (next one last) are cut."""
        gc.collect()  # a failed trace leaves cycles behind that hold its tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = sum(length - cell.first_position for cell in pack.cells)
        self.pack_tokens = max(1, min(self.pack_tokens, tokens) // 2)
        log.warning(
            "out of memory with %d positions in a pack: going on with %d (engine.pack_tokens=%d avoids the attempt)",
            tokens,
            self.pack_tokens,
            self.pack_tokens,
        )
        waiting.append(pack)
        pieces = [piece for other in reversed(waiting) for piece in self._cut(other, length, self.pack_tokens)]
        waiting[:] = reversed(pieces)

    # --- the two base runs -------------------------------------------------------------------------------------

    def _source_run(self, source: Encoding) -> _SourceRun:
        first = self._first_kept(source)
        known = self._source is not None and self._source[0] is source and self._source[1].first <= first
        if self._source is None or not known or not self._sites <= self._source[1].states.keys():
            self._source = None  # the last clip's states go before this one's come
            states, logits, _ = self._whole_run(source, first, self._sites, keep_keys=False)
            self._source = source, _SourceRun(first, states, logits)
        return self._source[1]

    def _target_run(self, target: Encoding) -> _TargetRun:
        # With silence the corrupted input depends on the prompt and the clip's length only: clips share it.
        first = self._first_kept(target)
        known = self._target is not None and self._target[0] is target and self._target[1].first <= first
        if self._target is None or not known:
            self._target = None
            states, logits, prefix = self._whole_run(target, first, {Site.RESID}, keep_keys=True)
            run = _TargetRun(first, [target.inputs_embeds[0, first:], *states[Site.RESID]], logits, prefix)
            self._target = target, run
        return self._target[1]

    def _first_kept(self, encoding: Encoding) -> int:
        """Position from which on a run's states are kept: before the first sweep, of the text alone."""
        text = encoding.tokens.text_positions[0]
        return text if self._first is None else min(text, self._first)

    def _whole_run(
        self, encoding: Encoding, first: int, sites: set[Site], keep_keys: bool
    ) -> tuple[dict[Site, list[Tensor]], Tensor, list[KeyValue]]:
        """States from a position on of some sites in each layer, logits of the last one, and keys and values of all."""
        wanted = [site for site in Site if site in sites - {Site.EMBED}]
        cache = DynamicCache(config=self.lalm.decoder_module.config) if keep_keys else None
        kept = {} if cache is None else {self.lalm.cache_keyword: cache}
        with (
            torch.no_grad(),
            self.lalm.decoder.trace(
                inputs_embeds=encoding.inputs_embeds,
                position_ids=encoding.position_ids,
                use_cache=keep_keys,
                **kept,
            ),
        ):
            if Site.EMBED in sites:
                entering = self.lalm.layers[0].input[0, first:].clone().save()
            found = nnsight.save(
                [[states_at(layer, site)[0, first:].clone() for site in wanted] for layer in self.lalm.layers]
            )
            last = self.lalm.norm.output[:, -1].clone().save()
        prefix = [] if cache is None else [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        states = {site: [layer[k] for layer in found] for k, site in enumerate(wanted)}
        if Site.EMBED in sites:
            states[Site.EMBED] = [entering]
        return states, self.lalm.logits(last), prefix

    # --- packs -------------------------------------------------------------------------------------------------

    @classmethod
    def count_passes(cls, cells: Sequence[Intervention], length: int, pack_tokens: int) -> int:
        """Forward passes for the cells of a prompt of `length` positions, where memory allows the packs."""
        return sum(1 for _ in cls._packs(cells, length, pack_tokens))

    @classmethod
    def _packs(cls, cells: Sequence[Intervention], length: int, tokens: int) -> Iterator[_Pack]:
        """Group cells by the layer they enter at; within one, longest suffix first, cut at `tokens` positions."""
        for layer in sorted({cell.entry_layer for cell in cells}):
            chosen = [index for index, cell in enumerate(cells) if cell.entry_layer == layer]
            chosen.sort(key=lambda index: cells[index].first_position)
            yield from cls._cut(_Pack(layer, tuple(chosen), tuple(cells[i] for i in chosen)), length, tokens)

    @staticmethod
    def _cut(pack: _Pack, length: int, tokens: int) -> Iterator[_Pack]:
        """A pack in pieces of at most `tokens` positions, each of at least one cell."""
        start = total = 0
        for end, cell in enumerate(pack.cells):
            suffix = length - cell.first_position
            if end > start and total + suffix > tokens:
                yield _Pack(pack.layer, pack.indices[start:end], pack.cells[start:end])
                start, total = end, 0
            total += suffix
        yield _Pack(pack.layer, pack.indices[start:], pack.cells[start:])

    def _run_pack(self, pack: _Pack, source_run: _SourceRun, target_run: _TargetRun, target: Encoding) -> Tensor:
        """Logits [cells, vocabulary] of a pack."""
        # Everything the layers index with is made here, on its device: inside the loop nothing waits for the host.
        length, entering = len(target.tokens), target_run.entering[pack.layer]
        starts = torch.tensor([cell.first_position for cell in pack.cells])
        ends = (length - starts).cumsum(0)
        rows = torch.arange(len(starts)).repeat_interleave(length - starts)
        positions = torch.arange(len(rows)) + (length - ends)[rows]
        window_start = int(starts[0])
        slots = rows * (length - window_start) + positions - window_start
        cuts = blocked_edges(pack.cells, ends.tolist(), length, window_start, self.lalm.num_heads)
        blocked = {
            layer: Blocked(*(_on(part, target_run.prefix[layer][0].device) for part in (edges.prefix, edges.window)))
            for layer, edges in cuts.items()
        }
        slots = _on(slots, entering.device)
        suffixes = SuffixLayout(target_run.prefix, window_start, length, slots, len(starts), blocked)
        writes = self._writes(
            pack, ends.tolist(), source_run, [state.device for state in target_run.entering[1:]], length
        )
        entering = entering.index_select(0, _on(positions - target_run.first, entering.device))[None]
        position_ids = target.position_ids[..., _on(positions, target.position_ids.device)]
        lasts = _on(ends - 1, target_run.entering[-1].device)

        layers: list[Any] = self.lalm.layers
        with (
            torch.no_grad(),
            self.lalm.decoder.trace(
                inputs_embeds=entering, position_ids=position_ids, use_cache=False, suffixes=suffixes
            ),
        ):
            for index in range(pack.layer):
                layers[index].skip(entering)
            for index, site, head, where, states in writes:
                overwrite(layers[index], site, head, where, states)
            # Only the last positions go through the final norm.
            self.lalm.norm.input = self.lalm.norm.input.index_select(1, lasts)
            last = self.lalm.norm.output[0].clone().save()
        return self.lalm.logits(last)

    def _writes(
        self, pack: _Pack, ends: Sequence[int], source_run: _SourceRun, devices: Sequence[torch.device], length: int
    ) -> list[_Write]:
        """The patches of a pack, in the order in which the forward pass meets them; one write per place."""
        places: dict[tuple[int, Site, int | None], tuple[list[int], list[int]]] = {}
        patches = [(patch, end) for cell, end in zip(pack.cells, ends, strict=True) for patch in cell.patches]
        for patch, end in sorted(patches, key=lambda pair: pair[0].moment[:3]):
            where, positions = places.setdefault((patch.layer, patch.site, patch.head), ([], []))
            where.extend(end - length + position for position in patch.positions)
            positions.extend(position - source_run.first for position in patch.positions)
        writes = []
        for (layer, site, head), (where, positions) in places.items():
            within, device = columns(self.lalm, head), devices[layer]
            states = source_run.states[site][layer][:, within]
            chosen = states.index_select(0, _on(torch.tensor(positions), states.device)).to(device)
            writes.append((layer, site, within, _on(torch.tensor(where), device), chosen))
        return writes


def _on(indices: Tensor, device: torch.device) -> Tensor:
    """Indices made on the host, on a device; to a GPU from pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return indices.to(device)
    return indices.pin_memory().to(device, non_blocking=True)
