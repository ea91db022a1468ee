"""Sweeps, shards and what runs leave behind: real processes where a process is the point."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import commands
import pytest
import xarray as xr
from conftest import GENDER, write_sakura
from test_cli import run

from lalm_patch.config import compose
from lalm_patch.errors import BusyError, ConfigError, StoreError
from lalm_patch.run import run as carry_out
from lalm_patch.run import run_identity
from lalm_patch.settings import RunSettings
from lalm_patch.storage.journal import snapshot
from lalm_patch.storage.run_store import RunStore, open_result
from lalm_patch.storage.shards import Shard, run_folder_of
from lalm_patch.sweep.runs import State, SweepRun, failure_recorded, status, sweep_summary
from lalm_patch.sweep.slurm import read_queue

pytestmark = pytest.mark.usefixtures("without_pdfs")

CLIPS = 5


@pytest.fixture(scope="module")
def tiny(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for a run of a random tiny model on a small data set."""
    root = write_sakura(tmp_path_factory.mktemp("data"), GENDER, clips=CLIPS)
    model = (f"model.id={checkpoints['qwen2_audio']}", "model.dtype=float32", "model=qwen2_audio")
    return (*model, "attr=gender", f"data.root={root}", "threads=1")


def bare(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.drop_attrs(deep=False)


# Shards


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "1/0", "1", "a/b", "-1/3", "1/3/5"])
def test_a_shard_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"shard={text}: expected i/n")):
        Shard.parse(text)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_shards_share_out_everything_once(count: int) -> None:
    clips = list(range(7))
    parts = [Shard(index + 1, count).select(clips) for index in range(count)]
    assert sorted(clip for part in parts for clip in part) == clips
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_works_in_its_own_folder_of_the_same_run() -> None:
    whole, part = compose("data.limit=3"), compose("data.limit=3", "shard=2/4")
    assert part.run_name == whole.run_name
    folder = Path("outputs", whole.run_name)
    assert run_folder_of(Shard.parse("2/4").folder(folder)) == run_folder_of(folder) == folder


