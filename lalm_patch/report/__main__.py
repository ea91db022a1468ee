"""`python -m lalm_patch.report FOLDER`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from lalm_patch.analysis import METRICS
from lalm_patch.errors import LalmPatchError
from lalm_patch.report.page import make_report


def main(arguments: list[str] | None = None) -> int:
    """Make the page and say where it is; 1 with a sentence on standard error if that cannot be done."""
    parser = argparse.ArgumentParser("python -m lalm_patch.report", description="One HTML page on a run or a sweep.")
    parser.add_argument("folder", type=Path, help="a run's folder, or a folder of runs")
    parser.add_argument("--out", type=Path, help="the page (default: FOLDER/report.html)")
    parser.add_argument("--clips", type=int, default=8, help="clips per run in the explorer (default: 8)")
    parser.add_argument("--no-audio", action="store_true", help="leave the sound out: it may not be yours to pass on")
    parser.add_argument(
        "--metric", choices=METRICS, default="probability", help="what the rates are of (default: probability)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        page = make_report(options.folder, options.out, options.clips, not options.no_audio, options.metric)
    except LalmPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
