"""Interventions as data: what to change in a run. Engines carry them out, grids arrange them, results store them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    """A named place in every decoder layer."""

    HEAD = "head"
    """One attention head's part of what enters the output projection, [batch, positions, head size]."""
    ATTN = "attn"
    """What self-attention adds to the residual stream: its output, [batch, positions, hidden]."""
    MLP = "mlp"
    """What the MLP adds to the residual stream: its output, [batch, positions, hidden]."""
    RESID = "resid"
    """The residual stream after the layer: the decoder layer's output, [batch, positions, hidden]."""


_ORDER = {site: index for index, site in enumerate(Site)}
"""Sites in the order in which a layer's forward pass meets them."""


@dataclass(frozen=True)
class Patch:
    """Take these states from the source run.

    Attributes:
        layer: index of the decoder layer, from 0.
        positions: positions in the decoder's sequence, ascending.
        site: where in the layer.
        head: which attention head, from 0; for the site `head` only.
    """

    layer: int
    positions: tuple[int, ...]
    site: Site = Site.RESID
    head: int | None = None

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"decoder layers are counted from 0, got {self.layer}")
        if not self.positions or list(self.positions) != sorted(set(self.positions)) or self.positions[0] < 0:
            raise ValueError(f"positions must be ascending, distinct and not negative, got {self.positions}")
        if (self.head is None) == (self.site is Site.HEAD) or (self.head or 0) < 0:
            raise ValueError(f"the site head, and no other, has a head, from 0: got {self.head} at {self.site}")

    @property
    def entry_layer(self) -> int:
        """The first layer that has to be computed: the states after a layer replace it, others change its inside."""
        return self.layer + (self.site is Site.RESID)

    @property
    def moment(self) -> tuple[int, int, int, tuple[int, ...]]:
        """What a forward pass meets earlier is smaller."""
        return self.layer, _ORDER[self.site], -1 if self.head is None else self.head, self.positions


@dataclass(frozen=True)
class Intervention:
    """What one cell of a grid does: a set of patches, kept in the order in which a forward pass meets them.

    The empty intervention is the corrupted run itself.
    """

    patches: tuple[Patch, ...] = ()

    def __init__(self, patches: Iterable[Patch] = ()) -> None:
        object.__setattr__(self, "patches", tuple(sorted(patches, key=lambda patch: patch.moment)))

    @property
    def entry_layer(self) -> int:
        """The first layer that has to be computed: everything below is the corrupted run's."""
        return min(patch.entry_layer for patch in self.patches)

    @property
    def first_position(self) -> int:
        """The first position whose states change; earlier ones keep theirs (causal attention)."""
        return min(patch.positions[0] for patch in self.patches)

    def at(self, layer: int) -> tuple[Patch, ...]:
        """The patches of one layer."""
        return tuple(patch for patch in self.patches if patch.layer == layer)
