"""Stored samples in; one labelled dataset out."""

from __future__ import annotations

from lalm_patch.results.dataset import build_dataset

__all__ = ["build_dataset"]
