"""Sweeps on a real Slurm of two virtual nodes, which the test starts on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xarray as xr
from slurm_here import SlurmHere

from lalm_patch.config import compose
from lalm_patch.storage.journal import snapshot
from lalm_patch.storage.run_store import open_result

# Every patched pass on its own: a second or more a clip for the token-wise runs, time enough to kill one.
SETTINGS = ("engine=direct", "data.limit=5", "granularity.layers=[0,5]")
SWEEP = ("attr=emotion,gender,animal", "granularity=layer,token", *SETTINGS)
LAUNCHER = (
    "hydra/launcher=lalm_patch_slurm",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=2",
    "hydra.launcher.timeout_min=30",
    "hydra.launcher.array_parallelism=3",
    "hydra.launcher.poll_s=1",
    "hydra.launcher.result_wait_s=3",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmHere]:
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, SlurmHere(Path(folder), nodes=2) as running:
        yield running
        for process in _started:  # of a test that failed; one that ended takes no harm
            process.kill()
            process.wait()


_started: list[subprocess.Popen[str]] = []


def start(slurm: SlurmHere, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "lalm_patch", "-m", *LAUNCHER, *arguments],
        cwd=folder,
        env={**slurm.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _started.append(process)
    return process


def sweep(slurm: SlurmHere, folder: Path, *arguments: str) -> tuple[int, str]:
    process = start(slurm, folder, *arguments)
    printed, _ = process.communicate(timeout=900)
    return process.returncode, printed


def run_folder(folder: Path, *overrides: str) -> Path:
    return folder / "outputs" / compose(*overrides, *SETTINGS).run_name


def wait_for_a_stored_sample(folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while not snapshot(folder / "journal.bin")[1]:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no sample was stored"
        time.sleep(0.02)


def results(folder: Path) -> dict[str, xr.Dataset]:
    found = {path.parent.name: open_result(path) for path in sorted(folder.glob("outputs/*/result.nc"))}
    return {name: dataset.drop_attrs(deep=False) for name, dataset in found.items()}


@pytest.fixture(scope="module")
def undisturbed(slurm: SlurmHere, tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.Dataset]:
    """The results of the sweep, six Slurm jobs that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    before = set(slurm.job_states())
    code, printed = sweep(slurm, folder, *SWEEP)
    assert code == 0, printed
    assert "sweep    6 of 6 runs finished\n" in printed
    states = [state for job, state in slurm.job_states().items() if job not in before]
    assert states == ["COMPLETED"] * 6
    return results(folder)


@pytest.mark.timeout(1800)
def test_killed_jobs_are_the_only_ones_submitted_again(
    slurm: SlurmHere, undisturbed: dict[str, xr.Dataset], tmp_path: Path
) -> None:
    cancelled = run_folder(tmp_path, "attr=emotion", "granularity=token")
    killed = run_folder(tmp_path, "attr=gender", "granularity=token")
    before = set(slurm.job_states())
    process = start(slurm, tmp_path, *SWEEP)
    wait_for_a_stored_sample(cancelled, process)
    cancelled_job = json.loads((cancelled / "slurm_job.json").read_text())["job"]
    slurm.run("scancel", cancelled_job)
    wait_for_a_stored_sample(killed, process)
    killed_job = json.loads((killed / "slurm_job.json").read_text())["job"]
    found = re.match(r"pid (\d+) on", (killed / ".lock").read_text())
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 1, printed
    assert "sweep    4 of 6 runs finished; 2 stopped\n" in printed
    for line in ("attr=emotion granularity=token", "attr=gender granularity=token"):
        assert re.search(rf"^(redo| {{4}}) {{5}}python -m lalm_patch {line} ", printed, re.MULTILINE), printed
    states = {job: state for job, state in slurm.job_states().items() if job not in before}
    assert len(states) == 6
    assert {job for job, state in states.items() if state != "COMPLETED"} == {cancelled_job, killed_job}
    assert states[cancelled_job] == "CANCELLED"
    assert states[killed_job] == "FAILED"
    stored = {folder: set(snapshot(folder / "journal.bin")[1]) for folder in (cancelled, killed)}
    assert all(stored.values())

    code, printed = sweep(slurm, tmp_path, *SWEEP)
    assert code == 0, printed
    assert "2 of 2 runs to submit" in printed
    assert "sweep    6 of 6 runs finished (4 of them before)\n" in printed
    assert len(set(slurm.job_states()) - before) == 8
    for folder in (cancelled, killed):
        assert "going on:" in (folder / "lalm_patch.log").read_text()
    again = results(tmp_path)
    assert again.keys() == undisturbed.keys()
    for name, dataset in again.items():
        xr.testing.assert_identical(dataset, undisturbed[name])

    code, printed = sweep(slurm, tmp_path, *SWEEP)
    assert code == 0, printed
    assert "0 of 6 runs to do" in printed
    assert len(set(slurm.job_states()) - before) == 8


