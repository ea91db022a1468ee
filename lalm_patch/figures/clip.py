"""One clip: its waveform and spectrogram above what each token, or each window of the audio, recovers by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lalm_patch.analysis import about, in_short, licence, run_settings
from lalm_patch.analysis.options import option_texts
from lalm_patch.errors import DataError
from lalm_patch.figures.run import axis_name, brackets
from lalm_patch.figures.style import PALETTE, as_csv, canvas, diverging, label, save, styled, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUIETEST = -70.0
"""Lower end of the spectrogram's scale, in dB below its loudest point."""

STRONGEST = 2.0


def plot_clip(
    dataset: xr.Dataset,
    sample: str,
    waveform: np.ndarray,
    folder: Path,
    name: str = "clip",
    rate: int = 16_000,
    answers: bool = False,
) -> list[Path]:
    """Draw one clip of a run.

    Args:
        dataset: the run's dataset.
        sample: name of the clip.
        waveform: [samples], what the model heard.
        folder: where the picture (PNG, PDF) and the recovery rates drawn (CSV) go.
        name: of the files.
        rate: of the waveform, in Hz.
        answers: whether to draw the options' probabilities in the clean, the corrupted and the best patched run, too.

    Raises:
        DataError: no such clip, one that was not patched because it does not count, or approximate cells without a
            licence.
        StoreError: a file cannot be written.
    """
    if sample not in dataset["sample"].values:
        raise DataError(
            f"there is no clip {sample!r} in this run; it has {', '.join(dataset['sample'].values[:5])}, ..."
        )
    licence(dataset)
    clip = dataset.sel(sample=sample)
    if not was_patched(dataset.sel(sample=[sample]))[0]:
        raise DataError(
            f"clip {sample!r} was not patched: {clip['exclusion'].item()}; to look at it all the same, repeat the run "
            "with trace_excluded=true"
        )
    rates = clip["recovery_rate"].transpose("layer", ...)
    rows: list[dict[str, object]] = []
    columns = [str(dim) for dim in rates.dims if dim not in ("layer", "token")]
    for index, layer in enumerate(rates["layer"].values):
        if "token" in rates.dims:
            for token in np.flatnonzero(clip["token_role"].values != ""):
                texts = {key: str(clip[key].values[token]) for key in ("token_text", "token_role")}
                place: dict[str, object] = {"layer": int(layer), "token": int(token), **texts}
                rows.append({**place, "recovery_rate": float(rates[index, token])})
        elif columns:
            for column in range(rates.sizes[columns[0]]):
                named = {columns[0]: str(rates[columns[0]].values[column])}
                rows.append({"layer": int(layer), **named, "recovery_rate": float(rates[index, column])})
        else:
            rows.append({"layer": int(layer), "recovery_rate": float(rates[index])})
    with styled():
        return save(_draw(clip, sample, waveform, rate, _title(dataset), answers), folder, name, as_csv(rows))


def _title(dataset: xr.Dataset) -> str:
    return "; ".join(filter(None, [about(dataset).title, in_short(dataset)]))


def was_patched(dataset: xr.Dataset) -> np.ndarray:
    """Which samples have cells: those that count, and with `trace_excluded` others; bool [samples]."""
    rates = dataset["p_patched"].transpose("sample", ...).values
    return np.asarray(~np.isnan(rates.reshape(len(rates), -1)).all(axis=1))


