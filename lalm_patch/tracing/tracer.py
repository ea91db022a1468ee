"""Trace one sample: clean run, corrupted run, and every cell of the grid between them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lalm_patch.checks import Check
from lalm_patch.engine import ApproximateEngine, DirectEngine, Engine, Readout, ReplayEngine
from lalm_patch.engine.choose import choose_engine
from lalm_patch.engine.observe import audio_attention, check_attention, lens
from lalm_patch.engine.whole_answers import AnswerReader
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Grid, chosen_layers, make_grid, place_in
from lalm_patch.interventions.patches import Site
from lalm_patch.interventions.segments import check_present
from lalm_patch.models import LALM, Encoding, TokenTable
from lalm_patch.models.proof import TOLERANCES, make_pair, prove
from lalm_patch.settings import RunSettings
from lalm_patch.stimuli import Attribute, Prompt, Record
from lalm_patch.terminal import Progress
from lalm_patch.tracing.corruptions import Corruption
from lalm_patch.tracing.metrics import Exclusion, exclusion, own_question
from lalm_patch.tracing.questions import Asked, Questions
from lalm_patch.tracing.transcripts import Transcripts

log = logging.getLogger(__name__)

SPOT_CHECKED_PER_SAMPLE = 2
TRACEABLE = (Exclusion.CLEAN_WRONG, Exclusion.CORRUPTED_RIGHT, Exclusion.NO_EFFECT)
"""Reasons not to count that leave something to be patched."""


@dataclass
class SampleTrace:
    """What tracing one sample gave.

    Attributes:
        arrays: `base_*` with [clean, corrupted] first, `patched_*` with the grid's shape first (kept samples only).
        meta: what a JSON record can hold: label, exclusion, tokens and roles after the audio, checks, ...
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Tracer:
    """A model, an attribute and a granularity, ready to trace samples.

    Args:
        lalm: the model.
        attribute: what is asked; None where every clip has a question of its own.
        settings: the run's settings.
        records: all clips of the run: corruptions may take another clip, or the mean of all.

    Attributes:
        questions: what each clip is asked.
        option_ids: first token of each option's answer in the example prompt.
        checks: what was verified before the first sample.
        engine: the engine that computes the cells.
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
        self, lalm: LALM, attribute: Attribute | None, settings: RunSettings, records: Sequence[Record] = ()
    ) -> None:
        self.lalm = lalm
        self.attribute = attribute
        self.settings = settings
        self.questions = Questions(lalm, attribute, settings)
        self.layout = self.questions.layout
        fixed = self.questions.example(tuple(records))
        # Answers of several tokens may begin alike: once is enough to prove engines with.
        self.option_ids = tuple(dict.fromkeys(ids[0] for ids in self.questions.answers(fixed)))
        self.place = place_in(lalm, settings.site, settings.granularity)
        self.noising = settings.direction.name == "noising"
        self.layers = chosen_layers(self.place.num_layers, settings.granularity.layers, self.place.layer_kind)
        self.tolerance = settings.engine.tolerance or TOLERANCES[lalm.dtype]
        self.transcripts = Transcripts(lalm, settings)
        self.checks: list[Check] = []
        self.engine: Engine
        example = self._open(replace(fixed, transcript=self.transcripts.example))
        check_present(self.place.edges, example.segments)
        grid = self.grid(example)
        self.dims, self.coords, self.cells_per_sample = grid.dims, grid.coords, len(grid.cells)
        self.example_prompt = _as_sent(example)
        self._oracle = DirectEngine(lalm)
        if settings.observe.attention:
            check_attention(lalm)
        self.corruption = Corruption(lalm, settings.corruption, self.layout, records)

    def _open(self, prompt: Prompt) -> TokenTable:
        """Prove the model on noise and silence and choose its engine; returns the noise's token table."""
        pair = make_pair(self.lalm, prompt, self.layout)
        self.checks += prove(self.lalm, pair)
        self.engine, engine_checks = choose_engine(
            self.lalm, self.settings.engine, pair, self.option_ids, self.tolerance, self.place
        )
        self.checks += engine_checks
        return pair.noise.tokens

    @property
    def about(self) -> dict[str, str]:
        """Attributes of the result that say what computed the cells, and where."""
        device, dtype = str(self.lalm.device), str(self.lalm.dtype).removeprefix("torch.")
        return {"dtype": dtype, "device": device, "engine": self.engine.name}

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
        self, records: Sequence[Record], spot_checks: int, progress: Progress, folder: Path
    ) -> Iterator[tuple[Record, SampleTrace]]:
        """Trace samples, each as soon as it is asked for; what was given out is the caller's to store.

        Args:
            records: the clips.
            spot_checks: how many cells to compute twice in all.
            progress: is told about every cell.
            folder: the run's own folder.
        """
        for record in records:
            trace = self.trace(record, record.waveform(None), spot_checks > 0, progress)
            spot_checks -= int(trace.meta.get("spot_checked_cells", 0))
            yield record, trace

    def trace(self, record: Record, waveform: np.ndarray, spot_check: bool, progress: Progress) -> SampleTrace:
        """Trace one sample.

        Args:
            record: the clip's record.
            waveform: float32 [samples] at 16 kHz.
            spot_check: whether to compute a few random cells again with the direct engine.
            progress: is told about every cell.

        Raises:
            ModelError: clean and corrupted input differ in their positions.
        """
        asked = self.questions.ask(record)
        read = AnswerReader(asked.answers, self.questions.whole)
        heard = self.corruption.heard(record, waveform)
        spoken = self.transcripts.pair(waveform, heard, None if record.prompt is None else record.prompt.transcript)
        prompt, other_prompt = (replace(asked.prompt, transcript=text) for text in spoken)
        clean = self.lalm.encode(waveform, prompt, self.layout)
        corrupted = self.corruption.encode(record, heard, other_prompt, clean)
        same = clean.tokens.same_layout(corrupted.tokens)
        lengths = f"clip and {self.corruption.name} give {len(clean.tokens)} and {len(corrupted.tokens)} positions"
        if not same and spoken[0] == spoken[1]:
            raise ModelError(f"{record.name}: {lengths} or other tokens, so their states cannot be exchanged")
        grid = self.grid(clean.tokens)
        progress.drop(self.cells_per_sample - len(grid.cells))  # clips differ in their text, or in their windows
        answer = asked.right
        source, target = (corrupted, clean) if self.noising else (clean, corrupted)
        base = read.base(self.engine, source, target)
        if self.noising:
            base = base.rows(slice(None, None, -1))  # the clean run comes first
        reason = exclusion(base, read.first_ids, answer, self.settings.prompt.correct)
        if not same and reason is Exclusion.KEPT:
            reason = Exclusion.LAYOUT
        trace = SampleTrace(
            readout_arrays("base", base, (2,)), self._meta(record, len(waveform), clean.tokens, asked, reason)
        )
        trace.meta |= self.corruption.about(record)
        trace.meta["top_texts"] = self._said(base)
        if self.place.spans is not None:
            trace.meta["windows"] = [str(name) for name in grid.coords["window"]]
        trace.meta |= {"transcript_clean": spoken[0], "transcript_corrupted": spoken[1]}
        if reason is Exclusion.LAYOUT:
            trace.meta["detail"] = f"{lengths}: each run reads its own transcript (transcript=upstream)"
        seen = self._observe(trace, clean, corrupted, base.probabilities[:, answer], read.first_ids[answer])
        trace.meta["checks"] = [vars(check) for check in seen]
        looked_at = self.settings.trace_excluded and reason in TRACEABLE
        if reason is not Exclusion.KEPT and not looked_at:
            progress.drop(len(grid.cells))
            return trace
        swept = read.sweep(self.engine, source, target, grid, progress.advance)
        trace.arrays |= readout_arrays("patched", swept, grid.shape)
        if isinstance(self.engine, ApproximateEngine):  # identities hold for exact cells only
            chosen = self._spots(record, grid, self.settings.engine.licence_cells)
            cells, exact = exact_cells(self.engine.exact, source, target, grid, chosen, read)
            trace.meta["licence_cells"] = cells
            trace.arrays |= readout_arrays("exact", exact, (len(exact),))
            return trace
        # An answer of several tokens is read at several positions: no single one carries everything.
        several = len(read.answers[answer]) > 1
        checks = [] if several else self._identities(grid, base, swept, answer, clean.tokens)
        if spot_check and isinstance(self.engine, ReplayEngine):
            cells, exact = exact_cells(self._oracle, source, target, grid, self._spots(record, grid), read)
            difference = float(np.abs(exact.probabilities - swept.probabilities[cells]).max())
            checks.append(Check.at_most("replay_equals_direct", difference, self.tolerance))
            trace.meta["spot_checked_cells"] = min(SPOT_CHECKED_PER_SAMPLE, len(grid.cells))
        trace.meta["checks"] += [vars(check) for check in checks]
        return trace

    def _said(self, base: Readout) -> list[str]:
        """The most probable token of each base run."""
        tokenizer = self.lalm.family.tokenizer
        return [str(tokenizer.decode([int(id)], skip_special_tokens=False)) for id in base.top_id]

    def _observe(
        self, trace: SampleTrace, clean: Encoding, corrupted: Encoding, p_base: np.ndarray, token: int
    ) -> list[Check]:
        """Look at the two runs without changing them, as far as the settings ask for it; the answer is a token."""
        checks = []
        if self.settings.observe.lens:
            found = [lens(self.lalm, encoding, token) for encoding in (clean, corrupted)]
            text = max(probabilities.shape[1] for probabilities, _ in found)
            padded = [np.pad(p, ((0, 0), (0, text - p.shape[1])), constant_values=np.nan) for p, _ in found]
            trace.arrays |= {"lens_text": np.stack(padded), "lens_audio": np.stack([audio for _, audio in found])}
            ends = [float(probabilities[-1, -1]) for probabilities, _ in found]
            worst = float(np.abs(np.array(ends) - p_base).max())
            checks.append(Check.at_most("lens_ends_at_the_answer", worst, self.tolerance))
        if self.settings.observe.attention:
            trace.arrays["audio_attention"] = audio_attention(self.lalm, clean)
        return checks

    def _meta(
        self, record: Record, samples: int, tokens: TokenTable, asked: Asked, reason: Exclusion
    ) -> dict[str, Any]:
        described = sample_meta(record.label, record.group, samples, tokens, reason)
        return described | asked_meta(record, asked)

    def _identities(self, grid: Grid, base: Readout, swept: Readout, answer: int, tokens: TokenTable) -> list[Check]:
        """What holds for any weights: the last position of the last layer carries everything, others nothing."""
        if self.place.site is not Site.RESID:
            return []
        last_layer, last = self.lalm.num_layers - 1, len(tokens) - 1
        clean, corrupted = base.probabilities[:, answer]
        source, target = (corrupted, clean) if self.noising else (clean, corrupted)
        worst = 0.0
        found = False
        for probability, cell in zip(swept.probabilities[:, answer], grid.cells, strict=True):
            if [patch.layer for patch in cell.patches] == [last_layer]:
                expected = source if last in cell.patches[0].positions else target
                worst, found = max(worst, abs(float(probability - expected))), True
        if not found:
            return []
        return [Check.at_most("last_layer_identity", worst, self.tolerance)]

    def _spots(self, record: Record, grid: Grid, count: int = SPOT_CHECKED_PER_SAMPLE) -> np.ndarray:
        """Indices of the cells of a sample that are computed twice."""
        seed = [self.settings.seed, *record.id.encode()]
        count = min(count, len(grid.cells))
        return np.random.default_rng(seed).choice(len(grid.cells), count, replace=False)


