"""What goes wrong on a server and between it and here: waited for, sent again, or said in one sentence.

The sentences are those of `ndif` 0.1.2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from ndif_runs import Server, assert_whole, in_background, remote, result, wait_for

import lalm_patch
from lalm_patch.engine import ndif
from lalm_patch.errors import CheckError, ConfigError, HostError
from lalm_patch.tracing import remote as remote_tracing

CLIPS = 3
PASSING = [
    "Error submitting request to model deployment. Please try again later. Sorry for the inconvenience.",
    "Replica was evicted while processing your request. Sorry for the inconvenience. Please try again later.",
    "Error provisioning model. Please try again later. Sorry for the inconvenience.",
    "Error starting model. Please try again later. Sorry for the inconvenience.",
    "Critical server error occurred. Please try again later. Sorry for the inconvenience.",
    "Your job was cancelled or preempted by the server.",
    "Could not deploy this model. CANT_ACCOMMODATE: placed 0 of 1 new replicas",
    "Your request payload could not be read (ZstdError: bad block). It may be truncated or corrupted in transit, or "
    "compressed differently than the request declared. Re-sending it usually resolves this.",
]
FRAMES = "".join(
    f'  File "/usr/lib/ndif/services/ray/sandbox/driver.py", line {line}, in pump\n    values = connection.recv()\n'
    "             ^^^^^^^^^^^^^^^^^\n"
    for line in range(300, 324)
)
TRACEBACK = "Traceback (most recent call last):\n" + FRAMES
RUNNER_KILLED = TRACEBACK + "ConnectionResetError: [Errno 104] Connection reset by peer\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>500 Internal Server Error</title></head>" + "<p>nothing here</p>" * 200


# --- faults that pass ------------------------------------------------------------------------------------------


def test_faults_that_pass(
    server: Server,
    tiny: tuple[str, ...],
    computed_here: xr.Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = len(server.states)
    texts = [*PASSING, RUNNER_KILLED]
    server.control(say={"times": len(texts), "texts": texts})
    dataset = result(*tiny, f"outputs={tmp_path}", *remote(server, "backend.retries=9", "backend.max_jobs=1"))
    assert_whole(dataset, computed_here)
    assert sorted(server.states[before:]) == ["COMPLETED"] * CLIPS + ["ERROR"] * len(texts)
    pauses = [float(pause) for pause in re.findall(r"sent again in ([\d.]+) s", caplog.text)]
    assert pauses[:4] == [0.02, 0.04, 0.08, 0.16]
    assert "  File" not in caplog.text


def test_pauses_have_limits() -> None:
    """Doubled, and at most `longest_pause_seconds`: by default about five minutes in all."""
    settings = ndif.BackendSettings("ndif")
    pauses = [ndif.pause(failures, settings) for failures in range(1, settings.retries + 1)]
    assert pauses == [5, 10, 20, 40, 60, 60, 60, 60]


@pytest.mark.parametrize("fault", ["empty", "damage"])
def test_results_that_cannot_be_used(
    fault: str, server: Server, tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path
) -> None:
    server.control(**{fault: {"times": 1}})
    assert_whole(result(*tiny, f"outputs={tmp_path}", *remote(server)), computed_here)


@pytest.mark.parametrize("status", [502, 503, 524])
def test_proxy_in_front_of_a_server(
    status: int, server: Server, tiny: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A page of the proxy's is not shown, and passes."""
    server.control(page={"times": 2, "status": status, "text": PAGE})
    what = (*tiny, "data.limit=1", f"outputs={tmp_path}", *remote(server, "backend.retries=3"))
    assert result(*what).sizes["sample"] == 1
    assert f"{status}: with a web page" in caplog.text
    assert "nothing here" not in caplog.text


# --- failures of a former process ------------------------------------------------------------------------------


