"""Means, intervals, figures and the summary, on datasets whose truth is known."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr

from lalm_patch.analysis import accuracy, exclusion_table, mean_recovery, peak_layer
from lalm_patch.checks import Check, to_json
from lalm_patch.figures import draw_run, plot_run, printable
from lalm_patch.results.dataset import build_dataset
from lalm_patch.storage.run_store import SampleRecord
from lalm_patch.summary import summary

OPTIONS = ("cat", "dog")
TEXTS = ["<eos>", "Which", " $cost$", " cat", "\n", " is"]
ROLES = ["template", "early", "early", "object", "template", "last"]


def sample(name: str, rates: np.ndarray | None, group: str = "", reason: str = "", label: str = "cat") -> SampleRecord:
    """A sample whose recovery rates are `rates`: p_clean 0.9, p_corrupted 0.1."""
    right = OPTIONS.index(label)
    answers = np.log(np.array([0.9, 0.1], np.float32))
    base = np.log(np.array([[0.05, 0.05], [0.5, 0.5]], np.float32))  # the corrupted run prefers the other option
    base[:, right] = answers
    if reason == "clean prediction wrong":
        base[0] = base[0][::-1]
    arrays = {
        "base_option_logits": base,
        "base_logsumexp": np.zeros(2, np.float32),
        "base_top_id": np.array([1, 2]),
    }
    if rates is not None:
        logits = np.full((*rates.shape, 2), np.log(0.01), np.float32)
        logits[..., right] = np.log(0.1 + 0.8 * rates)
        arrays |= {"patched_option_logits": logits, "patched_logsumexp": np.zeros(rates.shape, np.float32)}
    meta = {
        "label": label,
        "group": group or name,
        "exclusion": reason,
        "detail": "",
        "samples": 16000,
        "positions": 40,
        "audio_positions": 25,
        "first_text_position": 34,
        "token_ids": list(range(len(TEXTS))),
        "token_texts": TEXTS,
        "token_roles": ROLES,
        "option_order": list(OPTIONS),
    }
    return SampleRecord(name, arrays, meta)


def dataset(samples: list[SampleRecord], *dims: str, checks: tuple[Check, ...] = (), **attributes: str) -> xr.Dataset:
    layers = range(4)
    described = {
        "title": "Causal tracing of a test",
        "model_id": "tiny",
        "model_revision": "local:0",
        "model_layers": 4,
        "dtype": "float32",
        "engine": "replay",
        "settings": json.dumps({"model": {"name": "tiny"}, "attr": {"name": "pet"}, "seed": 0}),
        "checks": to_json(checks),
    }
    return build_dataset(samples, OPTIONS, dims or ("layer",), {"layer": layers}, described | attributes)


def curves(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.array([0.0, 0.2, 0.8, 1.0]) + np.array([0, 0.04, 0.02, 0]) * rng.normal(size=4) for _ in range(n)]


def test_mean_is_over_kept_samples_only() -> None:
    rates = curves(6)
    samples = [sample(f"s{i}", rate) for i, rate in enumerate(rates)]
    samples.append(sample("x", None, reason="clean prediction wrong"))
    found = mean_recovery(dataset(samples))
    np.testing.assert_allclose(found["mean"], np.mean(rates, axis=0), atol=1e-6)
    assert found["n"].values.tolist() == [6] * 4
    assert (found["low"] <= found["mean"] + 1e-9).all()
    assert (found["high"] >= found["mean"] - 1e-9).all()
    assert float(found["high"][1] - found["low"][1]) > 0


def test_repeating_a_speakers_clips_does_not_narrow_the_interval() -> None:
    """Clusters are drawn, not samples: every speaker heard three times is still as many speakers."""
    rates = curves(12)
    once = mean_recovery(dataset([sample(f"s{i}", rate, group=f"g{i}") for i, rate in enumerate(rates)]))
    thrice = mean_recovery(
        dataset([sample(f"s{i}_{k}", rate, group=f"g{i}") for i, rate in enumerate(rates) for k in range(3)])
    )
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(once[name], thrice[name], atol=1e-6)
    alone = mean_recovery(dataset([sample(f"s{i}_{k}", rate) for i, rate in enumerate(rates) for k in range(3)]))
    assert float(alone["high"][1] - alone["low"][1]) < 0.8 * float(once["high"][1] - once["low"][1])


def test_peak_is_the_first_of_the_largest() -> None:
    peak = peak_layer(dataset([sample(f"s{i}", np.array([0.0, 0.4, 1.0, 1.0])) for i in range(3)]))
    assert peak is not None
    assert peak.layer == 2


def test_ledger_and_accuracy() -> None:
    samples = [sample("a", curves(1)[0]), sample("b", None, reason="clean prediction wrong", label="dog")]
    found = dataset(samples)
    table = exclusion_table(found)
    assert int(table.sel(label="cat", reason="kept")) == 1
    assert int(table.sel(label="dog", reason="clean prediction wrong")) == 1
    assert accuracy(found).clean == 0.5
    assert accuracy(found).n == 2


@pytest.mark.parametrize("dims", [("layer",), ("layer", "token")])
def test_figure_shows_the_numbers_beside_it(tmp_path: Path, dims: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    shape = (4,) if dims == ("layer",) else (4, len(TEXTS))
    found = dataset([sample(f"s{i}", rng.uniform(0, 1, shape)) for i in range(5)], *dims)
    files = {path.suffix: path for path in plot_run(found, tmp_path)}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    assert files[".pdf"].read_bytes().startswith(b"%PDF")
    rows = list(csv.DictReader(io.StringIO(files[".csv"].read_text())))
    means = mean_recovery(found)["mean"].values.ravel()
    np.testing.assert_allclose([float(row["mean"]) for row in rows], means, rtol=1e-5, atol=1e-9)
    before = files[".png"].read_bytes()
    plot_run(found, tmp_path)
    assert files[".png"].read_bytes() == before


@pytest.mark.parametrize("dims", [("layer",), ("layer", "token")])
def test_run_without_a_kept_sample_says_why(tmp_path: Path, dims: tuple[str, ...]) -> None:
    found = dataset([sample("a", None, reason="clean prediction wrong")], *dims)
    files = plot_run(found, tmp_path)
    assert all(path.stat().st_size > 0 for path in files)
    text = summary(found, files)
    assert "no sample counts: clean prediction wrong (1)" in text
    assert "0 of 1 count" in text


def test_summary_has_what_one_needs_to_trust_it(tmp_path: Path) -> None:
    failed = Check.at_most("replay_equals_direct", 2e-3, 1e-5, "use engine=direct")
    samples = [sample(f"s{i}", np.array([0.0, 0.25, 0.75, 1.0])) for i in range(8)]
    samples += [sample(name, None, reason="clean prediction wrong", label="dog") for name in ("x", "y")]
    found = dataset(samples, checks=(failed,), planted_attention_layers="[1, 3]")
    text = summary(found, [tmp_path / "result.nc"])
    for expected in (
        "8 of 10 count; excluded: clean prediction wrong 2",
        "clean 80%, corrupted 0%, chance 50% (n=10)",
        "layer 0: 0.00; above one half from layer 2; layer 3: 1.00",
        "layer 3: 1.00 [1.00, 1.00], n=8 of 8 groups",
        "attention planted in layers 1 to 2 only",
        "0 of 1 passed",
        "FAILED replay_equals_direct: FAILED (0.002, bound 1e-05) - use engine=direct",
        str(tmp_path / "result.nc"),
    ):
        assert expected in text


def test_token_summary_names_the_best_token_before_the_last() -> None:
    rates = np.zeros((4, len(TEXTS)))
    rates[2, 3], rates[3, 5] = 0.6, 1.0
    found = dataset([sample(f"s{i}", rates) for i in range(3)], "layer", "token")
    assert "before the last token: layer 2, token ' cat' (object): 0.60" in summary(found, [])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_few_groups_have_no_interval_and_everything_says_why(count: int, tmp_path: Path) -> None:
    found = dataset([sample(f"s{i}", np.array([0.0, 0.25, 0.75, 1.0])) for i in range(count)])
    text = summary(found, [])
    assert "nan" not in text
    said = f"too few groups: {count}, expected at least 6"
    assert f"layer 3: 1.00 (no interval, {said}), n={count} of {count} groups" in text
    files = {path.suffix: path for path in plot_run(found, tmp_path)}
    rows = list(csv.DictReader(io.StringIO(files[".csv"].read_text())))
    assert {(row["low"], row["high"], row["no_interval"]) for row in rows} == {("", "", said)}
    figure = draw_run(found, mean_recovery(found))
    entries = [entry.get_text() for entry in figure.axes[0].get_legend().get_texts()]
    assert f"no 95 % interval: {said}" in entries
    assert ("single samples" in entries) == (count > 1)


def test_six_groups_have_an_interval(tmp_path: Path) -> None:
    found = dataset([sample(f"s{i}", rate) for i, rate in enumerate(curves(6))])
    files = {path.suffix: path for path in plot_run(found, tmp_path)}
    rows = list(csv.DictReader(io.StringIO(files[".csv"].read_text())))
    assert {row["no_interval"] for row in rows} == {""}
    assert all(row["low"] and row["high"] for row in rows)


def test_no_readable_clip_is_said_in_words() -> None:
    unusable = sample("a", None, reason="clip unusable")
    unusable = SampleRecord("a", {}, unusable.meta | {"token_ids": [], "token_texts": [], "token_roles": []})
    text = summary(dataset([unusable]), [])
    assert "nan" not in text
    assert "no clip could be used" in text


def test_a_class_lost_to_the_filter_is_named() -> None:
    samples = [sample(f"s{i}", np.array([0.0, 0.25, 0.75, 1.0])) for i in range(2)]
    samples += [sample(f"d{i}", None, reason="corrupted prediction right", label="dog") for i in range(2)]
    assert "no clip of dog counts" in summary(dataset(samples), [])


def test_figure_leaves_the_backend_alone(tmp_path: Path) -> None:
    before = matplotlib.rcParams["backend"]
    plot_run(dataset([sample(f"s{i}", curves(1, i)[0]) for i in range(3)]), tmp_path)
    assert matplotlib.rcParams["backend"] == before


def test_token_labels_can_be_printed() -> None:
    for text in (" cat", "\n", "$x$", "\ufffd", "\x07", "한국", ""):
        shown = printable(text)
        assert "\n" not in shown
        assert shown.isprintable()
