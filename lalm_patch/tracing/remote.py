"""Trace samples on a server: several clips in flight, each one request, each stored as soon as its answer is there."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lalm_patch.checks import Check
from lalm_patch.engine.ndif import JobFailed, JobLost, NdifEngine
from lalm_patch.engine.remote_session import ClipAnswer, ClipRequest
from lalm_patch.errors import HostError, ModelError
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import Intervention, Patch
from lalm_patch.models import TokenTable
from lalm_patch.models.proof import noise_clip
from lalm_patch.stimuli import Prompt, Record
from lalm_patch.storage.jobs import Job, JobBook
from lalm_patch.terminal import Progress
from lalm_patch.tracing.corruptions import digest_of
from lalm_patch.tracing.metrics import Exclusion, exclusion
from lalm_patch.tracing.tracer import SampleTrace, Tracer, readout_arrays

log = logging.getLogger(__name__)


@dataclass
class _Clip:
    """A clip on its way: what was asked, and what is needed to read the answer."""

    record: Record
    prompt: Prompt
    tokens: TokenTable
    grid: Grid
    request: ClipRequest
    digest: str
    samples: int
    verify: bool
    job: str = ""
    state: str = ""
    last_heard: float = 0.0
    lost: int = 0


class RemoteTracer(Tracer):
    """As `Tracer`, with the model on a server: `lalm` is an outline and nothing is computed here.

    What `Tracer` proves at load is proved on the server inside the first clips' own requests, so that every request
    is a clip's.

    Raises:
        ConfigError, ModelError: what cannot go to a server, before anything is sent.
    """

    def _open(self, prompt: Prompt) -> TokenTable:
        self.server = NdifEngine(self.lalm, self.settings.model, self.settings.backend)
        noise = noise_clip()
        tokens, _ = self.lalm.inputs(noise, prompt, self.layout)
        silent, _ = self.lalm.inputs(np.zeros_like(noise), prompt, self.layout)
        self.checks.append(Check.at_most("same_layout", float(not tokens.same_layout(silent)), 0.0))
        return tokens

    @property
    def about(self) -> dict[str, str]:
        """Attributes of the result that say what computed the cells, and where."""
        return {"dtype": self.settings.model.dtype, "device": self.server.host, "engine": self.server.name}

    def trace(self, record: Record, waveform: np.ndarray, spot_check: bool, progress: Progress) -> SampleTrace:
        """Trace one sample and wait for it; see `Tracer.trace`."""
        clip = self._clip(record, waveform, spot_check)
        self._send(clip)
        while (saved := self._ask(clip)) is None:
            progress.note(f"{record.id} {clip.state.lower()}")
            time.sleep(self.settings.backend.poll_seconds)
        return self._finish(clip, self.server.answer(clip.request, saved), progress)

    def traces(
        self, records: Sequence[Record], spot_checks: int, progress: Progress, folder: Path
    ) -> Iterator[tuple[Record, SampleTrace]]:
        """As `Tracer.traces`, in the order in which answers come; jobs a former process sent are picked up again."""
        backend, book = self.settings.backend, JobBook(folder)
        book.keep_only({record.id for record in records})
        waiting = deque(sorted(records, key=lambda record: book.get(record.id) is None))
        flying: list[_Clip] = []
        while waiting or flying:
            while waiting and len(flying) < backend.max_jobs:
                planned = sum(len(clip.request.repeated) for clip in flying)
                flying.append(self._launch(waiting.popleft(), planned < spot_checks, book))
            for clip in list(flying):
                try:
                    saved = self._ask(clip)
                except JobFailed:
                    book.drop(clip.record.id)
                    raise
                if book.get(clip.record.id) != self._entry(clip):
                    book.put(clip.record.id, self._entry(clip))
                if saved is None:
                    continue
                flying.remove(clip)
                trace = self._finish(clip, self.server.answer(clip.request, saved), progress)
                spot_checks -= int(trace.meta.get("spot_checked_cells", 0))
                yield clip.record, trace
                book.drop(clip.record.id)
            states = Counter(clip.state.lower() for clip in flying)
            progress.note(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
            if flying:
                time.sleep(backend.poll_seconds)

    # --- one clip ----------------------------------------------------------------------------------------------

    def _launch(self, record: Record, verify: bool, book: JobBook) -> _Clip:
        """Send a clip, unless a job for exactly this is on the server."""
        known = book.get(record.id)
        clip = self._clip(record, record.waveform(None), known.verify if known else verify)
        if known and (known.digest, known.host) == (clip.digest, self.server.host):
            log.info("%s: going on with job %s", record.id, known.id)
            clip.job, clip.last_heard = known.id, time.monotonic()
        else:
            self._send(clip)
            book.put(record.id, self._entry(clip))
        return clip

    def _clip(self, record: Record, waveform: np.ndarray, verify: bool) -> _Clip:
        prompt = self.prompt(record.id)
        heard = self.corruption.heard(record, waveform)
        tokens, clean = self.lalm.inputs(waveform, prompt, self.layout)
        other, corrupted = self.lalm.inputs(heard, prompt, self.layout)
        if not tokens.same_layout(other):
            raise ModelError(
                f"{record.name}: clip and {self.corruption.name} give {len(tokens)} and {len(other)} "
                "positions or other tokens, so their states cannot be exchanged"
            )
        grid = self.grid(tokens)
        request = ClipRequest(
            clean=clean,
            corrupted=corrupted,
            positions=len(tokens),
            cells=(*grid.cells, *(self._proofs(tokens) if verify else ())),
            repeated=tuple(int(index) for index in self._spots(record, grid)) if verify else (),
            option_ids=self.option_ids,
            answer=self.attribute.options.index(record.label),
            correct=self.settings.prompt.correct,
            pack_tokens=self.settings.engine.pack_tokens,
        )
        digest = self._digest(request)
        return _Clip(record, prompt, tokens, grid, request, digest, len(waveform), verify)

    def _proofs(self, tokens: TokenTable) -> tuple[Intervention, Intervention]:
        """Two rows whose result is known: nothing patched, and everything patched after the middle layer."""
        middle = (self.lalm.num_layers - 1) // 2
        return Intervention(), Intervention([Patch(middle, tuple(range(len(tokens))))])

    def _digest(self, request: ClipRequest) -> str:
        rest = replace(request, clean={}, corrupted={})
        inputs = digest_of(request.clean) + digest_of(request.corrupted)
        return hashlib.sha256(inputs + f"{self.server.model_key}\0{rest!r}".encode()).hexdigest()

    def _send(self, clip: _Clip) -> None:
        clip.job, clip.state, clip.last_heard = self.server.submit(clip.request), "RECEIVED", time.monotonic()

    def _entry(self, clip: _Clip) -> Job:
        return Job(clip.job, self.server.host, clip.digest, clip.verify)

    def _ask(self, clip: _Clip) -> dict[str, Any] | None:
        """What the clip's job saved, or None; a job the server lost is sent again."""
        backend = self.settings.backend
        try:
            state, saved = self.server.ask(clip.job)
        except JobLost as reason:
            clip.lost += 1
            if clip.lost > backend.retries:
                raise HostError(f"{self.server.host} gave up {clip.record.id} {clip.lost} times: {reason}") from None
            log.warning("%s: sent again, the server gave it up: %s", clip.record.id, reason)
            self._send(clip)
            return None
        now = time.monotonic()
        if state is not None:
            clip.state, clip.last_heard = state, now
        elif now - clip.last_heard > backend.forget_seconds:
            log.warning("%s: sent again, the server knows nothing of job %s", clip.record.id, clip.job)
            self._send(clip)
        return saved

    def _finish(self, clip: _Clip, answer: ClipAnswer, progress: Progress) -> SampleTrace:
        """The sample's arrays, its checks, and why it does not count if it does not.

        Raises:
            ModelError: the server computes in another floating-point type than the settings say.
        """
        wanted = self.settings.model.dtype
        if answer.dtype != wanted:
            raise ModelError(
                f"{self.server.host} runs {self.settings.model.name} in {answer.dtype}, the settings say {wanted}; "
                f"set model.dtype={answer.dtype}"
            )
        reason = exclusion(answer.base, self.option_ids, clip.request.answer, self.settings.prompt.correct)
        meta = self._meta(clip.record, clip.samples, clip.tokens, clip.prompt, reason)
        meta |= self.corruption.about(clip.record)
        trace = SampleTrace(readout_arrays("base", answer.base, (2,)), meta)
        trace.meta["server"] = answer.versions
        checks = []
        if clip.request.inputs_differ:
            checks.append(Check.more_than("audio_reaches_model", answer.moved, 1e-6))
        cells = len(clip.grid.cells)
        if reason is Exclusion.KEPT:
            if answer.cells is None:
                raise HostError(f"{self.server.host} left {clip.record.id} out, which counts by its own numbers")
            swept = answer.cells.rows(slice(cells))
            trace.arrays |= readout_arrays("patched", swept, clip.grid.shape)
            checks += self._identities(clip.grid, answer.base, swept, clip.request.answer, clip.tokens)
            if clip.verify:
                checks += self._verified(clip, answer)
                trace.meta["spot_checked_cells"] = len(clip.request.repeated)
            progress.advance(cells)
        else:
            progress.drop(cells)
        trace.meta["checks"] = [vars(check) for check in checks]
        return trace

    def _verified(self, clip: _Clip, answer: ClipAnswer) -> list[Check]:
        assert answer.cells is not None
        assert answer.repeated is not None
        probabilities, base = answer.cells.probabilities, answer.base.probabilities
        unpatched, restored = probabilities[-2], probabilities[-1]
        again = probabilities[list(clip.request.repeated)]
        pairs = {
            "decoder_from_embeddings": (unpatched, base[1]),
            "restore_all": (restored, base[0]),
            "remote_rows_equal_whole": (again, answer.repeated.probabilities),
        }
        return [
            Check.at_most(name, float(np.abs(left - right).max()), self.tolerance)
            for name, (left, right) in pairs.items()
        ]