def draw_answers(axes: Axes, clip: xr.Dataset, options: list[str]) -> None:
    """Bars: probability of each option in the clean, the corrupted, and the patched run that is nearest the clean one.

    Args:
        axes: where.
        clip: one sample of a run.
        options: its options.
    """
    rates = clip["recovery_rate"].values
    best = np.unravel_index(np.nanargmax(rates), rates.shape)
    place = ", ".join(
        f"{dim} {str(clip['token_text'].values[index])!r}" if dim == "token" else f"{dim} {clip[dim].values[index]}"
        for dim, index in zip(clip["recovery_rate"].dims, best, strict=True)
    )
    patched = clip["option_logit_patched"].transpose(*clip["recovery_rate"].dims, "option").values[best]
    runs = {
        f"clean: says {_said(clip, 'clean')}": clip["option_logit_clean"].values - float(clip["logsumexp_clean"]),
        f"corrupted: says {_said(clip, 'corrupted')}": clip["option_logit_corrupted"].values
        - float(clip["logsumexp_corrupted"]),
        f"patched, best cell: {place}": patched - clip["logsumexp_patched"].values[best],
    }
    colours = PALETTE
    for index, (name, logs) in enumerate(runs.items()):
        values = np.exp(logs[: len(options)])
        offset = (1 - index) * 0.26
        axes.barh(np.arange(len(options)) - offset, values, 0.24, color=colours[index], label=words(name))
    right = str(clip["label"].item())
    marked = [label(option) + ("  (right)" if option == right else "") for option in options]
    axes.set_yticks(range(len(options)), marked, fontsize=8)
    axes.set(xlim=(0, 1))
    axes.invert_yaxis()
    axes.set_xlabel("probability of the answer", fontsize=8, labelpad=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _said(clip: xr.Dataset, run: str) -> str:
    """The most probable token of a run; of older runs, the option that is most probable."""
    name = f"top_token_{run}" if f"top_token_{run}" in clip else f"prediction_{run}"
    return repr(str(clip[name].item()).strip())


def _draw(clip: xr.Dataset, sample: str, waveform: np.ndarray, rate: int, title: str, answers: bool) -> Figure:
    from scipy.signal import ShortTimeFFT  # of one kind of figure, and slow to import

    rates = clip["recovery_rate"].transpose("layer", ...)
    token_wise, columns = "token" in rates.dims, rates.ndim > 1
    seconds = len(waveform) / rate
    used = np.flatnonzero(clip["token_role"].values != "") if token_wise else np.arange(rates.shape[-1])
    timed = "window_start" in clip.coords and bool(clip["window_start"].notnull().any())
    width = float(np.clip(0.24 * len(used), 6.0 if timed else 4.5, 11.0))
    height = float(np.clip(0.14 * rates.sizes["layer"], 0.6 if timed else 1.8, 4.5))
    figure, axes = canvas(width, height)
    edges = _edges(clip, seconds) if timed else np.arange(len(used) + 1.0)
    if columns:
        values = rates.values[:, used] if not timed else rates.values[:, _in_time(clip)]
        limit = min(max(1.0, float(np.nanmax(np.abs(values)))), STRONGEST)
        colours = diverging()
        image = axes.pcolormesh(edges, np.arange(len(values) + 1), values, cmap=colours, norm=Normalize(-limit, limit))
        image.set_rasterized(True)
        step = max(1, int(np.ceil(0.15 * len(values) / height)))
        layers = np.arange(0, len(values), step)
        axes.set_yticks(layers + 0.5, [str(layer) for layer in rates["layer"].values[layers]], fontsize=8)
        axes.set(ylabel=axis_name(rates["layer"]))
        side = figure.add_axes((1 + 0.12 / width, 0.0, 0.1 / width, 1.0))
        figure.colorbar(image, cax=side).set_label(about(clip).measure)
        above = 0.15
    if token_wise:
        texts = clip["token_text"].values[used]
        axes.set_xticks(np.arange(len(used)) + 0.5, [label(str(text)) for text in texts], rotation=90, fontsize=7)
        axes.set(xlabel="token after the audio")
        above = brackets(figure, axes, [str(role) for role in clip["token_role"].values[used]]) / 72
    elif timed:
        axes.set(xlabel="s", xlim=(0, edges[-1]))
        if edges[-1] > seconds:
            axes.axvline(seconds, color="0.2", lw=0.8)
            axes.annotate("padding", (seconds, 1), (3, 2), ("data", "axes fraction"), "offset points", fontsize=7)
    elif columns:
        column = rates[str(rates.dims[1])]
        axes.set_xticks(np.arange(len(used)) + 0.5, [str(name) for name in column.values], rotation=90, fontsize=7)
        axes.set(xlabel=axis_name(column))
    else:
        axes.plot(rates["layer"].values, rates.values, marker="o", ms=3)
        axes.set(xlabel=axis_name(rates["layer"]), ylabel=about(clip).measure)
        above = 0.15
    bottom = 1 + (above + 0.45) / height
    spectrum = figure.add_axes((0.0, bottom, 1.0, 0.9 / height))
    wave = figure.add_axes((0.0, bottom + 1.0 / height, 1.0, 0.45 / height))
    transform = ShortTimeFFT.from_window("hann", rate, nperseg=400, noverlap=240)
    padded = np.pad(np.asarray(waveform, float), (0, max(0, 400 - len(waveform))))
    power = transform.spectrogram(padded)
    loudest = float(power.max())
    decibel = (
        10 * np.log10(np.maximum(power / loudest, 10 ** (QUIETEST / 10))) if loudest else np.full_like(power, QUIETEST)
    )
    low, high = transform.extent(len(padded))[:2]
    extent = (low, high, 0.0, rate / 2000)
    spectrum.imshow(decibel, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=QUIETEST, vmax=0)
    span = (0, edges[-1]) if timed else (0, seconds)
    spectrum.set(xlim=span, xlabel="" if timed else "s", ylabel="kHz")
    wave.plot(np.arange(len(waveform)) / rate, waveform, color="0.2", lw=0.4, rasterized=True)
    wave.set(xlim=span, xticks=[], yticks=[])
    wave.spines[["top", "right", "left", "bottom"]].set_visible(False)
    clean, corrupted = float(clip["p_clean"]), float(clip["p_corrupted"])
    heading = f"{title}: {sample} ({clip['label'].item()}), p {corrupted:.2f} corrupted, {clean:.2f} on the clip"
    marked = ""
    if not bool(clip["kept"]):
        marked = f"DOES NOT COUNT: {clip['exclusion'].item()}"
    highest = wave
    if answers:
        options = option_texts(clip.expand_dims("sample")).isel(sample=0).values
        options = options[options != ""]
        tall = 0.35 + 0.28 * len(options)
        highest = figure.add_axes((0.0, bottom + (1.0 + 0.95) / height, 1.0, tall / height))
        draw_answers(highest, clip, list(options))
    highest.set_title("\n".join(words(line) for line in (heading, marked) if line), fontsize=9)
    return figure


def _in_time(clip: xr.Dataset) -> np.ndarray:
    """Columns of the clip's own windows, in time, and of the padding after them where there are states of it."""
    rates = clip["recovery_rate"].transpose("layer", ...).values
    return np.flatnonzero(~np.isnan(rates).all(axis=0))


def _edges(clip: xr.Dataset, seconds: float) -> np.ndarray:
    """Edges of these columns in seconds; the padding is drawn as wide as a window."""
    starts = clip["window_start"].values[_in_time(clip)]
    timed = starts[~np.isnan(starts)]
    step = float(run_settings(clip)["granularity"]["seconds"])
    ends = [seconds] if len(timed) == len(starts) else [seconds, seconds + step]
    return np.array([*timed, *ends])
