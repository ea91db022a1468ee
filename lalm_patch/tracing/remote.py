"""Trace samples on a server: several clips in flight, each one request, each stored as soon as its answer is there."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lalm_patch.checks import Check
from lalm_patch.engine.memory import ROW_TOKENS
from lalm_patch.engine.ndif import JobFailed, NdifEngine
from lalm_patch.engine.remote_session import ClipAnswer, ClipRequest
from lalm_patch.errors import HostError, ModelError
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import Intervention, Patch
from lalm_patch.models import TokenTable
from lalm_patch.models.proof import UNMEASURED, noise_clip
from lalm_patch.stimuli import Prompt, Record
from lalm_patch.storage.jobs import Job, JobBook
from lalm_patch.terminal import Progress
from lalm_patch.tracing.corruptions import digest_of
from lalm_patch.tracing.metrics import Exclusion, exclusion
from lalm_patch.tracing.questions import Asked
from lalm_patch.tracing.rechecks import Rechecks
from lalm_patch.tracing.remote_jobs import ClipJobs
from lalm_patch.tracing.samples import SampleTrace, readout_arrays
from lalm_patch.tracing.tracer import Tracer


@dataclass
class _Clip:
    """A clip on its way: what was asked, and what is needed to read the answer."""

    record: Record
    asked: Asked
    tokens: TokenTable
    grid: Grid
    request: ClipRequest
    digest: str
    samples: int
    verify: bool
    jobs: ClipJobs


class RemoteTracer(Tracer):
    """As `Tracer`, with the model on a server: `lalm` is an outline and nothing is computed here.

    What `Tracer` proves at load is proved on the server inside the first clips' own requests, so that every request
    is a clip's.

    Raises:
        ConfigError, ModelError: what cannot go to a server, before anything is sent.
    """

    def _open(self, prompt: Prompt) -> TokenTable:
        self.server = NdifEngine(self.lalm, self.settings.model, self.settings.backend)
        # A server computes as its weights are, so how far that is from float32 is not known.
        self.tolerance = self.settings.engine.tolerance or UNMEASURED[self.lalm.dtype]
        noise = noise_clip()
        tokens, _ = self.lalm.inputs(noise, prompt, self.layout)
        silent, _ = self.lalm.inputs(np.zeros_like(noise), prompt, self.layout)
        self.checks.append(Check.at_most("same_layout", float(not tokens.same_layout(silent)), 0.0))
        return tokens

    @property
    def about(self) -> dict[str, str]:
        """Attributes of the result that say what computed the cells, and where."""
        return {
            "dtype": self.settings.model.dtype,
            "precision": "as_loaded",
            "device": self.server.host,
            "engine": self.server.name,
        }

    def trace(self, record: Record, waveform: np.ndarray, spot_check: bool, progress: Progress) -> SampleTrace:
        """Trace one sample and wait for it; see `Tracer.trace`."""
        clip = self._clip(record, waveform, spot_check)
        clip.jobs.send()
        while (saved := clip.jobs.look()) is None:
            progress.note(f"{record.id} {clip.jobs.state}")
            time.sleep(self.settings.backend.poll_seconds)
        trace = self._finish(clip, self.server.answer(clip.request, saved))
        self._count(clip, trace, progress)
        return trace

    def traces(
        self, records: Sequence[Record], rechecks: Rechecks, progress: Progress, folder: Path
    ) -> Iterator[tuple[Record, SampleTrace]]:
        """As `Tracer.traces`, in the order in which answers come; jobs a former process sent are picked up again."""
        backend, book = self.settings.backend, JobBook(folder)
        book.keep_only({record.id for record in records})
        waiting = deque(sorted(records, key=lambda record: book.get(record.id) is None))
        flying: list[_Clip] = []
        while waiting or flying:
            while waiting and len(flying) < backend.max_jobs:
                planned = sum(len(clip.request.repeated) for clip in flying)
                flying.append(self._launch(waiting.popleft(), planned < rechecks.cells, book))
            for clip in list(flying):
                trace = self._received(clip, book)
                if trace is None:
                    continue
                flying.remove(clip)
                for other in flying:
                    other.jobs.answered(clip.jobs)
                self._count(clip, trace, progress)
                rechecks.less(trace.meta)
                yield clip.record, trace
                book.drop(clip.record.id)
            if flying:
                states = Counter(clip.jobs.state for clip in flying)
                progress.note(", ".join(f"{count} {state}" for state, count in sorted(states.items())))
                time.sleep(backend.poll_seconds)

    # --- one clip ----------------------------------------------------------------------------------------------

    def _launch(self, record: Record, verify: bool, book: JobBook) -> _Clip:
        """Send a clip, unless a job for exactly this is on the server."""
        known = book.get(record.id)
        clip = self._clip(record, record.waveform(None), known.verify if known else verify, known)
        if not clip.jobs.ids:
            clip.jobs.send()
            self._note(clip, book)
        return clip

    def _received(self, clip: _Clip, book: JobBook) -> SampleTrace | None:
        """The clip's trace, if its answer is there. What cannot be used is not in the book any more."""
        try:
            saved = clip.jobs.look()
        except JobFailed:
            book.drop(clip.record.id)
            raise
        if saved is None:
            self._note(clip, book)
            return None
        try:
            trace = self._finish(clip, self.server.answer(clip.request, saved))
        except (HostError, ModelError) as error:
            if clip.jobs.refuse_former(error):
                return None
            book.drop(clip.record.id)
            raise
        failed = ", ".join(check["name"] for check in trace.meta["checks"] if not check["passed"])
        if failed and self.settings.on_failed_check == "stop":
            if clip.jobs.refuse_former(f"failed checks: {failed}"):
                return None
            book.drop(clip.record.id)
        return trace

    def _note(self, clip: _Clip, book: JobBook) -> None:
        """Let the book say which jobs may still come back."""
        if not clip.jobs.ids:
            book.drop(clip.record.id)
            return
        *earlier, newest = clip.jobs.ids
        entry = Job(newest, self.server.host, clip.digest, clip.verify, clip.jobs.sent, tuple(earlier))
        if book.get(clip.record.id) != entry:
            book.put(clip.record.id, entry)

    def _clip(self, record: Record, waveform: np.ndarray, verify: bool, known: Job | None = None) -> _Clip:
        asked = self.questions.ask(record)
        heard = self.corruption.heard(record, waveform)
        tokens, clean = self.lalm.inputs(waveform, asked.prompt, self.layout)
        other, corrupted = self.lalm.inputs(heard, asked.prompt, self.layout)
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
            option_ids=tuple(ids[0] for ids in asked.answers),
            answer=asked.right,
            correct=self.settings.prompt.correct,
            pack_tokens=self.settings.engine.pack_tokens or ROW_TOKENS,
        )
        digest = self._digest(request)
        if known and (known.digest, known.host) != (digest, self.server.host):
            known = None  # the answer to another request
        jobs = ClipJobs(self.server, request, record.id, known)
        return _Clip(record, asked, tokens, grid, request, digest, len(waveform), verify, jobs)

    def _proofs(self, tokens: TokenTable) -> tuple[Intervention, Intervention]:
        """Two rows whose result is known: nothing patched, and everything patched after the middle layer."""
        middle = (self.lalm.num_layers - 1) // 2
        return Intervention(), Intervention([Patch(middle, tuple(range(len(tokens))))])

    def _digest(self, request: ClipRequest) -> str:
        rest = replace(request, clean={}, corrupted={})
        inputs = digest_of(request.clean) + digest_of(request.corrupted)
        return hashlib.sha256(inputs + f"{self.server.model_key}\0{rest!r}".encode()).hexdigest()

    def _finish(self, clip: _Clip, answer: ClipAnswer) -> SampleTrace:
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
        reason = exclusion(answer.base, clip.request.option_ids, clip.request.answer, self.settings.prompt.correct)
        meta = self._meta(clip.record, clip.samples, clip.tokens, clip.asked, reason)
        meta |= self.corruption.about(clip.record)
        trace = SampleTrace(readout_arrays("base", answer.base, (2,)), meta)
        trace.meta["server"] = answer.versions
        trace.meta["top_texts"] = self._said(answer.base)
        checks = []
        if clip.request.inputs_differ:
            checks.append(Check.more_than("audio_reaches_model", answer.moved, 1e-6))
        cells = len(clip.grid.cells)
        if reason is Exclusion.KEPT:
            if answer.cells is None:
                raise HostError(f"{self.server.host} left {clip.record.id} out, which counts by its own numbers")
            swept = answer.cells.rows(slice(cells))
            trace.arrays |= readout_arrays("patched", swept, clip.grid.shape)
            found = self._identity(clip.grid, answer.base, swept, clip.request.answer, clip.tokens)
            checks += [] if found is None else [Check.at_most("last_layer_identity", found, self.tolerance)]
            if clip.verify:
                checks += self._verified(clip, answer)
                trace.meta["spot_checked_cells"] = len(clip.request.repeated)
        trace.meta["checks"] = [vars(check) for check in checks]
        return trace

    def _count(self, clip: _Clip, trace: SampleTrace, progress: Progress) -> None:
        computed = len(clip.grid.cells) if trace.meta["exclusion"] == str(Exclusion.KEPT) else 0
        progress.drop(self.cells_per_sample - computed)
        progress.advance(computed)

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
