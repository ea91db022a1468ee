"""Paths as data: what senders write, as single receivers read it, everything else held at the run that is patched.

A sender adds to the residual stream; attention and MLPs of later layers read from there. Path patching (Wang et al.,
arXiv 2211.00593; Goldowsky-Dill et al., arXiv 2304.05969) changes what a sender has written for some of these readers
only, on the direct way: what lies between does not react.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from lalm_patch.interventions.sites import Site


class Input(StrEnum):
    """What of a layer reads a position's residual stream."""

    QUERY = "query"
    """The queries that this position's attention asks with."""
    KEY = "key"
    """The keys by which other positions, and it itself, find this one."""
    VALUE = "value"
    """The values that they get from it."""
    RESID = "resid"
    """The whole layer, and with it everything above; of layer `num_layers` the final norm, and so the logits."""


WRITERS = (Site.EMBED, Site.HEAD, Site.ATTN, Site.MLP, Site.RESID)
"""Sites whose states are in the residual stream, or become a summand of it."""


@dataclass(frozen=True)
class Sender:
    """What is written as in the other run.

    Attributes:
        layer: index of the decoder layer, from 0 (at the site `embed` it is 0).
        positions: positions at which it writes, ascending.
        site: what writes: a head, all of attention, the MLP, or (resid) everything up to the end of the layer.
        head: which attention head; for the site `head` only.
        reads: None: its output is that of the other run. Positions: its output is that of the run that is patched, but
            for these positions' keys and values, which are the other run's: what it reads there, and nothing else. For
            the sites `head` and `attn`.
    """

    layer: int
    positions: tuple[int, ...]
    site: Site = Site.ATTN
    head: int | None = None
    reads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_place(self.layer, self.positions, self.head)
        if self.site not in WRITERS:
            raise ValueError(f"a sender writes to the residual stream: expected one of {', '.join(WRITERS)}")
        if (self.head is None) == (self.site is Site.HEAD):
            raise ValueError(f"the site head, and no other, has a head: got {self.head} at {self.site}")
        if self.site is Site.EMBED and self.layer:
            raise ValueError(f"the site embed is before layer 0, got layer {self.layer}")
        if self.reads is not None:
            _check_place(self.layer, self.reads, None)
            if self.site not in (Site.HEAD, Site.ATTN):
                raise ValueError(f"only attention reads other positions: expected head or attn, got {self.site}")

    @property
    def reaches(self) -> int:
        """The first layer whose input holds what it writes."""
        return self.layer + (self.site is not Site.EMBED)

    @property
    def writing(self) -> tuple[int, ...]:
        """The positions at which it can differ: those that see something of what it reads."""
        reads = self.reads
        return self.positions if reads is None else tuple(p for p in self.positions if p >= reads[0])


@dataclass(frozen=True)
class Receiver:
    """What reads the residual stream with the senders' difference in it.

    Attributes:
        layer: index of the decoder layer, from 0; of the input `resid` up to the number of layers.
        positions: positions whose residual stream is read, ascending.
        input: what reads it.
        head: in which attention head; None for all heads. A key or value that several query heads share is changed for
            this query head alone.
        seen_by: for keys and values: the positions that see the change, ascending; None for all that attend to them.
    """

    layer: int
    positions: tuple[int, ...]
    input: Input = Input.RESID
    head: int | None = None
    seen_by: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_place(self.layer, self.positions, self.head)
        if self.input is Input.RESID and self.head is not None:
            raise ValueError(f"the residual input of a layer belongs to no head, got head {self.head}")
        if self.seen_by is not None:
            _check_place(self.layer, self.seen_by, None)
            if self.input not in (Input.KEY, Input.VALUE):
                raise ValueError(f"only keys and values are seen by other positions, got seen_by for {self.input}")

    def readers(self, positions: Iterable[int], length: int) -> tuple[int, ...]:
        """Positions of a run of some length whose attention is changed, ascending: where `positions` are changed."""
        changed = sorted(positions)
        if self.input in (Input.QUERY, Input.RESID) or not changed:
            return tuple(changed)
        seen_by = range(length) if self.seen_by is None else self.seen_by
        return tuple(position for position in seen_by if position >= changed[0])


