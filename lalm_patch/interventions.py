"""Interventions as data: what to change in a run. Engines carry them out, grids arrange them, results store them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    """A named place in every decoder layer."""

    RESID = "resid"
    """The residual stream after the layer: the decoder layer's output, [batch, positions, hidden]."""


@dataclass(frozen=True, order=True)
class Patch:
    """Take these states from the source run.

    Attributes:
        layer: index of the decoder layer, from 0.
        positions: positions in the decoder's sequence, ascending.
        site: where in the layer.
    """

    layer: int
    positions: tuple[int, ...]
    site: Site = Site.RESID

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"decoder layers are counted from 0, got {self.layer}")
        if not self.positions or list(self.positions) != sorted(set(self.positions)) or self.positions[0] < 0:
            raise ValueError(f"positions must be ascending, distinct and not negative, got {self.positions}")


@dataclass(frozen=True)
class Intervention:
    """What one cell of a grid does: a set of patches, kept in the order in which a forward pass meets them.

    The empty intervention is the corrupted run itself.
    """

    patches: tuple[Patch, ...] = ()

    def __init__(self, patches: Iterable[Patch] = ()) -> None:
        object.__setattr__(self, "patches", tuple(sorted(patches)))

    @property
    def first_layer(self) -> int:
        """The first layer whose states change."""
        return self.patches[0].layer

    @property
    def first_position(self) -> int:
        """The first position whose states change; earlier ones keep theirs (causal attention)."""
        return min(patch.positions[0] for patch in self.patches)

    def at(self, layer: int) -> tuple[Patch, ...]:
        """The patches of one layer."""
        return tuple(patch for patch in self.patches if patch.layer == layer)
