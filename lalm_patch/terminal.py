"""What someone at a terminal sees: commands to type, paths as one would type them, and how far a run is."""

from __future__ import annotations

import logging
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


def command_line(overrides: Sequence[str]) -> str:
    """The command of a run with these overrides."""
    return shlex.join(["python", "-m", "lalm_patch", *overrides])


def as_typed(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


class Waiting:
    """Says every half minute what is going on, where there are no cells to count yet. Use as a context manager.

    Args:
        title: what is being waited for.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._step = ""
        self._done = self._total = 0
        self._started = self._step_started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def step(self, name: str, done: int = 0, total: int = 0) -> None:
        """What is begun now, and how much of how much is done of its kind."""
        if not done:
            self._step_started = time.monotonic()
        self._step, self._done, self._total = name, done, total

    def line(self) -> str:
        """What is going on, how far it is, and for how long, in one line."""
        now = time.monotonic()
        counted = ""
        if self._total:
            left = (now - self._step_started) / self._done * (self._total - self._done) if self._done else None
            about = "" if left is None else f", about {tqdm.format_interval(left)} left"
            counted = f" ({self._done} of {self._total} done{about})"
        return f"{self.title}: {self._step}{counted}; {tqdm.format_interval(now - self._started)} so far"

    def _speak(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LINES):
            log.info("%s", self.line())


class Progress:
    """A bar on a terminal, a line now and then in a log file.

    Counts cells; shows rate and time left. Use as a context manager.

    Args:
        total: cells of the whole run.
        title: what is being computed.
    """

    def __init__(self, total: int, title: str) -> None:
        self.total = total
        self.title = title
        self.done = 0
        self._note = ""
        self._on_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._stack = ExitStack()
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._on_terminal:
            self._stack.enter_context(logging_redirect_tqdm())
            self._bar = self._stack.enter_context(
                tqdm(total=self.total, desc=self.title, unit="cell", smoothing=0.1, dynamic_ncols=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def advance(self, cells: int) -> None:
        """Cells were computed."""
        self.done += cells
        if self._bar is not None:
            self._bar.update(cells)
        else:
            self._line_now_and_then()

    def drop(self, cells: int) -> None:
        """Cells turned out not to be needed: their sample is excluded."""
        self.total -= cells
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def note(self, text: str) -> None:
        """What is going on beside the cells; shown with the bar, or with the next line."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        else:
            self._line_now_and_then()

    def line(self) -> str:
        """State, rate and time left in one line."""
        rate = self.done / max(time.monotonic() - self._started, 1e-9)
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        note = f"; {self._note}" if self._note else ""
        return f"{self.title}: {self.done}/{self.total} cells, {rate:.3g} cells/s, about {left} left{note}"

    def _line_now_and_then(self) -> None:
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            log.info("%s", self.line())
