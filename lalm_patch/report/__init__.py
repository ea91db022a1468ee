"""One self-contained HTML page per run or sweep: python -m lalm_patch.report FOLDER."""

from __future__ import annotations

from lalm_patch.report.page import find_runs, make_report

__all__ = ["find_runs", "make_report"]
