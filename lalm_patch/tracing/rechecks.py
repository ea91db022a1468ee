"""How much of a run is computed a second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Rechecks:
    """What is left to be computed a second time.

    Attributes:
        cells: by the direct engine.
        clips: of which some cells are computed in float32.
    """

    cells: int
    clips: int

    def less(self, meta: dict[str, Any]) -> None:
        """A sample's record says what was done for it."""
        self.cells -= int(meta.get("spot_checked_cells", 0))
        self.clips -= "float32_cells" in meta
