"""The replay engine: the direct engine's numbers with the shared work removed.

Everything a patched run has in common with the corrupted run is taken from there: the audio tower, the layers below the
first patched one, the positions before the first patched one (causal attention). What is left of each cell is a suffix
of the sequence through the upper layers; the suffixes of all cells that start at the same layer go through together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers import DynamicCache

from lalm_patch.engine.direct import Progress, ignore_progress
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.suffix_attention import KeyValue, SuffixLayout, suffix_attention_in
from lalm_patch.grids import Grid
from lalm_patch.interventions import Intervention
from lalm_patch.models import LALM, Encoding


@dataclass(frozen=True)
class _SourceRun:
    """The clean run: residual stream [text positions, hidden] after each layer, and logits [1, vocabulary]."""

    first: int
    states: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class _CorruptedRun:
    """The corrupted run: as `_SourceRun`, with every layer's keys and values for all positions."""

    first: int
    states: list[Tensor]
    logits: Tensor
    prefix: list[KeyValue]


@dataclass(frozen=True)
class _Pack:
    """Cells that share a forward pass: all start after `layer`, with their indices in the grid."""

    layer: int
    indices: tuple[int, ...]
    cells: tuple[Intervention, ...]


class ReplayEngine:
    """Runs interventions of a grid in packs.

    Args:
        lalm: the model.
        pack_tokens: most suffix positions in one pack; more needs memory, fewer needs more passes.
    """

    name = "replay"

    def __init__(self, lalm: LALM, pack_tokens: int = 2048) -> None:
        self.lalm = lalm
        self.pack_tokens = pack_tokens
        self._source: tuple[Encoding, _SourceRun] | None = None
        self._corrupted: tuple[Encoding, _CorruptedRun] | None = None

    def base(self, clean: Encoding, corrupted: Encoding, option_ids: Sequence[int]) -> Readout:
        """The clean and the corrupted run: rows 0 and 1."""
        logits = torch.cat([self._source_run(clean).logits, self._corrupted_run(corrupted).logits])
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
        source, base = self._source_run(clean), self._corrupted_run(corrupted)
        parts = []
        with suffix_attention_in(self.lalm.decoder_module):
            for pack in _packs(grid.cells, len(corrupted.tokens), self.pack_tokens):
                logits = self._run_pack(pack, source, base, corrupted)
                parts.append((pack.indices, Readout.of(logits, option_ids)))
                progress(len(pack.indices))
        return Readout.scatter(parts)

    # --- the two base runs -------------------------------------------------------------------------------------

    def _source_run(self, clean: Encoding) -> _SourceRun:
        if self._source is None or self._source[0] is not clean:
            states, logits, _ = self._whole_run(clean, keep_keys=False)
            self._source = clean, _SourceRun(clean.tokens.text_positions[0], states, logits)
        return self._source[1]

    def _corrupted_run(self, corrupted: Encoding) -> _CorruptedRun:
        # With silence the corrupted input depends on the prompt and the clip's length only: clips share it.
        if self._corrupted is None or self._corrupted[0] is not corrupted:
            states, logits, prefix = self._whole_run(corrupted, keep_keys=True)
            run = _CorruptedRun(corrupted.tokens.text_positions[0], states, logits, prefix)
            self._corrupted = corrupted, run
        return self._corrupted[1]

    def _whole_run(self, encoding: Encoding, keep_keys: bool) -> tuple[list[Tensor], Tensor, list[KeyValue]]:
        """Text positions' residual stream after each layer, logits of the last position, and keys and values."""
        first = encoding.tokens.text_positions[0]
        cache = DynamicCache(config=self.lalm.decoder_module.config) if keep_keys else None
        with (
            torch.no_grad(),
            self.lalm.decoder.trace(
                inputs_embeds=encoding.inputs_embeds,
                position_ids=encoding.position_ids,
                past_key_values=cache,
                use_cache=keep_keys,
            ),
        ):
            states = nnsight.save([layer.output[0, first:].clone() for layer in self.lalm.layers])
            last = self.lalm.norm.output[:, -1].clone().save()
        prefix = [] if cache is None else [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        return list(states), self.lalm.logits(last), prefix

    # --- packs -------------------------------------------------------------------------------------------------

    @staticmethod
    def count_passes(cells: Sequence[Intervention], length: int, pack_tokens: int) -> int:
        """Forward passes for the cells of a prompt of `length` positions."""
        return sum(1 for _ in _packs(cells, length, pack_tokens))

    def _run_pack(self, pack: _Pack, source: _SourceRun, base: _CorruptedRun, corrupted: Encoding) -> Tensor:
        """Logits [cells, vocabulary] of a pack."""
        length, device = len(corrupted.tokens), base.states[pack.layer].device
        starts = [cell.first_position for cell in pack.cells]
        rows = torch.cat([torch.full((length - start,), row) for row, start in enumerate(starts)]).to(device)
        positions = torch.cat([torch.arange(start, length) for start in starts]).to(device)
        suffixes = SuffixLayout(base.prefix, starts[0], length, rows, positions - starts[0], len(starts))
        ends = torch.tensor([length - start for start in starts]).cumsum(0)
        writes = _writes(pack, ends.tolist(), length, source)

        entering = base.states[pack.layer][positions - base.first][None]
        layers: list[Any] = self.lalm.layers
        with (
            torch.no_grad(),
            self.lalm.decoder.trace(
                inputs_embeds=entering,
                position_ids=corrupted.position_ids[..., positions.to(corrupted.position_ids.device)],
                use_cache=False,
                suffixes=suffixes,
            ),
        ):
            for index in range(pack.layer + 1):
                layers[index].skip(entering)
            for index, where, states in writes:
                layers[index].output[:, where] = states.to(layers[index].output.device)
            last = self.lalm.norm.output[0, ends - 1].clone().save()
        return self.lalm.logits(last)


def _packs(cells: Sequence[Intervention], length: int, pack_tokens: int) -> Iterator[_Pack]:
    """Group cells by their first layer; within one, longest suffix first, cut at `pack_tokens`."""
    for layer in sorted({cell.first_layer for cell in cells}):
        chosen = [index for index, cell in enumerate(cells) if cell.first_layer == layer]
        chosen.sort(key=lambda index: cells[index].first_position)
        pack: list[int] = []
        tokens = 0
        for index in chosen:
            suffix = length - cells[index].first_position
            if pack and tokens + suffix > pack_tokens:
                yield _Pack(layer, tuple(pack), tuple(cells[i] for i in pack))
                pack, tokens = [], 0
            pack.append(index)
            tokens += suffix
        yield _Pack(layer, tuple(pack), tuple(cells[i] for i in pack))


def _writes(pack: _Pack, ends: Sequence[int], length: int, source: _SourceRun) -> list[tuple[int, Tensor, Tensor]]:
    """(layer, indices into the pack, states) of every patch, one write per layer, layers ascending."""
    by_layer: dict[int, tuple[list[int], list[int]]] = {}
    for cell, end in zip(pack.cells, ends, strict=True):
        for patch in cell.patches:
            where, positions = by_layer.setdefault(patch.layer, ([], []))
            where.extend(end - length + position for position in patch.positions)
            positions.extend(position - source.first for position in patch.positions)
    return [
        (layer, torch.tensor(where), source.states[layer][positions])
        for layer, (where, positions) in sorted(by_layer.items())
    ]
