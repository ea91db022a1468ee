"""`python -m lalm_patch.truth`: score tracing on models whose truth is planted."""

from __future__ import annotations

import argparse
import csv
import logging
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch

from lalm_patch.errors import ConfigError, LalmPatchError
from lalm_patch.truth.benchmark import Row, bars, markdown, run_benchmark, summary
from lalm_patch.truth.methods import METHODS, chosen_methods
from lalm_patch.truth.population import KINDS, MOST_BACKGROUND, make_population


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its table; 1 with a sentence on standard error if that cannot be done."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _check(options)
        methods = chosen_methods(options.methods.split(",") if options.methods else [])
        if options.threads:
            torch.set_num_threads(options.threads)
        plans = make_population(options.models, options.seed, options.background)
        rows = _collected(run_benchmark(plans, methods, options.clips, options.population), options.rows)
        text = "\n".join([markdown(summary(rows)), "", *bars(rows)])
        print(text)
        if options.out:
            options.out.write_text(f"{text}\n", encoding="utf-8")
    except LalmPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m lalm_patch.truth",
        description=f"Score tracing on planted models ({', '.join(KINDS)}); docs/truth.md explains the table.",
    )
    parser.add_argument("--models", type=int, default=200, help="planted models (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the population of models (default: 0)")
    parser.add_argument("--methods", help=f"some of {','.join(METHODS)} (default: all)")
    parser.add_argument("--clips", type=int, default=20, help="clips of a run (default: 20)")
    parser.add_argument("--population", type=int, default=32, help="clips a model's runs are drawn from (default: 32)")
    parser.add_argument(
        "--background",
        type=float,
        default=MOST_BACKGROUND,
        help=f"largest scale of the random weights around a circuit (default: {MOST_BACKGROUND})",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch; 0: its own choice (default: 1)")
    parser.add_argument("--out", type=Path, help="also write the table to this file (markdown)")
    parser.add_argument("--rows", type=Path, help="also write every model's scores to this file (CSV)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for what would fail after the work."""
    for name, least in (("models", 1), ("clips", 2), ("population", 2), ("seed", 0), ("threads", 0), ("background", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name}={getattr(options, name)}: expected at least {least}")
    for name in ("out", "rows"):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigError(f"--{name}={path}: expected a file in a folder that exists")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"--{name}={path}: not writable; choose another place")


def _collected(rows: Iterable[Row], path: Path | None) -> list[Row]:
    """All rows, each written to the file as it comes; interrupted from the keyboard, those there are."""
    collected: list[Row] = []
    with ExitStack() as stack:
        file = stack.enter_context(path.open("w", newline="", encoding="utf-8")) if path else None
        try:
            for row in rows:
                collected.append(row)
                if file is not None:
                    flat = row.flat()
                    writer = csv.DictWriter(file, list(flat))
                    if len(collected) == 1:
                        writer.writeheader()
                    writer.writerow(flat)
                    file.flush()
        except KeyboardInterrupt:
            if not collected:
                raise ConfigError("interrupted before the first model was scored") from None
            print("interrupted: the table is of the models scored so far", file=sys.stderr)
    return collected


if __name__ == "__main__":
    sys.exit(main())
