"""A small NDIF on loopback: nnsight 0.8's wire protocol, and nnsight's own functions to read and run what arrives.

    POST /request            multipart: `data`, the JSON envelope, and `blob`, the block -> {"id", "status": "RECEIVED"}
    GET  /response/<id>      the latest status; 404 before the first one and for ids nobody knows
    GET  /result/<id>        what the block saved, as the COMPLETED response's URL says
    POST /control            for tests: those of `Cluster.control` that are to hold from now on
    GET  /counts             for tests: requests by status, in the order of arrival

What it says about jobs, and results, lie in the folder `--store`, as NDIF's lie in an object store: they are there
again when it is started again. The queue is in memory, as NDIF's is in Redis and its dispatcher: jobs that were in it
are lost, and `/response/<id>` goes on to say that they are queued.

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
from pathlib import Path
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
    """The models, the queue, and what became of every request.

    Attributes:
        control: what tests want: `strict`; `hold`: so many blocks are run, the others wait; `key`: the only one that is
            taken; `minimum` version of nnsight; and, each for so many `times`, `refuse` (a request with `status` and
            `detail`), `slow` (a block takes `seconds` more), `fail` (a block raises `text`), `say` (a job ends in one
            of the sentences `texts`), `lose` (a job is received and not queued), `empty` (a job is done and has no
            result), `damage` (a result is cut) and `page` (any answer is `text` with `status`, for browsers).
    """

    def __init__(self, store: Path) -> None:
        self.control: dict[str, Any] = {}
        self.store = store
        self.models: dict[str, Remotable] = {}
        self.jobs: queue.Queue[tuple[str, RequestModel, bytes]] = queue.Queue()
        self.left = sys.maxsize

    def set(self, control: dict[str, Any]) -> None:
        self.control = control
        self.left = control.get("hold", sys.maxsize)

    def next(self, name: str) -> dict[str, Any] | None:
        """What is to go wrong now, if anything."""
        fault = self.control.get(name)
        if not fault or not fault["times"]:
            return None
        fault["times"] -= 1
        return dict(fault)

    def respond(self, id: str, status: str, description: str, **more: Any) -> dict[str, Any]:
        """Say something about a job; only the last word is kept."""
        response = {"id": id, "status": status, "description": description, **more}
        part = self.store / f"{id}.part"
        part.write_text(json.dumps(response))
        part.replace(self.store / f"{id}.json")
        return response

    def stored(self, name: str) -> bytes | None:
        path = self.store / name
        return path.read_bytes() if path.exists() else None

    @property
    def states(self) -> list[str]:
        ids = (self.store / "arrived").read_text().split() if (self.store / "arrived").exists() else []
        return [json.loads((self.store / f"{id}.json").read_bytes())["status"] for id in ids]

    def accept(self, headers: Any, data: str, blob: bytes) -> dict[str, Any]:
        if refusal := self.next("refuse"):
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
        self.respond(id, "QUEUED", f"Added to Queue at position {self.jobs.qsize() + 1}.")
        with (self.store / "arrived").open("a") as arrived:
            print(id, file=arrived)
        if not self.next("lose"):
            self.jobs.put((id, RequestModel.model_validate_json(data), blob))
        return {"id": id, "status": "RECEIVED", "description": "Your job has been received."}

    def run_forever(self, url: str) -> None:
        while True:
            id, request, blob = self.jobs.get()
            while not self.left:
                time.sleep(0.01)
            self.left -= 1
            if last_word := self.next("say"):
                texts = last_word["texts"]
                self.respond(id, "ERROR", texts[last_word["times"] % len(texts)])
                continue
            self.respond(id, "RUNNING", "Your job has started running.")
            try:
                result = self.run(request, blob)
            except Exception as error:
                self.respond(id, "ERROR", _described(error))
                continue
            (self.store / f"{id}.result").write_bytes(result[:-9] if self.next("damage") else result)
            where = None if self.next("empty") else f"{url}/result/{id}"
            self.respond(id, "COMPLETED", "Your job has been completed.", data=where)

    def run(self, request: RequestModel, blob: bytes) -> bytes:
        if slow := self.next("slow"):
            time.sleep(slow["seconds"])
        if failure := self.next("fail"):
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
                reason = f"{error}\n{''.join(traceback.format_exception(error))}"[:1500].rstrip() + "…"
                raise NotDeployed(f"Could not deploy this model. {reason}") from error
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
        if kind == "counts":
            self.reply(200, {"requests": self.cluster.states})
        elif page := self.cluster.next("page"):
            self.send(page["status"], "text/html", page["text"].encode())
        elif kind == "response" and (said := self.cluster.stored(f"{id}.json")):
            self.send(200, "application/json", said)
        elif kind == "result" and (content := self.cluster.stored(f"{id}.result")):
            self.send(200, "application/octet-stream", content)
        else:
            self.reply(404, {"detail": f"No response for request {id}."})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/control":
            self.cluster.set(json.loads(body))
            self.reply(200, {})
            return
        if page := self.cluster.next("page"):
            self.send(page["status"], "text/html", page["text"].encode(), **page.get("headers", {}))
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

    def send(self, status: int, kind: str, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
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
    parser.add_argument("--store", type=Path, required=True)
    arguments = parser.parse_args()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lalm_patch"]:
        del sys.modules[name]  # of the server that this process may be forked from
    sys.modules["lalm_patch"] = None  # type: ignore[assignment]
    Handler.cluster = Cluster(arguments.store)
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    Handler.cluster.run_forever(url)  # the main thread: where nnsight runs blocks


if __name__ == "__main__":
    main()
