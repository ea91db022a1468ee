"""A small NDIF on loopback: nnsight 0.8's wire protocol, and nnsight's own functions to read and run what arrives.

    POST /request            multipart: `data`, the JSON envelope, and `blob`, the block -> {"id", "status": "RECEIVED"}
    GET  /response/<id>      the latest status; 404 before the first one and for ids nobody knows
    GET  /result/<id>        what the block saved, as the COMPLETED response's URL says
    POST /control            for tests: {"strict", "hold", "key", "refuse", "fail", "minimum"}, those that are to hold
                             from now on; `hold`: so many blocks are run, the others wait
    GET  /counts             for tests: requests by status, in the order of arrival

`strict` refuses what NDIF refuses from keys that are not trusted, where a block runs apart from the weights: traces of
submodules, `stop` in a session, gradients, and batching by a class of the client's.

This package is hidden from the process, as it is not installed on NDIF either. One thread runs all blocks, because a
model may not be entered from two. Started as a process of its own; prints its port.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import queue
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import offline  # noqa: F401  (before the libraries that read it)
import torch
import zstandard
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.tracer import InterleavingTracer
from nnsight.modeling import huggingface
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc

torch.set_num_threads(1)


class Refused(Exception):
    """An HTTP error, with the sentence NDIF gives."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Cluster:
    """The models, the queue, and what became of every request."""

    def __init__(self) -> None:
        self.control: dict[str, Any] = {}
        self.responses: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.models: dict[str, Remotable] = {}
        self.jobs: queue.Queue[tuple[str, RequestModel, bytes]] = queue.Queue()
        self.left = sys.maxsize

    def set(self, control: dict[str, Any]) -> None:
        self.control = control
        self.left = control.get("hold", sys.maxsize)

    def accept(self, headers: Any, data: str, blob: bytes) -> dict[str, Any]:
        if (refusal := self.control.get("refuse")) and refusal["times"] > 0:
            refusal["times"] -= 1
            raise Refused(refusal["status"], refusal["detail"])
        key = headers.get("ndif-api-key")
        if (wanted := self.control.get("key")) is not None:
            if not key:
                raise Refused(
                    401, "Missing or invalid API key. Please visit https://login.ndif.us/ to create a new one."
                )
            if "-" not in key:  # NDIF's own sentence repeats the key
                raise Refused(400, f"Invalid API key format: '{key}'. API keys must be in the format: xxxxxxxx-...")
            if key != wanted:
                raise Refused(403, "Invalid API key.")
        if minimum := self.control.get("minimum"):
            raise Refused(
                400,
                f"Client nnsight version {headers['nnsight-version']} is below the minimum supported {minimum}. Please "
                "`pip install --upgrade nnsight`.",
            )
        id = str(uuid.uuid4())
        self.responses[id] = {"id": id, "status": "QUEUED", "description": "Your job is in the queue."}
        self.jobs.put((id, RequestModel.model_validate_json(data), blob))
        return {"id": id, "status": "RECEIVED", "description": "Your job has been received."}

    def run_forever(self, url: str) -> None:
        while True:
            id, request, blob = self.jobs.get()
            while not self.left:
                time.sleep(0.01)
            self.left -= 1
            self.responses[id] |= {"status": "RUNNING", "description": "Your job has started running."}
            try:
                self.results[id] = self.run(request, blob)
                self.responses[id] |= {"status": "COMPLETED", "description": "", "data": f"{url}/result/{id}"}
            except Exception as error:
                self.responses[id] |= {"status": "ERROR", "description": _described(error)}

    def run(self, request: RequestModel, blob: bytes) -> bytes:
        if (failure := self.control.get("fail")) and failure["times"] > 0:
            failure["times"] -= 1
            raise RuntimeError(failure["text"])
        model = self.model(request.model_key)
        BLOCKS.clear()  # keyed by file and line: another client's block may stand at the same place
        SOURCES.clear()
        model._remoteable_set_env(request.env)
        tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=request.compress)
        guard = strictly(model, tracer) if self.control.get("strict") else contextlib.nullcontext()
        inc()
        try:
            with guard:
                tracer.execute(tracer.info.code)
            saves = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        finally:
            dec()
        buffer = io.BytesIO()
        torch.save(saves, buffer)
        return zstandard.ZstdCompressor().compress(buffer.getvalue()) if request.compress else buffer.getvalue()

    def model(self, key: str) -> Remotable:
        if key not in self.models:
            repository = json.loads(key.partition(":")[2])["repo_id"]
            huggingface._ID_CACHE[repository] = repository
            try:
                self.models[key] = Remotable.from_model_key(key, dispatch=True, dtype=torch.float32)
            except Exception as error:
                raise NotDeployed(f"Model {repository} is not deployed and could not be: {error}") from error
        return self.models[key]


