"""Engines: encodings and a grid become logits. `direct` is the definition, `replay` the same numbers with less work."""

from __future__ import annotations

from lalm_patch.engine.approximate import ApproximateEngine
from lalm_patch.engine.direct import DirectEngine, Progress, ignore_progress
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.replay import ReplayEngine

Engine = DirectEngine | ReplayEngine | ApproximateEngine

__all__ = ["ApproximateEngine", "DirectEngine", "Engine", "Progress", "Readout", "ReplayEngine", "ignore_progress"]