@pytest.fixture(scope="module")
def undisturbed(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = carry_out(compose(*tiny), folder)
    assert outcome.dataset is not None
    return outcome.dataset


def part(tiny: tuple[str, ...], text: str) -> RunSettings:
    return compose(*tiny, f"shard={text}")


def test_shards_in_any_order_and_number_make_the_run(
    tiny: tuple[str, ...], undisturbed: xr.Dataset, tmp_path: Path
) -> None:
    first = carry_out(part(tiny, "3/3"), tmp_path)
    assert first.dataset is None
    assert "its 1 clips are stored; 4 of the run's 5 clips are left to other shards" in first.summary
    assert status(tmp_path / "shards/3-of-3").state is State.SHARD
    assert (status(tmp_path).state, status(tmp_path).samples) == (State.STOPPED, 1)
    assert carry_out(part(tiny, "1/2"), tmp_path).dataset is None
    stored = snapshot(tmp_path / "shards/1-of-2/journal.bin")[1]
    assert stored.keys() == set(undisturbed["sample"].values[0::2]) - {undisturbed["sample"].values[2]}
    last = carry_out(part(tiny, "2/2"), tmp_path)
    assert last.dataset is not None
    xr.testing.assert_identical(bare(last.dataset), bare(undisturbed))
    assert last.dataset.attrs.keys() == undisturbed.attrs.keys()
    assert not list(tmp_path.glob("**/journal.bin"))
    again = carry_out(part(tiny, "1/3"), tmp_path)
    assert again.dataset is not None


def test_a_run_goes_on_from_shards_without_them(
    tiny: tuple[str, ...], undisturbed: xr.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    carry_out(part(tiny, "1/2"), tmp_path)
    with caplog.at_level("INFO"):
        outcome = carry_out(compose(*tiny), tmp_path)
    assert "taken over from shards: 3 samples" in caplog.text
    assert outcome.dataset is not None
    xr.testing.assert_identical(bare(outcome.dataset), bare(undisturbed))


def test_a_shard_made_with_other_settings_is_refused(tiny: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "shards" / "2-of-2"
    with RunStore(folder, {**run_identity(compose(*tiny)), "lalm_patch": "0.0.9"}) as store:
        store.add("x", {}, {})
    with pytest.raises(StoreError, match=r"2-of-2 holds 1 samples made with other settings \(lalm_patch: '0\.0\.9'"):
        carry_out(part(tiny, "1/2"), tmp_path)
    assert snapshot(folder / "journal.bin")[1].keys() == {"x"}


def test_whoever_merges_excludes_the_others(tiny: tuple[str, ...], undisturbed: xr.Dataset, tmp_path: Path) -> None:
    with RunStore(tmp_path, run_identity(compose(*tiny))):
        outcome = carry_out(part(tiny, "1/1"), tmp_path)
        assert outcome.dataset is None
        assert "in use by another process" in outcome.summary
    assert carry_out(part(tiny, "1/1"), tmp_path).dataset is not None


# What a run leaves behind


def test_errors_are_recorded_and_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def attempt(error: BaseException) -> None:
        with failure_recorded(folder, "the command"):
            raise error

    with pytest.raises(ValueError, match="broken"):
        attempt(ValueError("broken\nin two"))
    text = (folder / "error.txt").read_text()
    assert text.startswith("ValueError: broken in two\n\ncommand: the command\n")
    assert "Traceback (most recent call last)" in text
    assert (status(folder).state, status(folder).note) == (State.FAILED, "ValueError: broken in two")
    for exit_like in (SystemExit(), KeyboardInterrupt(), BusyError()):
        with pytest.raises(type(exit_like)):
            attempt(exit_like)
        assert not (folder / "error.txt").exists()
    assert status(folder).state is State.MISSING


def test_a_full_disk_still_tells_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lalm_patch.sweep.runs.replace_file", full)
    with pytest.raises(ValueError, match="the cause"), failure_recorded(tmp_path, ""):
        raise ValueError("the cause")


# Sweeps


def test_a_failed_run_does_not_stop_its_siblings(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    arguments = ("-m", *tiny, "data.limit=2", "granularity.layers=[99],[0]")
    done = run(tmp_path, *arguments)
    assert done.returncode == 1
    assert "sweep    1 of 2 runs finished; 1 failed\n" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    (error,) = tmp_path.glob("outputs/*/error.txt")
    assert "Traceback (most recent call last)" in error.read_text()
    (redo,) = re.findall(r"^redo +python -m lalm_patch (.*)$", done.stdout, re.MULTILINE)
    assert "'granularity.layers=[99]'" in redo
    again = run(tmp_path, *arguments)
    assert again.returncode == 1
    assert "1 of 2 runs to do; 1 finished before" in again.stderr
    assert "sweep    1 of 2 runs finished (1 of them before); 1 failed\n" in again.stdout


def test_joblib_survives_a_killed_worker(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """The pool breaks, its runs are started again; meanwhile a second process on one of the runs is refused."""
    slow = (*tiny, "granularity=token", "engine=direct", "granularity.layers=[1]")
    launcher = ("hydra/launcher=lalm_patch_joblib", "hydra.launcher.n_jobs=2")
    identity = run_identity(compose(*slow, "data.limit=5"))
    sweep = commands.start_fresh(tmp_path, *commands.LALM_PATCH, "-m", *launcher, *slow, "data.limit=4,5")
    folder = tmp_path / "outputs" / compose(*slow, "data.limit=5").run_name
    deadline = time.monotonic() + 200
    while not snapshot(folder / "journal.bin")[1]:
        assert sweep.poll() is None, sweep.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(BusyError, match=r"in use by another process \(pid \d+ on "):
        RunStore(folder, identity)
    found = re.match(r"pid (\d+) on", (folder / ".lock").read_text())
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)
    printed = "".join(sweep.communicate(timeout=280))
    assert sweep.returncode == 0, printed
    assert "a worker process was killed" in printed
    assert "sweep    2 of 2 runs finished\n" in printed
    assert open_result(folder).sizes["sample"] == 5


def test_killed_at_random_moments_of_whole_runs(tmp_path: Path) -> None:
    """A few of the kills that `benchmarks/kills.py` makes by the dozen."""
    script = str(commands.ROOT / "benchmarks" / "kills.py")
    arguments = ("granularity=layer", "data.limit=4", "threads=1")
    done = commands.run(tmp_path, script, "--kills", "5", "--seed", "1", *arguments, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "every result equals the undisturbed one, bit for bit" in done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) >= 5


# The queue


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: Sequence[str]) -> None:
    """A squeue of our own at the head of PATH."""
    path = folder / "squeue"
    path.write_text("\n".join(["#!/bin/sh", *script, ""]))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_queue_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue(tmp_path, monkeypatch, ["echo '12_0|RUNNING|None'", "echo '12_1|PENDING|PartitionTimeLimit'"])
    assert read_queue() == {"12_0": ("RUNNING", "None"), "12_1": ("PENDING", "PartitionTimeLimit")}


def test_a_queue_that_cannot_be_asked_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue(tmp_path, monkeypatch, ["echo 'Unable to contact slurm controller' >&2", "exit 1"])
    assert read_queue() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="squeue was not found"):
        read_queue()


def test_a_sweep_says_how_its_runs_are_collected(tmp_path: Path) -> None:
    def hint(*overrides: tuple[str, ...]) -> str:
        runs = [SweepRun(row, tmp_path / f"run{index}") for index, row in enumerate(overrides)]
        return sweep_summary(runs)[0].splitlines()[-1]

    both = ("model=demo", "attr=gender")
    assert hint((*both, "data.limit=4"), ("model=demo", "attr=animal", "data.limit=4")).endswith(tmp_path.name)
    assert hint((*both, "data.seed=1"), (*both, "data.seed=2")).endswith(" --by data.seed")
    assert hint((*both, "direction=noising", "seed=1"), (*both, "seed=2")).endswith(" --by direction.name --by seed")
