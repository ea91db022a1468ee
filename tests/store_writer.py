"""A small run that several test modules write, and the child processes in which it is killed."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from lalm_patch.errors import StoreError
from lalm_patch.storage.run_store import RunStore

IDENTITY = {"config": "c0ffee", "data": "5eed", "lalm_patch": "0.1.0"}
# The calls by which Python code changes a disk. The store makes no other (HDF5 writes to memory).
CHANGES = ("write", "fsync", "ftruncate", "replace", "unlink")


def sample(number: int) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    random = np.random.default_rng(number)
    probability = random.random((4, 3)).astype(np.float32)
    probability[number % 4, 0] = np.nan
    margin = random.normal(size=5)
    margin[number % 5] = -np.inf
    excluded = "clean answer is wrong" if number % 3 == 0 else ""
    return f"chien né {number}.wav", {"probability": probability, "margin": margin}, {"excluded": excluded}


def assemble(rows: list[tuple[str, dict[str, np.ndarray], dict[str, Any]]]) -> xr.Dataset:
    return xr.Dataset(
        {
            "probability": (("sample", "layer", "option"), np.stack([arrays["probability"] for _, arrays, _ in rows])),
            "margin": (("sample", "token"), np.stack([arrays["margin"] for _, arrays, _ in rows])),
            "excluded": ("sample", np.array([meta["excluded"] for _, _, meta in rows], object)),
        },
        coords={"sample": np.array([sample_id for sample_id, _, _ in rows], object), "layer": np.arange(4)},
        attrs={"model": "tiny"},
    )


def write_run(folder: Path, count: int, *, acknowledge: Path | None = None, fsync: bool = True) -> None:
    """What the command does: store what is missing, build the dataset from the store alone, finalise."""
    with RunStore(folder, IDENTITY, fsync=fsync) as store:
        if store.finished:
            return
        for number in range(count):
            sample_id, arrays, meta = sample(number)
            if sample_id in store.completed():
                continue
            store.add(sample_id, arrays, meta)
            if acknowledge is not None:
                with acknowledge.open("a") as file:
                    file.write(f"{sample_id}\n")
        records = [store.sample(sample(number)[0]) for number in range(count)]
        store.finalise(assemble([(record.id, record.arrays, record.meta) for record in records]))


def ended(child: BaseProcess) -> int:
    """The exit code of a child; minus the signal's number if a signal ended it."""
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def write_until(folder: Path, count: int, acknowledge: Path, call: int, torn: bool) -> None:
    """`write_run`, killed right before its change of the disk number `call`; with `torn`, in the middle of a write."""
    made = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made == call:
                if torn and name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return replacement

    for name in CHANGES:
        setattr(os, name, counted(name, getattr(os, name)))
    write_run(folder, count, acknowledge=acknowledge)


def hold(folder: Path, ready: Path) -> None:
    with RunStore(folder, IDENTITY) as store:
        store.add(*sample(0))
        ready.touch()
        signal.pause()


def meet_file_size_limit(folder: Path, count: int) -> None:
    """Write a run under limits of the kernel (RLIMIT_FSIZE): one for the journal, one for the result."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refused(limit: int, action: Callable[[], object]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(StoreError, match=r"File too large .* Raise the limit .*ulimit -f"):
            action()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    rows = [sample(number) for number in range(count)]
    with RunStore(folder, IDENTITY) as store:
        for row in rows[:-1]:
            store.add(*row)
        size = (folder / "journal.bin").stat().st_size
        refused(size + 10, lambda: store.add(*rows[-1]))
        assert (folder / "journal.bin").stat().st_size == size
        store.add(*rows[-1])
        refused(2000, lambda: store.finalise(assemble(rows)))
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "journal.bin"]
        assert len(store.completed()) == count
