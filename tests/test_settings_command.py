"""Refusals at the command line: one sentence, nothing left behind, nothing heavy imported; and read-only folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import commands
import pytest

from lalm_patch.config import compose
from lalm_patch.errors import StoreError
from lalm_patch.run import run_identity
from lalm_patch.storage.places import unwritable
from lalm_patch.storage.run_store import RunStore

SMALL = ("data.limit=2", "granularity.layers=[0,7]", "engine=direct")


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run's command, by somebody whom permissions stop."""
    process = commands.start(folder, *commands.LALM_PATCH, *arguments, as_user=True, **environment)
    out, err = process.communicate()
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def refused(folder: Path, *arguments: str) -> str:
    done = command(folder, *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr.strip().removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("+data.limits=2",), "data.limits: there is no such setting; the nearest is data.limit"),
        (("data.limits=2",), "data.limits: there is no such setting; the nearest is data.limit"),
        (("-m", "data.limits=1,2"), "data.limits: there is no such setting; the nearest is data.limit"),
        (("-m", "+data.limits=1,2"), "data.limits: there is no such setting; the nearest is data.limit"),
        (("-m", "seed=-1,0"), "seed=-1: expected a whole number from 0"),
        (("shard=0/2",), "shard=0/2: expected i/n"),
        (("transcript=${x}",), "transcript=${x}: "),
        (("attr.options=[男,女]",), 'write \'attr.options=["男","女"]\''),
        (("--cfg", "job", "+data.limits=2"), "data.limits: there is no such setting"),
        (("--config-dir", "nowhere"), "--config-dir=nowhere: expected a folder"),
        (("experiment=which_heads", "data.limits=2"), "data.limits: there is no such setting"),
        (("experiment=which_head",), "the nearest is which_heads"),
    ],
)
def test_refused_in_a_sentence_that_leaves_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(tmp_path, *arguments)
    assert not list(tmp_path.rglob("error.txt"))


def test_files_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "conf" / "attr").mkdir(parents=True)
    (tmp_path / "conf" / "attr" / "room.yaml").write_text("question: Q?\noptions: [yes, no]\nresponse: It is\n")
    assert refused(tmp_path, "--config-dir", "conf", "attr=room").startswith("attr.name: expected a name")
    assert refused(tmp_path, "--config-dir=conf", "attr=room", "attr.name=room").startswith(
        "attr.options=[true, false]"
    )


@pytest.mark.parametrize("arguments", [("--help",), ("--frobnicate",), ("model=nothing",), ("model.family=x",)])
def test_help_and_wrong_options_import_no_torch(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('heavy:', sorted({'torch', 'transformers', 'nnsight'} & set(sys.modules))))\n"
        f"sys.argv = ['lalm_patch', *{arguments!r}]\n"
        "runpy.run_module('lalm_patch', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=commands.ENVIRONMENT, capture_output=True, text=True
    )
    assert "heavy: []" in done.stdout
    assert "Traceback" not in done.stderr


def test_outputs_in_the_home_folder(tmp_path: Path) -> None:
    """However it is written, and wherever Hydra makes its folder: nothing is named `~`."""
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    done = command(work, "outputs=~/x", *SMALL, HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert len(list(home.glob("x/*/result.nc"))) == 1
    assert not list(work.iterdir())
    done = command(work, "-m", "outputs='~/x'", *SMALL, HOME=str(home))
    assert "1 finished before" in done.stderr, done.stderr
    assert not list(work.iterdir())


def test_a_finished_run_is_shown_from_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    assert command(tmp_path, *SMALL).returncode == 0
    (folder,) = (tmp_path / "outputs").glob("demo-*")
    (folder / ".lock").unlink()
    for path in (*folder.rglob("*"), folder, folder.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        done = command(tmp_path, *SMALL)
        assert done.returncode == 0, done.stderr
        assert "2 count" in done.stdout or "of 2 count" in done.stdout
        assert "figures are left as they are" in done.stderr
        assert len(done.stderr.splitlines()) <= 2
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        message = refused(tmp_path, *SMALL, "seed=1")
        assert "outputs" in message
        assert "outputs=FOLDER" in message
        assert "outputs=FOLDER" in refused(tmp_path, "-m", *SMALL, "seed=1,2")
        assert command(tmp_path, *SMALL, "seed=1", "dry_run=true").returncode == 0
    finally:
        for path in (folder.parent, folder, *folder.rglob("*")):
            path.chmod(0o755)


@pytest.mark.parametrize("place", ["/proc/x", "/etc/passwd/x", "a" * 300])
def test_outputs_that_cannot_be(tmp_path: Path, place: str) -> None:
    assert "outputs" in refused(tmp_path, f"outputs={place}")


def test_opening_a_finished_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a lock nor a folder; an unfinished one still needs both."""
    import xarray as xr

    identity = run_identity(compose(*SMALL))
    with RunStore(tmp_path / "run", identity) as store:
        store.finalise(xr.Dataset(coords={"sample": []}))
    (tmp_path / "run" / ".lock").unlink()
    monkeypatch.setattr("lalm_patch.storage.run_store._lock", lambda _: pytest.fail("locked"))
    with RunStore(tmp_path / "run", identity) as store:
        assert store.finished
        assert store.load().sizes["sample"] == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["result.json", "result.nc"]


def test_what_is_said_of_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path / "new" / "folder") is None
    assert unwritable(tmp_path / "file" / "folder") == f"{tmp_path / 'file'} is a file"
    assert "File name too long" in str(unwritable(tmp_path / ("a" * 300)))
    with pytest.raises(StoreError, match="Not a directory"):
        RunStore(tmp_path / "file" / "run", {})
