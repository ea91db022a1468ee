"""The order of the rooms: the contracts of pyproject.toml hold, and each of them fails where it is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = 10
"""Most modules that may lie at the top of the package."""

PLANTED = {
    "Data flows one way": ("storage/jobs.py", "from lalm_patch.tracing import metrics"),
    "No import circle": ("analysis/resampling.py", "from lalm_patch.analysis import recovery"),
    "Only models/ and engine/ import nnsight": ("tracing/tracer.py", "import nnsight"),
    "Only models/ knows model families": ("tracing/transcripts.py", "from lalm_patch.models.desta import Desta2"),
    "without torch": ("figures/style.py", "import torch"),
}
"""By contract: where an import against it is planted, and which."""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its contracts, to break."""
    folder = tmp_path_factory.mktemp("copy")
    only_code = shutil.ignore_patterns("data", "__pycache__")
    for name in ("lalm_patch", "hydra_plugins"):
        shutil.copytree(ROOT / name, folder / name, ignore=only_code)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_contracts_hold(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert f"Contracts: {len(PLANTED)} kept, 0 broken." in done.stdout


@pytest.mark.parametrize("contract", PLANTED)
def test_a_contract_fails_where_it_is_broken(contract: str, copy: Path) -> None:
    name, line = PLANTED[contract]
    path = copy / "lalm_patch" / name
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("from __future__ import annotations\n", f"from __future__ import annotations\n{line}\n")
    )
    try:
        done = lint(copy)
    finally:
        path.write_text(text, encoding="utf-8")
    broken = [line for line in done.stdout.splitlines() if "BROKEN" in line]
    assert done.returncode == 1
    assert any(contract in line for line in broken), done.stdout


def test_few_modules_lie_at_the_top() -> None:
    assert len(list((ROOT / "lalm_patch").glob("*.py"))) <= TOP


def test_every_room_says_what_goes_in_and_out() -> None:
    packages = list((ROOT / "lalm_patch").glob("*/__init__.py"))
    assert len(packages) >= 13
    for path in packages:
        first = path.read_text(encoding="utf-8").split('"""')[1].strip().splitlines()[0]
        assert len(first) > 30, path


@pytest.mark.parametrize("arguments", [["--help"], ["attr=nonsense"], ["--cfg", "job"]], ids=lambda given: given[0])
def test_what_needs_no_model_does_not_wait_for_one(arguments: list[str], tmp_path: Path) -> None:
    """Torch and transformers take seconds to import, xarray half of one."""
    program = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'nnsight', 'xarray', 'matplotlib'}\n"
        "atexit.register(lambda: print('loaded:', sorted(heavy & set(sys.modules))))\n"
        "runpy.run_module('lalm_patch', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if arguments == ["attr=nonsense"] else 0), done.stderr
    assert "loaded: []" in done.stdout, done.stdout[-300:]
