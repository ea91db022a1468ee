"""Importing libraries of many thousand functions and classes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_commands: list[bool] = []
"""Not empty in the process of a command, which has nobody else's objects."""


def in_command() -> None:
    """Say that this process is a command's own: what it has after imports stays until it ends."""
    _commands.append(True)


@contextmanager
def uncollected() -> Iterator[None]:
    """Imports without collections of garbage in between: they find none, and look at all that was made so far each
    time, a seventh of a small run. In a command's process later ones leave the libraries out, too."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if _commands:
            gc.freeze()
        gc.enable()
