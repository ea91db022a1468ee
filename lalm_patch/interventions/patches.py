"""Interventions as data: what to change in a run. Engines carry them out, grids arrange them, results store them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    """A named place in the model, in the order in which a forward pass meets them: in every decoder layer, but for the
    first two."""

    TOWER = "tower"
    """What leaves a layer of the audio encoder, [chunks, frames, width]; positions are frames, chunk after chunk."""
    EMBED = "embed"
    """What enters the first decoder layer, [batch, positions, hidden]: at audio positions the projector's output."""
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
        layer: index of the decoder layer, from 0 (at the site `embed` it is 0); at `tower` of the encoder layer.
        positions: positions in the decoder's sequence, ascending; at `tower` frames.
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
        if self.site is Site.EMBED and self.layer:
            raise ValueError(f"the site embed is before layer 0, got layer {self.layer}")

    @property
    def entry_layer(self) -> int:
        """The first layer that has to be computed: the states after a layer replace it, others change its inside."""
        return self.layer + (self.site is Site.RESID)

    @property
    def moment(self) -> tuple[bool, int, int, int, tuple[int, ...]]:
        """What a forward pass meets earlier is smaller."""
        return (
            self.site is not Site.TOWER,
            self.layer,
            _ORDER[self.site],
            -1 if self.head is None else self.head,
            self.positions,
        )


@dataclass(frozen=True)
class Cut:
    """Do not let these positions attend to those: attention knockout (Geva et al., arXiv 2304.14767).

    Their scores are removed before the softmax, so that the other positions share all of the weight.

    Attributes:
        layer: index of the decoder layer, from 0.
        targets: positions that look, ascending.
        sources: positions they must not see, ascending; none of them a target, one at least before the last target.
        head: in which attention head, from 0; None for all heads.
    """

    layer: int
    targets: tuple[int, ...]
    sources: tuple[int, ...]
    head: int | None = None

    def __post_init__(self) -> None:
        if self.layer < 0 or (self.head or 0) < 0:
            raise ValueError(f"layers and heads are counted from 0, got layer {self.layer}, head {self.head}")
        for positions in (self.targets, self.sources):
            if not positions or list(positions) != sorted(set(positions)) or positions[0] < 0:
                raise ValueError(f"positions must be ascending, distinct and not negative, got {positions}")
        if set(self.targets) & set(self.sources):
            raise ValueError(f"a position must see itself: {self.targets} and {self.sources} overlap")
        if self.sources[0] > self.targets[-1]:
            raise ValueError(f"causal attention: none of {self.targets} sees any of {self.sources} anyway")

    @property
    def entry_layer(self) -> int:
        """The first layer that has to be computed."""
        return self.layer


@dataclass(frozen=True)
class Intervention:
    """What one cell of a grid does: patches, in the order in which a forward pass meets them, and cuts.

    The empty intervention is the run itself into which others are patched.
    """

    patches: tuple[Patch, ...] = ()
    cuts: tuple[Cut, ...] = ()

    def __init__(self, patches: Iterable[Patch] = (), cuts: Iterable[Cut] = ()) -> None:
        object.__setattr__(self, "patches", tuple(sorted(patches, key=lambda patch: patch.moment)))
        object.__setattr__(self, "cuts", tuple(sorted(cuts, key=lambda cut: cut.layer)))

    @property
    def entry_layer(self) -> int:
        """The first layer that has to be computed: everything below is the unpatched run's."""
        return min([patch.entry_layer for patch in self.patches] + [cut.entry_layer for cut in self.cuts])

    @property
    def first_position(self) -> int:
        """The first position whose states change; earlier ones keep theirs (causal attention)."""
        return min([patch.positions[0] for patch in self.patches] + [cut.targets[0] for cut in self.cuts])

    @property
    def in_tower(self) -> tuple[Patch, ...]:
        """The patches of the audio encoder: they change everything the decoder gets."""
        return tuple(patch for patch in self.patches if patch.site is Site.TOWER)

    def at(self, layer: int) -> tuple[Patch, ...]:
        """The patches of one decoder layer."""
        return tuple(patch for patch in self.patches if patch.layer == layer and patch.site is not Site.TOWER)
