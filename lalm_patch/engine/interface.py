"""What every engine offers, written once: the base runs of two encodings, and the cells of a grid between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lalm_patch.engine.readout import Readout
from lalm_patch.interventions import Grid
from lalm_patch.models import LALM, Encoding

Progress = Callable[[int], None]
"""Called with the number of cells that were just computed."""


def ignore_progress(cells: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Sweep:
    """One clip's grid: what `Engine.sweep` is given, so that several clips can share their passes.

    Attributes:
        source: the run that states are taken from.
        target: the run into which they are put.
        grid: the interventions.
        option_ids: target tokens of the options.
        progress: is told about the cells.
    """

    source: Encoding
    target: Encoding
    grid: Grid
    option_ids: Sequence[int]
    progress: Progress = ignore_progress


class Engine(Protocol):
    """Computes what interventions do to the logits at the last position.

    Attributes:
        lalm: the model.
    """

    lalm: LALM

    @property
    def name(self) -> str:
        """What results call it."""

    def base(self, source: Encoding, target: Encoding, option_ids: Sequence[int]) -> Readout:
        """The two runs as they are: row 0 that of `source`, row 1 that of `target`.

        Args:
            source: the run that states are taken from; the clean one when denoising.
            target: the run into which they are put.
            option_ids: target tokens of the options.
        """

    def sweep(
        self,
        source: Encoding,
        target: Encoding,
        grid: Grid,
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
    ) -> Readout:
        """One row per cell of the grid, in the grid's order: the target run with the cell's intervention.

        Args:
            source: the run that states are taken from.
            target: the run into which they are put; the same positions as `source`.
            grid: the interventions.
            option_ids: target tokens of the options.
            progress: is told about the cells.

        Raises:
            ModelError: a site that the model lacks, or what the engine cannot do; the message names another engine.
        """


@runtime_checkable
class SharesPasses(Protocol):
    """An engine that takes several clips through the model together."""

    def clips_within(self, source: Encoding, target: Encoding) -> int:
        """How many clips like this one should share a pass."""

    def bases(self, pairs: Sequence[tuple[Encoding, Encoding, Sequence[int]]]) -> list[Readout]:
        """As `Engine.base`, for source, target and option tokens of several clips."""

    def sweeps(self, sweeps: Sequence[Sweep]) -> list[Readout]:
        """As `Engine.sweep`, for several clips."""
