"""Pictures of several runs: Figure 2 of the paper, segment profiles, who counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lalm_patch.analysis import (
    KEPT,
    about,
    exclusion_table,
    mean_recovery,
    planted_window,
    segment_profiles,
    variants,
)
from lalm_patch.analysis.resampling import too_few
from lalm_patch.figures.style import PALETTE, ROLE_COLOURS, as_csv, in_order, label, looks, panels, save, styled, words

Rows = list[dict[str, Any]]

PLANTED_HEIGHT = 0.06
"""Recovery that the bar of a planted window takes up below the curves."""
LEGEND_LINE = 0.15
"""Inches that a line of a legend takes below its panel."""


def plot_layers(runs: Sequence[xr.Dataset], folder: Path, name: str = "figure2", relative: bool = False) -> list[Path]:
    """Figure 2: mean recovery over layers, one panel per attribute, all models, with 95 % bands over groups.

    Args:
        runs: datasets; the layer-wise ones are drawn.
        folder: where the picture (PNG, PDF) and the drawn numbers (CSV) go.
        name: of the files.
        relative: draw against the share of the decoder's depth, so that models of different depth compare.

    Raises:
        ValueError: none of the runs is layer-wise.
        StoreError: a file cannot be written.
    """
    rows = layer_rows(runs)
    with styled():
        return save(draw_layers(rows, relative), folder, name, as_csv(rows))


def layer_rows(runs: Sequence[xr.Dataset]) -> Rows:
    """What `plot_layers` draws: one row per run and layer."""
    rows: Rows = []
    for run, variant in zip(runs, variants(runs), strict=True):
        info = about(run)
        if info.granularity != "layer":
            continue
        recovery = mean_recovery(run, seed=info.seed)
        for index, layer in enumerate(recovery["layer"].values):
            numbers = {key: float(recovery[key][index]) for key in ("mean", "low", "high")}
            counts = {key: int(recovery[key][index]) for key in ("n", "groups")}
            place = {"layer": int(layer), "depth": int(layer) / max(info.layers - 1, 1)}
            which = {"attribute": info.attribute, "model": info.model, "variant": variant, "rate": info.measure}
            first, end = planted_window(run) or (np.nan, np.nan)
            planted = {"planted_first": first, "planted_end": end, "layers": info.layers}
            rows.append({**which, **place, **numbers, **counts, **_why(counts["groups"]), **planted})
    if not rows:
        raise ValueError("Figure 2 needs at least one layer-wise run (granularity=layer)")
    return rows


def draw_layers(rows: Rows, relative: bool = False) -> Figure:
    """The picture of `plot_layers` from its rows; to be called within `styled()`."""
    attributes = in_order(row["attribute"] for row in rows)
    shown = looks(_line(row) for row in rows)
    figure, axes = panels(len(attributes), 3.1, 2.2, gap=0.8 + LEGEND_LINE * _lines(len(shown) + 1))
    key = "depth" if relative else "layer"
    planted = [row for row in rows if not np.isnan(row["planted_first"])]
    room = PLANTED_HEIGHT * len({row["model"] for row in planted})
    bottom, top = _ends(rows)
    for attribute, axis in zip(attributes, axes, strict=True):
        for level in (0, 1):
            axis.axhline(level, color="0.6", lw=0.7, zorder=1)
        for name in dict.fromkeys(_line(row) for row in rows if row["attribute"] == attribute):
            line = [row for row in rows if row["attribute"] == attribute and _line(row) == name]
            x, mean, low, high = (np.array([row[name] for row in line]) for name in (key, "mean", "low", "high"))
            colour, mark = shown[name]
            text = f"{words(name)} (n = {max(row['n'] for row in line)}{_few(line)})"
            axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            every = max(1, len(x) // 10)
            axis.plot(x, mean, color=colour, lw=1.4, marker=mark, ms=3.5, markevery=every, label=text)
        _draw_planted(axis, [row for row in planted if row["attribute"] == attribute], shown, relative, bottom)
        rates = {row["rate"] for row in rows if row["attribute"] == attribute}
        axis.set_ylabel(rates.pop() if len(rates) == 1 else "share of the gap moved")
        _dress(axis, words(attribute), "share of depth" if relative else "decoder layer", whole=not relative)
        axis.set_ylim(bottom - room, top)
    return figure


def _draw_planted(axis: Any, lines: Rows, shown: dict[str, tuple[Any, str]], relative: bool, top: float) -> None:
    """The truth under the curves: a bar over the layers that attend, for each model of which they are known.

    Args:
        axis: the panel.
        lines: rows of such models; a model's runs share a bar, which has their colour if there is one only.
        shown: looks of the lines.
        relative: whether the panel's axis is the share of depth.
        top: recovery below which there is room.
    """
    of_model = {row["model"]: row for row in lines}
    for number, row in enumerate(of_model.values()):
        names = {_line(other) for other in lines if other["model"] == row["model"]}
        colour = shown[_line(row)][0] if len(names) == 1 else "0.4"
        scale = max(row["layers"] - 1, 1) if relative else 1
        ends = ((row["planted_first"] - 0.5) / scale, (row["planted_end"] - 0.5) / scale)
        height = top - PLANTED_HEIGHT * (number + 0.5)
        axis.plot(ends, [height] * 2, color=colour, lw=4, solid_capstyle="butt", alpha=0.6)
    if lines:
        axis.plot([], [], color="0.6", lw=4, label="attention planted here")


def _line(row: dict[str, Any]) -> str:
    """Name of a run's line in a panel."""
    return _named(row["model"], row["variant"])


