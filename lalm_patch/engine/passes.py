"""What a sweep is on its way up the layers: the clips of a pass, which cells share one, what it needs beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lalm_patch.engine.base_runs import BaseRun
from lalm_patch.engine.interface import Sweep
from lalm_patch.engine.packs import Pack
from lalm_patch.engine.path_states import PathStates
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.sources import RUNS, TakenStates, sites_inside
from lalm_patch.interventions.patches import Intervention, Origin


@dataclass
class ClipSweep:
    """A sweep on its way: its base runs, the packs that have started, and what has come out at the top.

    Attributes:
        sweep: what was asked for.
        source: the run that states are taken from.
        target: the run into which they are put.
        taken: states of either that are put in at other places than their own.
        packs: cells that have started, with their states in the layer in hand.
        top: what leaves the last layer at the last position, [cells, hidden], with the cells' indices.
        work: positions times layers of all cells.
        paths: what their paths send, and where it is read.
        done: of these, what is computed.
        told: cells that were reported.
    """

    sweep: Sweep
    source: BaseRun
    target: BaseRun
    taken: TakenStates
    work: int
    paths: PathStates
    packs: list[Pack] = field(default_factory=list)
    top: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)
    parts: list[tuple[Sequence[int], Readout]] = field(default_factory=list)
    done: int = 0
    told: int = 0
    _room: Tensor | None = None
    _used: int = 0

    def run(self, origin: Origin) -> BaseRun:
        """One of the two runs."""
        return self.source if origin is Origin.OTHER else self.target

    def make_room(self, like: Tensor, tokens: int) -> Tensor:
        """Memory [1, tokens, hidden] for the states of cells that start: a part of one piece for all cells of the grid.

        States that live on among short-lived ones would leave holes in the memory of a CPU.
        """
        if self._room is None or self._room.device != like.device:
            every = sum(self.length - cell.first_position for cell in self.cells if not cell.idle)
            # Not touched yet, so it takes no memory yet.
            self._room, self._used = like.new_empty(1, every, like.shape[-1]), 0
        room = self._room[:, self._used : self._used + tokens]
        self._used += tokens
        return room

    def end_pass(self) -> None:
        """Cells have come out at the top: their memory is free."""
        self._room, self._used = None, 0

    @property
    def length(self) -> int:
        """Positions of a whole run."""
        return len(self.sweep.target.tokens)

    @property
    def cells(self) -> tuple[Intervention, ...]:
        """The grid's cells."""
        return self.sweep.grid.cells

    def tell(self, work: int) -> None:
        """Report cells in proportion to the work done: a pass finishes all of its cells at once."""
        self.done += work
        cells = len(self.cells) * self.done // self.work
        if cells > self.told:
            self.sweep.progress(cells - self.told)
            self.told = cells


@dataclass(frozen=True)
class PassPart:
    """What one pass computes of one clip.

    Attributes:
        clip: whose cells they are.
        entering: indices of the cells that start at each layer.
        source_top: the last layer that states are taken from, the number of layers for what leaves the last one.
        lowest: the first layer whose states are needed.
    """

    clip: ClipSweep
    entering: dict[int, list[int]]
    source_top: int
    lowest: int

    def with_senders(self) -> PassPart:
        """The same as a clip's first pass: on its way it meets all senders of the clip's paths."""
        lowest = self.clip.paths.lowest
        if lowest is None:
            return self
        top = max(self.source_top, self.clip.paths.top)
        return replace(self, lowest=min(self.lowest, lowest), source_top=top)


def plan_passes(
    clips: Sequence[tuple[Sequence[Intervention], int]], num_layers: int, most: int
) -> list[dict[int, list[int]]]:
    """Which cells go up together: indices of the cells of each pass, by clip; those that start lowest come first.

    Idle cells are the unpatched run, and need none.

    Args:
        clips: cells, and the positions of a whole run, of each clip.
        num_layers: decoder layers.
        most: suffix positions of one pass; a pass has one cell at least.
    """
    waiting = sorted(
        (cell.entry_layer, number, cell.first_position, index)
        for number, (cells, _) in enumerate(clips)
        for index, cell in enumerate(cells)
        if not cell.idle
    )
    passes: list[dict[int, list[int]]] = []
    held = 0
    for entry, number, first, index in waiting:
        size = 1 if entry == num_layers else clips[number][1] - first
        if not passes or held + size > most:
            passes.append({})
            held = 0
        passes[-1].setdefault(number, []).append(index)
        held += size
    return passes


def sources_cost(cells: Sequence[Intervention], passes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """What it takes to put in something else than the same place's states.

    Args:
        cells: of one clip.
        passes: indices of the cells of each pass, the lowest first.

    Returns:
        Layers that base runs, where they are not kept, go through once more for states of later layers; and the
        positions whose states are kept, summed over layers.
    """
    taken = TakenStates(cells, {origin: frozenset(sites_inside(cells, origin)) for origin in RUNS})
    lowest = [min(cells[index].entry_layer for index in indices) for indices in passes]
    found = taken.beforehand(zip(lowest, passes, strict=True))
    again = sum(max(0, max(layers) - lowest[0]) for layers in found.values() if layers)
    return again, sum(map(len, taken.wanted.values()))


def collect_beforehand(clips: Sequence[ClipSweep], plan: Sequence[Sequence[PassPart]], lowest: Sequence[int]) -> None:
    """Take the states that passes do not meet in time: those of a later layer, or of one below a pass.

    Runs that are kept have them already; others go up once more, side by side, as far as they are needed.

    Args:
        clips: all clips of the sweeps.
        plan: what each pass computes.
        lowest: the lowest layer that a cell starts at, of each pass.
    """
    takers: dict[int, tuple[BaseRun, list[tuple[ClipSweep, Origin]], set[int]]] = {}
    for clip in clips:
        own = [
            (low, [index for some in part.entering.values() for index in some])
            for low, parts in zip(lowest, plan, strict=True)
            for part in parts
            if part.clip is clip
        ]
        for origin, layers in clip.taken.beforehand(own).items():
            if layers:
                run = clip.run(origin)
                _, clips_of_run, wanted = takers.setdefault(id(run), (run, [], set()))
                clips_of_run.append((clip, origin))
                wanted.update(layers)
    if not takers:
        return
    begins = {key: run.computes_from(min(wanted)) for key, (run, _, wanted) in takers.items()}
    top = max(max(wanted) for _, _, wanted in takers.values())
    for layer in range(min(begins.values()), top + 1):
        for key, (run, clips_of_run, wanted) in takers.items():
            if begins[key] <= layer <= max(wanted):
                view = run.view(layer, mark=layer in lowest)  # from there the passes go on
                for clip, origin in clips_of_run:
                    clip.taken.take(origin, layer, view)
