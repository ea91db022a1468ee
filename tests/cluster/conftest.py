"""Tests that need more than Python: Debian's Slurm. They are run by name, `pytest tests/cluster`, never by chance."""

from __future__ import annotations

# isort: off
import offline  # noqa: F401  (before the libraries that read it)

# isort: on
import shutil

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Without Slurm these tests fail at once and say why; skipped, they would look passed."""
    needed = ("slurmctld", "slurmd", "munged", "sbatch")
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    if missing := [name for name in needed if shutil.which(name) is None and shutil.which(name, path=path) is None]:
        raise pytest.UsageError(
            f"tests/cluster starts a real Slurm and lacks {', '.join(missing)}: "
            "apt-get install --no-install-recommends slurm-wlm slurm-client munge"
        )
