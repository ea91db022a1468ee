"""How things are written for someone at a terminal: commands to type, paths as one would type them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def command_line(overrides: Sequence[str]) -> str:
    """The command of a run with these overrides."""
    return shlex.join(["python", "-m", "lalm_patch", *overrides])


def as_typed(path: Path) -> str:
    """The path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
