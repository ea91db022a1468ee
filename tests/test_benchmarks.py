"""The benchmarks run, and what they compare computes the same numbers."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ModuleType:
    """Import a script, with its command line in place."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return importlib.import_module(name)


@pytest.mark.parametrize("shape", ["voxtral", "qwen2_audio"])
def test_everything_measured_computes_the_same_logits(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ("--layers=2", "--hidden=64", "--text=5", "--cells=4", "--rows=3", "--repeats=1", "--threads=1")
    target = tmp_path / "peers.json"
    script = benchmark("peers", monkeypatch, f"--shape={shape}", *size, f"--json={target}")
    monkeypatch.setattr(script, "find_spec", lambda _name: None)  # other tools may or may not be installed
    script.main()
    (table,) = json.loads(target.read_text())["tables"]
    differences = {row[0]: row[3] for row in table["rows"][1:]}
    assert len(differences) == 5
    assert max(differences.values()) < 1e-4
    assert all(row[1] > 0 for row in table["rows"])


def test_the_products_counted_are_those_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, hidden, text = 3, 64, 4
    target = tmp_path / "limit.json"
    arguments = (f"--layers={layers}", f"--hidden={hidden}", f"--text={text}", "--repeats=1", "--threads=1")
    benchmark("limit", monkeypatch, *arguments, f"--json={target}").main()
    note = json.loads(target.read_text())["tables"][0]["notes"][0]
    base = 2
    # All cells fit one pack: from the second layer on, in the last one keys and values first, then the last positions.
    # The head: base runs, cells from the last layer, cells that start above it.
    products = 7 * base * layers + 7 * (layers - 2) + (3 + 7) + base + 2
    assert f"{layers * text} cells, {products} products" in note


def test_results_replace_the_block_of_the_page_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("run_all", monkeypatch)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold numbers\n{script.END}\nafter\n")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "FIGURE", tmp_path / "figure.png")
    peers = {"title": "t", "columns": ["", "ms", "times", "d"], "rows": [["a", 1.0, 1.0, 0.0]], "notes": ["A note."]}
    growth = {"title": "g", "columns": ["layers", "c", "u", "s", "f", "p"], "rows": [[8, 1, 2, 0.5, 1.0, 3.0]]}
    results = {name: {"machine": "m", "tables": [table]} for name, table in (("peers", peers), ("scaling", growth))}
    script.write(results)
    script.draw(results)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old numbers" not in text
    assert "| a | 1 | 1 | 0 |" in text
    assert "A note." in text
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