def test_old_failures_are_no_failures(
    server: Server, tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path
) -> None:
    """When the cause is gone, the same command succeeds at once; while it lasts, each old job is sent once more."""
    what = (*tiny, f"outputs={tmp_path}", *remote(server, "backend.max_jobs=3"))
    first = len(server.states)
    for _ in range(2):
        before = len(server.states)
        server.control(say={"times": 99, "texts": [TRACEBACK + "ValueError: broken for now\n"]})
        with pytest.raises(HostError, match=r"could not run the job: ValueError: broken for now\. Finished"):
            lalm_patch.trace(*what)
        assert len(server.states) - before <= CLIPS
        wait_for(lambda: "QUEUED" not in server.states[first:])
    server.control()
    assert_whole(result(*what), computed_here)


def test_old_wrong_answers_are_not_taken_again(
    server: Server, tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that computed wrongly and was mended: its old answers are still there, and still wrong."""
    real = ndif.send_session

    def shifted(model: Any, decoder: Any, request: Any, backend: Any) -> None:
        class Shifted(type(request)):  # type: ignore[misc]
            @property
            def passes(self) -> Any:
                return [(rows, [(layer, where[::-1], what) for layer, where, what in w]) for rows, w in super().passes]

        real(model, decoder, Shifted(**vars(request)), backend)

    before = len(server.states)
    monkeypatch.setattr(ndif, "send_session", shifted)
    what = (*tiny, "granularity=token", f"outputs={tmp_path / 'there'}", *remote(server, "backend.max_jobs=3"))
    with pytest.raises(CheckError):
        lalm_patch.trace(*what)
    wait_for(lambda: set(server.states[before:]) == {"COMPLETED"})
    monkeypatch.undo()
    here = result(*tiny, "granularity=token", f"outputs={tmp_path / 'here'}")
    assert_whole(result(*what), here)


# --- what is said ----------------------------------------------------------------------------------------------


def test_killed_runner_in_one_sentence(
    server: Server, tiny: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.control(say={"times": 99, "texts": [RUNNER_KILLED]})
    with pytest.raises(HostError, match=r"Connection reset by peer.*the same command goes on") as caught:
        lalm_patch.trace(*tiny, f"outputs={tmp_path}", *remote(server))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "  File" not in caplog.text + str(caught.getrepr())


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"status": 500, "text": PAGE}, "answers with a web page"),
        ({"status": 200, "text": PAGE}, "answers, but not as NDIF does"),
        ({"status": 200, "text": '{"hello": "world"}'}, "answers, but not as NDIF does"),
        ({"status": 404, "text": PAGE}, "is no NDIF server"),
        ({"status": 413, "text": PAGE}, "no requests as large"),
        (
            {"status": 301, "text": PAGE, "headers": {"Location": "https://ndif.example/request"}},
            "redirects to https://ndif.example .*set backend.host",
        ),
        ({"status": 422, "text": '{"detail": [{"type": "missing", "loc": ["body"]}]}'}, "do not go together"),
    ],
)
def test_hosts_that_are_no_ndif(
    page: dict[str, Any],
    message: str,
    server: Server,
    tiny: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One short sentence, at the first answer."""
    server.control(page={"times": 99, **page})
    with pytest.raises(HostError, match=message) as caught:
        lalm_patch.trace(*tiny, f"outputs={tmp_path}", *remote(server, "backend.retries=6"))
    assert len(str(caught.value)) < 250
    assert "<" not in str(caught.getrepr()).split("HostError:")[-1] + caplog.text


def test_progress_always_says_something(
    server: Server, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of jobs that were picked up, that wait to be sent again, and when the last one is done."""
    notes: list[str] = []
    monkeypatch.setattr(remote_tracing.Progress, "note", lambda self, text: notes.append(text))
    what = (*tiny, f"outputs={tmp_path}", *remote(server, "backend.retries=0"))
    server.control(hold=0)
    page = {"times": 99, "status": 502, "text": PAGE}
    stopped = in_background(lambda: (wait_for(lambda: len(notes) > 1), server.control(hold=0, page=page)))
    with pytest.raises(HostError):
        lalm_patch.trace(*what)
    stopped.join()
    server.control(say={"times": CLIPS + 1, "texts": PASSING[:1]})
    result(*what, "backend.retries=3")
    assert len(notes) > 3
    assert [note for note in notes if not re.fullmatch(r"\d+ [a-z ]+(, \d+ [a-z ]+)*", note)] == []
    assert any("waiting to be sent again" in note for note in notes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backend.max_jobs=0", "backend.max_jobs=0: expected a whole number from 1"),
        ("backend.stale_seconds=-1", "stale_seconds"),
        ("backend.pause_seconds=nan", "pause_seconds"),
        ("backend.retries=-1", "backend.retries=-1: expected a whole number from 0"),
        ("backend.longest_pause_seconds=1", "at least pause_seconds"),
    ],
)
def test_settings_that_cannot_work(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        lalm_patch.trace("backend=ndif", "backend.host=http://127.0.0.1:9", override, f"outputs={tmp_path}")


def test_key_that_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", "schlüssel-hunter2")
    with pytest.raises(ConfigError, match="signs of ASCII") as caught:
        lalm_patch.trace("backend=ndif", "backend.host=http://127.0.0.1:9", f"outputs={tmp_path}")
    assert "hunter2" not in str(caught.value)


DEPLOY = "Could not deploy this model. "
UNDERSTOOD: list[tuple[str, bool, str]] = [
    *((text, True, "") for text in PASSING),
    (RUNNER_KILLED, True, r"gave the job up: ConnectionResetError: \[Errno 104\] Connection reset by peer"),
    (TRACEBACK + "RuntimeError: runner process exited before its socket was ready", True, ""),
    (TRACEBACK + "ndif.services.ray.tp.common.RanksDiverged: peer 1 dropped", True, ""),
    (TRACEBACK + "botocore.exceptions.EndpointConnectionError: Could not connect to the endpoint", True, ""),
    (TRACEBACK + "redis.exceptions.ConnectionError: Error 111", True, ""),
    (TRACEBACK + "greenlet.error: Cannot switch to a different thread", True, ""),
    (TRACEBACK + "RuntimeError: CUDA error: device-side assert triggered\nCompile with X", True, "assert triggered$"),
    (DEPLOY + "HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded\n", True, "cannot fetch"),
    (DEPLOY + "No GPU nodes available.", True, "no room"),
    (TRACEBACK + "torch.OutOfMemoryError: CUDA out of memory.", False, "engine.pack_tokens"),
    (TRACEBACK + "torch.OutOfMemoryError: CUDA out of memory. Please try again later", False, "engine.pack_tokens"),
    (TRACEBACK + "ValueError: Please try again later", False, "could not run the job: ValueError"),
    (TRACEBACK + "IndexError: index 9 is out of range\n\nDuring handling of the above exception, another exception "
     "occurred:\n\n" + TRACEBACK + "KeyError: 'x'", False, "KeyError: 'x'$"),
    (TRACEBACK, False, "cut off"),
    ("Your job exceeded the execution timeout of 60.0s.", False, "after 60.0 s.*coarser granularity"),
    ("Request cancelled by operator.", False, "operator cancelled"),
    ("Your request payload could not be read (ModuleNotFoundError: No module named 'x'). It may be truncated or "
     "corrupted in transit", False, "cannot read what nnsight 0.8 send; use the versions"),
    ("The model architecture on this server doesn't match the one your code was traced against: it has no module at "
     "'model.x'.\n\nThis usually means ...", False, "cannot read what nnsight 0.8.*'model.x'$"),
    (DEPLOY + "404 Client Error. Repository Not Found for url: https://huggingface.co/api/models/a/b.\nPlease make "
     "sure\n" + TRACEBACK[:900] + "…", False, "does not have the model a/b and cannot deploy it: 404 Client Error"),
    (DEPLOY + "Remotable.describe_checkpoint() got an unexpected keyword argument 'trust_remote_code'\n" + TRACEBACK,
     False, "on demand.*ask its operator to deploy a/b first"),
    (DEPLOY + "You are trying to access a gated repo.\n" + TRACEBACK, False, "gated repo$"),
    ("", False, "no reason given"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "passes", "reason"), UNDERSTOOD)
def test_what_a_server_means(text: str, passes: bool, reason: str) -> None:
    fault = ndif.understand(text, "a/b", "nnsight 0.8")
    assert fault.passes is passes
    assert re.search(reason, fault.reason)
    assert "\n" not in fault.reason
    assert "  File" not in fault.reason
    assert len(fault.reason) < 500
