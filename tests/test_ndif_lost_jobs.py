"""Jobs that a server lost, by itself or as it was started again: they are sent again, and every clip is stored once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import xarray as xr
from ndif_runs import Server, assert_whole, in_background, remote, result, wait_for

import lalm_patch
from lalm_patch.engine import ndif
from lalm_patch.errors import HostError
from lalm_patch.settings import BackendSettings
from lalm_patch.storage.jobs import JOBS, Job, JobBook
from lalm_patch.tracing.remote_jobs import ClipJobs

CLIPS = 3


def test_restart_with_the_store_kept(tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path) -> None:
    """The queue is lost, and what the server said of its jobs is not: they are queued for ever, and sent again."""
    first = Server()
    first.control(hold=1)
    what = (*tiny, f"outputs={tmp_path}", *remote(first, "backend.max_jobs=3", "backend.forget_seconds=0.3"))

    def stop() -> None:
        wait_for(lambda: first.states.count("COMPLETED") >= 1 and len(first.states) >= CLIPS)
        first.kill(keep_store=True)

    helper = in_background(stop)
    with pytest.raises(HostError, match=r"cannot be reached.*the same command goes on"):
        lalm_patch.trace(*what)
    helper.join()
    again = Server(first.port, first.store)
    try:
        assert again.states.count("QUEUED") >= 2
        assert_whole(result(*what), computed_here)
    finally:
        again.kill()


@pytest.mark.parametrize("poll_seconds", [0.02, 1.5])
def test_restart_under_a_client_that_stays(
    poll_seconds: float,
    tiny: tuple[str, ...],
    computed_here: xr.Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also one that asks so seldom that the answer that was there before the restart is first seen after it.

    The server is away until the client has noticed; of a shorter absence it knows nothing, and `stale_seconds` counts.
    """
    first = Server()
    first.control(hold=1)
    begun: list[Server] = []

    def restart() -> None:
        wait_for(lambda: first.states.count("COMPLETED") == 1 and len(first.states) >= CLIPS)
        first.kill(keep_store=True)
        wait_for(lambda: "cannot be reached" in caplog.text)
        begun.append(Server(first.port, first.store))

    helper = in_background(restart)
    what = (*tiny, f"outputs={tmp_path}", *remote(first, "backend.max_jobs=3", "backend.forget_seconds=0.3"))
    patience = ("backend.retries=8", "backend.pause_seconds=1", f"backend.poll_seconds={poll_seconds}")
    try:
        dataset = result(*what, *patience)
        assert_whole(dataset, computed_here)
        assert begun[0].states.count("COMPLETED") >= CLIPS
    finally:
        helper.join()
        begun[0].kill()


class Told:
    """In the place of an engine: says of each job what a test wants."""

    host = "http://server"
    last_outage = float("-inf")
    settings = BackendSettings("ndif", forget_seconds=0.2, stale_seconds=1000)

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def submit(self, request: object) -> str:
        self.said[str(len(self.said))] = "QUEUED"
        return str(len(self.said) - 1)

    def ask(self, job: str) -> ndif.Report:
        return ndif.Report(self.said[job], "", {} if self.said[job] == "COMPLETED" else None)


@pytest.mark.parametrize("seen_waiting_after_it", [False, True])
def test_an_answer_from_before_an_outage_says_nothing_of_the_queue(seen_waiting_after_it: bool) -> None:
    """It was there before the server was started again, and the job behind it is lost."""
    told = Told()
    first, second = (ClipJobs(told, None, name) for name in "ab")  # type: ignore[arg-type]
    for jobs in (first, second):
        jobs.send()
        assert jobs.look() is None
    told.last_outage = time.monotonic()
    if seen_waiting_after_it:
        assert first.look() is None
    told.said["0"] = "COMPLETED"
    assert first.look() is not None
    second.answered(first)
    limit = time.monotonic() + 5 * told.settings.forget_seconds
    while time.monotonic() < limit:
        second.look()
    assert (len(second.ids) == 1) is seen_waiting_after_it


def test_overtaken_job_is_lost(
    server: Server, tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path
) -> None:
    """A queue answers in order: a job that waits while a later one is done was lost, long before it is stale."""
    before = len(server.states)
    server.control(lose={"times": 1})
    dataset = result(*tiny, f"outputs={tmp_path}", *remote(server, "backend.max_jobs=2", "backend.forget_seconds=0.5"))
    assert_whole(dataset, computed_here)
    assert server.states[before:] == ["QUEUED", "COMPLETED", "COMPLETED", "COMPLETED"]


def test_silence_ends(server: Server, tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path) -> None:
    """All jobs in flight are lost, so none overtakes another."""
    server.control(lose={"times": CLIPS})
    dataset = result(*tiny, f"outputs={tmp_path}", *remote(server, "backend.stale_seconds=1"))
    assert_whole(dataset, computed_here)


def test_a_queue_that_moves_is_not_lost(
    server: Server, tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path
) -> None:
    """The last job waits longer than the limit, and earlier ones come back: copies would only make the queue longer."""
    before = len(server.states)
    server.control(slow={"times": CLIPS, "seconds": 2})
    dataset = result(*tiny, f"outputs={tmp_path}", *remote(server, "backend.max_jobs=3", "backend.stale_seconds=3.5"))
    assert_whole(dataset, computed_here)
    assert server.states[before:] == ["COMPLETED"] * CLIPS


def test_answers_that_come_back_twice(
    server: Server, tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path
) -> None:
    """A long queue looks like a lost one: few copies are sent, and every clip is stored once."""
    before, started = len(server.states), time.monotonic()
    server.control(hold=0)
    what = (*tiny, f"outputs={tmp_path}", *remote(server, "backend.stale_seconds=0.4", "backend.max_jobs=3"))

    def release() -> None:
        wait_for(lambda: len(server.states) - before >= 3 * CLIPS)
        server.control()

    helper = in_background(release)
    dataset = result(*what)
    helper.join()
    assert_whole(dataset, computed_here)
    (folder,) = tmp_path.iterdir()
    assert not (folder / JOBS).exists()
    waited = time.monotonic() - started
    assert waited > 0.4 + 0.8  # the second copy is sent after twice the time
    wait_for(lambda: set(server.states[before:]) == {"COMPLETED"})
    assert len(server.states) - before <= 4 * CLIPS
    assert_whole(result(*what), computed_here)  # what came back late changes nothing
    assert len(server.states) - before <= 4 * CLIPS


def test_book_names_every_job_that_may_come_back(tmp_path: Path) -> None:
    book = JobBook(tmp_path)
    book.put("clip", Job("new", "host", "digest", False, 12.5, ("old", "older")))
    assert JobBook(tmp_path).get("clip") == book.get("clip")
    book.path.write_text(json.dumps({"clip": {"id": "one", "host": "host", "digest": "digest", "verify": True}}))
    assert JobBook(tmp_path).get("clip") == Job("one", "host", "digest", True)  # as written before there were copies