class NotDeployed(Exception):
    """A model this cluster does not have."""


def _described(error: Exception) -> str:
    if isinstance(error, NotDeployed):
        return str(error)
    if isinstance(error, (ModuleNotFoundError, AttributeError)) and error.__traceback__:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if "pickle" in last or "serialization" in last:
            return f"Your request payload could not be read ({type(error).__name__}: {error})."
    return "".join(traceback.format_exception(error))


@contextlib.contextmanager
def strictly(model: Remotable, tracer: Any) -> Iterator[None]:
    """Refuse what NDIF's sandbox cannot do, with the exceptions it raises."""
    for value in tracer.info.frame.f_locals.values():
        if isinstance(value, Remotable) and type(value)._batch is not type(model)._batch:
            raise NotImplementedError("Can't batch these inputs")
    trace, stop = Envoy.trace, InterleavingTracer.stop
    stopped = False

    def guarded_trace(self: Envoy, *inputs: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Remotable):
            raise OutOfOrderError(f"'{self.path}.output' was requested but the model already ran past it")
        if stopped:
            raise BrokenPipeError(32, "Broken pipe")
        return trace(self, *inputs, **kwargs)

    def guarded_stop(self: Any) -> Any:
        nonlocal stopped
        stopped = True
        return stop(self)

    def no_gradients(self: Any, *arguments: Any, **kwargs: Any) -> None:
        raise OutOfOrderError("gradients were requested but the weights are elsewhere")

    with (
        mock.patch.object(Envoy, "trace", guarded_trace),
        mock.patch.object(InterleavingTracer, "stop", guarded_stop),
        mock.patch.object(torch.Tensor, "backward", no_gradients),
    ):
        yield


class Handler(BaseHTTPRequestHandler):
    """One HTTP request."""

    cluster: Cluster

    def do_GET(self) -> None:
        kind, _, id = self.path.strip("/").partition("/")
        if kind == "response" and id in self.cluster.responses:
            self.reply(200, self.cluster.responses[id])
        elif kind == "result" and id in self.cluster.results:
            self.send(200, "application/octet-stream", self.cluster.results[id])
        elif kind == "counts":
            self.reply(200, {"requests": [response["status"] for response in self.cluster.responses.values()]})
        else:
            self.reply(404, {"detail": f"No response for request {id}."})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/control":
            self.cluster.set(json.loads(body))
            self.reply(200, {})
            return
        form = BytesParser(policy=HTTP).parsebytes(
            b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
        )
        fields = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        data, blob = (fields[name].get_payload(decode=True) for name in ("data", "blob"))
        try:
            self.reply(200, self.cluster.accept(self.headers, data.decode(), blob))
        except Refused as refusal:
            self.reply(refusal.status, {"detail": refusal.detail})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        self.send(status, "application/json", json.dumps(content).encode())

    def send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing; errors go to the client."""


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    sys.modules["lalm_patch"] = None  # type: ignore[assignment]
    Handler.cluster = Cluster()
    server = ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    Handler.cluster.run_forever(url)  # the main thread: where nnsight runs blocks


if __name__ == "__main__":
    main()
