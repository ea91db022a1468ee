"""A refused sweep leaves nothing behind and replaces nothing; keys of its launcher are checked like settings."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest

JOBLIB = "hydra/launcher=lalm_patch_joblib"
SLURM = "hydra/launcher=lalm_patch_slurm"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("seed=1,-1",), "seed=-1: expected a whole number"),
        (("metric=probability,rank",), "are all read from one run"),
        (("granularity=layer,nope",), "granularity=nope: expected one of"),
        (("+hydra.launcher.foo=1",), "hydra.launcher.foo: this launcher has no such setting; it has none"),
        ((JOBLIB, "+hydra.launcher.n_job=1"), "the nearest is hydra.launcher.n_jobs"),
        ((JOBLIB, "hydra.launcher.n_jobs=x"), "hydra.launcher.n_jobs=x: expected a number of processes"),
        ((SLURM, "+hydra.launcher.partitions=gpu"), "the nearest is hydra.launcher.partition"),
        (("seed=1,2", "hydra.sweeper.max_batch_size=1", "data.limit=0"), "data.limit=0"),
    ],
)
def test_a_refused_sweep_leaves_nothing(given: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = commands.run(tmp_path, *commands.LALM_PATCH, "-m", "dry_run=true", "outputs=outputs", *given)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_refused_sweep_replaces_nothing(tmp_path: Path) -> None:
    """What is known of the sweep that ran in this folder before stays."""
    sweep = (*commands.LALM_PATCH, "-m", "dry_run=true", "outputs=outputs", "hydra.sweeper.max_batch_size=1")
    done = commands.run(tmp_path, *sweep, "seed=1,2")
    assert done.returncode == 1  # a dry run finishes nothing
    noted = tmp_path / "outputs" / "multirun.yaml"
    before = noted.read_bytes()
    assert b"seed=1,2" in before
    assert commands.run(tmp_path, *sweep, "seed=1,-1").returncode == 1
    assert noted.read_bytes() == before
