# ruff: noqa: F841, SIM117 (a session returns values by their names, and reads best as one block)
"""Runs on a server, against a small NDIF on loopback: real HTTP, nnsight's real client, real processes to kill."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import nnsight
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import GENDER, noise, write_sakura
from ndif_runs import PROBABILITIES, Server, assert_same_numbers, remote, result
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.modeling.transformers import TransformersModel

import lalm_patch
from lalm_patch.engine import ndif
from lalm_patch.errors import CheckError, ConfigError, HostError, ModelError
from lalm_patch.models import LALM
from lalm_patch.settings import BackendSettings, ModelSettings
from lalm_patch.stimuli import Prompt
from lalm_patch.storage.jobs import JOBS

pytestmark = pytest.mark.usefixtures("without_pdfs")

KEY = "planted-5ecret-0f-the-user"
CLIPS = 6


DEMO = ("model=demo", "attr=gender", "data.limit=6")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("which", ["demo", "tiny"])
def test_remote_equals_local(which: str, strict: bool, server: Server, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The whole run's dataset, and one request per clip."""
    server.control(strict=strict)
    before = len(server.states)
    what = (*DEMO, "granularity=layer") if which == "demo" else (*tiny, "granularity=token")
    what = (*what, "engine.pack_tokens=1500", f"outputs={tmp_path}")
    there = result(*what, *remote(server))
    here = result(*what)
    assert len(server.states) - before == there.sizes["sample"] == CLIPS
    assert int(there.kept.sum()) >= 2
    assert float(there.p_patched.max() - there.p_patched.min()) > 1e-3
    # Of the random model p_clean - p_corrupted may be small, and a rate is a quotient by it.
    gap = abs(there.p_clean - there.p_corrupted).min() if which == "tiny" else 1
    assert_same_numbers(here.drop_vars("recovery_rate"), there.drop_vars("recovery_rate"))
    np.testing.assert_allclose(there.recovery_rate, here.recovery_rate, atol=2e-5 / float(gap))
    checks = {check["name"]: check for check in json.loads(there.attrs["checks"])}
    assert {"audio_reaches_model", "restore_all", "decoder_from_embeddings", "remote_rows_equal_whole"} <= set(checks)
    assert all(check["passed"] for check in checks.values())
    assert there.attrs["engine"] == "ndif"
    assert json.loads(there.attrs["servers"])[0]["nnsight"] == nnsight.__version__