def exact_cells(
    engine: Engine,
    source: Encoding,
    target: Encoding,
    grid: Grid,
    chosen: np.ndarray,
    read: AnswerReader,
) -> tuple[list[int], Readout]:
    """Some cells of a grid by an exact engine: their indices, ascending, and one row for each."""
    indices: list[int] = np.sort(chosen).tolist()
    some = Grid(("cell",), {"cell": np.array(indices)}, tuple(grid.cells[index] for index in indices))
    return indices, read.sweep(engine, source, target, some)


def sample_meta(label: str, group: str, samples: int, tokens: TokenTable, reason: Exclusion) -> dict[str, Any]:
    """What a sample's record says besides numbers.

    Args:
        label: the right answer.
        group: what the clip shares with others that are not independent of it.
        samples: length of the clip at 16 kHz.
        tokens: its prompt.
        reason: why it does not count, or that it does.
    """
    text = tokens.text_positions
    return {
        "label": label,
        "group": group,
        "exclusion": str(reason),
        "detail": "",
        "samples": samples,
        "positions": len(tokens),
        "audio_positions": len(tokens.audio_positions),
        "first_text_position": text[0],
        "token_ids": [tokens.ids[i] for i in text],
        "token_texts": [tokens.texts[i] for i in text],
        "token_roles": [tokens.roles[i] for i in text],
    }


