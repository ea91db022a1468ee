"""Path patching in a pass up the layers: what senders add, and how receivers read it.

Everything between sender and receiver is held at the run that is patched, and the residual stream is a sum. So a
receiver's input is the patched run's own plus what each sender writes otherwise: known as soon as both base runs have
been through the sender's layer, and the same for all cells that it is in. No frozen pass is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lalm_patch.engine.attention import attention_in
from lalm_patch.engine.base_runs import LayerInputs, LayerView
from lalm_patch.engine.packs import Pack, on
from lalm_patch.engine.path_attention import (
    ATTENTION_NAME,
    EditedQueries,
    SendersLayout,
    edited_queries,
)
from lalm_patch.engine.sites import columns, overwrite, states_at
from lalm_patch.errors import ModelError
from lalm_patch.interventions.patches import Intervention, Site
from lalm_patch.interventions.paths import Input, PathPatch, Receiver, Sender
from lalm_patch.models import LALM

Inputs = Callable[[Tensor], LayerInputs]
"""What a decoder hands its layers for tokens at some positions [positions]."""
Heads = Callable[[int, Tensor, LayerInputs], tuple[Tensor, Tensor, Tensor]]
"""Queries, keys and values [heads, tokens, head size] of a layer for residual streams [1, tokens, hidden]."""


def senders_of(cells: Iterable[Intervention]) -> set[Sender]:
    """All that cells' paths send."""
    return {sender for cell in cells if cell.path is not None and not cell.idle for sender in cell.path.senders}


def sent_sites(cells: Iterable[Intervention]) -> set[Site]:
    """Sites inside the layers whose states have to be looked at in both runs to know what senders write."""
    inside = (Site.HEAD, Site.ATTN, Site.MLP)
    return {sender.site for sender in senders_of(cells) if sender.reads is None and sender.site in inside}


def path_sites(cells: Iterable[Intervention]) -> set[Site]:
    """Sites that a model must have for the cells' paths; what attention is asked is asked head by head."""
    found = set()
    for cell in cells:
        if cell.path is not None:
            found |= {sender.site for sender in cell.path.senders} | {Site.ATTN, Site.MLP}
            found |= {Site.HEAD for receiver in cell.path.receivers if receiver.input is not Input.RESID}
    return found


def path_positions(cells: Iterable[Intervention]) -> int:
    """Positions that go through (a part of) a layer besides the cells' own: at senders, twice, and at receivers."""
    cells = [cell for cell in cells if not cell.idle]
    called = [sender for sender in senders_of(cells) if sender.reads is not None or sender.site is Site.HEAD]
    read = 0
    for path in [cell.path for cell in cells if cell.path is not None]:
        for layer in {receiver.layer for receiver, _ in path.reached if receiver.input is not Input.RESID}:
            read += len({position for _, positions in path.at(layer) for position in positions})
    return 2 * sum(len(sender.positions) for sender in called) + read


def check_paths(lalm: LALM, cells: Iterable[Intervention]) -> None:
    """Raises ModelError for senders and receivers in layers or heads that the model does not have."""
    for cell in cells:
        parts: list[Sender | Receiver] = [] if cell.path is None else [*cell.path.senders, *cell.path.receivers]
        for part in parts:
            most = lalm.num_layers - (not (isinstance(part, Receiver) and part.input is Input.RESID))
            if part.layer > most or (part.head or 0) >= lalm.num_heads:
                raise ModelError(
                    f"{part}: expected layers 0 to {most} and heads 0 to {lalm.num_heads - 1} of this model"
                )


