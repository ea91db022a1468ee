"""Runs on the demo that tests of several grids look at, and what has to hold for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

import lalm_patch
from lalm_patch.checks import Check, from_json

TOLERANCE = 1e-5


def runs_on_demo(
    folder: Path, common: Sequence[str], kinds: Mapping[str, Sequence[str]]
) -> dict[str, lalm_patch.RunOutcome]:
    """A run of each kind, by name."""
    return {name: lalm_patch.trace(*common, *own, f"outputs={folder}") for name, own in kinds.items()}


def sound(outcome: lalm_patch.RunOutcome, *dims: str) -> tuple[xr.Dataset, dict[str, Check]]:
    """The run's dataset and checks by name: labelled by these dimensions, finite where it counts, checked, drawn."""
    dataset = outcome.dataset
    assert dataset is not None
    assert dataset["recovery_rate"].dims == ("sample", *dims)
    assert np.isfinite(dataset["recovery_rate"].values[dataset["kept"].values]).all()
    checks = {check.name: check for check in from_json(dataset.attrs["checks"])}
    assert checks["replay_equals_direct"].value < TOLERANCE
    assert all(check.passed for check in checks.values())
    assert {"figure.png", "figure.csv"} <= {path.name for path in outcome.files}
    return dataset, checks
