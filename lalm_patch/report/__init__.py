"""Folders of finished runs in; one self-contained HTML page out: `python -m lalm_patch.report FOLDER`."""

from __future__ import annotations

from lalm_patch.report.page import find_runs, make_report

__all__ = ["find_runs", "make_report"]
