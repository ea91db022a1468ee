"""Trace one sample: clean run, corrupted run, and every cell of the grid between them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lalm_patch.checks import Check
from lalm_patch.engine import ApproximateEngine, DirectEngine, Engine, Readout, ReplayEngine
from lalm_patch.engine.choose import EXACT_STEPS, PROOF_STEPS, choose_engine
from lalm_patch.engine.interface import SharesPasses, Sweep
from lalm_patch.engine.observe import audio_attention, check_attention, lens
from lalm_patch.engine.whole_answers import AnswerReader, read_bases, read_sweeps
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Grid, make_grid, patched_layers, place_in
from lalm_patch.interventions.patches import Site
from lalm_patch.interventions.segments import check_present
from lalm_patch.interventions.ways import check_way
from lalm_patch.models import LALM, Encoding, TokenTable
from lalm_patch.models.proof import make_pair, passes, prove
from lalm_patch.settings import RunSettings
from lalm_patch.stimuli import Attribute, Prompt, Record
from lalm_patch.terminal import Progress, Waiting
from lalm_patch.tracing.corruptions import Corruption, balanced_clips
from lalm_patch.tracing.metrics import Exclusion, exclusion
from lalm_patch.tracing.questions import Asked, Questions
from lalm_patch.tracing.rechecks import Rechecks
from lalm_patch.tracing.rounding import Rounding
from lalm_patch.tracing.samples import OpenedClip, SampleTrace, asked_meta, exact_cells, readout_arrays, sample_meta
from lalm_patch.tracing.transcripts import Transcripts
from lalm_patch.tracing.vectors import Vectors

log = logging.getLogger(__name__)

SPOT_CHECKED_PER_SAMPLE = 2
TRACEABLE = (Exclusion.CLEAN_WRONG, Exclusion.CORRUPTED_RIGHT, Exclusion.NO_EFFECT)
"""Reasons not to count that leave something to be patched."""


class Tracer:
    """A model, an attribute and a granularity, ready to trace samples.

    Args:
        lalm: the model.
        attribute: what is asked; None where every clip has a question of its own.
        settings: the run's settings.
        records: all clips of the run: corruptions may take another clip, or the mean of all.
        waiting: is told how far the proof is.

    Attributes:
        questions: what each clip is asked.
        option_ids: first token of each option's answer in the example prompt.
        checks: what was verified before the first sample.
        engine: the engine that computes the cells.
        rounding: how far they are from float32.
        place: where in a layer states are exchanged, and in how many layers at once.
        noising: whether corrupted states go into the clean run, and not the other way round.
        dims: dimensions of the grid.
        coords: labels along them; along `token` those of the example.
        example_prompt: the prompt as sent, for a clip of noise.
        cells_per_sample: cells of one sample's grid (of a sample without a transcript of its own).

    Raises:
        ModelError: the model lacks something the method needs.
        ConfigError: a layer or granularity that does not exist.
    """

    def __init__(
        self,
        lalm: LALM,
        attribute: Attribute | None,
        settings: RunSettings,
        records: Sequence[Record] = (),
        waiting: Waiting | None = None,
    ) -> None:
        self._waiting = waiting or Waiting("")
        self.lalm = lalm
        self.attribute = attribute
        self.settings = settings
        self.questions = Questions(lalm, attribute, settings)
        self.layout = self.questions.layout
        fixed = self.questions.example(tuple(records))
        # Answers of several tokens may begin alike: once is enough to prove engines with.
        self.option_ids = tuple(dict.fromkeys(ids[0] for ids in self.questions.answers(fixed)))
        self.place = place_in(lalm, settings.site, settings.granularity, settings.direction.name)
        self.noising = settings.direction.name == "noising"
        self.layers = patched_layers(self.place, settings.granularity)
        self.transcripts = Transcripts(lalm, settings)
        self.checks: list[Check] = []
        self.engine: Engine
        self.rounding: Rounding
        example = self._open(replace(fixed, transcript=self.transcripts.example))
        check_present(self.place.edges, example.segments)
        if self.place.receivers:
            check_way(self.place.way, example.segments)
        grid = self.grid(example)
        self.dims, self.coords, self.cells_per_sample = grid.dims, grid.coords, len(grid.cells)
        self.example_prompt = _as_sent(example)
        self._oracle = DirectEngine(lalm)
        if settings.observe.attention:
            check_attention(lalm)
        self.corruption = Corruption(lalm, settings.corruption, self.layout, records)
        self._records = records
        name = settings.granularity.name
        self._vectors = Vectors(lalm, name, self.place, self.layers, self._clean_runs, settings.seed)

    def _open(self, prompt: Prompt) -> TokenTable:
        """Prove the model on noise and silence and choose its engine; returns the noise's token table."""
        lalm, settings = self.lalm, self.settings.engine
        pair = make_pair(lalm, prompt, self.layout, settings.tolerance)
        done = itertools.count()
        steps = passes(lalm.exact) + PROOF_STEPS + (0 if lalm.exact else EXACT_STEPS)

        def told(check: str) -> None:
            self._waiting.step(f"proving the model, {check}", next(done), steps)

        self.checks += prove(lalm, pair, told)
        self.engine, engine_checks = choose_engine(lalm, settings, pair, self.option_ids, self.place, told)
        self.checks += engine_checks
        self.rounding = Rounding(lalm, self.engine, settings, pair, self.settings.seed)
        return pair.noise.tokens

    @property
    def about(self) -> dict[str, str]:
        """Attributes of the result that say what computed the cells, and where."""
        device, dtype = str(self.lalm.device), str(self.lalm.dtype).removeprefix("torch.")
        return {"dtype": dtype, "precision": self.lalm.precision, "device": device, "engine": self.engine.name}

    def grid(self, tokens: TokenTable) -> Grid:
        """The run's grid for one sample's tokens."""
        return make_grid(self.settings.granularity.name, tokens, self.layers, self.place)

    def prompt(self, record: Record) -> Prompt:
        """The prompt of one clip, without a transcript.

        Raises:
            ModelError: its options cannot be told apart.
        """
        return self.questions.ask(record).prompt

    def traces(
        self, records: Sequence[Record], rechecks: Rechecks, progress: Progress, folder: Path
    ) -> Iterator[tuple[Record, SampleTrace]]:
        """Trace samples, each as soon as it is asked for; what was given out is the caller's to store.

        Args:
            records: the clips.
            rechecks: how much to compute twice in all.
            progress: is told about every cell.
            folder: the run's own folder.
        """
        waiting = list(records)
        while waiting:
            first = self._opened(waiting[0], waiting[0].waveform(None), progress)
            others = waiting[1 : self._clips(first)]
            group = [first, *(self._opened(record, record.waveform(None), progress) for record in others)]
            del waiting[: len(group)]
            for clip, trace in zip(group, self._traced(group, rechecks, progress), strict=True):
                yield clip.record, trace

    def trace(self, record: Record, waveform: np.ndarray, spot_check: bool, progress: Progress) -> SampleTrace:
        """Trace one sample.

        Args:
            record: the clip's record.
            waveform: float32 [samples] at 16 kHz.
            spot_check: whether to compute a few random cells again with the direct engine, and in float32.
            progress: is told about every cell.

        Raises:
            ModelError: clean and corrupted input differ in their positions.
        """
        rechecks = Rechecks(int(spot_check), int(spot_check))
        (trace,) = self._traced([self._opened(record, waveform, progress)], rechecks, progress)
        return trace

    def _clips(self, clip: OpenedClip) -> int:
        """How many clips go through the model together."""
        if self.settings.engine.clips is not None:
            return self.settings.engine.clips
        if isinstance(self.engine, SharesPasses) and not self.questions.whole:
            return self.engine.clips_within(clip.source, clip.target)
        return 1

    def _opened(self, record: Record, waveform: np.ndarray, progress: Progress) -> OpenedClip:
        """What the decoder gets for one clip.

        Raises:
            ModelError: clean and corrupted input differ in their positions.
        """
        asked = self.questions.ask(record)
        heard = self.corruption.heard(record, waveform)
        spoken = self.transcripts.pair(waveform, heard, None if record.prompt is None else record.prompt.transcript)
        prompt, other_prompt = (replace(asked.prompt, transcript=text) for text in spoken)
        clean = self.lalm.encode(waveform, prompt, self.layout)
        corrupted = self.corruption.encode(record, heard, other_prompt, clean)
        grid = self.grid(clean.tokens)
        if vectors := self._vectors.of(record, clean):
            grid = replace(grid, arrays=vectors)
        clip = OpenedClip(
            record,
            len(waveform),
            asked,
            AnswerReader(asked.answers, self.questions.whole),
            spoken,
            clean,
            corrupted,
            grid,
            self.noising,
        )
        if not clip.same_layout and spoken[0] == spoken[1]:
            raise ModelError(
                f"{record.name}: {self._lengths(clip)} or other tokens, so their states cannot be exchanged"
            )
        progress.drop(self.cells_per_sample - len(clip.grid.cells))  # clips differ in their text, or in their windows
        return clip

    def _clean_runs(self, count: int) -> Iterator[tuple[Record, Encoding]]:
        """Clean runs of some clips that stand for all of the run, see `balanced_clips`."""
        for record, waveform in balanced_clips(self.lalm, self._records, count, self.settings.data.seed):
            known = None if record.prompt is None else record.prompt.transcript
            spoken, _ = self.transcripts.pair(waveform, waveform, known)
            prompt = replace(self.questions.ask(record).prompt, transcript=spoken)
            yield record, self.lalm.encode(waveform, prompt, self.layout)

    def _lengths(self, clip: OpenedClip) -> str:
        """What the two runs' lengths are, for messages."""
        return (
            f"clip and {self.corruption.name} give {len(clip.clean.tokens)} and {len(clip.corrupted.tokens)} positions"
        )

    def _traced(self, clips: Sequence[OpenedClip], rechecks: Rechecks, progress: Progress) -> list[SampleTrace]:
        """Trace clips that go through the model together; of the first ones that count, cells are computed twice."""
        bases = read_bases(self.engine, [(clip.read, clip.source, clip.target) for clip in clips])
        if self.noising:
            bases = [base.rows(slice(None, None, -1)) for base in bases]  # the clean run comes first
        traces = [self._looked_at(clip, base) for clip, base in zip(clips, bases, strict=True)]
        wanted = []
        for number, (clip, trace) in enumerate(zip(clips, traces, strict=True)):
            reason = Exclusion(trace.meta["exclusion"])
            if reason is Exclusion.KEPT or (self.settings.trace_excluded and reason in TRACEABLE):
                wanted.append(number)
            else:
                progress.drop(len(clip.grid.cells))
        if not wanted:
            return traces
        sweeps = []
        for number in wanted:
            clip = clips[number]
            sweeps.append((clip.read, Sweep(clip.source, clip.target, clip.grid, (), progress.advance)))
        self._measure_rounding([(clips[number], traces[number]) for number in wanted], rechecks)
        for number, swept in zip(wanted, read_sweeps(self.engine, sweeps), strict=True):
            clip, trace = clips[number], traces[number]
            trace.arrays |= readout_arrays("patched", swept, clip.grid.shape)
            self._check(clip, trace, bases[number], swept, rechecks.cells > 0)
            rechecks.less(trace.meta)
        return traces

    def _measure_rounding(self, traced: Sequence[tuple[OpenedClip, SampleTrace]], rechecks: Rechecks) -> None:
        """Compute the first ones in float32, too."""
        if self.lalm.exact:
            return
        first = traced[: max(0, rechecks.clips)]
        for (_, trace), (arrays, meta) in zip(first, self.rounding.measured([clip for clip, _ in first]), strict=True):
            trace.arrays |= arrays
            trace.meta |= meta

    def _looked_at(self, clip: OpenedClip, base: Readout) -> SampleTrace:
        """What the two base runs say: whether the clip counts, and what else is to be seen in them."""
        record, read, answer = clip.record, clip.read, clip.asked.right
        reason = exclusion(base, read.first_ids, answer, self.settings.prompt.correct)
        if not clip.same_layout and reason is Exclusion.KEPT:
            reason = Exclusion.LAYOUT
        trace = SampleTrace(
            readout_arrays("base", base, (2,)), self._meta(record, clip.samples, clip.clean.tokens, clip.asked, reason)
        )
        trace.meta |= self.corruption.about(record)
        trace.meta["top_texts"] = self._said(base)
        if self.place.spans is not None:
            trace.meta["windows"] = [str(name) for name in clip.grid.coords["window"]]
        trace.meta |= {"transcript_clean": clip.spoken[0], "transcript_corrupted": clip.spoken[1]}
        if reason is Exclusion.LAYOUT:
            trace.meta["detail"] = f"{self._lengths(clip)}: each run reads its own transcript (transcript=upstream)"
        seen = self._observe(trace, clip, base.probabilities[:, answer])
        trace.meta["checks"] = [vars(check) for check in seen]
        return trace

    def _check(self, clip: OpenedClip, trace: SampleTrace, base: Readout, swept: Readout, spot_check: bool) -> None:
        """Compute some of a clip's cells again, and compare what is known of them."""
        record, grid, answer = clip.record, clip.grid, clip.asked.right
        if isinstance(self.engine, ApproximateEngine):  # identities hold for exact cells only
            chosen = self._spots(record, grid, self.settings.engine.licence_cells)
            cells, exact = exact_cells(self.engine.exact, clip.source, clip.target, grid, chosen, clip.read)
            trace.meta["licence_cells"] = cells
            trace.arrays |= readout_arrays("exact", exact, (len(exact),))
            return
        # An answer of several tokens is read at several positions: no single one carries everything.
        several = len(clip.read.answers[answer]) > 1
        found = None if several else self._identity(grid, base, swept, answer, clip.clean.tokens)
        checks = [] if found is None else [self._explained("last_layer_identity", found, clip)]
        checks += self._own_states(clip, base, swept)
        if spot_check and isinstance(self.engine, ReplayEngine):
            cells, exact = exact_cells(
                self._oracle, clip.source, clip.target, grid, self._spots(record, grid), clip.read
            )
            difference = float(np.abs(exact.probabilities - swept.probabilities[cells]).max())
            checks.append(self._explained("replay_equals_direct", difference, clip))
            trace.meta["spot_checked_cells"] = min(SPOT_CHECKED_PER_SAMPLE, len(grid.cells))
        trace.meta["checks"] += [vars(check) for check in checks]

    def _own_states(self, clip: OpenedClip, base: Readout, swept: Readout) -> list[Check]:
        """What holds for any weights: a run's own states, put back where they are, leave it."""
        cells = [
            index
            for index, cell in enumerate(clip.grid.cells)
            if cell.patches and not cell.cuts and all(patch.changes_nothing for patch in cell.patches)
        ]
        if not cells:
            return []
        unpatched = base.probabilities[0 if self.noising else 1]
        difference = float(np.abs(swept.probabilities[cells] - unpatched).max())
        return [self._explained("own_states_identity", difference, clip)]

    def _explained(self, name: str, difference: float, clip: OpenedClip) -> Check:
        """Whether rounding explains a difference in probability between two ways to compute the same of a clip."""
        return Check.at_most(name, difference, self.rounding.bound(clip, difference))

    def _said(self, base: Readout) -> list[str]:
        """The most probable token of each base run."""
        tokenizer = self.lalm.family.tokenizer
        return [str(tokenizer.decode([int(id)], skip_special_tokens=False)) for id in base.top_id]

    def _observe(self, trace: SampleTrace, clip: OpenedClip, p_base: np.ndarray) -> list[Check]:
        """Look at the two runs without changing them, as far as the settings ask for it."""
        checks = []
        clean, corrupted, token = clip.clean, clip.corrupted, clip.read.first_ids[clip.asked.right]
        if self.settings.observe.lens:
            found = [lens(self.lalm, encoding, token) for encoding in (clean, corrupted)]
            text = max(probabilities.shape[1] for probabilities, _ in found)
            padded = [np.pad(p, ((0, 0), (0, text - p.shape[1])), constant_values=np.nan) for p, _ in found]
            trace.arrays |= {"lens_text": np.stack(padded), "lens_audio": np.stack([audio for _, audio in found])}
            ends = [float(probabilities[-1, -1]) for probabilities, _ in found]
            worst = float(np.abs(np.array(ends) - p_base).max())
            checks.append(self._explained("lens_ends_at_the_answer", worst, clip))
        if self.settings.observe.attention:
            trace.arrays["audio_attention"] = audio_attention(self.lalm, clean)
        return checks

    def _meta(
        self, record: Record, samples: int, tokens: TokenTable, asked: Asked, reason: Exclusion
    ) -> dict[str, Any]:
        described = sample_meta(record.label, record.group, samples, tokens, reason)
        return described | asked_meta(record, asked)

    def _identity(self, grid: Grid, base: Readout, swept: Readout, answer: int, tokens: TokenTable) -> float | None:
        """What holds for any weights: the last position of the last layer carries everything, others nothing.

        The largest difference in probability from it; None where no cell is of that kind.
        """
        if self.place.site is not Site.RESID:
            return None
        last_layer, last = self.lalm.num_layers - 1, len(tokens) - 1
        clean, corrupted = base.probabilities[:, answer]
        source, target = (corrupted, clean) if self.noising else (clean, corrupted)
        worst = 0.0
        found = False
        for probability, cell in zip(swept.probabilities[:, answer], grid.cells, strict=True):
            if [patch.layer for patch in cell.patches if patch.plain] == [last_layer] and len(cell.patches) == 1:
                expected = source if last in cell.patches[0].positions else target
                worst, found = max(worst, abs(float(probability - expected))), True
        return worst if found else None

    def _spots(self, record: Record, grid: Grid, count: int = SPOT_CHECKED_PER_SAMPLE) -> np.ndarray:
        """Indices of the cells of a sample that are computed twice; those that nothing is computed for are left out."""
        seed = [self.settings.seed, *record.id.encode()]
        computed = [index for index, cell in enumerate(grid.cells) if not cell.idle]
        return np.random.default_rng(seed).choice(computed, min(count, len(computed)), replace=False)


def _as_sent(tokens: TokenTable) -> str:
    """The prompt as the model gets it, with the audio positions written as their number."""
    audio = tokens.audio_positions
    before, after = tokens.texts[: audio[0]], tokens.texts[audio[-1] + 1 :]
    return f"{''.join(before)}[{len(audio)} audio positions]{''.join(after)}"
