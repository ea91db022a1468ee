from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import store_writer
import xarray as xr
from commands import fork
from store_writer import IDENTITY, assemble, ended, sample, write_run

from lalm_patch.errors import StoreError
from lalm_patch.storage.run_store import RunStore, is_finished, open_result, repair

COUNT = 3


def reference(count: int = COUNT) -> xr.Dataset:
    """The run's dataset, made without a store."""
    return assemble([sample(number) for number in range(count)])


def expect(folder: Path, count: int = COUNT) -> None:
    """The folder holds exactly the finished run and nothing else."""
    found = open_result(folder)
    assert json.loads(found.attrs.pop("run_identity")) == IDENTITY
    xr.testing.assert_identical(found, reference(count))
    assert {name: found[name].dtype for name in ("probability", "margin")} == {
        "probability": np.float32,
        "margin": np.float64,
    }
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "result.json", "result.nc"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "deep" / "run"
    write_run(folder, COUNT)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    with RunStore(tmp_path, IDENTITY) as store:
        assert (store.finished, store.completed()) == (False, set())
        for number in range(COUNT):
            store.add(*sample(number))
        sample_id, arrays, meta = sample(1)
        record = store.sample(sample_id)
        assert (record.id, record.meta) == (sample_id, meta)
        assert {name: array.tobytes() for name, array in record.arrays.items()} == {
            name: array.tobytes() for name, array in arrays.items()
        }
        with pytest.raises(KeyError):
            store.sample("another")
        with pytest.raises(ValueError, match=r"already holds 'chien né 1.wav'"):
            store.add(*sample(1))
        with pytest.raises(ValueError, match="not finished"):
            store.load()
        assert store.finalise(reference()) == tmp_path / "result.nc"
        assert store.finished
        for misuse in (lambda: store.add("x", {}, {}), lambda: store.sample(sample_id)):
            with pytest.raises(ValueError, match="is finished"):
                misuse()
    expect(tmp_path)
    with RunStore(tmp_path, IDENTITY) as store:
        assert store.finished
        assert store.completed() == {sample(number)[0] for number in range(COUNT)}
        xr.testing.assert_identical(store.load(), open_result(tmp_path / "result.nc"))
    store.close()
    with pytest.raises(ValueError, match=r"is finished|is closed"):
        store.add("x", {}, {})


def test_the_result_opens_without_this_package(finished: Path) -> None:
    script = """
import json, sys, xarray
dataset = xarray.open_dataset(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("lalm_patch")]
chosen = dataset.sel(sample="chien né 1.wav")
print(json.dumps([dataset.attrs["run_identity"], chosen.margin.values.tolist(), str(chosen.excluded.values)]))
"""
    command = [sys.executable, "-I", "-W", "error", "-c", script, str(finished / "result.nc")]
    printed = subprocess.run(command, cwd="/", check=True, capture_output=True, text=True, encoding="utf-8").stdout
    identity, margin, excluded = json.loads(printed)
    assert json.loads(identity) == IDENTITY
    assert margin == sample(1)[1]["margin"].tolist()
    assert excluded == sample(1)[2]["excluded"]


def test_a_dataset_that_would_lose_samples_is_refused(tmp_path: Path) -> None:
    with RunStore(tmp_path, IDENTITY) as store:
        store.add(*sample(0))
        store.add("\0é", {}, {})
        with pytest.raises(ValueError, match="lacks 1 stored samples, among them"):
            store.finalise(reference(1))
        rows = [sample(0), ("\0é", *sample(1)[1:])]
        store.finalise(assemble(rows))
    assert open_result(tmp_path)["sample"].values.tolist() == [sample(0)[0], "\\x00é"]
    with RunStore(tmp_path, IDENTITY) as store:
        assert store.completed() == {sample(0)[0], "\0é"}


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_another_identity_is_refused_entry_by_entry(run: Path, tmp_path: Path, state: str) -> None:
    folder = run
    if state == "unfinished":
        folder = tmp_path / "unfinished"
        with RunStore(folder, IDENTITY) as store:
            store.add(*sample(0))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    other = {"config": "c0ffee", "data": "other", "git": "abc"}
    with pytest.raises(StoreError) as caught:
        RunStore(folder, other)
    assert (
        "(data: '5eed' there, 'other' now; git: nothing there, 'abc' now; lalm_patch: '0.1.0' there, nothing now)"
        in (str(caught.value))
    )
    assert "an unfinished run with 1 samples made" in str(caught.value) or state == "finished"
    assert not is_finished(folder, other)
    assert is_finished(folder, IDENTITY) is (state == "finished")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before


