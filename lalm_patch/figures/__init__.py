"""Datasets in; figures as PNG and PDF, and the drawn numbers as CSV, out."""

from __future__ import annotations

from lalm_patch.figures.clip import plot_clip, was_patched
from lalm_patch.figures.observed import plot_grounding, plot_lens
from lalm_patch.figures.run import draw_run, plot_run
from lalm_patch.figures.style import printable, rendered, styled
from lalm_patch.figures.sweep import plot_layers, plot_ledger, plot_segments

__all__ = [
    "draw_run",
    "plot_clip",
    "plot_grounding",
    "plot_layers",
    "plot_ledger",
    "plot_lens",
    "plot_run",
    "plot_segments",
    "printable",
    "rendered",
    "styled",
    "was_patched",
]
