"""Which settings make two runs the same."""

from __future__ import annotations

NOT_PART_OF_A_RUN: tuple[str, ...] = (
    "outputs",
    "run_name",
    "dry_run",
    "threads",
    "shard",
    "on_failed_check",
    "metric.name",
    "model.device",
    "model.device_map",
    "engine.pack_tokens",
    "engine.memory_budget",
    "engine.clips",
    "model.offload",
    "backend.host",
    "backend.max_jobs",
    "backend.poll_seconds",
    "backend.retries",
    "backend.pause_seconds",
    "backend.longest_pause_seconds",
    "backend.forget_seconds",
    "backend.stale_seconds",
)
"""Settings that say where or how fast a run computes, or what is drawn, not what is computed: changing them keeps the
run's folder."""

ADDED_LATER: dict[str, object] = {
    "attr.answer": None,
    "data.audio": None,
    "data.path": None,
    "prompt.options": "words",
    "prompt.answer": "first_token",
    "trace_excluded": False,
    "min_gap": 5.0,
    "engine.float32_clips": 4,
    "engine.float32_cells": 16,
    "granularity.sources": None,
    "granularity.replacement": None,
    "granularity.strength": None,
    "granularity.controls": None,
    "granularity.path": None,
    "granularity.receivers": None,
}
"""Settings that older runs do not know, and the value that does what those runs did: it tells no runs apart."""