def asked_meta(record: Record, asked: Asked) -> dict[str, Any]:
    """What a sample's record says of its question."""
    order = {"option_order": list(asked.prompt.options), "answer_id": asked.answers[asked.right][0]}
    return order | own_question(record)


def readout_arrays(prefix: str, readout: Readout, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A readout as a sample's arrays: rows in row-major order of `shape`, options last."""
    arrays: dict[str, np.ndarray] = {
        f"{prefix}_option_logits": readout.option_logits.reshape(*shape, -1).astype(np.float32),
        f"{prefix}_logsumexp": readout.logsumexp.reshape(shape).astype(np.float32),
        f"{prefix}_top_id": readout.top_id.reshape(shape).astype(np.int64),
    }
    if readout.option_rank is not None:
        arrays[f"{prefix}_option_rank"] = readout.option_rank.reshape(*shape, -1).astype(np.int32)
    if readout.divergence is not None:
        arrays[f"{prefix}_divergence"] = readout.divergence.reshape(*shape, 2).astype(np.float32)
    return arrays


def _as_sent(tokens: TokenTable) -> str:
    """The prompt as the model gets it, with the audio positions written as their number."""
    audio = tokens.audio_positions
    before, after = tokens.texts[: audio[0]], tokens.texts[audio[-1] + 1 :]
    return f"{''.join(before)}[{len(audio)} audio positions]{''.join(after)}"