@dataclass
class PathStates:
    """What the cells of one clip send, and where it is read.

    Attributes:
        lalm: the model.
        cells: of the clip.
        inputs: makes a layer's inputs for positions of the patched run.
        heads: queries, keys and values of a layer.
        known: of every sender that was met, the other run's output minus the patched run's: [positions, hidden].
    """

    lalm: LALM
    cells: Sequence[Intervention]
    inputs: Inputs
    heads: Heads
    known: dict[Sender, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._senders = sorted(senders_of(self.cells), key=lambda sender: (sender.layer, str(sender)))

    @property
    def lowest(self) -> int | None:
        """The lowest layer that a sender is in; None without any."""
        return self._senders[0].layer if self._senders else None

    @property
    def top(self) -> int:
        """The highest layer whose view of the other run is needed to know all that is sent."""
        return max((self._met_in(sender) for sender in self._senders), default=-1)

    @staticmethod
    def _met_in(sender: Sender) -> int:
        return sender.layer + (sender.site is Site.RESID)

    # --- senders -----------------------------------------------------------------------------------------------

    def take(self, layer: int, target: LayerView, source: LayerView | None) -> None:
        """Keep what senders write, of both runs' views at a layer: the patched run's, the other's."""
        met = [each for each in self._senders if self._met_in(each) == layer and each not in self.known]
        if not met:
            return
        assert source is not None
        calls = []
        for sender in met:
            if sender.reads is not None or sender.site is Site.HEAD:
                calls.append(sender)
                continue
            rows = torch.tensor(sender.positions) - target.first
            pair = [
                view.entering if sender.site in (Site.EMBED, Site.RESID) else view.states[sender.site]
                for view in (source, target)
            ]
            one, other = (states.index_select(0, on(rows, states.device)) for states in pair)
            self.known[sender] = one.to(other.device) - other
        if calls:
            self._call(layer, calls, target, source)

    def _call(self, layer: int, senders: Sequence[Sender], target: LayerView, source: LayerView) -> None:
        """Compute a layer's attention at the positions of senders: as in the patched run, and as they send it."""
        positions: list[int] = []
        parts, swaps, begin = [], [], 0
        for sender in senders:
            for sends in (False, True):
                count = len(sender.positions)
                parts.append(self._reading(sender, sends, begin, target, source))
                if sends and sender.reads is None:
                    swaps.append((sender, list(range(begin, begin + count))))
                positions.extend(sender.positions)
                begin += count
        device = target.entering.device
        where = torch.tensor(positions)
        states = target.entering.index_select(0, on(where - target.first, device))[None]
        assert target.prefix is not None
        inputs = self.inputs(where)
        keywords: dict[str, Any] = inputs.keywords | {"senders": SendersLayout(target.prefix, parts)}
        wrapped = self.lalm.layer(layer)
        with (
            torch.no_grad(),
            attention_in(self.lalm.decoder_module, ATTENTION_NAME),
            wrapped.trace(states, *inputs.rest, **keywords),
        ):
            for sender, tokens in swaps:
                within = columns(self.lalm, sender.head)
                rows = [position - source.first for position in sender.positions]
                overwrite(wrapped, Site.HEAD, within, tokens, source.states[Site.HEAD][rows, within])
            written = states_at(wrapped, Site.ATTN)[0].clone().save()
        begin = 0
        for sender in senders:
            count = len(sender.positions)
            self.known[sender] = written[begin + count : begin + 2 * count] - written[begin : begin + count]
            begin += 2 * count

    def _reading(self, sender: Sender, sends: bool, begin: int, target: LayerView, source: LayerView) -> EditedQueries:
        """Which queries read what the sender reads from the other run; none of them where it does not send."""
        assert target.prefix is not None
        reads = sender.reads or (0,)
        at, count = torch.tensor(reads), len(sender.positions)
        prefix = target.prefix
        if sends and sender.reads is not None:
            assert source.prefix is not None
            prefix = source.prefix
        key, value = (states.index_select(1, on(at, states.device)) for states in prefix)
        mine = torch.zeros(self.lalm.num_heads, 1, 1, dtype=torch.bool)
        if sends and sender.reads is not None:
            mine[slice(None) if sender.head is None else slice(sender.head, sender.head + 1)] = True
        sees = mine.expand(-1, count, len(reads))
        return EditedQueries(
            tokens=torch.arange(begin, begin + count),
            positions=torch.tensor(sender.positions),
            row=0,
            changed=at,
            query=key[:1],  # none of the queries is changed
            key=key,
            value=value,
            asks=torch.zeros(self.lalm.num_heads, count, dtype=torch.bool),
            finds=sees,
            gets=sees,
        )

    # --- receivers ---------------------------------------------------------------------------------------------

    def difference(self, path: PathPatch, layer: int, positions: Sequence[int], like: Tensor) -> Tensor:
        """What is added to what a layer reads at some positions: [positions, hidden]."""
        total = like.new_zeros(len(positions), like.shape[-1])
        place = {position: row for row, position in enumerate(positions)}
        for sender in path.senders:
            rows = [row for row, position in enumerate(sender.positions) if position in place]
            if sender.reaches <= layer and rows:
                there = torch.tensor([place[sender.positions[row]] for row in rows])
                total.index_add_(0, on(there, total.device), self.known[sender].to(total)[rows])
        return total

    def enter(self, pack: Pack, layer: int, states: Tensor) -> None:
        """Let the residual inputs of a layer (above the last one: of the final norm) have what is sent to them.

        Args:
            pack: the cells.
            layer: which layer.
            states: what enters it, [1, tokens of the pack, hidden]; added to in place.
        """
        if not self._senders:
            return
        for cell, end in zip(pack.cells, pack.ends.tolist(), strict=True):
            for receiver, positions in () if cell.path is None else cell.path.at(layer):
                if receiver.input is Input.RESID:
                    tokens = on(torch.tensor(positions) + end - pack.length, states.device)
                    more = self.difference(cell.path, layer, positions, states)  # type: ignore[arg-type]
                    states[0].index_add_(0, tokens, more)

    def enter_last(self, pack: Pack, states: Tensor) -> Tensor:
        """As `enter`, above the last layer: for its last positions alone, [cells, hidden]."""
        if not self._senders:
            return states
        layer, last = self.lalm.num_layers, pack.length - 1
        rows = [
            row
            for row, cell in enumerate(pack.cells)
            if cell.path is not None and any(last in positions for _, positions in cell.path.at(layer))
        ]
        if not rows:
            return states
        more = [self.difference(pack.cells[row].path, layer, [last], states) for row in rows]  # type: ignore[arg-type]
        return states.index_add(0, on(torch.tensor(rows), states.device), torch.cat(more))

    def edits(self, pack: Pack, layer: int, target: LayerView) -> tuple[EditedQueries, ...]:
        """What queries of the pack see and ask otherwise in a layer; its states are those that enter it."""
        found = []
        if not self._senders:
            return ()
        for row, (cell, end) in enumerate(zip(pack.cells, pack.ends.tolist(), strict=True)):
            path = cell.path
            reached = [] if path is None else [each for each in path.at(layer) if each[0].input is not Input.RESID]
            if not reached:
                continue
            assert path is not None
            tables = edited_queries(reached, self.lalm.num_heads, pack.length)
            found.append((row, end - pack.length, cell, path, tables))
        if not found:
            return ()
        states, positions = [], []
        for _, begin, cell, path, (_, changed, *_) in found:
            own = torch.tensor([position for position in changed if position >= cell.first_position])
            before = torch.tensor([position for position in changed if position < cell.first_position])
            here = [
                source.index_select(0, on(rows, source.device)).to(pack.states.device)
                for source, rows in (
                    (target.entering, before - target.first),
                    (pack.states[0], own + begin),
                )
                if len(rows)
            ]
            states.append(torch.cat(here) + self.difference(path, layer, changed, pack.states))
            positions.extend(changed)
        where = torch.tensor(positions)
        query, key, value = self.heads(layer, torch.cat(states)[None], self.inputs(where))
        made, low = [], 0
        for row, begin, _, _, (queries, changed, asks, finds, gets) in found:
            part = slice(low, low + len(changed))
            low += len(changed)
            of = torch.tensor(queries)
            three = (query[:, part], key[:, part], value[:, part])
            made.append(EditedQueries(of + begin, of, row, torch.tensor(changed), *three, asks, finds, gets))
        return tuple(made)
