"""Interventions as data: what to change in a run. Engines carry them out, grids arrange them, results store them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lalm_patch.interventions.paths import PathPatch
from lalm_patch.interventions.sites import Site as Site

_ORDER = {site: index for index, site in enumerate(Site)}
"""Sites in the order in which a layer's forward pass meets them."""


_HIDDEN_WIDE = (Site.EMBED, Site.ATTN, Site.MLP, Site.RESID)
"""Sites whose states are as wide as the residual stream, so that one can stand in another's place."""


class Origin(StrEnum):
    """Where that which is put in place of a state comes from."""

    OTHER = "other"
    """The run that states are taken from: `source` of `Engine.sweep`."""
    OWN = "own"
    """The run into which states are put, as it is without any patch: `target` of `Engine.sweep`."""
    ZERO = "zero"
    """Zeros."""
    VECTOR = "vector"
    """An array that travels with the grid (`Grid.arrays`): a mean over clips, a direction."""


class RunPlace(NamedTuple):
    """Where in one of the two runs states are.

    Attributes:
        origin: which run, `other` or `own`.
        layer: decoder layer; at `tower` of the encoder.
        site: where in the layer.
    """

    origin: Origin
    layer: int
    site: Site


class Mix(NamedTuple):
    """How a state and what is put in its place become one.

    Attributes:
        alpha: how much of what is put in.
        added: whether it is added to the state, which stays.
        basis: key of the subspace in which that happens; None for the whole state.
    """

    alpha: float
    added: bool
    basis: str | None

    @property
    def replaces(self) -> bool:
        """Whether nothing of the state that was there is left."""
        return self == (1.0, False, None)