@dataclass(frozen=True)
class PathPatch:
    """All paths from some senders to some receivers: single edges of the graph of what writes and what reads.

    A receiver at layer L reads at each of its positions p, in place of the residual stream x of the run in hand,

        x[p] + sum over senders below L that write at p of (output as in the other run - output of the patched run)

    with both outputs [hidden] as the unpatched runs have them. That is what the residual stream holds if everything
    between sender and receiver is held at the patched run, since it is a sum. All else reads x. Behind the receivers
    the forward pass goes on as usual, through other receivers, too.

    Attributes:
        senders: what is written as in the other run; no two of them the same thing twice.
        receivers: what reads it; no two of them the same thing twice.
    """

    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]

    def __post_init__(self) -> None:
        if not self.senders or not self.receivers:
            raise ValueError("a path has a sender and a receiver at least; the empty intervention changes nothing")
        self._check_senders()
        self._check_receivers()

    def _check_senders(self) -> None:
        """What one sender writes must not be part of what another does."""
        for number, one in enumerate(self.senders):
            for other in self.senders[number + 1 :]:
                if set(one.positions) & set(other.positions) and _same_summand(one, other):
                    raise ValueError(f"{one} and {other} write the same: their difference would count twice")

    def _check_receivers(self) -> None:
        """A reader must not get the difference twice."""
        for number, one in enumerate(self.receivers):
            for other in self.receivers[number + 1 :]:
                if set(one.positions) & set(other.positions) and _same_reader(one, other):
                    raise ValueError(f"{one} and {other} hold the same reader: it would get the difference twice")

    @cached_property
    def reached(self) -> tuple[tuple[Receiver, tuple[int, ...]], ...]:
        """The receivers that anything reaches, from the lowest up, with the positions at which it does.

        Nothing goes from one position to another but by attention, and none looks ahead.
        """
        found = []
        for receiver in sorted(self.receivers, key=lambda each: each.layer):
            written = {p for sender in self.senders if sender.reaches <= receiver.layer for p in sender.writing}
            seen_by = receiver.seen_by
            last = None if seen_by is None else seen_by[-1]
            positions = tuple(p for p in receiver.positions if p in written and (last is None or p <= last))
            if positions:
                found.append((receiver, positions))
        return tuple(found)

    @property
    def entry_layer(self) -> int:
        """The first layer that has to be computed; of a path that reaches nothing its lowest receiver's."""
        return min(receiver.layer for receiver, _ in self.reached) if self.reached else self.receivers[0].layer

    @property
    def first_position(self) -> int:
        """The first position whose states change; of a path that reaches nothing its first receiver's."""
        if not self.reached:
            return self.receivers[0].positions[0]
        return min(receiver.readers(changed, changed[0] + 1)[0] for receiver, changed in self.reached)

    @property
    def earliest_position(self) -> int:
        """The first position at which states of the unpatched runs are needed."""
        changed = [position for _, positions in self.reached for position in positions]
        return min([sender.positions[0] for sender in self.senders] + changed)

    def at(self, layer: int) -> tuple[tuple[Receiver, tuple[int, ...]], ...]:
        """The receivers of one layer that are reached, with the positions at which they are."""
        return tuple(each for each in self.reached if each[0].layer == layer)


def _check_place(layer: int, positions: tuple[int, ...], head: int | None) -> None:
    if layer < 0 or (head or 0) < 0:
        raise ValueError(f"layers and heads are counted from 0, got layer {layer}, head {head}")
    if not positions or list(positions) != sorted(set(positions)) or positions[0] < 0:
        raise ValueError(f"positions must be ascending, distinct and not negative, got {positions}")


def _same_summand(one: Sender, other: Sender) -> bool:
    """Whether two senders write the same part of the residual stream, where they share a position."""
    for whole, part in ((one, other), (other, one)):
        if whole.site is Site.RESID and part.reaches <= whole.reaches:
            return True
    if one.layer != other.layer:
        return False
    return one.head == other.head if one.site is other.site else {one.site, other.site} == {Site.HEAD, Site.ATTN}


def _same_reader(one: Receiver, other: Receiver) -> bool:
    """Whether two receivers are, or hold, the same reader, where they share a position."""
    for whole, part in ((one, other), (other, one)):
        if whole.input is Input.RESID and part.layer >= whole.layer:
            return True
    if (one.layer, one.input) != (other.layer, other.input):
        return False
    heads = one.head is None or other.head is None or one.head == other.head
    seen = one.seen_by is None or other.seen_by is None or bool(set(one.seen_by) & set(other.seen_by))
    return heads and seen
