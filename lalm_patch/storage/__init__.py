"""Samples and datasets in; files that survive a killed process, and say what made them, out. Knows no model."""

from __future__ import annotations

from lalm_patch.storage.run_store import RunStore, SampleRecord, open_result, repair

__all__ = ["RunStore", "SampleRecord", "open_result", "repair"]
