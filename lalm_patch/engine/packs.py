"""Cells of one clip that go up the layers together: their suffixes, one after another, as one sequence.

A pack is plain bookkeeping: which token of it is which position of which cell, what is written where, which edges are
cut. It computes nothing of the model.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lalm_patch.engine.base_runs import LayerInputs, LayerView
from lalm_patch.engine.cuts import blocked_edges
from lalm_patch.engine.suffix_attention import Blocked, SuffixLayout
from lalm_patch.interventions.patches import Intervention, Patch, Site


@dataclass(frozen=True)
class Write:
    """States that go into one place of a layer.

    Attributes:
        site: which site.
        head: which attention head; None for all columns.
        where: [positions] int64, tokens of the pack.
        positions: [positions] int64, of the source run.
    """

    site: Site
    head: int | None
    where: Tensor
    positions: Tensor


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
        patches = ((patch, end) for cell, end in zip(self.cells, ends, strict=True) for patch in cell.patches)
        return _gathered(patches, layer, self.length)

    def last_writes(self, layer: int) -> list[Write]:
        """As `writes`, of the last positions alone: the pack's tokens are one for each cell."""
        last = (self.length - 1,)
        patches = (
            (Patch(patch.layer, last, patch.site, patch.head), row + 1)
            for row, cell in enumerate(self.cells)
            for patch in cell.patches
            if patch.positions[-1] == self.length - 1
        )
        return _gathered(patches, layer, self.length)

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


def _gathered(patches: Iterable[tuple[Patch, int]], layer: int, length: int) -> list[Write]:
    """Writes of the patches of one layer, each given with the end of its suffix in the pack."""
    places: dict[tuple[Site, int | None], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    of_layer = [(patch, end) for patch, end in patches if patch.layer == layer and patch.site is not Site.EMBED]
    for patch, end in sorted(of_layer, key=lambda pair: pair[0].moment[:4]):
        where, positions = places[patch.site, patch.head]
        where.extend(end - length + position for position in patch.positions)
        positions.extend(patch.positions)
    return [
        Write(site, head, torch.tensor(where), torch.tensor(positions))
        for (site, head), (where, positions) in places.items()
    ]


def started(pack: Pack, layer: int, source: LayerView | None, target: LayerView, room: Tensor | None = None) -> Pack:
    """A pack whose cells all enter at a layer, with its states: suffixes of the run into which states are put, the
    other run's states written in.

    Args:
        pack: without states.
        layer: the first layer that its cells have to be computed in.
        source: the run that states are taken from, at that layer; None where nothing is taken from what enters it.
        target: the run into which they are put, at that layer.
        room: [1, tokens, hidden], where the states are put.
    """
    device = target.entering.device
    states = target.entering.index_select(0, on(pack.positions - target.first, device))
    if room is not None:
        states = room[0].copy_(states)
    where: list[int] = []
    positions: list[int] = []
    for cell, end in zip(pack.cells, pack.ends.tolist(), strict=True):
        for patch in cell.patches:
            if (patch.site is Site.EMBED and layer == 0) or (patch.site is Site.RESID and patch.layer == layer - 1):
                where.extend(end - pack.length + position for position in patch.positions)
                positions.extend(patch.positions)
    if where:
        assert source is not None
        taken = source.entering
        taken = taken.index_select(0, on(torch.tensor(positions) - source.first, taken.device))
        states.index_copy_(0, on(torch.tensor(where), device), taken.to(device))
    pack.states = states[None]
    return pack


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
