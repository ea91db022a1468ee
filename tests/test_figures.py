"""Figures of several runs and of one clip: the numbers beside them, and what is drawn from them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import seaborn
import xarray as xr

from benchmarks.simulation import ROLES, Planted, simulate
from lalm_patch.analysis import mean_recovery, variants
from lalm_patch.errors import DataError
from lalm_patch.figures import plot_clip, plot_layers, plot_ledger, plot_segments, styled
from lalm_patch.figures.style import PALETTE, in_order, looks
from lalm_patch.figures.sweep import draw_layers, layer_rows


def rows_of(files: list[Path]) -> list[dict[str, str]]:
    kinds = {path.suffix: path for path in files}
    assert kinds[".png"].read_bytes().startswith(b"\x89PNG")
    assert kinds[".pdf"].read_bytes().startswith(b"%PDF")
    return list(csv.DictReader(io.StringIO(kinds[".csv"].read_text())))


def sweep(attributes: tuple[str, ...] = ("gender", "animal"), token_wise: bool = False) -> list[xr.Dataset]:
    planted = {"voxtral": Planted(layers=16, centre=6.0), "qwen2_audio": Planted(layers=20, centre=15.0)}
    return [
        simulate(truth, seed=index, groups=12, token_wise=token_wise, name=(model, attribute))
        for index, (model, truth) in enumerate(planted.items())
        for attribute in attributes
    ]


def test_the_palette_is_seaborns() -> None:
    assert list(PALETTE) == seaborn.color_palette("colorblind")


def test_figure_2_holds_every_run_and_its_n(tmp_path: Path) -> None:
    runs = sweep()
    rows = rows_of(plot_layers(runs, tmp_path))
    assert len(rows) == 2 * (16 + 20)
    for run, model, attribute in zip(
        runs, ["voxtral"] * 2 + ["qwen2_audio"] * 2, ["gender", "animal"] * 2, strict=True
    ):
        of_run = [row for row in rows if (row["model"], row["attribute"]) == (model, attribute)]
        expected = run.recovery_rate.mean("sample")
        np.testing.assert_allclose([float(row["mean"]) for row in of_run], expected)
        assert {row["n"] for row in of_run} == {str(run.sizes["sample"])}
        assert float(of_run[-1]["depth"]) == 1.0
    first = (tmp_path / "figure2.png").read_bytes()
    plot_layers(runs, tmp_path)
    assert (tmp_path / "figure2.png").read_bytes() == first


def test_runs_that_differ_in_a_setting_alone_stay_apart(tmp_path: Path) -> None:
    """Five seeds of one model and attribute are five lines and five ledgers, not one."""
    runs = []
    for seed in range(3):
        run = simulate(Planted(layers=8, centre=4.0), seed, groups=4 + seed)
        settings = json.loads(run.attrs["settings"]) | {"data": {"seed": seed}, "run_name": f"run{seed}"}
        identity = json.dumps({"data.seed": str(seed)})
        runs.append(run.assign_attrs(settings=json.dumps(settings), run_identity=identity))
    assert variants(runs) == ["data.seed=0", "data.seed=1", "data.seed=2"]
    assert variants(runs[:1]) == [""]
    assert variants([runs[0], runs[0]]) == ["#1", "#2"]
    rows = rows_of(plot_layers(runs, tmp_path))
    for run, variant in zip(runs, variants(runs), strict=True):
        means = [float(row["mean"]) for row in rows if row["variant"] == variant]
        np.testing.assert_allclose(means, run.recovery_rate.mean("sample"))
    with styled():
        (axis,) = draw_layers(layer_rows(runs)).axes
    legend = axis.get_legend()
    assert legend is not None
    assert [text.get_text().split(" (")[0] for text in legend.get_texts()] == [f"model, {v}" for v in variants(runs)]
    counted = rows_of(plot_ledger(runs, tmp_path))
    for run, variant in zip(runs, variants(runs), strict=True):
        mine = [int(row["samples"]) for row in counted if row["run"].endswith(variant)]
        assert sum(mine) == run.sizes["sample"]


def test_drawn_lines_and_legends_are_the_rows() -> None:
    runs = sweep()
    rows = layer_rows(runs)
    with styled():
        figure = draw_layers(rows, relative=True)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["animal", "gender"]
    curves = [line for line in figure.axes[1].lines if len(line.get_xdata()) in (16, 20)]
    assert sorted(line.get_label() for line in curves) == [
        f"qwen2_audio (n = {runs[2].sizes['sample']})",
        f"voxtral (n = {runs[0].sizes['sample']})",
    ]
    for line, run in zip(curves, (runs[0], runs[2]), strict=True):
        np.testing.assert_allclose(line.get_ydata(), mean_recovery(run)["mean"])
        assert line.get_xdata()[-1] == 1.0


def test_models_of_the_paper_always_look_the_same() -> None:
    few, many = looks(["voxtral"]), looks(["voxtral", "another", "desta2"])
    assert few["voxtral"] == many["voxtral"]
    assert len(set(looks(["x", "y"]).values())) == 7
    assert in_order(["pet", "language", "animal"]) == ["animal", "language", "pet"]


def test_segment_figure_holds_the_profiles(tmp_path: Path) -> None:
    (run,) = sweep(("gender",), token_wise=True)[:1]
    rows = rows_of(plot_segments([run], tmp_path))
    early = [float(row["mean"]) for row in rows if row["segment"] == "early"]
    expected = run.recovery_rate.values[:, :, np.array(ROLES) == "early"].mean(axis=(0, 2))
    np.testing.assert_allclose(early, expected)
    with pytest.raises(ValueError, match="token-wise"):
        plot_segments(sweep(), tmp_path)
    with pytest.raises(ValueError, match="layer-wise"):
        plot_layers([run], tmp_path)


def test_ledger_counts_every_clip_once(tmp_path: Path) -> None:
    (run,) = sweep(("gender",))[:1]
    reasons = run.exclusion.values.copy()
    reasons[:5] = "clean prediction wrong"
    run = run.assign(exclusion=("sample", reasons), kept=("sample", reasons == ""))
    rows = rows_of(plot_ledger([run], tmp_path))
    assert sum(int(row["samples"]) for row in rows) == run.sizes["sample"]
    counts = {(row["class"], row["reason"]): int(row["samples"]) for row in rows}
    assert counts["cat", "clean prediction wrong"] == 5
    assert counts["dog", "kept"] == 0


@pytest.mark.parametrize("token_wise", [False, True])
def test_clip_figure_holds_the_clips_own_rates(tmp_path: Path, token_wise: bool) -> None:
    run = simulate(Planted(layers=6, centre=3.0), seed=1, groups=4, token_wise=token_wise)
    waveform = np.random.default_rng(0).normal(0, 0.1, 16_000)
    rows = rows_of(plot_clip(run, "clip2", waveform, tmp_path))
    expected = run.recovery_rate.sel(sample="clip2").values.ravel()
    np.testing.assert_allclose([float(row["recovery_rate"]) for row in rows], expected)
    plot_clip(run, "clip2", np.zeros(100), tmp_path)  # silence, shorter than a window of the spectrogram
    with pytest.raises(DataError, match="no clip 'other'"):
        plot_clip(run, "other", waveform, tmp_path)
    dropped = run.assign(kept=("sample", np.zeros(run.sizes["sample"], bool)))
    assert len(rows_of(plot_clip(dropped, "clip2", waveform, tmp_path, answers=False))) == len(rows)  # and marked
    dropped["p_patched"] = dropped["p_patched"] * np.nan
    with pytest.raises(DataError, match=r"was not patched.*trace_excluded=true"):
        plot_clip(dropped, "clip2", waveform, tmp_path)


def test_planted_windows_are_drawn_under_the_curves() -> None:
    planted, plain = sweep(("gender",))
    planted = planted.assign_attrs(planted_attention_layers="[1, 3]")
    rows = layer_rows([planted, plain])
    lowest = min(row["low"] for row in rows if not np.isnan(row["low"]))
    for relative, scale in ((False, 1), (True, rows[0]["layers"] - 1)):
        with styled():
            (axis,) = draw_layers(rows, relative).axes
        (bar,) = (line for line in axis.lines if line.get_lw() == 4 and len(line.get_xdata()))
        np.testing.assert_allclose(bar.get_xdata(), np.array([0.5, 2.5]) / scale)
        assert axis.get_ylim()[0] < max(bar.get_ydata()) < min(0, lowest)