@pytest.mark.timeout(600)
def test_a_failing_run_fails_its_job_and_leaves_its_traceback(slurm: SlurmHere, tmp_path: Path) -> None:
    """Slurm sees a failure, the siblings finish, and a time limit that came too often is not taken for a bad clip."""
    before = set(slurm.job_states())
    code, printed = sweep(slurm, tmp_path, "data.limit=2", "granularity.layers=[0],[99]")
    assert code == 1
    assert "sweep    1 of 2 runs finished; 1 failed\n" in printed
    (error,) = tmp_path.glob("outputs/*/error.txt")
    text = error.read_text()
    assert text.startswith("ConfigError: granularity.layers=[99]: the model has decoder layers 0 to 7")
    assert "Traceback" in text
    assert "Slurm job: " in text
    states = sorted(state for job, state in slurm.job_states().items() if job not in before)
    assert states == ["COMPLETED", "FAILED"]


@pytest.mark.timeout(600)
def test_the_last_time_limit_ends_a_run_that_can_go_on(slurm: SlurmHere, tmp_path: Path) -> None:
    """The signal before the limit (sent by hand): submitit raises in the sample loop, and nothing may swallow it."""
    folder = run_folder(tmp_path, "granularity=token")
    arguments = ("granularity=token", *SETTINGS)
    limits = ("hydra.launcher.timeout_min=10", "hydra.launcher.max_num_timeout=0")
    process = start(slurm, tmp_path, *arguments, *limits)
    wait_for_a_stored_sample(folder, process)
    job = json.loads((folder / "slurm_job.json").read_text())["job"]
    slurm.run("scancel", "--signal=USR2", job)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1, printed
    assert (folder / "error.txt").read_text().startswith("UncompletedJobError: Job not requeued because: timed-out")
    assert slurm.job_states()[job] == "FAILED"
    assert snapshot(folder / "journal.bin")[1]


@pytest.mark.timeout(600)
def test_a_preempted_job_is_requeued_and_goes_on(
    slurm: SlurmHere, undisturbed: dict[str, xr.Dataset], tmp_path: Path
) -> None:
    """The signal long before the time limit is a preemption: the same job comes back, and goes on where it was."""
    arguments = ("attr=emotion", "granularity=token", *SETTINGS)
    folder = run_folder(tmp_path, "attr=emotion", "granularity=token")
    before = set(slurm.job_states())
    process = start(slurm, tmp_path, *arguments)
    wait_for_a_stored_sample(folder, process)
    job = json.loads((folder / "slurm_job.json").read_text())["job"]
    slurm.run("scancel", "--signal=USR2", job)
    deadline = time.monotonic() + 120
    while slurm.job_states()[job] != "PENDING":
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, slurm.job_states()[job]
        time.sleep(0.2)
    stored = set(snapshot(folder / "journal.bin")[1])
    assert 0 < len(stored) < 5
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would let it wait two minutes
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert set(slurm.job_states()) - before == {job}
    assert slurm.job_states()[job] == "COMPLETED"
    assert f"going on: {len(stored)} of 5 samples" in (folder / "lalm_patch.log").read_text()
    ((name, dataset),) = results(tmp_path).items()
    xr.testing.assert_identical(dataset, undisturbed[name])


@pytest.mark.timeout(600)
def test_shards_as_jobs_make_one_run(slurm: SlurmHere, undisturbed: dict[str, xr.Dataset], tmp_path: Path) -> None:
    arguments = ("attr=emotion", "granularity=layer", *SETTINGS, "shard=1/3,2/3,3/3")
    code, printed = sweep(slurm, tmp_path, *arguments)
    assert code == 0, printed
    assert "sweep    3 of 3 runs finished\n" in printed
    ((name, dataset),) = results(tmp_path).items()
    xr.testing.assert_identical(dataset, undisturbed[name])


@pytest.mark.timeout(600)
def test_a_client_that_died_does_not_submit_twice(slurm: SlurmHere, tmp_path: Path) -> None:
    arguments = ("granularity=token", *SETTINGS)
    folder = run_folder(tmp_path, "granularity=token")
    before = set(slurm.job_states())
    process = start(slurm, tmp_path, *arguments)
    wait_for_a_stored_sample(folder, process)
    process.kill()
    process.communicate()
    code, printed = sweep(slurm, tmp_path, *arguments)
    assert code == 0, printed
    assert "in the queue already, not submitted again" in printed
    assert len(set(slurm.job_states()) - before) == 1
    assert len(results(tmp_path)) == 1
