"""Peak memory of a whole token-wise sweep against one forward pass of the same model at the same length.

    python benchmarks/memory.py

Each runs in a process of its own. After the model is built, the kernel's record of the peak resident memory is reset
(`/proc/self/clear_refs`, so Linux only); the peak is read at the end. The sweep includes both base runs, the forward
pass starts from the audio.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from common import IDS, RandomVoxtral, Table, emit, parser

from lalm_patch.engine import ReplayEngine
from lalm_patch.engine.memory import give_back_holes
from lalm_patch.interventions.grids import token_grid

MIB = 2**20


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.set_defaults(layers=32)
    made.add_argument("--child", choices=("forward", "sweep"), help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.child:
        print(*child(options))
        return
    results = {}
    for kind in ("forward", "sweep"):
        arguments = [f"--{name}={getattr(options, name)}" for name in ("layers", "hidden", "text", "audio", "threads")]
        arguments += [f"--pack-tokens={options.pack_tokens}", f"--child={kind}"]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
        results[kind] = [int(word) for word in done.stdout.split()[-2:]]
    rows: list[list[str | int | float]] = []
    titles = {"forward": "one forward pass", "sweep": f"replay, {options.layers * options.text} cells"}
    for kind, (before, peak) in results.items():
        first_before, first_peak = results["forward"]
        rows.append(
            [
                titles[kind],
                round(peak / MIB),
                peak / first_peak,
                round((peak - before) / MIB),
                (peak - before) / (first_peak - first_before),
            ]
        )
    columns = ["", "peak, MiB", "ratio", "beyond the loaded model, MiB", "ratio "]
    size = f"{options.layers} layers, hidden {options.hidden}, {options.audio} audio and {options.text} text positions"
    emit([Table(f"Peak resident memory: {size}", columns, rows)], options)


def child(options: argparse.Namespace) -> tuple[int, int]:
    """Resident bytes before the work, and their peak."""
    torch.set_num_threads(options.threads)
    lalm = RandomVoxtral(options.layers, options.hidden)
    clean, corrupted = (lalm.random_encoding(options.text, options.audio, seed) for seed in (0, 1))
    grid = token_grid(clean.tokens, range(options.layers))
    give_back_holes()  # memory that is free already would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    if options.child == "forward":
        with torch.no_grad():
            lalm.module(**clean.inputs)
    else:
        ReplayEngine(lalm, options.pack_tokens).sweep(clean, corrupted, grid, IDS)
    return before, _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


if __name__ == "__main__":
    main()
