"""What the page's explorer shows: some clips of each run, with their sound and their recovery rates."""

from __future__ import annotations

import base64
import io
import logging
from collections import defaultdict
from typing import Any

import numpy as np
import soundfile
import xarray as xr

from lalm_patch.analysis import about, kept_samples, run_settings
from lalm_patch.errors import LalmPatchError
from lalm_patch.stimuli import Attribute, Record, load_demo, load_sakura
from lalm_patch.stimuli.audio import SAMPLING_RATE

log = logging.getLogger(__name__)

Sounds = dict[str, int]


def explore(run: xr.Dataset, count: int, with_audio: bool, sounds: Sounds) -> dict[str, Any]:
    """Clips of one run as plain data for the page.

    Args:
        run: the run's dataset.
        count: at most this many clips, taken from the classes in turn.
        with_audio: whether to look for the sound.
        sounds: data addresses of the sounds so far and their places on the page; those of this run are added, each once
            on the page however many runs have it.
    """
    info = about(run)
    chosen = _chosen(run, count)
    records, silent = _records(run, with_audio)
    clips = []
    for sample in chosen:
        clip = run.sel(sample=sample)
        sound = -1
        if sample in records:
            sound = sounds.setdefault(_sound(records[sample]), len(sounds))
        clips.append(_clip(clip, sample, sound))
    title = f"{info.title}, {info.granularity}-wise"
    layers = [int(layer) for layer in run["layer"].values]
    return {"title": title, "granularity": info.granularity, "layers": layers, "clips": clips, "silent": silent}


def _chosen(run: xr.Dataset, count: int) -> list[str]:
    """Names of kept clips, one of each class in turn."""
    kept = kept_samples(run)
    by_class: dict[str, list[str]] = defaultdict(list)
    for sample, label in zip(kept["sample"].values, kept["label"].values, strict=True):
        by_class[str(label)].append(str(sample))
    deepest = max((len(names) for names in by_class.values()), default=0)
    turns = [names[k] for k in range(deepest) for names in by_class.values() if k < len(names)]
    return turns[:count]


def _clip(clip: xr.Dataset, sample: str, sound: int) -> dict[str, Any]:
    rates = clip["recovery_rate"].transpose("layer", ...).values.astype(float)
    shown: dict[str, Any] = {
        "id": sample,
        "label": str(clip["label"].item()),
        "sound": sound,
        "p_clean": round(float(clip["p_clean"]), 4),
        "p_corrupted": round(float(clip["p_corrupted"]), 4),
    }
    if rates.ndim == 1:
        return shown | {"rates": [[_number(rate)] for rate in rates], "texts": ["all text positions"], "roles": [""]}
    column = str(clip["recovery_rate"].transpose("layer", ...).dims[1])
    if column != "token":
        values = [[_number(rate) for rate in row] for row in rates]
        names = [f"{column} {name}" for name in clip[column].values]
        return shown | {"rates": values, "texts": names, "roles": [""] * len(names)}
    roles = clip["token_role"].values.astype(str)
    used = np.flatnonzero(roles != "")
    texts = [str(text) for text in clip["token_text"].values[used]]
    values = [[_number(rate) for rate in row] for row in rates[:, used]]
    return shown | {"rates": values, "texts": texts, "roles": [str(role) for role in roles[used]]}


def _number(rate: float) -> float | None:
    return round(rate, 3) if np.isfinite(rate) else None


def _records(run: xr.Dataset, wanted: bool) -> tuple[dict[str, Record], str]:
    """The run's clips by name where their sound lies on this machine, and else why it is not on the page."""
    if not wanted:
        return {}, "the page was made without sound"
    settings = run_settings(run)
    if not {"attr", "data", "model"} <= set(settings):
        return {}, "the dataset does not say where its clips are"
    attr, data = settings["attr"], settings["data"]
    name = settings["model"].get("data", "sakura") if data["name"] == "auto" and not data["root"] else data["name"]
    if name != "demo" and not data["root"]:
        return {}, "the clips came from the hub; give the run data.root=FOLDER to have them on the page"
    try:
        attribute = Attribute(**attr)
        found = load_demo(attribute) if name == "demo" else load_sakura(attribute, data["root"])
    except LalmPatchError as error:
        log.warning("no sound for %s: %s", about(run).title, error)
        return {}, f"the clips are not where the run found them: {error}"
    return {record.id: record for record in found}, ""


def _sound(record: Record) -> str:
    """What the model heard, as FLAC in a data address."""
    buffer = io.BytesIO()
    soundfile.write(buffer, record.waveform(None), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
