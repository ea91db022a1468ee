"""What is left of the answers when lower layers let no text position attend to the audio."""

from __future__ import annotations

import numpy as np
import xarray as xr

from lalm_patch.analysis.alignment import kept_samples
from lalm_patch.analysis.options import right_options
from lalm_patch.analysis.recovery import group_names, mean_over_samples
from lalm_patch.analysis.resampling import CONFIDENCE, unanimous
from lalm_patch.analysis.run_info import about, run_settings


def accuracy_without_early_audio(dataset: xr.Dataset, confidence: float = CONFIDENCE) -> xr.Dataset:
    """Share of clips still answered right where text attends to audio above a layer only (arXiv 2603.13768, 5.3).

    Only clips that count were run, and these are right in the clean run: 1 is what the whole model has on them.

    Args:
        dataset: dataset of a run with granularity=early_text_only.
        confidence: of the intervals. Where all clips agree these are exact ones of a share, over groups: they do not
            shrink to one value.

    Returns:
        Along `layer`, the highest layer whose text does not attend to the audio: `accuracy` with `low`, `high`, `n`;
        and `saved`, the share of the decoder's attention scores that need not be computed: text positions times audio
        positions in the layers up to this one, of the N (N + 1) / 2 pairs of N positions in each of all layers.

    Raises:
        ValueError: another granularity.
    """
    if run_settings(dataset).get("granularity", {}).get("name") != "early_text_only":
        raise ValueError("accuracy without early audio needs a run with granularity=early_text_only")
    kept = kept_samples(dataset)
    logits = kept["option_logit_patched"].transpose("sample", "layer", "option")
    best = np.where(np.isnan(logits.values), -np.inf, logits.values).argmax(axis=-1)
    right = np.take_along_axis(right_options(kept).transpose("sample", "option").values, best, axis=1)
    values = xr.DataArray(right.astype(np.float64), dims=("sample", "layer"), coords={"layer": kept["layer"]})
    found = mean_over_samples(values, group_names(kept), confidence, about(dataset).seed)
    bound = unanimous(found["groups"].values, confidence)
    found["low"] = found["low"].where(found["mean"] < 1, bound).where(found["mean"] > 0, 0.0).clip(0.0)
    found["high"] = found["high"].where(found["mean"] > 0, 1 - bound).where(found["mean"] < 1, 1.0).clip(max=1.0)
    positions = kept["positions"].astype(np.float64)
    text = positions - kept["first_text_position"]
    share = text * kept["audio_positions"] / (positions * (positions + 1) / 2)
    saved = share.mean("sample") * (kept["layer"] + 1) / about(dataset).layers
    table = found.rename(mean="accuracy").assign(saved=saved)
    table["accuracy"].attrs["long_name"] = "share of clips still answered right"
    table["saved"].attrs = {"long_name": "share of attention scores saved", "units": "1"}
    return table