def test_every_altered_or_missing_byte_of_the_result_is_noticed(run: Path) -> None:
    result = run / "result.nc"
    whole = result.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        result.write_bytes(whole[:cut])
        for opened in (lambda: open_result(run), lambda: RunStore(run, IDENTITY)):
            with pytest.raises(StoreError, match=rf"has {cut} bytes, the run wrote {len(whole)}.*compute it again"):
                opened()
    for position in range(0, len(whole), 997):
        result.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(StoreError, match="was altered"):
            open_result(run)
    result.unlink()
    for opened in (lambda: open_result(run), lambda: open_result(result), lambda: RunStore(run, IDENTITY)):
        with pytest.raises(StoreError, match=r"result\.nc is missing"):
            opened()
    assert not is_finished(run, IDENTITY)


def test_every_altered_byte_of_the_receipt_is_noticed(run: Path) -> None:
    receipt = run / "result.json"
    whole = receipt.read_bytes()
    for position in range(len(whole)):
        for altered in (whole[:position], whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :]):
            receipt.write_bytes(altered)
            with pytest.raises(StoreError, match=r"result\.json was altered or cut short"):
                open_result(run)
    receipt.write_bytes(b"[]")
    with pytest.raises(StoreError, match="was altered"):
        is_finished(run, IDENTITY)


def test_a_folder_without_a_checked_result_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    (run / "result.json").unlink()
    with pytest.raises(StoreError, match=r"no result\.json beside it.*unchecked with xarray\.open_dataset"):
        open_result(run / "result.nc")
    with pytest.raises(StoreError, match=r"holds a result\.nc but no result\.json"):
        RunStore(run, IDENTITY)
    assert (run / "result.nc").exists()
    with pytest.raises(StoreError, match="no finished run at"):
        open_result(tmp_path / "nowhere")
    with RunStore(tmp_path / "new", IDENTITY), pytest.raises(StoreError, match="not finished"):
        open_result(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"Not a directory|File exists"):
        RunStore(tmp_path / "file", IDENTITY)


