"""What patches put in place of states: found in one of the two runs or in a grid's arrays, and mixed in.

A pass up the layers meets states in the order of the layers. What is put in at the place where it is met, or above it,
is kept on the way; what comes from a later layer (back-patching) has to be collected before the pass begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lalm_patch.engine.base_runs import INSIDE, LayerView
from lalm_patch.interventions.patches import SAME_PLACE, Intervention, Mix, Origin, Patch, RunPlace, Site

RUNS = (Origin.OTHER, Origin.OWN)
"""Origins that are runs."""
PLAIN = SAME_PLACE.mix
"""How the state of the same place of the other run is put in: whole."""


def mixed(here: Tensor, put: Tensor, mix: Mix, arrays: Mapping[str, np.ndarray]) -> Tensor:
    """What becomes of states [positions, width] when others of that shape are put in, see `Source`.

    Computed in float32 at least, and rounded to the states' own type.
    """
    if mix.replaces:
        return put
    old, new = (states.to(torch.promote_types(states.dtype, torch.float32)) for states in (here, put))
    change = new if mix.added else new - old
    if mix.basis is not None:
        rows = array_like(arrays, mix.basis, old)
        if rows.shape[1] != old.shape[1]:
            raise ValueError(f"basis {mix.basis}: expected rows of width {old.shape[1]}, got {tuple(rows.shape)}")
        change = (change @ rows.T) @ rows
    elif not mix.added:
        return ((1 - mix.alpha) * old + mix.alpha * new).to(here.dtype)
    return (old + mix.alpha * change).to(here.dtype)


def given(patch: Patch, like: Tensor, columns: slice, arrays: Mapping[str, np.ndarray]) -> Tensor:
    """States [positions, width] that are no run's: zeros, or a vector's.

    Args:
        patch: with such a source.
        like: states [..., width of the site], on the device and of the type that is wanted.
        columns: those of the patch's head.
        arrays: the grid's.

    Raises:
        ValueError: an array of another shape.
    """
    width = like.shape[-1]
    if patch.source.vector is None:
        return like.new_zeros(len(patch.positions), width)[:, columns]
    found = array_like(arrays, patch.source.vector, like)
    if tuple(found.shape) not in ((width,), (len(patch.positions), width)):
        raise ValueError(
            f"array {patch.source.vector}: expected [{width}] or [{len(patch.positions)}, {width}] at {patch.site} of "
            f"layer {patch.layer}, got {list(found.shape)}"
        )
    return found.expand(len(patch.positions), width)[:, columns]


def array_like(arrays: Mapping[str, np.ndarray], key: str, like: Tensor) -> Tensor:
    """One of a grid's arrays, on a tensor's device and of its type.

    Raises:
        ValueError: the grid does not have it.
    """
    if key not in arrays:
        raise ValueError(f"a cell names the array {key!r}, and the grid has {', '.join(arrays) or 'none'}")
    return torch.as_tensor(np.asarray(arrays[key], np.float32)).to(like)


def run_places(cells: Iterable[Intervention]) -> set[RunPlace]:
    """Where in the two runs the cells take states from."""
    return {place for cell in cells for patch in cell.patches if (place := patch.taken_from) is not None}


def put_in_layer(cell: Intervention, patch: Patch) -> int:
    """The layer whose view a pass up the layers has in hand when it puts a patch in: the cell's first one, if it starts
    with the patch, else the patch's own."""
    return patch.entry_layer if patch.entry_layer == cell.entry_layer else patch.layer


def sites_inside(cells: Iterable[Intervention], origin: Origin) -> set[Site]:
    """Sites inside the layers of one of the runs that cells take states from.

    What enters a layer is seen anyway. What leaves it has to be looked at only where it is put in while the layer is
    computed, because the cell has started below.
    """
    found = set()
    for cell in cells:
        for patch in cell.patches:
            place = patch.taken_from
            if place is None or place.origin is not origin or place.site not in INSIDE:
                continue
            within = patch.site is Site.RESID and place.layer == patch.layer == put_in_layer(cell, patch)
            if place.site is not Site.RESID or within:
                found.add(place.site)
    return found


