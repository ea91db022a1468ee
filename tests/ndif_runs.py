"""A small NDIF on loopback as a process of its own, and runs on it: shared by the tests."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import httpx
import numpy as np
import xarray as xr

import lalm_patch

TESTS = Path(__file__).resolve().parent
PROBABILITIES = ["p_clean", "p_corrupted", "p_patched"]


class Server:
    """The loopback NDIF as a process of its own.

    Args:
        port: where it listens; 0 for any.
        store: the object store of another one that is started again here; by default a new one.
    """

    def __init__(self, port: int = 0, store: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.store = store or tempfile.TemporaryDirectory()
        arguments = (str(TESTS / "ndif_server.py"), "--port", str(port), "--store", self.store.name)
        self.process = commands.start(TESTS, *arguments)
        self.port = int(self.process.first_line())
        self.url = f"http://127.0.0.1:{self.port}"

    def control(self, **control: Any) -> None:
        httpx.post(f"{self.url}/control", json=control, timeout=60).raise_for_status()

    @property
    def states(self) -> list[str]:
        """States of all requests so far, in the order of their arrival."""
        return list(httpx.get(f"{self.url}/counts", timeout=60).json()["requests"])

    def kill(self, keep_store: bool = False) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        if not keep_store:
            self.store.cleanup()


def remote(server: Server, *more: str) -> tuple[str, ...]:
    return (
        *("backend=ndif", f"backend.host={server.url}", "backend.poll_seconds=0.02"),
        *("backend.retries=1", "backend.pause_seconds=0.02", *more),
    )


def result(*overrides: str) -> xr.Dataset:
    dataset = lalm_patch.trace(*overrides).dataset
    assert dataset is not None
    return dataset


def assert_same_numbers(local: xr.Dataset, other: xr.Dataset) -> None:
    """Every variable within 1e-5; what is not a probability or a rate, relative to its size."""
    # A server sends the options' logits back, not the vocabulary's.
    unknown = [f"{name}_{run}" for name in ("rank", "kl") for run in ("clean", "corrupted", "patched")]
    local = local.drop_vars(unknown, errors="ignore")
    assert set(local.data_vars) == set(other.data_vars)
    for name, variable in local.data_vars.items():
        if variable.dtype.kind == "f":
            np.testing.assert_allclose(other[name], variable, atol=1e-5, rtol=1e-5, err_msg=str(name))
        else:
            np.testing.assert_array_equal(other[name], variable, err_msg=str(name))


def assert_whole(dataset: xr.Dataset, local: xr.Dataset) -> None:
    """Every clip once, with the numbers of a run without a server."""
    assert dataset["sample"].values.tolist() == local["sample"].values.tolist()
    assert_same_numbers(local[PROBABILITIES], dataset[PROBABILITIES])


def in_background(do: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=do)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool], patience: float = 240) -> None:
    limit = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < limit, f"not within {patience} s"
        time.sleep(0.05)
