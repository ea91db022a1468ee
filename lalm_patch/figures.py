"""The picture of a run: mean recovery over layers, or over layers and tokens. `figure.csv` holds the drawn numbers."""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import seaborn
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from lalm_patch.analysis import mean_recovery, planted_window, run_settings, segments, why_none_counts
from lalm_patch.journal import storage_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 200
MOST_SINGLE_LINES = 50
"""Up to this many samples are drawn one by one behind their mean."""

STRONGEST = 2.0
"""The colour scale ends here at the latest, so that one extreme cell does not bleach all others."""

LONGEST_LABEL = 18
ROLE_COLOURS = {
    "transcript": "#8c6d31",
    "early": "#4c72b0",
    "object": "#dd8452",
    "late": "#55a868",
    "template": "#8c8c8c",
    "last": "#8172b3",
}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.linewidth": 0.8,
    "pdf.fonttype": 42,  # text stays text
    "text.parse_math": False,  # a token or a model's name may hold "$"
}


def plot_run(dataset: xr.Dataset, folder: Path) -> list[Path]:
    """Draw a run.

    Layer-wise: mean recovery with its bootstrap band, single samples behind it if there are at most
    `MOST_SINGLE_LINES`. Token-wise: a heatmap of layers and tokens whose colours are symmetric about 0, so that
    equal distances from 0 look equally strong; the scale reaches at least 1 and at most `STRONGEST`.

    Args:
        dataset: the run's dataset; without a kept sample the picture says why there is nothing to see.
        folder: where `figure.png`, `figure.pdf` and `figure.csv` go.

    Raises:
        StoreError: a file cannot be written.
    """
    seed = int(run_settings(dataset).get("seed", 0))
    recovery = mean_recovery(dataset, seed=seed)
    with matplotlib.rc_context(_style()):
        if not recovery["mean"].notnull().any():
            figure = _draw_nothing(dataset)
        elif "token" in recovery.dims:
            figure = _draw_tokens(dataset, recovery)
        else:
            figure = _draw_layers(dataset, recovery)
        files = {
            folder / "figure.png": _rendered(figure, "png", {"Software": None}),
            folder / "figure.pdf": _rendered(figure, "pdf", {"CreationDate": None}),
            folder / "figure.csv": _table(recovery).encode("utf-8", "backslashreplace"),
        }
    for path, content in files.items():
        try:
            path.write_bytes(content)
        except OSError as error:
            raise storage_error(error, path, "writing the figure") from error
    return list(files)


def _style() -> Any:
    """The style, on matplotlib's defaults: a user's matplotlibrc must not change the picture.

    Without what names the backend: a context would not put that back.
    """
    return {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key} | _STYLE


def printable(text: str) -> str:
    r"""`text` with everything made visible that would not be: blanks as `␣`, newlines as `\n`, and characters that the
    figures' font lacks by their number (`\ud55c`)."""
    glyphs = _glyphs()
    return "".join(_visible(character, glyphs) for character in text)


def _visible(character: str, glyphs: set[int]) -> str:
    if character in "\n\r\t\\":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}[character]
    if character == " ":
        return "␣"
    # Categories C: control, format, surrogate, private, unassigned; Z: blanks; M: marks that need a base letter.
    if unicodedata.category(character)[0] in "CZM" or ord(character) not in glyphs:
        number = ord(character)
        return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:x}"
    return character


