"""How far each `engine.precision` is from float32 on a checkpoint in half precision, by both engines.

    python benchmarks/precision.py CHECKPOINT DATA_ROOT      # a folder of family qwen2_audio, and SAKURA

The reference is the same weights widened for good. All cells of the token-wise grid are computed by replay, some by the
direct engine. `split` is what a GPU does with bfloat16 weights, computed here in float32: products of the two parts of
each input. Memory is what the process takes at most beyond what it has once the model is loaded (Linux only).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
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
MIB = 2**20


def main() -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkpoint")
    made.add_argument("root")
    made.add_argument("--family", default="qwen2_audio")
    made.add_argument("--attr", default="gender")
    made.add_argument("--clips", type=int, default=1)
    made.add_argument("--direct-cells", type=int, default=12)
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
            some = clip["some"]
            row: list[str | int | float] = [mode, number, rms(clip["direct"] - exact["direct"])]
            row += [rms(clip["replay"] - exact["replay"]), float(np.abs(clip["direct"] - clip["replay"][some]).max())]
            row += [float(np.abs(clip["base"] - exact["base"]).max()), clip["seconds"] / exact["seconds"]]
            rows.append([*row, round(clip["stored"] / MIB), round(clip["more"] / MIB)])
    columns = ["", "clip", "direct, rms", "replay, rms", "replay against direct", "base runs", "time"]
    columns += ["weights, MiB", "beyond them, MiB"]
    cells = [len(clip["replay"]) for clip in found[WIDENED]]
    notes = [f"{cells} cells by replay, {options.direct_cells} by the direct engine; time is replay's, whole sweep."]
    emit([Table("Errors of a probability", columns, rows, notes)], options)


def rms(numbers: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt((numbers**2).mean()))


def status(field: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measured(options: argparse.Namespace, mode: str, widen: bool = False) -> list[dict[str, Any]]:
    """Of each clip: probabilities of base runs and of cells by both engines, replay's seconds and memory."""
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
        grid = token_grid(runs[0].tokens, range(lalm.num_layers))
        some = np.random.default_rng(0).choice(len(grid.cells), options.direct_cells, replace=False)
        few = Grid(("cell",), {"cell": some}, tuple(grid.cells[index] for index in some))
        ids = [answer[0] for answer in asked.answers]
        Path("/proc/self/clear_refs").write_text("5")
        before, started = status("VmRSS"), time.perf_counter()
        replay = ReplayEngine(lalm).sweep(*runs, grid, ids).probabilities
        seconds, more = time.perf_counter() - started, status("VmHWM") - before
        engine = DirectEngine(lalm)
        base, direct = (engine.base(*runs, ids).probabilities, engine.sweep(*runs, few, ids).probabilities)
        stored = sum(parameter.numel() * parameter.itemsize for parameter in lalm.module.parameters())
        numbers = {"base": base, "direct": direct, "replay": replay, "some": some}
        clips.append({**numbers, "seconds": seconds, "stored": stored, "more": more})
    return clips


if __name__ == "__main__":
    main()
