"""Cells of one clip that go up the layers together: their suffixes, one after another, as one sequence.

A pack is plain bookkeeping: which token of it is which position of which cell, what is written where, which edges are
cut. It computes nothing of the model.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lalm_patch.engine.base_runs import LayerInputs, LayerView
from lalm_patch.engine.cuts import blocked_edges
from lalm_patch.engine.sources import PLAIN, Put, TakenStates
from lalm_patch.engine.suffix_attention import Blocked, SuffixLayout
from lalm_patch.interventions.patches import Intervention, Mix, Patch, Site

EVERY = slice(None)
"""All positions of a patch."""


@dataclass(frozen=True)
class Write:
    """States that go into one place of a layer.

    Attributes:
        site: which site.
        head: which attention head; None for all columns.
        where: [positions] int64, tokens of the pack.
        positions: [positions] int64, of the source run, whose states of the same place are taken.
        mix: how they are put in.
        patches: in place of `positions`: patches that take something else, with the part of them that counts.
        enters: whether they go into what enters the layer.
    """

    site: Site
    head: int | None
    where: Tensor
    positions: Tensor
    mix: Mix = PLAIN
    patches: tuple[tuple[Patch, slice], ...] = ()
    enters: bool = False


@dataclass
class Pack:
    """Suffixes of cells that have started, with their states in the layer in hand.

    Attributes:
        cells: the interventions, longest suffix first where they start together.
        indices: of the cells in their grid.
        length: positions of a whole run.
        states: [1, tokens, hidden].
        inputs: what the decoder hands its layers for these positions; None until it is asked.
    """

    cells: tuple[Intervention, ...]
    indices: tuple[int, ...]
    length: int
    states: Tensor
    inputs: LayerInputs | None = None

    @classmethod
    def of(cls, cells: Sequence[Intervention], indices: Sequence[int], length: int) -> Pack:
        """Cells without states; see `started`."""
        return cls(tuple(cells), tuple(indices), length, torch.empty(0))

    @cached_property
    def starts(self) -> Tensor:
        """First position of every suffix."""
        return torch.tensor([cell.first_position for cell in self.cells])

    @cached_property
    def ends(self) -> Tensor:
        """Where every suffix ends in the pack."""
        return (self.length - self.starts).cumsum(0)

    @cached_property
    def _rows(self) -> Tensor:
        """The suffix of every token."""
        return torch.arange(len(self.cells)).repeat_interleave(self.length - self.starts)

    @cached_property
    def positions(self) -> Tensor:
        """The position of every token."""
        return torch.arange(len(self._rows)) + (self.length - self.ends)[self._rows]

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return int(self.ends[-1])

    @cached_property
    def window_start(self) -> int:
        """First position of the longest suffix."""
        return int(self.starts.min())

    @cached_property
    def slots(self) -> Tensor:
        """Every token's place in the table of windows, see `SuffixLayout`, on the device of the states."""
        slots = self._rows * (self.length - self.window_start) + self.positions - self.window_start
        return on(slots, self.states.device)

    @cached_property
    def lasts(self) -> Tensor:
        """The tokens at the last position, on the device of the states."""
        return on(self.ends - 1, self.states.device)

    def layout(self, view: LayerView, blocked: Blocked | None) -> SuffixLayout:
        """The layout of the pack's attention in a layer, for that layer's view of the run into which it is put."""
        assert view.prefix is not None
        return SuffixLayout(view.prefix, self.window_start, self.length, self.slots, len(self.cells), blocked)

    def blocked(self, layer: int, heads: int) -> Blocked | None:
        """The edges that the cells cut in a layer."""
        if not any(cut.layer == layer for cell in self.cells for cut in cell.cuts):
            return None
        edges = blocked_edges(self.cells, self.ends.tolist(), self.length, self.window_start, heads, layer)
        return Blocked(*(on(part, self.states.device) for part in (edges.prefix, edges.window)))

    def writes(self, layer: int) -> list[Write]:
        """The patches of a layer, in the order in which its forward pass meets them; one write per place."""
        ends = self.ends.tolist()
        patches = (
            (patch, EVERY, end)
            for cell, end in zip(self.cells, ends, strict=True)
            for patch in cell.patches
            if patch.layer == layer and patch.site is not Site.EMBED
        )
        return _gathered(patches, self.length)

    def first_writes(self, layer: int) -> list[Write]:
        """As `writes`, of what enters the layer: the patches that the pack's cells start with."""
        ends = self.ends.tolist()
        patches = (
            (patch, EVERY, end)
            for cell, end in zip(self.cells, ends, strict=True)
            for patch in cell.patches
            if (patch.site is Site.EMBED and layer == 0) or (patch.site is Site.RESID and patch.layer == layer - 1)
        )
        return _gathered(patches, self.length, enters=True)

    def last_writes(self, layer: int) -> list[Write]:
        """As `writes`, of the last positions alone: the pack's tokens are one for each cell."""
        # As if the pack were one token long for each cell: position `length - 1` of a cell is its token.
        patches = (
            (patch, slice(-1, None), row + 1)
            for row, cell in enumerate(self.cells)
            for patch in cell.patches
            if patch.layer == layer and patch.site is not Site.EMBED and patch.positions[-1] == self.length - 1
        )
        return _gathered(patches, self.length)

    def cut(self, tokens: int) -> list[Pack]:
        """The pack in pieces of at most `tokens` tokens, each of at least one cell; itself if it is small enough."""
        if self.tokens <= tokens or len(self.cells) == 1:
            return [self]
        bounds, held = [0], 0
        for number, suffix in enumerate((self.length - self.starts).tolist()):
            if held and held + suffix > tokens:
                bounds.append(number)
                held = 0
            held += suffix
        bounds.append(len(self.cells))
        ends = [0, *self.ends.tolist()]
        return [
            Pack(
                self.cells[low:high],
                self.indices[low:high],
                self.length,
                self.states[:, ends[low] : ends[high]],
            )
            for low, high in itertools.pairwise(bounds)
        ]

    def joined(self, other: Pack) -> Pack:
        """This pack and another one as one; neighbours in memory are not copied."""
        own, others = self.states, other.states
        end = own.storage_offset() + own.shape[1] * own.shape[2]
        if own.untyped_storage().data_ptr() == others.untyped_storage().data_ptr() and others.storage_offset() == end:
            states = own.as_strided((1, self.tokens + other.tokens, own.shape[2]), own.stride())
        else:
            states = torch.cat([own, others.to(own.device)], dim=1)
        return Pack(self.cells + other.cells, self.indices + other.indices, self.length, states)