def test_repair_then_the_same_run_again(tmp_path: Path) -> None:
    with RunStore(tmp_path, IDENTITY) as store:
        for number in range(COUNT):
            store.add(*sample(number))
        with pytest.raises(StoreError, match="in use"):
            repair(tmp_path)
    journal = tmp_path / "journal.bin"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged at byte \d+ .* 2 stored samples are readable.*repair\("):
        write_run(tmp_path, COUNT)
    assert repair(tmp_path) == 2
    (tmp_path / "journal.damaged").unlink()
    write_run(tmp_path, COUNT)
    expect(tmp_path)
    with pytest.raises(StoreError, match="nothing to repair"):
        repair(tmp_path)


def test_one_writer_a_folder_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    folder = tmp_path / "run"
    child = fork(store_writer.hold, folder, ready)
    wait_for(ready.exists)
    with pytest.raises(StoreError, match=rf"{folder} is in use by another process \(pid {child.pid} on "):
        RunStore(folder, IDENTITY)
    child.kill()
    assert ended(child) == -9
    write_run(folder, COUNT)
    expect(folder)


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9 of a real writer, again and again: what was acknowledged is there, and the result is the reference's."""
    count, kills, moments = 400, 0, random.Random(0)
    folder, acknowledged = tmp_path / "run", tmp_path / "acknowledged"
    acknowledged.touch()
    while kills < 10:
        before = acknowledged.stat().st_size
        child = fork(write_while_acknowledging, folder, count, acknowledged)
        wait_for(lambda: acknowledged.stat().st_size > before or not child.is_alive())  # noqa: B023
        time.sleep(moments.uniform(0, 0.03))
        child.kill()
        if ended(child) == 0:
            break
        kills += 1
        nothing_acknowledged_is_lost(folder, acknowledged)
    assert kills >= 3, "the writer is too fast to be killed: raise count"
    write_run(folder, count)
    expect(folder, count)


def nothing_acknowledged_is_lost(folder: Path, acknowledged: Path) -> None:
    whole_lines = acknowledged.read_text().rpartition("\n")[0].splitlines()
    with RunStore(folder, IDENTITY) as store:
        assert set(whole_lines) <= store.completed()


def write_while_acknowledging(folder: Path, count: int, acknowledge: Path) -> None:
    write_run(folder, count, acknowledge=acknowledge)


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_change_of_the_disk(tmp_path: Path, torn: bool) -> None:
    """kill -9 right before (or in the middle of) the first, second, ... write, fsync, ftruncate, rename, removal."""
    states = set()
    for call in range(1, 100):
        folder = tmp_path / str(call)
        acknowledged = tmp_path / f"{call}.acknowledged"
        acknowledged.touch()
        code = ended(fork(store_writer.write_until, folder, COUNT, acknowledged, call, torn))
        if code == 0:
            break
        assert code == -9
        states.add(tuple(sorted(path.name for path in folder.iterdir())))
        nothing_acknowledged_is_lost(folder, acknowledged)
        write_run(folder, COUNT)
        expect(folder)
    # Head, 3 samples, 2 files, each written and synced; folder synced 4 times; 2 renames; 1 removal.
    assert call > 18
    assert {
        (".lock", "journal.bin"),
        (".lock", ".result.nc.tmp", "journal.bin"),
        (".lock", ".result.json.tmp", "journal.bin", "result.nc"),
        (".lock", "journal.bin", "result.json", "result.nc"),
        (".lock", "result.json", "result.nc"),
    } <= states


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "unlink"])
def test_every_failing_call_of_finalise_is_recoverable(tmp_path: Path, call: str) -> None:
    """The disk refuses the first, second, ... call: StoreError, and the same command finishes the run."""
    real = getattr(os, call)
    for failing in range(1, 20):
        folder = tmp_path / str(failing)
        with RunStore(folder, IDENTITY) as store:
            for number in range(COUNT):
                store.add(*sample(number))
            made = 0

            def refuse(*arguments: object, failing: int = failing, **options: object) -> object:
                nonlocal made
                made += 1
                if made == failing:
                    raise OSError(28, "No space left on device")
                return real(*arguments, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, call, refuse)
                try:
                    store.finalise(reference())
                except StoreError as error:
                    message = str(error)
                else:
                    break
        assert "No space left on device while writing the result" in message
        with RunStore(folder, IDENTITY) as store:
            assert store.completed() == {sample(number)[0] for number in range(COUNT)}
        write_run(folder, COUNT)
        expect(folder)
    assert failing > 1
    expect(folder)


def test_the_kernel_refuses_to_write_more(tmp_path: Path) -> None:
    """A real failure of write(2), in a process that must end in order: HDF5 on a full disk would crash it."""
    assert ended(fork(store_writer.meet_file_size_limit, tmp_path, COUNT)) == 0
    write_run(tmp_path, COUNT)
    expect(tmp_path)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with RunStore(tmp_path, IDENTITY) as store, RunStore(tmp_path, IDENTITY) as other:
        assert "has no locks" in caplog.text
        store.add(*sample(0))
        with pytest.raises(StoreError, match="changed by another process"):
            other.add(*sample(1))
