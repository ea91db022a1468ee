"""The picture of a run: mean recovery over layers, or over layers and tokens. `figure.csv` holds the drawn numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lalm_patch.analysis import about, in_short, mean_recovery, planted_window, segments, why_none_counts
from lalm_patch.analysis.early_text import accuracy_without_early_audio
from lalm_patch.analysis.resampling import CONFIDENCE, too_few
from lalm_patch.figures.style import PALETTE, ROLE_COLOURS, canvas, diverging, label, save, styled, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_SINGLE_LINES = 50
"""Up to this many samples are drawn one by one behind their mean."""

STRONGEST = 2.0
"""The colour scale ends here at the latest, so that one extreme cell does not bleach all others."""

SINGLE_PATHS = 0.1
"""Of single paths, which carry little each, it reaches at least so far."""


def plot_run(dataset: xr.Dataset, folder: Path, recovery: xr.Dataset | None = None, name: str = "figure") -> list[Path]:
    """Draw a run.

    Layer-wise: mean recovery with its bootstrap band (where groups are too few for one, the legend says so), single
    samples behind it if there are at most `MOST_SINGLE_LINES`. Token-wise, and of single heads: a heatmap of layers and
    tokens (or heads) whose colours are symmetric about 0, so that equal distances from 0 look equally strong; the scale
    reaches at least 1 (of paths `SINGLE_PATHS`) and at most `STRONGEST`.

    Args:
        dataset: the run's dataset; without a kept sample the picture says why there is nothing to see.
        folder: where the picture (PNG, PDF) and the drawn numbers (CSV) go.
        recovery: the run's `mean_recovery`, where that is there already.
        name: of the files.

    Raises:
        StoreError: a file cannot be written.
    """
    recovery = mean_recovery(dataset, seed=about(dataset).seed) if recovery is None else recovery
    with styled():
        return save(draw_run(dataset, recovery), folder, name, _table(recovery))


def draw_run(dataset: xr.Dataset, recovery: xr.Dataset) -> Figure:
    """The picture of `plot_run`, from the run's `mean_recovery`; to be called within `styled()`."""
    if not recovery["mean"].notnull().any():
        return _draw_nothing(dataset)
    draw = {"token": _draw_tokens, "layer": _draw_layers}.get(about(dataset).granularity, _draw_columns)
    return draw(dataset, recovery)


def _title(dataset: xr.Dataset) -> str:
    return words(about(dataset).title)


def _counts(dataset: xr.Dataset, recovery: xr.Dataset) -> str:
    kept, groups = int(recovery["n"].max()), int(recovery["groups"].max())
    fewest = int(recovery["n"].where(recovery["n"] > 0).min())
    clustered = f" from {groups} groups" if groups < kept else ""
    counts = (
        f"n = {kept if fewest == kept else f'{fewest} to {kept}'} of {recovery.attrs['n_samples']} samples{clustered}"
    )
    return "\n".join(filter(None, [counts, in_short(dataset)]))


def _draw_nothing(dataset: xr.Dataset) -> Figure:
    figure, axes = canvas(5.0, 2.6)
    axes.set(xticks=[], yticks=[])
    axes.set_title(_title(dataset))
    axes.text(0.5, 0.5, fill(words(why_none_counts(dataset)), 62), ha="center", va="center", transform=axes.transAxes)
    return figure


