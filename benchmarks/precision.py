"""How far each `engine.precision` is from float32 on a checkpoint in half precision, by both engines.

    python benchmarks/precision.py CHECKPOINT DATA_ROOT      # a folder of family qwen2_audio, and SAKURA

The reference is the same weights widened for good, through the direct engine. `split` is what a GPU does with bfloat16
weights, computed here in float32: products of the two parts of each input.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import Table, emit

from lalm_patch.config import compose
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.interventions.grids import Grid, token_grid
from lalm_patch.models import LALM, precision
from lalm_patch.run import load_records
from lalm_patch.stimuli import Attribute, silence
from lalm_patch.tracing.questions import Questions

WIDENED = "widened for good"


def main() -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint")
    made.add_argument("root")
    made.add_argument("--family", default="qwen2_audio")
    made.add_argument("--attr", default="gender")
    made.add_argument("--clips", type=int, default=2)
    made.add_argument("--cells", type=int, default=24)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--json")
    options = made.parse_args()
    options.clock, options.dtype = "wall", "bfloat16"
    torch.set_num_threads(options.threads)
    found = {WIDENED: measured(options, "as_loaded", widen=True)}
    found |= {mode: measured(options, mode) for mode in ("as_loaded", "stream", "float32")}
    precision.sums_in_float32 = lambda device, dtype: True  # type: ignore[assignment]
    precision._product = lambda states, weight: torch.nn.functional.linear(states.float(), weight.float())
    found["split"] = measured(options, "float32")
    rows: list[list[str | int | float]] = []
    for mode, clips in found.items():
        for number, (clip, exact) in enumerate(zip(clips, found[WIDENED], strict=True)):
            direct, replay = clip["direct"] - exact["direct"], clip["replay"] - exact["direct"]
            base = float(np.abs(clip["base"] - exact["base"]).max())
            between = float(np.abs(clip["direct"] - clip["replay"]).max())
            rows.append([mode, number, rms(direct), rms(replay), between, base, clip["seconds"] / exact["seconds"]])
    columns = ["", "clip", "direct, rms", "replay, rms", "replay against direct", "base runs", "time"]
    emit([Table(f"Errors of a probability, {options.cells} cells", columns, rows)], options)


def rms(numbers: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt((numbers**2).mean()))


def measured(options: argparse.Namespace, mode: str, widen: bool = False) -> list[dict[str, Any]]:
    """Of each clip: probabilities of base runs and of random cells by both engines, and replay's seconds."""
    what = f"model={options.family}", f"model.id={options.checkpoint}", "model.dtype=bfloat16", f"attr={options.attr}"
    settings = compose(*what, f"data.root={options.root}")
    attribute = Attribute(**vars(settings.attr))
    lalm = LALM.load(settings.model, precision=mode)
    if widen:
        lalm.module.float()
    questions, clips = Questions(lalm, attribute, settings), []
    for record in load_records(settings, attribute)[: options.clips]:
        asked, waveform = questions.ask(record), record.waveform(None)
        runs = [lalm.encode(sound, asked.prompt, questions.layout) for sound in (waveform, silence(waveform))]
        cells = token_grid(runs[0].tokens, range(lalm.num_layers)).cells
        chosen = np.random.default_rng(0).choice(len(cells), options.cells, replace=False)
        grid = Grid(("cell",), {"cell": chosen}, tuple(cells[index] for index in chosen))
        ids = [answer[0] for answer in asked.answers]
        started = time.perf_counter()
        replay = ReplayEngine(lalm).sweep(*runs, grid, ids).probabilities
        seconds = time.perf_counter() - started
        engine = DirectEngine(lalm)
        base, direct = (engine.base(*runs, ids).probabilities, engine.sweep(*runs, grid, ids).probabilities)
        clips.append({"base": base, "direct": direct, "replay": replay, "seconds": seconds})
    return clips


if __name__ == "__main__":
    main()
