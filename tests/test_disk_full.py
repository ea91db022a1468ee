"""A disk without room: one sentence that says so and where, and the same command goes on when there is room again.

A limit on the size of files stands in for the disk: the kernel refuses the same calls.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
from functools import partial
from pathlib import Path

import commands
import pytest
import xarray as xr

import lalm_patch
from lalm_patch import cli
from lalm_patch.errors import StoreError
from lalm_patch.storage.jobs import Job, JobBook
from lalm_patch.storage.log_file import LogFile
from lalm_patch.storage.shards import mark_complete

WHAT = ("data.limit=2", "granularity.layers=[0]", "engine=direct")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    dataset = lalm_patch.trace(*WHAT, f"outputs={tmp_path_factory.mktemp('other')}").dataset
    assert dataset is not None
    return dataset


@pytest.mark.parametrize(
    ("size", "file", "kept"), [(0, "", 0), (3000, "", 0), (4500, "journal.bin", 1), (9000, "result.nc", 2)]
)
def test_a_full_disk_in_one_sentence(size: int, file: str, kept: int, undisturbed: xr.Dataset, tmp_path: Path) -> None:
    """While Hydra writes its folder (its files have up to 4300 bytes), and later."""
    # Forked commands print to files, for which nothing is left of 0 bytes, and leave out what an interpreter does at
    # its end, where HDF5 would crash.
    fresh = not size or file == "result.nc"
    command = (*commands.LALM_PATCH, *WHAT, "outputs=outputs")
    done = commands.run(tmp_path, *command, fresh=fresh, begin=partial(_limit, size))
    assert done.returncode == 1
    *before, last = done.stderr.splitlines()
    (folder,) = (tmp_path / "outputs").iterdir()
    assert last.startswith("error: ")
    assert f"{folder.name}{'/' if file else ''}{file}: File too large while " in last
    assert "then run the same command again" in last
    assert before in ([], ["loading demo (demo)"])
    again = commands.run(tmp_path, *commands.LALM_PATCH, *WHAT, "outputs=outputs")
    assert again.returncode == 0, again.stderr
    assert ("samples are stored already" in again.stderr) is (kept > 0)
    assert f"{kept} samples are stored already" in again.stderr or not kept
    xr.testing.assert_identical(xr.load_dataset(folder / "result.nc").drop_attrs(), undisturbed.drop_attrs())


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_log_on_a_full_disk(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Said once, without a traceback; when there is room again the log goes on."""
    path = tmp_path / "run.log"
    path.symlink_to("/dev/full")
    handler = LogFile(path)
    record = logging.makeLogRecord({"msg": "a message"})
    for _ in range(2):
        handler.emit(record)
    path.unlink()
    path.mkdir()  # now it cannot be opened either
    handler.emit(record)
    path.rmdir()
    handler.emit(record)
    handler.close()
    assert capsys.readouterr().err == f"{path}: No space left on device; messages are missing there\n"
    assert path.read_text() == "a message\n"
    handler.emit(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert "TypeError" in capsys.readouterr().err  # a defect is not a full disk
    handler.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_between_the_runs_of_a_sweep(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra writes each run's folder; what it raises there is no defect of a run that ended before."""
    monkeypatch.setattr(cli, "_begun", [Path("outputs/first")])
    monkeypatch.setattr(cli, "_places", [Path("outputs")])
    told = cli._told(OSError(code, os.strerror(code)))
    assert str(told).startswith(f"outputs: {os.strerror(code)} while writing there")
    assert cli._told(OSError(errno.EIO, "a broken disk")) is None


def test_notes_beside_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those about jobs on a server, and about a shard."""

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", no_room)
    with pytest.raises(StoreError, match=r"jobs\.json: No space left on device while noting which clips"):
        JobBook(tmp_path).put("clip", Job("id", "host", "digest", False))
    with pytest.raises(StoreError, match="No space left on device while noting that the shard is complete"):
        mark_complete(tmp_path, {}, 1)
    assert list(tmp_path.iterdir()) == []