def _named(name: str, variant: str) -> str:
    return f"{name}, {variant}" if variant else name


def plot_segments(runs: Sequence[xr.Dataset], folder: Path, name: str = "segments") -> list[Path]:
    """Mean recovery of each segment of the text over layers, one panel per token-wise run, with 95 % bands.

    Raises:
        ValueError: none of the runs is token-wise.
        StoreError: a file cannot be written.
    """
    rows = segment_rows(runs)
    with styled():
        return save(draw_segments(rows), folder, name, as_csv(rows))


def segment_rows(runs: Sequence[xr.Dataset]) -> Rows:
    """What `plot_segments` draws: one row per run, segment and layer."""
    rows: Rows = []
    for run, variant in zip(runs, variants(runs), strict=True):
        info = about(run)
        if info.granularity != "token" or not bool(run["kept"].any()):
            continue
        profiles = segment_profiles(run)
        for segment in profiles["segment"].values:
            line = profiles.sel(segment=segment)
            for index, layer in enumerate(line["layer"].values):
                numbers = {key: float(line[key][index]) for key in ("mean", "low", "high")}
                counts = {key: int(line[key][index]) for key in ("n", "groups")}
                place = {"segment": str(segment), "tokens": float(line["tokens"]), "layer": int(layer)}
                rows.append(
                    {"run": _named(info.title, variant), **place, **numbers, **counts, **_why(counts["groups"])}
                )
    if not rows:
        raise ValueError("segment profiles need a token-wise run (granularity=token) of which samples count")
    return rows


def draw_segments(rows: Rows) -> Figure:
    """The picture of `plot_segments` from its rows; to be called within `styled()`."""
    names = list(dict.fromkeys(row["run"] for row in rows))
    segments = {row["segment"] for row in rows}
    figure, axes = panels(len(names), 3.1, 2.2, gap=0.8 + LEGEND_LINE * _lines(len(segments)))
    for name, axis in zip(names, axes, strict=True):
        of_run = [row for row in rows if row["run"] == name]
        axis.axhline(0, color="0.6", lw=0.7, zorder=1)
        for segment in dict.fromkeys(row["segment"] for row in of_run):
            line = [row for row in of_run if row["segment"] == segment]
            x, mean, low, high = (np.array([row[key] for row in line]) for key in ("layer", "mean", "low", "high"))
            colour = ROLE_COLOURS.get(segment, "0.3")
            tokens = line[0]["tokens"]
            text = f"{segment}, {tokens:.3g} token{'' if tokens == 1 else 's'}"
            axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            axis.plot(x, mean, color=colour, lw=1.4, label=text, ls="--" if segment == "template" else "-")
        axis.set_ylabel("recovery rate, mean of a token")
        _dress(axis, f"{words(name)} (n = {max(row['n'] for row in of_run)}{_few(of_run)})", "decoder layer")
        axis.set_ylim(*_ends(rows))
    return figure