@dataclass(frozen=True)
class Source:
    """What a patch puts in place of a state: by default the state of the same place of the other run.

    With h the state that is there and s what is put in, the state becomes

        (1 - alpha) h + alpha s                 replaced
        h + alpha s                             added
        h + alpha B^T B (s - h)                 within a subspace with the orthonormal rows B; added: h + alpha B^T B s

    States of a run are those of the whole unpatched run, so that a later layer's can be put into an earlier one.

    Attributes:
        origin: a run, zeros, or an array.
        layer: the layer of that run; None for the patch's own.
        positions: positions of that run, one for each of the patch's; None for the patch's own.
        site: the site there; None for the patch's own. Another one has to be as wide: embed, attn, mlp and resid are.
        vector: key of the array among `Grid.arrays`, [width] or [positions, width] with the site's width (at the site
            `head` that of all heads side by side, of which the patch's own columns are taken).
        alpha: how much of it is put in; any finite number.
        basis: key of the subspace's rows among `Grid.arrays`, [k, width of what is exchanged], orthonormal; None for
            all of the state.
        added: whether it is added to the state instead of replacing it: a direction that steers.
    """

    origin: Origin = Origin.OTHER
    layer: int | None = None
    positions: tuple[int, ...] | None = None
    site: Site | None = None
    vector: str | None = None
    alpha: float = 1.0
    basis: str | None = None
    added: bool = False

    def __post_init__(self) -> None:
        if (self.vector is None) == (self.origin is Origin.VECTOR):
            raise ValueError(f"a vector's key goes with the origin vector: got {self.vector!r} with {self.origin}")
        place = (self.layer, self.positions, self.site)
        if self.origin not in (Origin.OTHER, Origin.OWN) and place != (None, None, None):
            raise ValueError(
                f"{self.origin} is at no place of a run: expected no layer, positions or site, got {place}"
            )
        if (self.layer or 0) < 0:
            raise ValueError(f"layers are counted from 0, got {self.layer}")
        if self.positions is not None and (not self.positions or min(self.positions) < 0):
            raise ValueError(f"expected positions from 0, got {self.positions}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"expected a finite alpha, got {self.alpha}")

    @property
    def mix(self) -> Mix:
        """How it is put in."""
        return Mix(self.alpha, self.added, self.basis)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Keys of the arrays it needs."""
        return tuple(key for key in (self.vector, self.basis) if key is not None)


SAME_PLACE = Source()
"""The same place of the other run, whole."""


@dataclass(frozen=True)
class Patch:
    """Put something else in place of these states: by default those of the source run.

    Attributes:
        layer: index of the decoder layer, from 0 (at the site `embed` it is 0); at `tower` of the encoder layer.
        positions: positions in the decoder's sequence, ascending; at `tower` frames.
        site: where in the layer.
        head: which attention head, from 0; for the site `head` only.
        source: what is put in their place.
    """

    layer: int
    positions: tuple[int, ...]
    site: Site = Site.RESID
    head: int | None = None
    source: Source = SAME_PLACE

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"decoder layers are counted from 0, got {self.layer}")
        if not self.positions or list(self.positions) != sorted(set(self.positions)) or self.positions[0] < 0:
            raise ValueError(f"positions must be ascending, distinct and not negative, got {self.positions}")
        if (self.head is None) == (self.site is Site.HEAD) or (self.head or 0) < 0:
            raise ValueError(f"the site head, and no other, has a head, from 0: got {self.head} at {self.site}")
        if self.site is Site.EMBED and self.layer:
            raise ValueError(f"the site embed is before layer 0, got layer {self.layer}")
        if self.source is not SAME_PLACE:
            self._check_source(self.source)

    def _check_source(self, source: Source) -> None:
        taken = source.positions
        if taken is not None and len(taken) != len(self.positions):
            raise ValueError(f"expected a source position for each of {self.positions}, got {taken}")
        there = source.site or self.site
        if there is not self.site and not {there, self.site} <= {*_HIDDEN_WIDE}:
            raise ValueError(f"states of the site {there} are not as wide as those of {self.site}")
        layer = self.layer if source.layer is None else source.layer
        if there is Site.EMBED and layer and source.origin in (Origin.OTHER, Origin.OWN):
            raise ValueError(f"the site embed is before layer 0, got layer {layer} as the source's")

    @property
    def plain(self) -> bool:
        """Whether it takes the state of the same place of the other run, whole."""
        return self.source is SAME_PLACE or self.source == SAME_PLACE

    @property
    def changes_nothing(self) -> bool:
        """Whether it puts a state of the run into which it is put back where that is: of an unpatched run."""
        mine = RunPlace(Origin.OWN, self.layer, self.site)
        return self.taken_from == mine and self.taken_positions == self.positions and not self.source.added

    @property
    def taken_from(self) -> RunPlace | None:
        """Where the states it puts in are; None where they are no run's."""
        source = self.source
        if source.origin not in (Origin.OTHER, Origin.OWN):
            return None
        layer = self.layer if source.layer is None else source.layer
        return RunPlace(source.origin, layer, source.site or self.site)

    @property
    def taken_positions(self) -> tuple[int, ...]:
        """Which positions of that run, one for each of the patch's."""
        return self.positions if self.source.positions is None else self.source.positions

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
    """What one cell of a grid does: patches, in the order in which a forward pass meets them, and cuts; or paths.

    The empty intervention is the run itself into which others are patched.
    """

    patches: tuple[Patch, ...] = ()
    cuts: tuple[Cut, ...] = ()
    path: PathPatch | None = None

    def __init__(self, patches: Iterable[Patch] = (), cuts: Iterable[Cut] = (), path: PathPatch | None = None) -> None:
        object.__setattr__(self, "patches", tuple(sorted(patches, key=lambda patch: patch.moment)))
        object.__setattr__(self, "cuts", tuple(sorted(cuts, key=lambda cut: cut.layer)))
        object.__setattr__(self, "path", path)
        if path is not None and (self.patches or self.cuts):
            raise ValueError("a path holds everything else at the unpatched run: expected no patches, no cuts with it")
        if any(not patch.plain for patch in self.patches):
            self._check_overlap()

    def _check_overlap(self) -> None:
        """Two patches of one state would depend on their order, unless both put in that of the other run."""
        known: dict[tuple[Site, int, int | None, int], bool] = {}
        for patch in self.patches:
            for position in patch.positions:
                place = patch.site, patch.layer, patch.head, position
                if place in known and not (known[place] and patch.plain):
                    raise ValueError(
                        f"two patches of position {position} at {patch.site} of layer {patch.layer}: give one"
                    )
                known[place] = patch.plain

    @property
    def idle(self) -> bool:
        """Whether it is the unpatched run by its definition: nothing that is written reaches anything that reads it."""
        return not self.patches and not self.cuts and (self.path is None or not self.path.reached)

    @property
    def entry_layer(self) -> int:
        """The first layer that has to be computed: everything below is the unpatched run's."""
        if self.path is not None:
            return self.path.entry_layer
        return min([patch.entry_layer for patch in self.patches] + [cut.entry_layer for cut in self.cuts])

    @property
    def first_position(self) -> int:
        """The first position whose states change; earlier ones keep theirs (causal attention)."""
        if self.path is not None:
            return self.path.first_position
        return min([patch.positions[0] for patch in self.patches] + [cut.targets[0] for cut in self.cuts])

    @property
    def in_tower(self) -> tuple[Patch, ...]:
        """The patches of the audio encoder: they change everything the decoder gets."""
        return tuple(patch for patch in self.patches if patch.site is Site.TOWER)

    def at(self, layer: int) -> tuple[Patch, ...]:
        """The patches of one decoder layer."""
        return tuple(patch for patch in self.patches if patch.layer == layer and patch.site is not Site.TOWER)
