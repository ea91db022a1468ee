"""One clip: its waveform and spectrogram above what each token of each layer recovers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import seaborn
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.signal import ShortTimeFFT

from lalm_patch.analysis import about
from lalm_patch.errors import DataError
from lalm_patch.figures.run import brackets
from lalm_patch.figures.style import as_csv, canvas, label, save, styled, words

QUIETEST = -70.0
"""Lower end of the spectrogram's scale, in dB below its loudest point."""

STRONGEST = 2.0


def plot_clip(
    dataset: xr.Dataset, sample: str, waveform: np.ndarray, folder: Path, name: str = "clip", rate: int = 16_000
) -> list[Path]:
    """Draw one clip of a run.

    Args:
        dataset: the run's dataset.
        sample: name of the clip.
        waveform: [samples], what the model heard.
        folder: where the picture (PNG, PDF) and the recovery rates drawn (CSV) go.
        name: of the files.
        rate: of the waveform, in Hz.

    Raises:
        DataError: no such clip, or one that does not count and so was not patched.
        StoreError: a file cannot be written.
    """
    if sample not in dataset["sample"].values:
        raise DataError(
            f"there is no clip {sample!r} in this run; it has {', '.join(dataset['sample'].values[:5])}, ..."
        )
    clip = dataset.sel(sample=sample)
    if not bool(clip["kept"]):
        raise DataError(f"clip {sample!r} was not patched: {clip['exclusion'].item()}")
    rates = clip["recovery_rate"].transpose("layer", ...)
    rows: list[dict[str, object]] = []
    for index, layer in enumerate(rates["layer"].values):
        if "token" not in rates.dims:
            rows.append({"layer": int(layer), "recovery_rate": float(rates[index])})
            continue
        for token in np.flatnonzero(clip["token_role"].values != ""):
            texts = {key: str(clip[key].values[token]) for key in ("token_text", "token_role")}
            place: dict[str, object] = {"layer": int(layer), "token": int(token), **texts}
            rows.append({**place, "recovery_rate": float(rates[index, token])})
    with styled():
        return save(_draw(clip, sample, waveform, rate, about(dataset).title), folder, name, as_csv(rows))


def _draw(clip: xr.Dataset, sample: str, waveform: np.ndarray, rate: int, title: str) -> Figure:
    rates = clip["recovery_rate"].transpose("layer", ...)
    token_wise = "token" in rates.dims
    used = np.flatnonzero(clip["token_role"].values != "") if token_wise else np.arange(0)
    width = float(np.clip(0.24 * len(used), 4.5, 11.0))
    height = float(np.clip(0.14 * rates.sizes["layer"], 1.8, 4.5))
    figure, axes = canvas(width, height)
    if token_wise:
        values = rates.values[:, used]
        limit = min(max(1.0, float(np.nanmax(np.abs(values)))), STRONGEST)
        image = axes.pcolormesh(values, cmap=seaborn.color_palette("vlag", as_cmap=True), norm=Normalize(-limit, limit))
        image.set_rasterized(True)
        texts = clip["token_text"].values[used]
        axes.set_xticks(np.arange(len(used)) + 0.5, [label(str(text)) for text in texts], rotation=90, fontsize=7)
        step = max(1, int(np.ceil(0.15 * len(values) / height)))
        layers = np.arange(0, len(values), step)
        axes.set_yticks(layers + 0.5, [str(layer) for layer in rates["layer"].values[layers]], fontsize=8)
        axes.set(xlabel="token after the audio", ylabel="decoder layer")
        side = figure.add_axes((1 + 0.12 / width, 0.0, 0.1 / width, 1.0))
        figure.colorbar(image, cax=side).set_label("recovery rate")
        above = brackets(figure, axes, [str(role) for role in clip["token_role"].values[used]]) / 72
    else:
        axes.plot(rates["layer"].values, rates.values, marker="o", ms=3)
        axes.set(xlabel="decoder layer", ylabel="recovery rate")
        above = 0.15
    bottom = 1 + (above + 0.45) / height
    spectrum = figure.add_axes((0.0, bottom, 1.0, 0.9 / height))
    wave = figure.add_axes((0.0, bottom + 1.0 / height, 1.0, 0.45 / height))
    seconds = len(waveform) / rate
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
    spectrum.set(xlim=(0, seconds), xlabel="s", ylabel="kHz")
    wave.plot(np.arange(len(waveform)) / rate, waveform, color="0.2", lw=0.4, rasterized=True)
    wave.set(xlim=(0, seconds), xticks=[], yticks=[])
    wave.spines[["top", "right", "left", "bottom"]].set_visible(False)
    clean, corrupted = float(clip["p_clean"]), float(clip["p_corrupted"])
    heading = f"{title}: {sample} ({clip['label'].item()}), p {corrupted:.2f} corrupted, {clean:.2f} on the clip"
    wave.set_title(words(heading), fontsize=9)
    return figure