@pytest.mark.parametrize("corruption", ["silence", "counterfactual"])
def test_voxtral_goes_too(corruption: str, server: Server, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root = write_sakura(tmp_path / "data", GENDER, clips=2)
    identifier = f"model.id={checkpoints['voxtral']}"
    what = ("model=voxtral", identifier, "model.dtype=float32", "attr=gender", f"data.root={root}")
    what = (*what, f"corruption={corruption}", f"outputs={tmp_path / 'outputs'}")
    server.control(strict=True)
    there, here = result(*what, *remote(server)), result(*what)
    assert_same_numbers(here[PROBABILITIES], there[PROBABILITIES])
    if corruption == "counterfactual":
        assert there["partner"].values.tolist() == there["sample"].values[::-1].tolist()


def client(checkpoint: Path) -> tuple[TransformersModel, LALM]:
    settings = ModelSettings(name="tiny", family="qwen2_audio", id=str(checkpoint), dtype="float32")
    lalm = LALM.outline(settings)
    engine = ndif.NdifEngine(lalm, settings, BackendSettings("ndif", "http://127.0.0.1:9"))
    return engine._model, lalm


class OwnBatching(TransformersModel):  # type: ignore[misc]
    """A client's class that batches by itself; the server is told the class it stands in for."""

    def _remoteable_class(self) -> type:
        return TransformersModel

    def _batch(self, invokes: Any, fn: Any) -> Any:
        return TransformersModel._batch(self, invokes, fn)


SANDBOX = {
    "submodule": "OutOfOrderError: 'model.model.language_model.output'",
    "stop": "BrokenPipeError",
    "gradient": "OutOfOrderError: gradients",
    "batching": "NotImplementedError: Can't batch these inputs",
}


@pytest.mark.parametrize("what", SANDBOX)
def test_strict_mode_refuses(what: str, server: Server, checkpoints: dict[str, Path], prompt: Prompt) -> None:
    """What the session avoids is possible on the server as it is, and refused in strict mode."""
    model, lalm = client(checkpoints["qwen2_audio"])
    _, inputs = lalm.inputs(noise(1.0), prompt, "chat")
    if what == "batching":
        model.__class__ = OwnBatching
        nnsight.register(sys.modules[__name__])

    def send() -> Any:
        backend = RemoteBackend(model.to_model_key(), host=server.url, api_key="-")
        backend.display.enabled = False
        backend.blocking = False
        if what == "submodule":
            with model.session(backend=backend):
                with torch.no_grad(), model.model.language_model.trace(inputs_embeds=torch.zeros(1, 4, 64)):
                    length = nnsight.save(model.model.language_model.output.last_hidden_state.shape[1])
        elif what == "stop":
            with model.session(backend=backend):
                with torch.no_grad(), model.trace(**inputs) as half:
                    state = model.model.language_model.layers[0].output.clone()
                    half.stop()
                with torch.no_grad(), model.trace(**inputs):
                    length = nnsight.save(state.shape[1] + model.output.logits.shape[1])
        elif what == "gradient":
            with model.session(backend=backend):
                with model.trace(**inputs):
                    state = model.model.language_model.layers[0].output
                    state.requires_grad_(True)
                    loss = model.output.logits[0, -1].sum()
                    with loss.backward():
                        length = nnsight.save(state.grad.shape[1])
        else:
            with model.session(backend=backend):
                with torch.no_grad(), model.trace(**inputs):
                    length = nnsight.save(model.output.logits.shape[1])
        while (saved := backend.poll()) is None:
            time.sleep(0.1)
        return saved["length"]

    assert send() > 0
    server.control(strict=True)
    with pytest.raises(RemoteError, match=SANDBOX[what]):
        send()


def stored_text(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_client_killed_then_reattached(
    server: Server,
    tiny: tuple[str, ...],
    computed_here: xr.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Jobs that were sent are not sent again; and the key that was sent along is nowhere on disk."""
    before = len(server.states)
    server.control(hold=2, key=KEY)
    arguments = (*tiny, f"outputs={tmp_path / 'outputs'}", *remote(server, "backend.max_jobs=3"))
    process = commands.start(tmp_path, *commands.LALM_PATCH, *arguments, NDIF_API_KEY=KEY)
    while len(server.states) - before < 5:  # two answers are stored, three jobs are held
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    (book,) = (tmp_path / "outputs").rglob(JOBS)
    while len(json.loads(book.read_bytes())) != 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert KEY not in "".join(process.communicate())
    assert KEY.encode() not in stored_text(tmp_path)

    server.control(key=KEY)
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    with caplog.at_level(logging.INFO):
        dataset = result(*arguments)
    assert caplog.text.count("going on with job") == 3
    assert server.states[before:] == ["COMPLETED"] * CLIPS
    assert not book.exists()
    assert KEY not in caplog.text
    assert KEY.encode() not in stored_text(tmp_path)
    assert_same_numbers(computed_here[PROBABILITIES], dataset[PROBABILITIES])


def test_server_killed_in_mid_run(tiny: tuple[str, ...], computed_here: xr.Dataset, tmp_path: Path) -> None:
    """The run stops with one sentence and keeps what it has; the same command goes on with a new server."""
    first = Server()
    first.control(hold=3)
    what = (*tiny, f"outputs={tmp_path}", *remote(first, "backend.max_jobs=3", "backend.forget_seconds=0.2"))

    def kill_when_all_are_sent() -> None:
        while len(first.states) < CLIPS:
            time.sleep(0.05)
        first.kill()

    killer = threading.Thread(target=kill_when_all_are_sent)
    killer.start()
    with pytest.raises(HostError, match=r"cannot be reached.*the same command goes on"):
        lalm_patch.trace(*what)
    killer.join()
    (folder,) = tmp_path.iterdir()
    assert len(json.loads((folder / JOBS).read_bytes())) >= 2  # the last one may have been killed while it was sent
    again = Server(first.port)
    try:
        dataset = result(*what)
        assert again.states == ["COMPLETED"] * 3
    finally:
        again.kill()
    assert_same_numbers(computed_here[PROBABILITIES], dataset[PROBABILITIES])


REFUSALS = {
    "no key": ({"key": "a-key"}, {}, HostError, "is not set"),
    "wrong key": ({"key": "a-key"}, {"NDIF_API_KEY": "another-key"}, HostError, "is refused"),
    "malformed key": ({"key": "a-key"}, {"NDIF_API_KEY": "hunter2"}, HostError, r"\[NDIF_API_KEY\]"),
    "old client": ({"minimum": "0.9"}, {}, HostError, "versions that do not go together.*0.9"),
    "failing block": (
        {"fail": {"times": 9, "text": "no reason"}},
        {},
        HostError,
        "run the job: RuntimeError: no reason. Fin.*the same command",
    ),
    "out of memory": ({"fail": {"times": 9, "text": "CUDA out of memory"}}, {}, HostError, "engine.pack_tokens"),
    "always busy": (
        {"refuse": {"times": 99, "status": 503, "detail": "reconnecting"}},
        {},
        HostError,
        "cannot take or show jobs now.*Tried 2 times",
    ),
    "always preempted": (
        {"say": {"times": 99, "texts": ["preempted"]}},
        {},
        HostError,
        "end of 2 jobs.*same command",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_will_not_pass(
    case: str, server: Server, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, environment, kind, message = REFUSALS[case]
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server.control(**control)
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        lalm_patch.trace(*tiny, f"outputs={tmp_path}", *remote(server))
    assert "hunter2" not in str(caught.getrepr(chain=True))
    assert b"hunter2" not in stored_text(tmp_path)


def test_what_passes(server: Server, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """A busy server and a preempted job cost a retry, not the run."""
    server.control(
        refuse={"times": 1, "status": 503, "detail": "reconnecting"}, say={"times": 1, "texts": ["preempted"]}
    )
    dataset = result(*tiny, f"outputs={tmp_path}", *remote(server))
    assert dataset.sizes["sample"] == CLIPS


def test_the_fingerprint_of_a_folder_stays_here(checkpoints: dict[str, Path]) -> None:
    """A pinned folder is compared with its files here; a server knows branches, tags and commits only."""
    settings = ModelSettings(name="tiny", family="qwen2_audio", id=str(checkpoints["qwen2_audio"]), dtype="float32")
    free = LALM.outline(settings)
    pinned = replace(settings, revision=free.commit)
    assert str(pinned.revision).startswith("local:")
    backend = BackendSettings("ndif", "http://127.0.0.1:9")
    engines = [ndif.NdifEngine(LALM.outline(one), one, backend) for one in (settings, pinned)]
    assert engines[0].model_key == engines[1].model_key
    assert json.loads(engines[1].model_key.partition(":")[2])["revision"] is None


def test_model_not_deployed(server: Server, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    settings = ModelSettings(name="tiny", family="qwen2_audio", id=str(checkpoints["qwen2_audio"]), dtype="float32")
    lalm = LALM.outline(settings)
    engine = ndif.NdifEngine(lalm, settings, BackendSettings("ndif", server.url, poll_seconds=0.02, retries=1))
    engine.model_key = engine.model_key.replace(str(checkpoints["qwen2_audio"]), str(tmp_path / "absent"))
    backend = engine._backend()
    with engine._model.session(backend=backend):
        result = nnsight.save(1)
    with pytest.raises(HostError, match="does not have the model"):  # noqa: PT012
        while engine.ask(str(backend.job_id)).saved is None:
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (("model=desta25",), ModelError, "needs this package to open or run it; use backend=local"),
        (("model=qwen_audio",), ModelError, "needs this package"),
        (("model=qwen3_omni",), ModelError, "needs this package"),
        (("model=voxtral",), ConfigError, "no key for https://api.ndif.us.*NDIF_API_KEY"),
        (("backend.host=https://somewhere.example",), ModelError, "is a folder of this machine"),
        (("backend.host=somewhere.example",), ConfigError, "expected a URL"),
        (("backend.host=https://me:hunter2@somewhere.example",), ConfigError, "without user name"),
        (("backend.name=cloud",), ConfigError, "expected one of local, ndif"),
        (("backend.host=http://127.0.0.1:9", "backend.retries=0"), HostError, "cannot be reached"),
    ],
)
def test_refused_before_anything_is_sent(
    overrides: tuple[str, ...],
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NDIF_API_KEY", "NDIF_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(kind, match=message) as caught:
        lalm_patch.trace("data.limit=5", f"outputs={tmp_path}", "backend=ndif", *overrides)
    assert "hunter2" not in str(caught.value)


def test_wrong_numbers_are_noticed(
    server: Server, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that take the wrong states differ from the same cells computed one at a time."""
    real = ndif.send_session

    def shifted(model: Any, decoder: Any, request: Any, backend: Any) -> None:
        class Shifted(type(request)):  # type: ignore[misc]
            @property
            def passes(self) -> Any:
                return [(rows, [(layer, where[::-1], what) for layer, where, what in w]) for rows, w in super().passes]

        real(model, decoder, Shifted(**vars(request)), backend)

    monkeypatch.setattr(ndif, "send_session", shifted)
    with pytest.raises(CheckError, match=r"remote_rows_equal_whole|restore_all|last_layer_identity"):
        lalm_patch.trace(*tiny, f"outputs={tmp_path}", "granularity=token", *remote(server))


def test_other_dtype_on_the_server(server: Server, tiny: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"set model\.dtype=float32"):
        lalm_patch.trace(*tiny, f"outputs={tmp_path}", *remote(server, "model.dtype=float16"))
