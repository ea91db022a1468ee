"""Jobs on an NDIF server: send, ask, understand what went wrong. Nothing here waits for a result.

The key is read from the environment for every request and taken out of every sentence that comes back: a server may
repeat what it was sent, and NDIF does when it refuses a key.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
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
LONGEST_WAIT = 60.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_MAY_PASS = ("preempted", "Critical server error", "reconnecting", "truncated or corrupted in transit")


class JobLost(Exception):
    """The server ended a job for reasons of its own: the same request may succeed."""


class _Passing(Exception):
    """What may go by itself."""


class JobFailed(HostError):
    """A job ended in an error that it would end in again."""


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
        self.host = refuse_what_cannot_go(model, backend)
        checkpoint = find_checkpoint(model, weights=False)
        name = str(checkpoint.folder.resolve()) if checkpoint.local else model.id
        # The meta device: the wrapper says which modules there are, the server has the weights.
        self._model = TransformersModel(
            lalm.module, task=lalm.family.hosted_task, processor=lalm.family.processor, device="meta"
        )
        self._model.repo_id, self._model.revision = name, model.revision
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

    def ask(self, job: str) -> tuple[str | None, dict[str, Any] | None]:
        """State of a job (None: the server knows nothing of it), and what it saved once it is done.

        Raises:
            JobLost: the server gave the job up.
            HostError: the job failed, or the server cannot be reached after all retries.
        """

        def look() -> tuple[str | None, dict[str, Any] | None]:
            backend = self._backend(job)
            saved = backend.poll()
            return (None if backend.status is None else str(backend.status.value)), saved

        return self._patiently(look)

    def answer(self, request: ClipRequest, saved: dict[str, Any]) -> ClipAnswer:
        """What a finished job saved, checked against the request.

        Raises:
            HostError: the server did something else than it was sent.
        """
        return read_answer(request, saved["result"])

    def _backend(self, job: str | None = None) -> Any:
        backend = RemoteBackend(
            self.model_key, host=self.host, env=self._environment, blocking=False, job_id=job, api_key=_key()
        )
        backend.api_key = _key()  # not one that nnsight's own settings file may hold
        backend.display = StatusDisplay(enabled=False)
        return backend

    def _patiently(self, call: Callable[[], T]) -> T:
        """Do it, again where the reason may pass."""
        wait = self.settings.poll_seconds
        for tries_left in range(self.settings.retries, -1, -1):
            failure: Exception
            try:
                return call()
            except (RemoteError, httpx.HTTPError) as error:
                failure = error
            # Outside of the handler: what is raised from here carries no text of the server's along.
            problem = self._explained(failure)
            if not isinstance(problem, _Passing):
                raise problem
            if not tries_left:
                raise HostError(
                    f"{problem}. Tried {self.settings.retries + 1} times. Finished samples are kept, jobs already sent "
                    "stay there, and the same command goes on with them."
                )
            log.warning("%s; trying again in %.3g s", problem, wait)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable")

    def _explained(self, failure: Exception) -> Exception:
        """What to raise, or a `_Passing`."""
        cause = failure if isinstance(failure, httpx.HTTPError) else failure.__cause__
        text = redacted(str(failure).removeprefix("Failed to send request: ").strip())
        if isinstance(cause, httpx.HTTPStatusError):
            return self._refusal(cause, text)
        if isinstance(cause, httpx.HTTPError):
            return _Passing(f"{self.host} cannot be reached ({text or type(cause).__name__})")
        if any(passing in text for passing in _MAY_PASS):
            return JobLost(text)
        return JobFailed(self._failed_job(text))

    def _refusal(self, failure: httpx.HTTPStatusError, text: str) -> Exception:
        status, place = failure.response.status_code, failure.request.url.path
        if status in _BUSY:
            return _Passing(f"{self.host} cannot take or show jobs now ({status}: {text})")
        if not place.endswith("/request") and "/response/" not in place:
            return JobLost(f"its result cannot be fetched any more ({status})")
        if status in (401, 403) or "API key" in text:
            state = "is refused" if _key() else "is not set"
            return HostError(f"{self.host} wants a key, and the one in {KEY_VARIABLE} {state}: {text}")
        if "version" in text:
            return HostError(f"{self.host} and this machine have versions that do not go together: {text}")
        if status in (404, 405):
            return HostError(f"{self.host} is no NDIF server ({status}); set backend.host")
        return HostError(f"{self.host} refused the request ({status}): {text}")

    def _failed_job(self, text: str) -> str:
        last = text.splitlines()[-1] if text else "no reason given"
        if "payload could not be read" in text or "architecture on this server" in text:
            return (
                f"{self.host} cannot read what nnsight {version('nnsight')} and transformers "
                f"{version('transformers')} send; use the versions that are there: {text}"
            )
        if "deploy" in text.lower() or "Repository Not Found" in text:
            return f"{self.host} does not have the model {self.model_key.partition(':')[2]}: {text}"
        if "OutOfMemory" in text or "out of memory" in text:
            return f"{self.host} ran out of memory; give a smaller engine.pack_tokens: {last}"
        if last != text:
            log.warning("what %s says about the failed job:\n%s", self.host, text)
        return f"the job failed on {self.host}: {last}"


def refuse_what_cannot_go(model: ModelSettings, backend: BackendSettings) -> str:
    """The server's URL, if the run can be sent there: asked before anything is fetched, opened or sent.

    Raises:
        ConfigError: no usable address, or no key for the public NDIF.
        ModelError: a model that a server cannot have.
    """
    host = _host(backend.host)
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