def _draw_layers(dataset: xr.Dataset, recovery: xr.Dataset) -> Figure:
    layers = recovery["layer"].values
    figure, axes = canvas(float(np.clip(0.14 * len(layers), 4.2, 6.5)), 2.9)
    mean, low, high = (recovery[name].values for name in ("mean", "low", "high"))
    blue = PALETTE[0]
    window = planted_window(dataset)
    if window:
        axes.axvspan(window[0] - 0.5, window[1] - 0.5, color="#f0e2c4", lw=0, label="attention planted here")
    for level in (0, 1):
        axes.axhline(level, color="0.45", lw=0.7, zorder=1.5)
    ends = [*mean, *low[~np.isnan(low)], *high[~np.isnan(high)]]
    bottom, top = min(-0.1, np.nanmin(ends) - 0.1), max(1.1, np.nanmax(ends) + 0.1)
    singles = dataset["recovery_rate"].transpose("sample", "layer").values[dataset["kept"].values.astype(bool)]
    if 1 < len(singles) <= MOST_SINGLE_LINES:
        outside = int(((singles < bottom) | (singles > top)).any(axis=1).sum())
        name = "single samples" + (f" ({outside} leave the frame)" if outside else "")
        lines = axes.plot(layers, singles.T, color=blue, lw=0.6, alpha=0.25, zorder=1.7)
        lines[0].set_label(name)
    if not np.isnan(low).all():
        axes.fill_between(layers, low, high, color=blue, alpha=0.25, lw=0, zorder=2, label="95 % interval")
    else:
        axes.plot([], [], " ", label=without_band(recovery["groups"].values))
    axes.plot(layers, mean, color=blue, lw=1.6, marker="o", ms=3.5, zorder=3, label="mean")
    if about(dataset).knockout:
        table = accuracy_without_early_audio(dataset)
        orange = PALETTE[1]
        text = f"clips still right (scores saved: {float(table['saved'].max()):.0%} in all layers)"
        axes.plot(layers, table["accuracy"], color=orange, lw=1.4, marker="s", ms=3.5, zorder=3, label=text)
    axes.set(xlabel=axis_name(recovery["layer"]), ylabel=about(dataset).measure, ylim=(bottom, top))
    axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_title(f"{_title(dataset)}\n{_counts(dataset, recovery)}")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    legend = axes.legend(handles, labels, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    for handle in legend.get_lines():
        handle.set_alpha(max(handle.get_alpha() or 1.0, 0.6))
    return figure


def _draw_tokens(dataset: xr.Dataset, recovery: xr.Dataset) -> Figure:
    means = recovery["mean"].transpose("layer", "token").values
    n_layers, n_tokens = means.shape
    width = float(np.clip(0.3 * n_tokens, 3.0, max(7.0, 0.155 * n_tokens)))
    height = float(np.clip(0.24 * n_layers, 1.6, max(4.5, 0.08 * n_layers)))
    figure, axes = canvas(width, height)
    heatmap(figure, axes, recovery["layer"], means, f"mean {about(dataset).measure}")
    axes.set_xticks(
        np.arange(n_tokens) + 0.5,
        [label(str(text)) for text in recovery["token_text"].values],
        rotation=90,
        fontsize=8 if width / n_tokens > 0.16 else 7,
    )
    axes.set_xlabel("token after the audio")
    top = brackets(figure, axes, [str(role) for role in recovery["token_role"].values])
    heading = f"{_title(dataset)}: {_counts(dataset, recovery)}"
    if bool(recovery["averaged"].any()):
        heading += "\n" + fill(words(recovery.attrs["token_alignment"]), 70)
    axes.annotate(heading, (0.5, 1), (0, top), "axes fraction", textcoords="offset points", ha="center", fontsize=10)
    return figure


def _draw_columns(dataset: xr.Dataset, recovery: xr.Dataset) -> Figure:
    """Layers and whatever else a grid has: heads, segments."""
    column = about(dataset).granularity
    means = recovery["mean"].transpose("layer", column).values
    names = [str(name) for name in recovery[column].values]
    n_layers, n_columns = means.shape
    figure, axes = canvas(float(np.clip(0.3 * n_columns, 2.4, 7.0)), float(np.clip(0.24 * n_layers, 1.6, 6.0)))
    if column == "source_layer":
        _mark_own_places(axes, recovery)
    least = 1.0
    if column == "receiver_layer":  # what is written at the end of a window's readers or above is none of theirs
        least = SINGLE_PATHS
        top = recovery[column].values + about(dataset).window - 1
        means = np.where(top[None] <= recovery["layer"].values[:, None], np.nan, means)
    measure = f"mean {about(dataset).measure}"
    if column == "source_layer" and about(dataset).direction == "noising":
        means, measure = means - 1, f"{measure} - 1\n(0: as in the clean run)"
    heatmap(figure, axes, recovery["layer"], means, measure, least=least)
    numbers = all(name.isdigit() for name in names)
    every = np.arange(0, n_columns, max(1, -(-n_columns // 16)) if numbers else 1)
    axes.set_xticks(every + 0.5, [names[k] for k in every], fontsize=8, rotation=0 if numbers else 90)
    axes.set_xlabel(axis_name(dataset[column]))
    axes.set_title(f"{_title(dataset)}: {_counts(dataset, recovery)}")
    return figure


def _mark_own_places(axes: Axes, recovery: xr.Dataset) -> None:
    """Frames around the cells whose states come from the layer just below, where they belong."""
    taken = recovery["source_layer"].values
    for row, layer in enumerate(recovery["layer"].values):
        for column in np.flatnonzero(taken == layer - 1):
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="0.2", lw=0.8, zorder=3))


def without_band(groups: np.ndarray) -> str:
    """Entry of a legend where no interval is drawn: why."""
    return f"no 95 % interval: {too_few(int(np.max(groups, initial=0))) or 'it does not exist'}"


def axis_name(labels: xr.DataArray) -> str:
    """What a dimension is called, without where it is counted from."""
    return str(labels.attrs.get("long_name", labels.name)).partition(",")[0]


def heatmap(
    figure: Figure,
    axes: Axes,
    layers: xr.DataArray,
    means: np.ndarray,
    name: str,
    others: Sequence[np.ndarray] = (),
    least: float = 1.0,
) -> None:
    """Means [layer, column] in colours symmetric about 0, with their scale beside them and the layers' numbers.

    The scale reaches as far as these means and `others`, which are drawn beside them with the same colours; at least to
    `least`.
    """
    width, height = figure.get_size_inches()
    largest = max(float(np.nanmax(np.abs(values))) for values in (means, *others))
    limit = min(max(least, largest), STRONGEST)
    colours = diverging()
    image = axes.pcolormesh(means, cmap=colours, norm=Normalize(-limit, limit), edgecolors="none", rasterized=True)
    rows = np.arange(0, len(layers), max(1, int(np.ceil(0.15 * len(layers) / height))))
    axes.set_yticks(rows + 0.5, [str(layer) for layer in layers.values[rows]], fontsize=8)
    axes.tick_params(length=2, pad=2)
    axes.set_ylabel(axis_name(layers))
    over = [float(np.nanmin(means)) < -limit, float(np.nanmax(means)) > limit]
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    if name:
        side = figure.add_axes((axes.get_position().x1 + 0.15 / width, 0.0, 0.12 / width, 1.0))
        figure.colorbar(image, cax=side, extend=extend[over[0], over[1]]).set_label(name)


def brackets(figure: Figure, axes: Axes, roles: list[str]) -> float:
    """Brackets with the roles' names above the columns; names that would touch go up a step.

    Returns:
        Height in points above the axes that is free of names.
    """
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    per_column = axes.get_window_extent(renderer).width / len(roles)
    above = axes.get_xaxis_transform()
    rise = 1 + 4 / 72 / figure.get_figheight()
    taken: list[float] = []  # right end of the last name on each step, in pixels
    for role, first, last in segments(roles):
        colour = ROLE_COLOURS.get(role, "0.3")
        axes.plot((first + 0.15, last + 0.85), (rise, rise), transform=above, color=colour, lw=2.2, clip_on=False)
        centre = (first + last + 1) / 2
        name = axes.annotate(
            role,
            (centre, 1),
            (0, 8),
            ("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
        )
        half = name.get_window_extent(renderer).width / 2 + 3
        left, right = centre * per_column - half, centre * per_column + half
        step = next((index for index, end in enumerate(taken) if end <= left), len(taken))
        taken[step : step + 1] = [right]
        name.xyann = (0, 8 + 11 * step)
    axes.set_xlim(0, len(roles))
    return 8 + 11 * len(taken) + 4


def _table(recovery: xr.Dataset) -> str:
    """The drawn numbers as CSV; missing ones are empty. `no_interval` says why there is no interval."""
    confidence = float(recovery.attrs.get("confidence", CONFIDENCE))
    reasons = [too_few(int(number), confidence) for number in recovery["groups"].values.ravel()]
    recovery = recovery.assign(no_interval=(recovery["groups"].dims, np.reshape(reasons, recovery["groups"].shape)))
    names = ["mean", "low", "high", "n", "groups", "no_interval"]
    keys = ["layer"]
    if "token" in recovery.dims:
        keys += ["token", "token_text", "token_role"]
    keys += [str(dim) for dim in recovery["mean"].dims if dim not in ("layer", "token")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*keys, *names])
    order = ["layer", *(dim for dim in recovery["mean"].dims if dim != "layer")]
    columns = [recovery[key].broadcast_like(recovery["mean"]).transpose(*order).values.ravel() for key in keys]
    columns += [recovery[name].transpose(*order).values.ravel() for name in names]
    for row in zip(*columns, strict=True):
        writer.writerow(["" if isinstance(value, float) and np.isnan(value) else value for value in row])
    return buffer.getvalue()
