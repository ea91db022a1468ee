"""Whatever reads results verifies them the same way, names what is damaged, and still shows the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_collect import write

from lalm_patch.collect import main as collect
from lalm_patch.errors import StoreError
from lalm_patch.report import find_runs
from lalm_patch.storage.run_store import open_result
from lalm_patch.sweep.collection import read_runs
from lalm_patch.sweep.runs import State, SweepRun, read_result, sweep_summary


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    path.write_text("<html>this is no netCDF</html>")


DAMAGES = [cut, flip, empty, other]


@pytest.fixture
def runs(tmp_path: Path) -> list[SweepRun]:
    names = [("attr=gender",), ("attr=animal",)]
    return [SweepRun(name, write(tmp_path, *name), before=True) for name in names]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_sweep_names_the_damaged_run_and_shows_the_others(
    damage: Callable[[Path], None], runs: list[SweepRun]
) -> None:
    damage(runs[1].folder / "result.nc")
    text, all_done = sweep_summary(runs)
    assert not all_done
    assert "1 of 2 runs finished (1 of them before); 1 damaged" in text
    assert re.search(r"attr=gender +finished +4 of 6 samples count", text)
    assert re.search(r"attr=animal +damaged ", text)
    assert f"damaged  {runs[1].folder / 'result.nc'} " in text
    assert "Put back an intact copy, or remove result.nc and result.json" in text


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_readers_say_the_same(
    damage: Callable[[Path], None], runs: list[SweepRun], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(runs[0].folder / "result.nc")
    with pytest.raises(StoreError) as alone:
        open_result(runs[0].folder)
    said = str(alone.value)
    assert read_result(runs[0].folder)[0].note == said
    assert [run.status.note for run in read_runs([runs[0].folder.parent]) if run.dataset is None] == [said]
    with pytest.raises(StoreError, match=re.escape(said)):
        find_runs(runs[0].folder.parent)
    with pytest.raises(SystemExit, match=re.escape(f"error: {said}")):
        collect([str(runs[0].folder.parent)])
    assert "Traceback" not in capsys.readouterr().err


def test_a_receipt_that_is_damaged_is_named_too(runs: list[SweepRun]) -> None:
    cut(runs[0].folder / "result.json")
    flip(runs[0].folder / "result.json")
    found, dataset = read_result(runs[0].folder)
    assert found.state is State.DAMAGED
    assert dataset is None
    assert "result.json was altered or cut short" in sweep_summary(runs)[0]
