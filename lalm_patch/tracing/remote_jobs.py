"""One clip's jobs on a server: usually one; another where it is lost, given up, or silent for too long.

A server that is started again may have kept what it said about a job and lost the job: it then repeats that sentence
for ever. It looks the same as a long queue. So a job from which nothing new is heard is sent again after a while, and
both are asked from then on: the first answer counts, and the other one is never looked at.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from lalm_patch.engine.ndif import GOES_ON, JobFailed, JobLost, NdifEngine, pause
from lalm_patch.engine.remote_session import ClipRequest
from lalm_patch.storage.jobs import Job

log = logging.getLogger(__name__)

WAITING = ("", "RECEIVED", "QUEUED", "PROVISIONING", "DEPLOYING")
"""States in which a later job of the same model cannot overtake this one, unless the server lost it."""


@dataclass
class _Sent:
    """A job, and what was last heard of it.

    `former`: by a process before this one. `moved`: something has changed since it was first heard of here. `begun`:
    when this process sent it or picked it up. `waited`: when the server last said that it has not begun with it.
    """

    id: str
    sent: float
    former: bool = False
    moved: bool = False
    heard: tuple[str, str] = ("", "")
    begun: float = field(default_factory=time.monotonic)
    changed: float = field(default_factory=time.monotonic)
    waited: float = float("-inf")


class ClipJobs:
    """Sends a clip, asks for the answer, and sends it again where that is needed.

    Args:
        server: where to.
        request: what to compute.
        name: of the clip, for messages.
        known: the jobs of a process before this one for exactly this request, if there are any.
    """

    def __init__(self, server: NdifEngine, request: ClipRequest, name: str, known: Job | None = None) -> None:
        self.server, self.request, self.name = server, request, name
        self.settings = server.settings
        self.given_up = 0
        self.sent_again = 0
        self.overtaken_at: float | None = None
        self.answered_by: _Sent | None = None
        self._queue_moved_at = float("-inf")
        self._send_at: float | None = None
        self._alive: list[_Sent] = []
        if known:
            log.info("%s: going on with job %s", name, known.id)
            self._alive = [_Sent(id, known.sent, former=True) for id in (*known.earlier, known.id)]

    @property
    def ids(self) -> tuple[str, ...]:
        """The jobs that may still come back, oldest first."""
        return tuple(job.id for job in self._alive)

    @property
    def sent(self) -> float:
        """When the newest of them was sent, in seconds since 1970."""
        return self._alive[-1].sent if self._alive else 0.0

    @property
    def sent_of_answer(self) -> float:
        """When the job was sent that came back, in seconds since 1970."""
        return self.answered_by.sent if self.answered_by else 0.0

    @property
    def queue_moved(self) -> bool:
        """Whether the job that came back left a queue that is still there.

        What is first seen after an outage may have been done before it: then it says nothing of the queue after it.
        """
        job, outage = self.answered_by, self.server.last_outage
        return job is not None and (job.waited > outage or (not job.former and job.begun > outage))

    @property
    def state(self) -> str:
        """In one or a few words, never empty."""
        if not self._alive:
            return "waiting to be sent again"
        return self._alive[-1].heard[0].lower() or ("picked up" if self._alive[-1].former else "sent")

    @property
    def waiting(self) -> bool:
        """Whether the server has not begun with it."""
        return all(job.heard[0] in WAITING for job in self._alive)

    def send(self) -> None:
        """Send the clip, whatever was sent before.

        Raises:
            HostError: the server cannot be reached after all retries, or refuses.
        """
        job = _Sent(self.server.submit(self.request), time.time(), heard=("RECEIVED", ""))
        self._alive.append(job)
        self._send_at = self.overtaken_at = None

    def look(self) -> dict[str, Any] | None:
        """What a job saved, or None: go on waiting.

        Raises:
            JobFailed: the job failed and would fail again, or was given up too often.
            HostError: the server cannot be reached after all retries, or refuses.
        """
        for job in list(self._alive):
            saved = self._ask(job)
            if saved is not None:
                self.answered_by = job
                return saved
        if self._send_at is not None:
            if time.monotonic() >= self._send_at:
                self.send()
        elif self._alive:
            self._send_again_if_silent()
        return None

    def answered(self, other: ClipJobs) -> None:
        """A job of another clip's came back; a model's jobs begin in their order.

        From an earlier one it follows that the queue moves, if it was in it; from a later one, that this one is not.
        """
        if other.sent_of_answer < self.sent:
            if other.queue_moved:
                self._queue_moved_at = time.monotonic()
        elif self.waiting and self.overtaken_at is None:
            self.overtaken_at = time.monotonic()

    def refuse_former(self, reason: object) -> bool:
        """Send the clip again if the answer is a former process's job's: what was wrong then may have been put right.

        Args:
            reason: what is wrong with the answer.

        Returns:
            Whether it is; if not, the answer of this process's own job is wrong.
        """
        job = self.answered_by
        if job is None or not job.former:
            return False
        self._former_failed(job, reason)
        self.answered_by = None
        return True

    def _ask(self, job: _Sent) -> dict[str, Any] | None:
        try:
            report = self.server.ask(job.id)
        except JobLost as reason:
            self._lost(job, str(reason))
            return None
        except JobFailed as failure:
            if not job.former:
                raise
            self._former_failed(job, failure)
            return None
        heard, now = (report.status, report.description), time.monotonic()
        if report.status in WAITING:
            job.waited = now
        if heard != job.heard:
            job.moved = job.moved or any(job.heard)
            job.heard, job.changed = heard, now
            self.overtaken_at = None
        elif not report.status and now - job.changed > self.settings.forget_seconds:
            self._lost(job, f"knows nothing of job {job.id}")
        return report.saved

    def _send_again_if_silent(self) -> None:
        newest, now = self._alive[-1], time.monotonic()
        since = max(self._queue_moved_at, *(job.changed for job in self._alive))
        limit = self.settings.stale_seconds
        suspicions = [since] if newest.former and not newest.moved else []
        # What is heard after an outage may have been written before it: only a queue that moves shows that it is there.
        outage = self.server.last_outage
        suspicions += [outage] if outage > max(self._queue_moved_at, newest.begun) else []
        suspicions += [self.overtaken_at] if self.overtaken_at is not None else []
        if self.waiting and suspicions:
            since, limit = max(since, min(suspicions)), min(limit, self.settings.forget_seconds)
        limit *= 2 ** min(self.sent_again, 32)
        if now - since > limit:
            said = " ".join(newest.heard).strip()
            log.warning("%s: sent again, the server has said %r for %.3g s", self.name, said, now - since)
            self.sent_again += 1
            self.send()

    def _lost(self, job: _Sent, reason: str) -> None:
        self._alive.remove(job)
        wait = 0.0
        if not job.former:
            self.given_up += 1
            if self.given_up > self.settings.retries:
                raise JobFailed(
                    f"{self.server.host} {reason}. This was the end of {self.given_up} jobs for {self.name}. {GOES_ON}."
                )
            wait = pause(self.given_up, self.settings)
        if not self._alive and self._send_at is None:
            self._send_at = time.monotonic() + wait
            log.warning("%s: sent again in %.3g s, the server %s", self.name, wait, reason)

    def _former_failed(self, job: _Sent, reason: object) -> None:
        self._alive.remove(job)
        log.warning("%s: sent again, once; the job of a process before this one failed: %s", self.name, reason)
        if not self._alive and self._send_at is None:
            self._send_at = time.monotonic()
