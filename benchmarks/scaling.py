"""How replay's time grows with layers, text positions and audio positions.

    python benchmarks/scaling.py

Beside the time of a whole token-wise sweep (base runs included) stands the work the method predicts: cells x remaining
suffix, that is one unit per position and layer that a cell passes through after its patch. Time per unit should stay
the same when layers or text grow; audio is only seen by attention and by the two base runs. The sizes of a table are
measured in turns, so that all see the same machine.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable

import torch
from common import IDS, RandomVoxtral, Table, emit, parser, seconds

from lalm_patch.engine import ReplayEngine
from lalm_patch.interventions.grids import token_grid


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--layer-counts", type=int, nargs="*", default=[8, 16, 24, 32])
    made.add_argument("--text-counts", type=int, nargs="*", default=[10, 20, 40])
    made.add_argument("--audio-counts", type=int, nargs="*", default=[375, 750, 1500])
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    names = ("layer", "text", "audio")
    emit([_along(name, getattr(options, f"{name}_counts"), options) for name in names], options)


def _along(name: str, counts: list[int], options: Namespace) -> Table:
    size = {"layer": options.layers, "text": options.text, "audio": options.audio}
    fixed = ", ".join(f"{value} {other}{'s' if other == 'layer' else ' positions'}" for other, value in size.items())
    rows: list[list[str | int | float]] = []
    sizes = [size | {name: count} for count in counts]
    sweeps = [_sweep(now["layer"], now["text"], now["audio"], options) for now in sizes]
    turns = [[seconds(sweep, 1, options.clock) for sweep in sweeps] for _ in range(options.repeats)]
    for count, now, times in zip(counts, sizes, zip(*turns, strict=True), strict=True):
        took = statistics.median(times)
        cells = now["layer"] * now["text"]
        units = sum(range(now["layer"])) * sum(range(1, now["text"] + 1))
        first = float(rows[0][3]) if rows else took
        rows.append([count, cells, units, took, took / first, took / units * 1e6])
    what = "layers" if name == "layer" else f"{name} positions"
    columns = [what, "cells", "cells x remaining suffix", "seconds", "times the first", "microseconds per unit"]
    return Table(f"Growth with {what}", columns, rows, [f"Where not said otherwise: {fixed}, hidden {options.hidden}."])


def _sweep(layers: int, text: int, audio: int, options: Namespace) -> Callable[[], object]:
    lalm = RandomVoxtral(layers, options.hidden)
    clean, corrupted = (lalm.random_encoding(text, audio, seed) for seed in (0, 1))
    grid = token_grid(clean.tokens, range(layers))

    def replay() -> object:
        return ReplayEngine(lalm, options.pack_tokens).sweep(clean, corrupted, grid, IDS)

    ReplayEngine(lalm, options.pack_tokens).base(clean, corrupted, IDS)  # warm-up
    return replay


if __name__ == "__main__":
    main()
