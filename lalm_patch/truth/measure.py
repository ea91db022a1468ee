"""Trace a planted model with the package's own engines, and say what every cell had to give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from lalm_patch.engine import DirectEngine, Progress, Readout, ReplayEngine, ignore_progress
from lalm_patch.engine.whole_answers import AnswerReader
from lalm_patch.interventions.grids import Grid
from lalm_patch.models import Encoding
from lalm_patch.results.dataset import build_dataset
from lalm_patch.settings import EngineSettings
from lalm_patch.storage.run_store import SampleRecord
from lalm_patch.tracing.metrics import Exclusion, exclusion
from lalm_patch.tracing.samples import exact_cells, readout_arrays, sample_meta
from lalm_patch.truth.circuit import Circuit, FloatArray, Truth
from lalm_patch.truth.decoder import MELS, Clip, PlantedLALM
from lalm_patch.truth.methods import Method

LICENCE_CELLS = EngineSettings().licence_cells
FRAME_SAMPLES = 160
"""Audio samples a mel frame stands for, as in the real models."""


@dataclass(frozen=True)
class Measured:
    """A traced model.

    Attributes:
        dataset: a run's dataset, as any run of the package makes it; every clip is a group of its own.
        grid: what was patched or cut.
        cuts: whether attention was cut in the clean run.
        audio: the kept clips' class as the decoder got it: one [audio position, class] each.
        answers: the kept clips' answers.
        spot_check: largest difference in probability from the direct engine; NaN if nothing was compared.
    """

    dataset: xr.Dataset
    grid: Grid
    cuts: bool
    audio: list[FloatArray]
    answers: list[int]
    spot_check: float

    def expected(self, truth: Truth) -> FloatArray:
        """Mean recovery rate over the kept clips that a truth implies: the grid's shape, NaN where it implies nothing.

        The circuit's background is not part of it.
        """
        cells = self.grid.cells
        if not isinstance(truth, Circuit):
            return (truth.lost if self.cuts else truth.recovery)(cells).reshape(self.grid.shape)
        of_clip = truth.lost if self.cuts else truth.recovery
        each = [of_clip(audio, answer, cells) for audio, answer in zip(self.audio, self.answers, strict=True)]
        return np.asarray(np.mean(each, axis=0)).reshape(self.grid.shape)


def measure(
    lalm: PlantedLALM,
    method: Method,
    clips: Sequence[Clip],
    progress: Progress = ignore_progress,
    name: str = "planted",
) -> Measured:
    """Trace clips; silence is the corruption, and the right answer has to be the most probable of all tokens.

    In a window model no answer is planted: what the clean run says is taken as right.
    """
    engine, oracle = method.engine(lalm), DirectEngine(lalm)
    corrupted = lalm.encode_frames(torch.zeros(MELS, lalm.frames))
    grid = method.grid(corrupted.tokens, range(lalm.num_layers))
    records: list[SampleRecord] = []
    audio: list[FloatArray] = []
    answers: list[int] = []
    spot_check = np.nan
    for index, clip in enumerate(clips):
        clean = lalm.encode_frames(clip.frames)
        base = engine.base(clean, corrupted, lalm.option_ids)
        answer = clip.label if isinstance(lalm.truth, Circuit) else int(base.top_id[0])
        reason = exclusion(base, lalm.option_ids, answer, "vocabulary")
        arrays = readout_arrays("base", base, (2,))
        if reason is Exclusion.KEPT:
            source, target = (corrupted, clean) if method.cuts else (clean, corrupted)
            swept = engine.sweep(source, target, grid, lalm.option_ids, progress)
            arrays |= readout_arrays("patched", swept, grid.shape)
            if method.exact and not answers:
                spot_check = _spot_check(oracle, source, target, grid, swept, lalm.option_ids)
            audio.append(lalm.audio_register(clean))
            answers.append(answer)
        else:
            progress(len(grid.cells))
        meta = sample_meta(str(answer), f"clip{index}", lalm.frames * FRAME_SAMPLES, clean.tokens, reason)
        if reason is Exclusion.KEPT and not method.exact:
            chosen = np.random.default_rng(index).choice(
                len(grid.cells), min(LICENCE_CELLS, len(grid.cells)), replace=False
            )
            meta["licence_cells"], exact = exact_cells(
                ReplayEngine(lalm), source, target, grid, chosen, AnswerReader([(id,) for id in lalm.option_ids], False)
            )
            arrays |= readout_arrays("exact", exact, (len(exact),))
        records.append(SampleRecord(f"clip{index}", arrays, meta))
    settings = {"model": {"name": name}, "attr": {"name": "class"}, "granularity": {"name": method.name}, "seed": 0}
    settings["site"] = {"name": str(method.site)}
    direction = "noising" if method.cuts else "denoising"
    settings["direction"] = {"name": direction}
    attributes = {
        "direction": direction,
        "model_layers": lalm.num_layers,
        "settings": json.dumps(settings),
        "model_id": lalm.id,
        "engine": "exact" if method.exact else method.name,
    }
    options = [str(option) for option in range(len(lalm.option_ids))]
    dataset = build_dataset(records, options, grid.dims, grid.coords, attributes)
    return Measured(dataset, grid, method.cuts, audio, answers, spot_check)


def _spot_check(
    oracle: DirectEngine, source: Encoding, target: Encoding, grid: Grid, swept: Readout, ids: tuple[int, ...]
) -> float:
    """Largest difference in probability from the direct engine: the cell that changes most, and one at random."""
    unpatched = oracle.base(source, target, ids).probabilities[1]
    changed = int(np.abs(swept.probabilities - unpatched).max(axis=1).argmax())
    chosen = [changed, int(np.random.default_rng(len(grid.cells)).integers(len(grid.cells)))]
    direct = oracle.cells(source, target, [grid.cells[i] for i in chosen], ids)
    return float(np.abs(direct.probabilities - swept.probabilities[chosen]).max())
