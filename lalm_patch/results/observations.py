"""Variables of a dataset with what was seen in the runs without changing them: logit lens, attention to the audio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from lalm_patch.models.roles import ROLES, segments_of
from lalm_patch.storage.run_store import SampleRecord

_NOT_RUN = "NaN: the clip could not be used"


def observed(samples: Sequence[SampleRecord], text_length: int) -> xr.Dataset:
    """What the samples' records hold of it; empty if the run was not asked to look.

    Args:
        samples: one record per sample.
        text_length: most tokens after the audio of any sample.

    Returns:
        Dimensions sample, observed_layer, token, listener (segment of the text), attention_head.
    """
    found = xr.Dataset()
    lenses = [sample.arrays.get("lens_text") for sample in samples]
    if layers := max((len(lens[0]) for lens in lenses if lens is not None), default=0):
        text = np.full((len(samples), 2, layers, text_length), np.nan, np.float32)
        audio = np.full((len(samples), 2, layers), np.nan, np.float32)
        for row, (sample, lens) in enumerate(zip(samples, lenses, strict=True)):
            if lens is not None:
                length = min(lens.shape[-1], text_length)  # a corrupted run's own transcript may be longer
                text[row, :, :, :length] = lens[..., :length]
                audio[row] = sample.arrays["lens_audio"]
        for index, run in enumerate(("clean", "corrupted")):
            name = f"probability of the answer by the logit lens, {run} run"
            found[f"lens_p_{run}"] = _variable(
                ("sample", "observed_layer", "token"), text[:, index], name, f"{_NOT_RUN}, or its text is shorter"
            )
            name = f"the largest over the audio positions, {run} run"
            found[f"lens_audio_{run}"] = _variable(("sample", "observed_layer"), audio[:, index], name, _NOT_RUN)
    masses = [sample.arrays.get("audio_attention") for sample in samples]
    if known := [mass for mass in masses if mass is not None]:
        present = {name for sample in samples for name in segments_of(sample.meta["token_roles"])}
        listeners = [role for role in ROLES if role in present]
        layers, _, heads = known[0].shape
        values = np.full((len(samples), layers, len(listeners), heads), np.nan, np.float32)
        for row, (sample, mass) in enumerate(zip(samples, masses, strict=True)):
            if mass is not None:
                own = segments_of(sample.meta["token_roles"])
                values[row][:, [listeners.index(name) for name in own]] = mass
        dims = ("sample", "observed_layer", "listener", "attention_head")
        name = "share of a segment's attention that falls on the audio, clean run"
        found["audio_attention"] = _variable(dims, values, name, f"{_NOT_RUN}, or its text lacks the segment")
        found = found.assign_coords(
            listener=("listener", np.array(listeners, object), {"long_name": "segment of the text that listens"}),
            attention_head=("attention_head", np.arange(heads), {"long_name": "attention head, from 0"}),
        )
    if "observed_layer" in found.dims:
        described = {"long_name": "decoder layer, from 0"}
        numbers = np.arange(found.sizes["observed_layer"])
        found = found.assign_coords(observed_layer=("observed_layer", numbers, described))
    return found


def _variable(dims: Any, values: np.ndarray, long_name: str, missing: str) -> tuple[Any, np.ndarray, dict[str, str]]:
    return dims, values, {"long_name": long_name, "units": "1", "missing": missing}
