"""Time per cell of the direct and the replay engine on one random model, in one run.

    python benchmarks/sweep.py                  # Voxtral-shaped: 30 layers, 375 audio and 40 text positions, hidden 512
    python benchmarks/sweep.py --layers 8 --hidden 128

The whole token-wise grid goes through replay, both base runs included; the direct engine computes some of its cells,
spread over the grid, both from audio (as a user without replay would) and from embeddings (audio tower left out). Only
the ratios mean something. `peers.py` compares with other tools.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import numpy as np
import torch
from common import IDS, RandomVoxtral, Table, emit, from_embeddings, parser, seconds

from lalm_patch.engine import DirectEngine, Readout, ReplayEngine
from lalm_patch.interventions.grids import token_grid


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--cells", type=int, default=20, help="cells the direct engine computes")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    emit([measure(options)], options)


def measure(options: Namespace) -> Table:
    """The table of times per cell."""
    lalm = RandomVoxtral(options.layers, options.hidden)
    clean, corrupted = (lalm.random_encoding(options.text, options.audio, seed) for seed in (0, 1))
    grid = token_grid(clean.tokens, range(options.layers))
    chosen = np.random.default_rng(0).choice(len(grid.cells), options.cells, replace=False)
    cells = [grid.cells[index] for index in chosen]

    def replay() -> Readout:
        engine = ReplayEngine(lalm, options.pack_tokens)
        engine.base(clean, corrupted, IDS)
        return engine.sweep(clean, corrupted, grid, IDS)

    fast = replay()
    own = seconds(replay, options.repeats, options.clock) / len(grid.cells)
    rows: list[list[str | int | float]] = [["replay (base runs included)", own * 1e3, 1.0, 0.0]]
    pairs = {"audio": (clean, corrupted), "embeddings": (from_embeddings(clean), from_embeddings(corrupted))}
    for name, pair in pairs.items():
        direct = partial(DirectEngine(lalm).cells, *pair, cells, IDS)
        slow = direct()
        taken = seconds(direct, 1, options.clock) / (len(cells) + 1)  # the clean states are read in a run of their own
        difference = float(np.abs(slow.probabilities - fast.probabilities[chosen]).max())
        rows.append([f"direct, from {name}", taken * 1e3, taken / own, difference])
    positions = f"{options.audio} audio and {options.text} text positions"
    title = f"voxtral-shaped, {options.layers} layers, hidden {options.hidden}, {positions}"
    notes = [f"Replay: all {len(grid.cells)} cells, median of {options.repeats}; direct: {len(cells)} cells."]
    return Table(title, ["", "ms per cell", "times replay", "largest difference in probability"], rows, notes)


if __name__ == "__main__":
    main()
