"""Attention knockout: the edges that cuts remove, as masks of whole forward passes and of packed suffixes."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lalm_patch.engine.suffix_attention import Blocked
from lalm_patch.errors import ModelError
from lalm_patch.interventions.patches import Cut, Intervention
from lalm_patch.models import LALM


def check_cuts(lalm: LALM) -> None:
    """Raises ModelError for a decoder whose attention takes no mask."""
    decoder: Any = lalm.decoder_module
    for index, layer in enumerate(decoder.layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None or "attention_mask" not in inspect.signature(attention.forward).parameters:
            raise ModelError(
                f"attention knockout: layer {index} of {type(decoder).__name__} has no self_attn that takes an "
                "attention_mask; patch states instead (granularity=layer, token or segment)"
            )


def by_layer(cuts: Iterable[Cut]) -> dict[int, list[Cut]]:
    """Cuts of each layer, ascending."""
    found: dict[int, list[Cut]] = defaultdict(list)
    for cut in sorted(cuts, key=lambda cut: cut.layer):
        found[cut.layer].append(cut)
    return found


def blocked(cuts: Sequence[Cut], positions: int, heads: int) -> Tensor:
    """Edges that cuts of one layer remove: bool [heads or 1, positions, positions], queries first."""
    depth = 1 if all(cut.head is None for cut in cuts) else heads
    gone = torch.zeros(depth, positions, positions, dtype=torch.bool)
    for cut in cuts:
        where = slice(None) if cut.head is None else slice(cut.head, cut.head + 1)
        rows, columns = torch.tensor(cut.targets), torch.tensor(cut.sources)
        gone[where, rows[:, None], columns] = True
    return gone


def masks(lalm: LALM, cuts: Iterable[Cut], positions: int) -> Mapping[int, Tensor]:
    """Additive attention masks [1, heads or 1, positions, positions] of the layers that are cut: causal, and the cuts.

    In the decoder's type, with its smallest number where nothing is seen: what sdpa and eager attention both take.
    """
    future = torch.ones(positions, positions, dtype=torch.bool).triu(1)
    made = {}
    for layer, own in by_layer(cuts).items():
        hidden = blocked(own, positions, lalm.num_heads) | future
        mask = torch.zeros(hidden.shape, dtype=lalm.state_dtype).masked_fill(hidden, torch.finfo(lalm.state_dtype).min)
        made[layer] = mask[None].to(lalm.layer_device(layer))
    return made


def blocked_edges(
    cells: Sequence[Intervention], ends: Sequence[int], length: int, window_start: int, heads: int, layer: int
) -> Blocked:
    """The cuts of packed suffixes in one layer.

    Args:
        cells: one per suffix.
        ends: where each suffix ends in the pack.
        length: positions of a whole run.
        window_start: first position of the longest suffix.
        heads: attention heads.
        layer: which layer.
    """
    window = length - window_start
    depth = 1 if all(cut.head is None for cell in cells for cut in cell.cuts if cut.layer == layer) else heads
    prefix = torch.zeros(depth, ends[-1], window_start, dtype=torch.bool)
    inside = torch.zeros(depth, len(cells), window, window, dtype=torch.bool)
    for row, (cell, end) in enumerate(zip(cells, ends, strict=True)):
        for cut in cell.cuts:
            if cut.layer != layer:
                continue
            head = slice(None) if cut.head is None else slice(cut.head, cut.head + 1)
            targets = torch.tensor(cut.targets)[:, None]
            before = torch.tensor([source for source in cut.sources if source < window_start], dtype=torch.long)
            after = torch.tensor([source for source in cut.sources if source >= window_start], dtype=torch.long)
            prefix[head, end - length + targets, before] = True
            inside[head, row, targets - window_start, after - window_start] = True
    return Blocked(prefix, inside)