@dataclass
class _Group:
    """What becomes one write."""

    where: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    patches: list[tuple[Patch, slice]] = field(default_factory=list)


def _gathered(patches: Iterable[tuple[Patch, slice, int]], length: int, enters: bool = False) -> list[Write]:
    """Writes of patches, each given with the part of it that counts and the end of its suffix in the pack."""
    groups: dict[tuple[Site, int | None, bool, Mix], _Group] = defaultdict(_Group)
    for patch, part, end in sorted(patches, key=lambda each: each[0].moment[:4]):
        group = groups[patch.site, patch.head, patch.plain, patch.source.mix]
        positions = patch.positions[part]
        group.where.extend(end - length + position for position in positions)
        if patch.plain:
            group.positions.extend(positions)
        else:
            group.patches.append((patch, part))
    return [
        Write(site, head, torch.tensor(group.where), torch.tensor(group.positions), mix, tuple(group.patches), enters)
        for (site, head, _, mix), group in groups.items()
    ]


def started(
    pack: Pack,
    target: LayerView,
    puts: Sequence[Put],
    room: Tensor | None = None,
) -> Pack:
    """A pack whose cells all enter at a layer, with its states: suffixes of the run into which states are put, with
    what their first patches put in.

    Args:
        pack: without states.
        target: the run into which states are put, at that layer: the first that its cells have to be computed in.
        puts: what the cells' first patches put in, see `Pack.first_writes`.
        room: [1, tokens, hidden], where the states are put.
    """
    device = target.entering.device
    states = target.entering.index_select(0, on(pack.positions - target.first, device))
    if room is not None:
        states = room[0].copy_(states)
    for put in puts:
        states.index_copy_(0, put.where, put.onto(states))
    pack.states = states[None]
    return pack


def prepared(
    writes: Sequence[Write],
    source: LayerView | None,
    taken: TakenStates,
    arrays: Mapping[str, np.ndarray],
    within: Callable[[int | None], slice],
    device: torch.device,
) -> list[Put]:
    """Writes with what they put in, everything on the layer's device.

    Args:
        writes: of one layer.
        source: the run that states are taken from, at that layer; None where no write takes the same place's.
        taken: states that others take.
        arrays: the grid's.
        within: columns of an attention head; all for None.
        device: the layer's.
    """
    made = []
    for write in writes:
        columns, where = within(write.head), on(write.where, device)
        if write.patches:
            made.append(Put(write.site, columns, where, None, write.mix, write.patches, taken, arrays))
            continue
        assert source is not None
        states = source.entering if write.enters else source.states[write.site]
        chosen = states[:, columns].index_select(0, on(write.positions - source.first, states.device))
        made.append(Put(write.site, columns, where, chosen.to(device)))
    return made


def arranged(packs: Sequence[Pack], tokens: int) -> list[Pack]:
    """The same cells in packs of at most `tokens` tokens (but of at least one cell): small neighbours are joined."""
    made: list[Pack] = []
    for pack in packs:
        for piece in pack.cut(tokens):
            if made and made[-1].tokens + piece.tokens <= tokens:
                made[-1] = made[-1].joined(piece)
            else:
                made.append(piece)
    return made


def on(indices: Tensor, device: torch.device) -> Tensor:
    """Indices made on the host, on a device; to a GPU from pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return indices.to(device)
    return indices.pin_memory().to(device, non_blocking=True)