@dataclass
class TakenStates:
    """States of a clip's two runs that are put in at other places than their own.

    Attributes:
        cells: those whose patches need them.
        inside: sites that are seen inside the layers of each of the runs.
        wanted: positions of every place, ascending.
        known: of every place that was met, states [positions, width] in that order.
    """

    cells: Sequence[Intervention]
    inside: Mapping[Origin, frozenset[Site]]
    wanted: dict[RunPlace, list[int]] = field(init=False)
    known: dict[RunPlace, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        positions: dict[RunPlace, set[int]] = {}
        for cell in self.cells:
            for patch in cell.patches:
                if not patch.plain and (place := patch.taken_from) is not None:
                    positions.setdefault(place, set()).update(patch.taken_positions)
        self.wanted = {place: sorted(chosen) for place, chosen in positions.items()}
        self._rows = {
            place: {position: row for row, position in enumerate(chosen)} for place, chosen in self.wanted.items()
        }

    def met_in(self, place: RunPlace) -> int:
        """The layer in whose view a place's states are; for what leaves a layer mostly the next one."""
        leaves = place.site is Site.RESID and Site.RESID not in self.inside[place.origin]
        return place.layer + leaves

    def beforehand(self, passes: Iterable[tuple[int, Iterable[int]]]) -> dict[Origin, list[int]]:
        """Layers of each run, ascending, whose states have to be collected before the passes.

        Args:
            passes: the lowest layer of each pass, and the indices of its cells.
        """
        layers: dict[Origin, set[int]] = {origin: set() for origin in RUNS}
        for lowest, indices in passes:
            for index in indices:
                cell = self.cells[index]
                for patch in cell.patches:
                    if patch.plain or (place := patch.taken_from) is None:
                        continue
                    if not lowest <= self.met_in(place) <= put_in_layer(cell, patch):
                        layers[place.origin].add(self.met_in(place))
        return {origin: sorted(found) for origin, found in layers.items()}

    def top(self, indices: Iterable[int]) -> int:
        """The highest layer whose view of the other run a pass with these cells needs."""
        top = 0
        for index in indices:
            cell = self.cells[index]
            for patch in cell.patches:
                if patch.plain:
                    top = max(top, patch.entry_layer)
                elif (place := patch.taken_from) is not None and place.origin is Origin.OTHER:
                    met = self.met_in(place)
                    top = max(top, met if met <= put_in_layer(cell, patch) else 0)
        return top

    def take(self, origin: Origin, layer: int, view: LayerView) -> None:
        """Keep what is wanted of a run's view at a layer."""
        for place, positions in self.wanted.items():
            if place.origin is not origin or place in self.known or self.met_in(place) != layer:
                continue
            enters = place.site is Site.EMBED or place.layer != layer
            states = view.entering if enters else view.states[place.site]
            rows = torch.tensor(positions) - view.first
            self.known[place] = states.index_select(0, rows.to(states.device))

    def rows(self, patch: Patch, columns: slice) -> Tensor:
        """States [positions, width] that a patch takes from a run."""
        place = patch.taken_from
        assert place is not None
        states, rows = self.known[place], self._rows[place]
        chosen = torch.tensor([rows[position] for position in patch.taken_positions])
        return states[:, columns].index_select(0, chosen.to(states.device))

    def put(self, patch: Patch, like: Tensor, columns: slice, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """What a patch puts in, [positions, width]; see `given`."""
        if patch.taken_from is None:
            return given(patch, like, columns, arrays)
        return self.rows(patch, columns).to(like)


@dataclass(frozen=True)
class Put:
    """What goes into one place of a layer, for all cells of a pack.

    Attributes:
        site: which site.
        within: columns of the head; all for other sites.
        where: [positions] int64, tokens of the pack.
        states: [positions, width], what is put in; None where `patches` say it.
        mix: how.
        patches: with the part of their positions that counts.
        taken: states of runs that these take.
        arrays: the grid's.
    """

    site: Site
    within: slice
    where: Tensor
    states: Tensor | None
    mix: Mix = PLAIN
    patches: Sequence[tuple[Patch, slice]] = ()
    taken: TakenStates | None = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def onto(self, there: Tensor) -> Tensor:
        """What becomes of the states at `where`, [positions, width within]; `there` is [tokens, width]."""
        if self.states is not None:
            return self.states
        assert self.taken is not None
        parts = [self.taken.put(patch, there, self.within, self.arrays)[part] for patch, part in self.patches]
        here = there[:, self.within].index_select(0, self.where)
        return mixed(here, torch.cat(parts), self.mix, self.arrays)
