"""Whether a folder can be written, found out before anything is computed, and without writing."""

from __future__ import annotations

import os
from pathlib import Path

from lalm_patch.errors import StoreError


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, or the folder not be made; None if it can."""
    try:
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not place.is_dir():
            return f"{place} is a file"
        # Asks the kernel, which knows of read-only mounts also for those to whom permissions do not apply.
        return None if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written"
    except OSError as error:  # a name that is too long, a parent that may not be entered
        return f"{folder}: {os.strerror(error.errno) if error.errno else error}"


def not_writable(why: str) -> StoreError:
    """The error of a run whose folder cannot be written."""
    return StoreError(f"outputs: {why}; expected a folder that can be written, choose one with outputs=FOLDER")
