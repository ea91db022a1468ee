"""Encodings and a grid in; logits at the last position out.

`direct` is the definition, `replay` the same numbers with less work, `approximate` a guess from gradients.
"""

from __future__ import annotations

from lalm_patch.engine.approximate import ApproximateEngine
from lalm_patch.engine.direct import DirectEngine
from lalm_patch.engine.interface import Engine, Progress, ignore_progress
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.replay import ReplayEngine

__all__ = [
    "ApproximateEngine",
    "DirectEngine",
    "Engine",
    "Progress",
    "Readout",
    "ReplayEngine",
    "ignore_progress",
]
