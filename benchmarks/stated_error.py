"""Does the error that a run states about itself cover the true one? On a checkpoint in half precision.

    python benchmarks/stated_error.py CHECKPOINT DATA_ROOT      # a folder of family qwen2_audio, and SAKURA

For each type, precision and question, both runs and some random cells of some clips are computed as they would be, and
in float32. Runs are drawn from these clips: each states its error from its first few clips and cells, as
`engine.float32_clips` and `engine.float32_cells` say, and its true error is that of all its clips and cells.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from common import Table, emit
from numpy.typing import NDArray

from lalm_patch.analysis import precision
from lalm_patch.config import compose
from lalm_patch.engine import ReplayEngine
from lalm_patch.interventions.grids import Grid, token_grid
from lalm_patch.models import LALM
from lalm_patch.models.proof import in_float32
from lalm_patch.run import load_records
from lalm_patch.settings import EngineSettings
from lalm_patch.stimuli import Attribute, silence
from lalm_patch.tracing.questions import Questions

SEED = 20261127
MODES = (("bfloat16", "as_loaded"), ("bfloat16", "stream"), ("float16", "stream"))
RUNS, CLIPS_OF_A_RUN = 48, 8
COVERED = 1.5
"""A true error up to so many times the stated one is covered."""


def main() -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint")
    made.add_argument("root")
    made.add_argument("--attrs", nargs="+", default=["gender", "emotion"])
    made.add_argument("--clips", type=int, default=12, help="clips of each question")
    made.add_argument("--cells", type=int, default=24)
    made.add_argument("--seed", type=int, default=SEED, help="of the choice of cells and of the runs")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--json", type=Path)
    options = made.parse_args()
    options.clock, options.dtype = "wall", "half"
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    found = {}
    for dtype, mode in MODES:
        for attr in options.attrs:
            found[dtype, mode, attr] = computed(options, dtype, mode, attr)
            print(f"{dtype} {mode} {attr}: {time.perf_counter() - started:.0f} s", flush=True)
    rng = np.random.default_rng(options.seed)
    rows: list[list[str | int | float]] = []
    ratios = []
    for number in range(RUNS):
        name = list(found)[number % len(found)]
        chosen = rng.choice(options.clips, CLIPS_OF_A_RUN, replace=False)
        stated, true = errors(*(values[chosen] for values in found[name]), rng)
        ratios.append(true / stated)
        rows.append([*name, stated, true, true / stated])
    share = np.mean(np.array(ratios) <= COVERED)
    notes = [
        f"{RUNS} runs of {CLIPS_OF_A_RUN} clips; in {share:.1%} the true error is at most {COVERED} times the stated; "
        f"ratio from {min(ratios):.2f} to {max(ratios):.2f}, median {np.median(ratios):.2f}; seed {options.seed}."
    ]
    columns = ["weights", "precision", "question", "stated", "true", "true / stated"]
    emit([Table("Root mean square error of a probability", columns, rows, notes)], options)


def computed(options: argparse.Namespace, dtype: str, mode: str, attr: str) -> tuple[NDArray[np.float32], ...]:
    """Probabilities of the answer [clip, number], of clean and corrupted run and cells: as computed, and in float32."""
    what = f"model.id={options.checkpoint}", f"model.dtype={dtype}", f"attr={attr}", f"data.root={options.root}"
    settings = compose("model=qwen2_audio", *what, f"data.limit={options.clips}")
    attribute = Attribute(**vars(settings.attr))
    lalm = LALM.load(settings.model, precision=mode)
    questions = Questions(lalm, attribute, settings)
    found: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = [], []
    for record in load_records(settings, attribute):
        asked, waveform = questions.ask(record), record.waveform(None)
        runs = [lalm.encode(sound, asked.prompt, questions.layout) for sound in (waveform, silence(waveform))]
        cells = token_grid(runs[0].tokens, range(lalm.num_layers)).cells
        chosen = np.random.default_rng(options.seed).choice(len(cells), options.cells, replace=False)
        grid = Grid(("cell",), {"cell": chosen}, tuple(cells[index] for index in chosen))
        ids = [answer[0] for answer in asked.answers]

        def numbers(clean, corrupted, grid=grid, ids=ids, answer=asked.right):  # type: ignore[no-untyped-def]
            engine = ReplayEngine(lalm)
            base = engine.base(clean, corrupted, ids).probabilities
            return np.concatenate([base, engine.sweep(clean, corrupted, grid, ids).probabilities])[:, answer]

        found[0].append(numbers(*runs))
        with lalm.exactly():
            found[1].append(numbers(*(in_float32(lalm, run) for run in runs)))
    return np.array(found[0]), np.array(found[1])


def errors(
    as_computed: NDArray[np.float32], exact: NDArray[np.float32], rng: np.random.Generator
) -> tuple[float, float]:
    """What a run states, and what is true, of probabilities [clip, number]."""
    settings = EngineSettings()
    measured = np.full_like(exact, np.nan)
    cells = 2 + rng.choice(exact.shape[1] - 2, min(settings.float32_cells, exact.shape[1] - 2), replace=False)
    for column in (0, 1, *cells):
        measured[: settings.float32_clips, column] = exact[: settings.float32_clips, column]
    variables = {
        f"p_{run}{ending}": (dims, values[:, part])
        for run, dims, part in (
            ("clean", ("sample",), 0),
            ("corrupted", ("sample",), 1),
            ("patched", ("sample", "cell"), slice(2, None)),
        )
        for ending, values in (("", as_computed), ("_float32", measured))
    }
    stated = precision(xr.Dataset({**variables, "kept": ("sample", np.ones(len(exact), bool))}))
    assert stated is not None
    return stated.probability, float(np.sqrt(np.mean((as_computed - exact).astype(np.float64) ** 2)))


if __name__ == "__main__":
    main()