def plot_ledger(runs: Sequence[xr.Dataset], folder: Path, name: str = "ledger") -> list[Path]:
    """How many samples of each class count, and why the others do not: one panel per run.

    Raises:
        ValueError: no run.
        StoreError: a file cannot be written.
    """
    rows = ledger_rows(runs)
    with styled():
        return save(draw_ledger(rows), folder, name, as_csv(rows))


def ledger_rows(runs: Sequence[xr.Dataset]) -> Rows:
    """What `plot_ledger` draws: one row per run, class and reason."""
    if not runs:
        raise ValueError("the ledger needs at least one run")
    rows: Rows = []
    for run, variant in zip(runs, variants(runs), strict=True):
        info, table = about(run), exclusion_table(run)
        run_name = _named(f"{info.title}, {info.granularity}", variant)
        for text in table["label"].values:
            for reason in table["reason"].values:
                count = int(table.sel(label=text, reason=reason))
                rows.append({"run": run_name, "class": str(text), "reason": str(reason), "samples": count})
    return rows


def draw_ledger(rows: Rows) -> Figure:
    """The picture of `plot_ledger` from its rows; to be called within `styled()`."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    reasons = sorted({row["reason"] for row in rows} - {KEPT})
    palette = PALETTE
    colours = {KEPT: palette[0], **{reason: palette[1 + k] for k, reason in enumerate(reasons)}}
    hatches = {KEPT: "", **{reason: ("///", "...", "xxx", "---")[k % 4] for k, reason in enumerate(reasons)}}
    figure, axes = panels(len(runs), 3.1, 2.2, gap=0.9 + LEGEND_LINE * (1 + len(reasons)))
    for run, axis in zip(runs, axes, strict=True):
        of_run = [row for row in rows if row["run"] == run]
        classes = list(dict.fromkeys(row["class"] for row in of_run))
        left = np.zeros(len(classes))
        for reason in (KEPT, *reasons):
            counts = {row["class"]: row["samples"] for row in of_run if row["reason"] == reason}
            widths = np.array([counts.get(name, 0) for name in classes], float)
            axis.barh(
                range(len(classes)),
                widths,
                left=left,
                color=colours[reason],
                hatch=hatches[reason],
                edgecolor="white",
                lw=0.5,
                label=f"{reason} ({int(widths.sum())})",
            )
            left += widths
        axis.set_yticks(range(len(classes)), [label(name) for name in classes])
        axis.invert_yaxis()
        _dress(axis, f"{words(run)} (n = {int(left.sum())})", "clips", columns=1)
    return figure


def _why(groups: int) -> dict[str, str]:
    """Column of the table: why a row has no interval."""
    return {"no_interval": too_few(groups)}


def _few(rows: Rows) -> str:
    """What stands beside n where no interval is drawn."""
    groups = max(row["groups"] for row in rows)
    return f"; {groups} group{'' if groups == 1 else 's'}: no interval" if too_few(groups) else ""


def _lines(entries: int, columns: int = 2) -> int:
    """Lines of a legend; at least the three that panels have room for anyway."""
    return max(3, -(-entries // columns))


def _dress(axis: Any, title: str, xlabel: str, whole: bool = True, columns: int = 2) -> None:
    """What all panels have in common: title, whole numbers below, the legend under them."""
    axis.set_title(title)
    axis.set_xlabel(xlabel)
    if whole:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)


def _ends(rows: Rows) -> tuple[float, float]:
    """Where the vertical scale begins and ends: 0, 1, and all that is drawn."""
    ends = [value for row in rows for value in (row["mean"], row["low"], row["high"]) if not np.isnan(value)]
    return min([-0.1, *(end - 0.05 for end in ends)]), max([1.1, *(end + 0.05 for end in ends)])
