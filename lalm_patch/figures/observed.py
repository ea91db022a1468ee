"""What was seen in a run beside what was moved: the logit lens on the causal curve's axis, and the grounding score."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from lalm_patch.analysis import (
    about,
    grounding,
    mean_recovery,
    over_layers,
    planted_window,
    seen_at_tokens,
    seen_in_audio,
)
from lalm_patch.analysis.resampling import too_few
from lalm_patch.figures.run import heatmap, without_band
from lalm_patch.figures.style import PALETTE, as_csv, canvas, label, save, styled, words

CAUSAL, SEEN, IN_AUDIO = "causal", "logit lens, last token", "logit lens, best audio position"


def plot_lens(dataset: xr.Dataset, folder: Path, recovery: xr.Dataset | None = None, name: str = "lens") -> list[Path]:
    """Draw a run that looked through the logit lens: observational against causal.

    Curves over the layers; of a token-wise run two heatmaps with the same tokens, side by side.

    Args:
        dataset: the run's dataset; at least one clip counts.
        folder: where the picture (PNG, PDF) and the drawn numbers (CSV) go.
        recovery: the run's `mean_recovery`, where that is there already.
        name: of the files.

    Raises:
        DataError: a run without observe=lens.
        StoreError: a file cannot be written.
    """
    recovery = mean_recovery(dataset, seed=about(dataset).seed) if recovery is None else recovery
    seen = seen_at_tokens(dataset)
    if "token" in recovery.dims:
        rows = [*_token_rows(recovery, CAUSAL), *_token_rows(seen, SEEN.partition(",")[0])]
        with styled():
            return save(_draw_tokens(dataset, recovery, seen), folder, name, as_csv(rows))
    rows = lens_rows(dataset, recovery, seen)
    with styled():
        return save(_draw_layers(dataset, rows), folder, name, as_csv(rows))


def lens_rows(dataset: xr.Dataset, recovery: xr.Dataset, seen: xr.Dataset) -> list[dict[str, object]]:
    """What the curves show: one row per curve and layer."""
    curves = ((CAUSAL, recovery), (SEEN, seen), (IN_AUDIO, seen_in_audio(dataset)))
    return [
        {"curve": curve, "layer": cell.layer, "mean": cell.mean, "low": cell.low, "high": cell.high, "n": cell.n}
        | {"groups": cell.groups, "no_interval": cell.reason}
        for curve, found in curves
        for cell in over_layers(found)
    ]


def _token_rows(found: xr.Dataset, curve: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for layer in found["layer"].values:
        for token in range(found.sizes["token"]):
            cell = found.sel(layer=layer).isel(token=token)
            texts = {key: str(cell[key].item()) for key in ("token_text", "token_role")}
            numbers = {key: float(cell[key]) for key in ("mean", "low", "high")}
            counts = {key: int(cell[key]) for key in ("n", "groups")}
            why = {"no_interval": too_few(counts["groups"])}
            rows.append({"curve": curve, "layer": int(layer), "token": token, **texts, **numbers, **counts, **why})
    return rows


def _draw_layers(dataset: xr.Dataset, rows: list[dict[str, object]]) -> Figure:
    layers = sorted({int(str(row["layer"])) for row in rows})
    figure, axes = canvas(float(np.clip(0.14 * len(layers), 4.2, 6.5)), 2.9)
    if window := planted_window(dataset):
        axes.axvspan(window[0] - 0.5, window[1] - 0.5, color="#f0e2c4", lw=0, label="attention planted here")
    for level in (0, 1):
        axes.axhline(level, color="0.45", lw=0.7, zorder=1.5)
    palette = PALETTE
    for index, (curve, style) in enumerate(((CAUSAL, "-"), (SEEN, "--"), (IN_AUDIO, ":"))):
        own = [row for row in rows if row["curve"] == curve]
        x, mean, low, high = (np.array([row[key] for row in own], float) for key in ("layer", "mean", "low", "high"))
        what = f"{CAUSAL}: {about(dataset).measure}" if curve == CAUSAL else curve
        axes.fill_between(x, low, high, color=palette[index], alpha=0.2, lw=0)
        axes.plot(x, mean, style, color=palette[index], marker="os^"[index], ms=3.5, lw=1.6, label=what)
    n, groups = (max(int(str(row[key])) for row in rows) for key in ("n", "groups"))
    if too_few(groups):
        axes.plot([], [], " ", label=without_band(np.array(groups)))
    axes.set(xlabel="decoder layer", ylabel="share of the gap in probability")
    axes.set_title(f"{words(about(dataset).title)}\nn = {n} of {dataset.sizes['sample']} samples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def _draw_tokens(dataset: xr.Dataset, recovery: xr.Dataset, seen: xr.Dataset) -> Figure:
    n_layers, n_tokens = recovery.sizes["layer"], recovery.sizes["token"]
    width, height = float(np.clip(0.16 * n_tokens, 3.0, 7.0)), float(np.clip(0.24 * n_layers, 1.6, 4.5))
    figure, left = canvas(width, height)
    right = figure.add_axes((1 + 0.35 / width, 0.0, 1.0, 1.0))
    both = [found["mean"].transpose("layer", "token").values for found in (recovery, seen)]
    for axes, found, title in ((left, recovery, f"{CAUSAL}: {about(dataset).measure}"), (right, seen, "logit lens")):
        scale = "share of the gap" if axes is right else ""
        heatmap(figure, axes, found["layer"], both[axes is right], scale, both)
        texts = [label(str(text)) for text in found["token_text"].values]
        axes.set_xticks(np.arange(len(texts)) + 0.5, texts, rotation=90, fontsize=7)
        axes.set_title(title)
    right.set_ylabel("")
    n = int(recovery["n"].max())
    heading = f"{words(about(dataset).title)}: n = {n} of {dataset.sizes['sample']} samples"
    left.annotate(heading, (1 + 0.17 / width, 1), (0, 22), "axes fraction", textcoords="offset points", ha="center")
    return figure


def plot_grounding(dataset: xr.Dataset, folder: Path, name: str = "grounding") -> list[Path]:
    """Draw how well attention to the audio tells wrong answers, beside what costs nothing.

    Args:
        dataset: dataset of a run with observe=grounding.
        folder: where the picture (PNG, PDF) and the drawn numbers (CSV) go.
        name: of the files.

    Raises:
        DataError: a run that did not look at attention.
        StoreError: a file cannot be written.
    """
    found = grounding(dataset)
    rows = [
        {"score": score, "auroc": value.value, "low": value.low, "high": value.high, "wrong": found.wrong}
        | {"right": found.right, "groups": value.groups, "no_interval": value.reason}
        for score, value in found.auroc.items()
    ]
    with styled():
        figure, axes = canvas(3.6, 2.6)
        colours = PALETTE
        for index, row in enumerate(rows):
            value = float(str(row["auroc"]))
            if np.isfinite(value):
                axes.bar(index, value, color=colours[index], width=0.6)
                ends = [[value - float(str(row["low"]))], [float(str(row["high"])) - value]]
                if np.isfinite(ends).all():
                    axes.errorbar(index, value, np.maximum(ends, 0), color="0.2", capsize=3)
        axes.axhline(0.5, color="0.45", lw=0.7)
        axes.set_xticks(
            range(len(rows)), [str(row["score"]) + (", held out" if not k else "") for k, row in enumerate(rows)]
        )
        axes.tick_params(axis="x", labelsize=7)
        axes.set(ylabel="AUROC for wrong answers", ylim=(0, 1))
        counts = f"{found.wrong} wrong, {found.right} right answers"
        why = "; ".join(dict.fromkeys(value.reason for value in found.auroc.values() if value.reason))
        said = "" if not why else f": {why}" if found.reason else f"; no interval, {why}"
        axes.set_title(f"{words(about(dataset).title)}\n{fill(counts + said, 70)}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        return save(figure, folder, name, as_csv(rows))
