"""Jobs on an NDIF server: send, ask, understand what went wrong. Nothing here waits for a result.

The key is read from the environment for every request and taken out of every sentence that comes back: a server may
repeat what it was sent, and NDIF does when it refuses a key.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from nnsight.intervention.backends.display import StatusDisplay
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.modeling import huggingface
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.config import CONFIG
from nnsight.schema.response import Status
from pydantic import ValidationError
from zstandard import ZstdError

from lalm_patch.engine.ndif_faults import essence, looks_like_a_web_page, understand
from lalm_patch.engine.remote_session import ClipAnswer, ClipRequest, read_answer, send_session
from lalm_patch.errors import ConfigError, HostError, ModelError
from lalm_patch.models import FAMILIES, LALM
from lalm_patch.models.checkpoint import BUNDLED, find_checkpoint
from lalm_patch.settings import BackendSettings, ModelSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

KEY_VARIABLE = "NDIF_API_KEY"
PUBLIC_HOST = "https://api.ndif.us"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GOES_ON = "Finished samples are kept, jobs already sent stay there, and the same command goes on with them"
_BUSY = (408, 425, 429, 500, 502, 503, 504, *range(520, 531))  # the last ones are a proxy's, about the server behind it


class JobLost(Exception):
    """A job is gone for reasons of the server's own: the same request may succeed, later.

    Its text is the rest of a sentence that begins with the server.
    """


class _Passing(Exception):
    """What may go by itself."""


class JobFailed(HostError):
    """A job ended in an error that it would end in again, or too many jobs for one clip were lost."""


@dataclass(frozen=True)
class Report:
    """What a server says about a job.

    Attributes:
        status: NDIF's word for it in capitals; empty if the server knows nothing of the job.
        description: the sentence beside it.
        saved: what the job saved, once it is done.
    """

    status: str
    description: str
    saved: dict[str, Any] | None


class _Backend(RemoteBackend):  # type: ignore[misc]
    """nnsight's, which tells neither what the server says beside a status nor what is wrong with a result."""

    description = ""

    def note(self, response: Any) -> bool:
        self.description = response.description or ""
        return bool(super().note(response))

    def finalize(self, content: bytes) -> Any:
        try:
            return super().finalize(content)
        except (ZstdError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise JobLost(f"sent a damaged result ({type(error).__name__})") from None


class NdifEngine:
    """The model on a server, as jobs; one per clip.

    Args:
        lalm: the model as an outline, without weights.
        model: its settings.
        backend: where, and how patient to be.

    Raises:
        ConfigError: no usable address, or no key for the public NDIF.
        ModelError: a model that a server cannot have.
    """

    name = "ndif"

    def __init__(self, lalm: LALM, model: ModelSettings, backend: BackendSettings) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs one line per look at a job
        self.settings = backend
        self.last_outage = float("-inf")
        self._has_answered = False
        self.host = refuse_what_cannot_go(model, backend)
        checkpoint = find_checkpoint(model, weights=False)
        name = str(checkpoint.folder.resolve()) if checkpoint.local else model.id
        # The meta device: the wrapper says which modules there are, the server has the weights.
        self._model = TransformersModel(
            lalm.module, task=lalm.family.hosted_task, processor=lalm.family.processor, device="meta"
        )
        # A folder's revision is a fingerprint that was compared here; servers know branches, tags and commits.
        self._model.repo_id, self._model.revision = name, None if checkpoint.local else model.revision
        huggingface._ID_CACHE.setdefault(name, name)  # otherwise nnsight asks the hub how the id is spelled
        self.model_key: str = self._model.to_model_key()
        self._decoder = _descend(self._model, lalm.decoder_path)
        self._environment = {**self._model._remoteable_get_env(), "attn_implementation": model.attn_implementation}

    # --- jobs --------------------------------------------------------------------------------------------------

    def submit(self, request: ClipRequest) -> str:
        """Send one clip; returns the job's id at once.

        Raises:
            HostError: the server cannot be reached after all retries, or refuses.
        """

        def send() -> str:
            backend = self._backend()
            send_session(self._model, self._decoder, request, backend)
            return str(backend.job_id)

        return self._patiently(send)

    def ask(self, job: str) -> Report:
        """What became of a job.

        Raises:
            JobLost: the server gave the job up, or its result cannot be had.
            JobFailed: the job failed, and would again.
            HostError: the server cannot be reached after all retries, or refuses.
        """

        def look() -> Report:
            backend = self._backend(job)
            saved = backend.poll()
            if backend.status == Status.COMPLETED and not isinstance(saved, dict):
                raise JobLost("says that it is done, and has no result")
            return Report("" if backend.status is None else str(backend.status.value), backend.description, saved)

        return self._patiently(look)

    def answer(self, request: ClipRequest, saved: dict[str, Any]) -> ClipAnswer:
        """What a finished job saved, checked against the request.

        Raises:
            HostError: the server did something else than it was sent.
        """
        if "result" not in saved:
            raise HostError(f"{self.host} sent back {sorted(saved)} where `result` was asked for")
        return read_answer(request, saved["result"])

    def _backend(self, job: str | None = None) -> Any:
        backend = _Backend(
            self.model_key, host=self.host, env=self._environment, blocking=False, job_id=job, api_key=_key()
        )
        backend.api_key = _key()  # not one that nnsight's own settings file may hold
        backend.display = StatusDisplay(enabled=False)
        return backend

    def _patiently(self, call: Callable[[], T]) -> T:
        """Do it, again where the reason may pass."""
        for failures in range(1, self.settings.retries + 2):
            failure: Exception
            try:
                result = call()
            except (RemoteError, httpx.HTTPError, httpx.InvalidURL, ValidationError) as error:
                failure = error
            else:
                self._has_answered = True
                return result
            # Outside of the handler: what is raised from here carries no text of the server's along.
            problem = self._explained(failure)
            if not isinstance(problem, _Passing):
                raise problem
            self.last_outage = time.monotonic()
            if failures > self.settings.retries:
                raise HostError(f"{problem}. Tried {failures} times. {GOES_ON}.")
            wait = pause(failures, self.settings)
            log.warning("%s; trying again in %.3g s", problem, wait)
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _explained(self, failure: Exception) -> Exception:
        """What to raise, or a `_Passing`."""
        if isinstance(failure, (ValidationError, httpx.InvalidURL)):
            return HostError(f"{self.host} answers, but not as NDIF does; set backend.host to an NDIF server's URL")
        cause = failure if isinstance(failure, httpx.HTTPError) else failure.__cause__
        text = redacted(str(failure).removeprefix("Failed to send request: ").strip())
        if isinstance(cause, httpx.HTTPStatusError):
            return self._refusal(cause, text)
        if isinstance(cause, httpx.HTTPError):
            asked = _url_of(cause)
            if asked is None or _origin(asked) == _origin(httpx.URL(self.host)):
                return _Passing(f"{self.host} cannot be reached ({text or type(cause).__name__})")
            return _Passing(
                f"the results of {self.host} are at {_origin(asked)}, which cannot be reached from here "
                f"({text or type(cause).__name__})"
            )
        fault = understand(text, self._model_named(), _versions())
        log.debug("what %s says about the failed job:\n%s", self.host, text)
        return JobLost(fault.reason) if fault.passes else JobFailed(f"{self.host} {fault.reason}. {GOES_ON}.")

    def _model_named(self) -> str:
        key = json.loads(self.model_key.partition(":")[2])
        return str(key["repo_id"]) + (f" at revision {key['revision']}" if key["revision"] else "")

    def _refusal(self, failure: httpx.HTTPStatusError, text: str) -> Exception:
        status, url = failure.response.status_code, failure.request.url
        if not url.path.endswith("/request") and "/response/" not in url.path:
            if status in _BUSY:
                return _Passing(f"{_origin(url)}, where {self.host} has its results, is busy ({status})")
            return JobLost(f"has its result no more ({status})")
        if looks_like_a_web_page(text):
            if status == 500 and not self._has_answered:
                return HostError(f"{self.host} answers with a web page (500): it is no NDIF server; set backend.host")
            text = "with a web page instead of a reason"
        said = essence(text)
        if status in _BUSY:
            return _Passing(f"{self.host} cannot take or show jobs now ({status}: {said})")
        if 300 <= status < 400:
            place = redacted(failure.response.headers.get("location", "elsewhere")).removesuffix(url.path)
            return HostError(f"{self.host} redirects to {place} ({status}); set backend.host to the server's own URL")
        if status == 413:
            return HostError(f"{self.host} takes no requests as large as a clip's (413); ask its operator")
        if status in (401, 403) or "API key" in text:
            state = "is refused" if _key() else "is not set"
            return HostError(f"{self.host} wants a key, and the one in {KEY_VARIABLE} {state}: {said}")
        if status == 422 or "version" in text:
            return HostError(f"{self.host} and this machine have versions that do not go together: {said}")
        if status in (404, 405):
            return HostError(f"{self.host} is no NDIF server ({status}); set backend.host")
        return HostError(f"{self.host} refused the request ({status}): {said}")


def pause(failures: int, settings: BackendSettings) -> float:
    """Seconds to wait after so many failures in a row: twice as long each time, up to a limit."""
    return float(min(settings.pause_seconds * 2 ** min(failures - 1, 32), settings.longest_pause_seconds))


def _versions() -> str:
    return f"nnsight {version('nnsight')} and transformers {version('transformers')}"


def _url_of(failure: httpx.HTTPError) -> httpx.URL | None:
    try:
        return failure.request.url
    except RuntimeError:  # httpx: no request was made yet
        return None


def _origin(url: httpx.URL) -> str:
    """Scheme, host and port: a result's whole URL is a licence to fetch it."""
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{url.host}{port}"


def refuse_what_cannot_go(model: ModelSettings, backend: BackendSettings) -> str:
    """The server's URL, if the run can be sent there: asked before anything is fetched, opened or sent.

    Raises:
        ConfigError: no usable address, or no key for the public NDIF.
        ModelError: a model that a server cannot have.
    """
    host = _host(backend.host)
    for name in ("max_jobs", "poll_seconds", "forget_seconds", "stale_seconds", "pause_seconds"):
        if not getattr(backend, name) > 0:
            raise ConfigError(f"backend.{name}={getattr(backend, name)}: expected a number above 0")
    if backend.retries < 0 or not backend.longest_pause_seconds >= backend.pause_seconds:
        raise ConfigError(
            f"backend: expected retries of 0 or more and longest_pause_seconds of at least pause_seconds; got "
            f"{backend.retries}, {backend.longest_pause_seconds} and {backend.pause_seconds}"
        )
    if not _key().isascii() or not _key().isprintable():
        raise ConfigError(f"{KEY_VARIABLE}: a key has only letters, digits and signs of ASCII; copy it once more")
    family = FAMILIES.get(model.family)
    if family is not None and family.hosted_task is None:
        raise ModelError(
            f"backend=ndif: {model.name} cannot run on a server that has transformers alone: family {model.family!r} "
            "needs this package to open or run it; use backend=local"
        )
    if urlsplit(host).hostname not in LOOPBACK and (model.id in BUNDLED or Path(model.id).expanduser().is_dir()):
        raise ModelError(
            f"backend=ndif: model.id={model.id} is a folder of this machine, which {host} cannot open; give the hub id "
            "of a model that is deployed there, or use backend=local"
        )
    if host == PUBLIC_HOST and not _key():
        raise ConfigError(
            f"backend=ndif: no key for {host}; get one at https://login.ndif.us and put it into the environment: "
            f"export {KEY_VARIABLE}=..."
        )
    return host


def redacted(text: str) -> str:
    """The text without the key."""
    key = _key()
    return text.replace(key, f"[{KEY_VARIABLE}]") if key else text


def _key() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def _host(setting: str | None) -> str:
    host = (setting or os.environ.get("NDIF_HOST") or CONFIG.API.HOST).rstrip("/")
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"backend.host={host}: expected a URL like {PUBLIC_HOST}")
    if parts.username or parts.password:
        raise ConfigError(
            f"backend.host: expected a URL without user name and password, which would be stored with the result; "
            f"the key comes from the environment, {KEY_VARIABLE}"
        )
    return host


def _descend(envoy: Any, path: str) -> Any:
    for part in path.split("."):
        envoy = getattr(envoy, part)
    return envoy