def _glyphs() -> set[int]:
    return set(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def _words(text: str) -> str:
    """Text of a title: as `printable`, blanks left alone."""
    return " ".join(printable(word) for word in text.split(" "))


def _label(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= LONGEST_LABEL else f"{shown[: LONGEST_LABEL - 1]}…"


def _title(dataset: xr.Dataset) -> str:
    settings = run_settings(dataset)
    model = settings.get("model", {}).get("name") or dataset.attrs.get("model_id", "model")
    attribute = settings.get("attr", {}).get("name", "attribute")
    return _words(f"{model}, {attribute}")


def _counts(recovery: xr.Dataset) -> str:
    kept, groups = int(recovery["n"].max()), int(recovery["groups"].max())
    clustered = f" from {groups} groups" if groups < kept else ""
    return f"n = {kept} of {recovery.attrs['n_samples']} samples{clustered}"


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes measure exactly this many inches; what lies around them is added when it is rendered."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def _rendered(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def _draw_nothing(dataset: xr.Dataset) -> Figure:
    figure, axes = _canvas(5.0, 2.6)
    axes.set(xticks=[], yticks=[])
    axes.set_title(_title(dataset))
    axes.text(0.5, 0.5, fill(_words(why_none_counts(dataset)), 62), ha="center", va="center", transform=axes.transAxes)
    return figure


def _draw_layers(dataset: xr.Dataset, recovery: xr.Dataset) -> Figure:
    layers = recovery["layer"].values
    figure, axes = _canvas(float(np.clip(0.14 * len(layers), 4.2, 6.5)), 2.9)
    mean, low, high = (recovery[name].values for name in ("mean", "low", "high"))
    blue = seaborn.color_palette("colorblind")[0]
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
    axes.plot(layers, mean, color=blue, lw=1.6, marker="o", ms=3.5, zorder=3, label="mean")
    axes.set(xlabel="decoder layer", ylabel="recovery rate", ylim=(bottom, top))
    axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_title(f"{_title(dataset)}\n{_counts(recovery)}")
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
    figure, axes = _canvas(width, height)
    largest = float(np.nanmax(np.abs(means)))
    limit = min(max(1.0, largest), STRONGEST)
    colours = seaborn.color_palette("vlag", as_cmap=True).with_extremes(bad="0.8")
    image = axes.pcolormesh(means, cmap=colours, norm=Normalize(-limit, limit), edgecolors="none", rasterized=True)
    axes.set_xticks(
        np.arange(n_tokens) + 0.5,
        [_label(str(text)) for text in recovery["token_text"].values],
        rotation=90,
        fontsize=8 if width / n_tokens > 0.16 else 7,
    )
    step = max(1, int(np.ceil(0.15 * n_layers / height)))
    rows = np.arange(0, n_layers, step)
    axes.set_yticks(rows + 0.5, [str(layer) for layer in recovery["layer"].values[rows]], fontsize=8)
    axes.tick_params(length=2, pad=2)
    axes.set(xlabel="token after the audio", ylabel="decoder layer")
    over = [float(np.nanmin(means)) < -limit, float(np.nanmax(means)) > limit]
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    side = figure.add_axes((1 + 0.15 / width, 0.0, 0.12 / width, 1.0))
    figure.colorbar(image, cax=side, extend=extend[over[0], over[1]]).set_label("mean recovery rate")
    top = _brackets(figure, axes, [str(role) for role in recovery["token_role"].values])
    heading = f"{_title(dataset)}: {_counts(recovery)}"
    if bool(recovery["averaged"].any()):
        heading += "\n" + fill(_words(recovery.attrs["token_alignment"]), 70)
    axes.annotate(heading, (0.5, 1), (0, top), "axes fraction", textcoords="offset points", ha="center", fontsize=10)
    return figure


def _brackets(figure: Figure, axes: Axes, roles: list[str]) -> float:
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
    """The drawn numbers as CSV; missing ones are empty."""
    names = ["mean", "low", "high", "n", "groups"]
    keys = ["layer"]
    if "token" in recovery.dims:
        keys += ["token", "token_text", "token_role"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*keys, *names])
    order = ["layer", *(dim for dim in recovery["mean"].dims if dim != "layer")]
    columns = [recovery[key].broadcast_like(recovery["mean"]).transpose(*order).values.ravel() for key in keys]
    columns += [recovery[name].transpose(*order).values.ravel() for name in names]
    for row in zip(*columns, strict=True):
        writer.writerow(["" if isinstance(value, float) and np.isnan(value) else value for value in row])
    return buffer.getvalue()
