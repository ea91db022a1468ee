"""The logit lens in the causal curve's units: how much of the answer can be seen, against how much can be moved.

AudioLens (arXiv 2506.05140) reads attributes off hidden states. What can be read off a state need not be used from
there, and what is used need not be readable in the head's own basis: hence both on one axis.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from lalm_patch.analysis.recovery import mean_recovery
from lalm_patch.analysis.run_info import about
from lalm_patch.errors import DataError


def seen_at_tokens(dataset: xr.Dataset) -> xr.Dataset:
    """Mean share of the runs' difference that the lens sees, by layer and token; like a token-wise `mean_recovery`.

    The share is (lens_p_clean - lens_p_corrupted) / (p_clean - p_corrupted), with the recovery rate's denominator: at
    the last layer's last token it is 1.

    Raises:
        DataError: a run without observe=lens.
    """
    return mean_recovery(_as_rates(dataset, "lens_p"), seed=about(dataset).seed)


def seen_in_audio(dataset: xr.Dataset) -> xr.Dataset:
    """The same of the audio position where it is largest, in each run, by layer."""
    return mean_recovery(_as_rates(dataset, "lens_audio"), seed=about(dataset).seed)


def _as_rates(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """A dataset whose recovery rates are shares that the lens sees; the same samples count."""
    if f"{name}_clean" not in dataset:
        raise DataError("this run did not look through the logit lens: expected a run with observe=lens")
    clean, corrupted = (dataset[f"{name}_{run}"].astype(float) for run in ("clean", "corrupted"))
    gap = dataset["p_clean"].astype(float) - dataset["p_corrupted"].astype(float)
    share = ((clean - corrupted) / gap.where(gap > 0)).transpose("sample", "observed_layer", ...)
    names = [key for key in ("kept", "exclusion", "token_text", "token_role") if key in dataset]
    shown = share.rename(observed_layer="layer").assign_coords(layer=np.arange(share.sizes["observed_layer"]))
    # What was seen is exact, also where cells are approximate.
    attributes = {key: value for key, value in dataset.attrs.items() if key != "engine"}
    lens = dataset[names].assign(recovery_rate=shown)
    lens.attrs = attributes
    return lens
