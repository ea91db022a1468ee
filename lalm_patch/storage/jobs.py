"""Which clips are with a server: written beside the journal, so that another process can pick the answers up."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lalm_patch.storage.journal import replace_file, storage_error

log = logging.getLogger(__name__)

JOBS = "jobs.json"


@dataclass(frozen=True)
class Job:
    """One clip on a server.

    Attributes:
        id: the server's name for it.
        host: the server.
        digest: of everything that was sent; an answer to another request is of no use.
        verify: whether some cells are computed twice.
        sent: when, in seconds since 1970.
        earlier: other jobs for the same clip that may still come back, oldest first: the server seemed to have lost
            them. Whichever answers first counts.
    """

    id: str
    host: str
    digest: str
    verify: bool
    sent: float = 0.0
    earlier: tuple[str, ...] = ()


class JobBook:
    """The jobs of one run folder, whose lock the caller holds. Always whole on disk, whenever the process ends.

    Losing it costs only that clips are computed again, so a damaged one is set aside with a warning.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOBS
        self._jobs: dict[str, Job] = {}
        if self.path.exists():
            try:
                self._jobs = {sample: _job(entry) for sample, entry in json.loads(self.path.read_bytes()).items()}
            except (ValueError, TypeError, AttributeError) as error:
                log.warning("%s cannot be read (%s); its jobs are sent again", self.path, error)

    def get(self, sample: str) -> Job | None:
        """The job of a clip, if one was sent."""
        return self._jobs.get(sample)

    def put(self, sample: str, job: Job) -> None:
        """A clip was sent."""
        self._jobs[sample] = job
        self._write()

    def drop(self, sample: str) -> None:
        """The clip's answer is stored, or there will be none."""
        if self._jobs.pop(sample, None) is not None:
            self._write()

    def keep_only(self, samples: set[str]) -> None:
        """Forget clips that are stored already: the process ended between storing one and noting it here."""
        if stale := self._jobs.keys() - samples:
            for sample in stale:
                del self._jobs[sample]
            self._write()

    def _write(self) -> None:
        if not self._jobs:
            self.path.unlink(missing_ok=True)
            return
        data = json.dumps({sample: asdict(job) for sample, job in self._jobs.items()}).encode()
        try:
            replace_file(self.path, data)
        except OSError as error:
            raise storage_error(error, self.path, "noting which clips are with the server") from error


def _job(entry: dict[str, Any]) -> Job:
    return Job(**{**entry, "earlier": tuple(entry.get("earlier", ()))})
