"""What a dataset says about itself: which run it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr


@dataclass(frozen=True)
class About:
    """Which run a dataset is.

    Attributes:
        model: short name of the model.
        attribute: name of the attribute.
        granularity: `layer` or `token`.
        layers: decoder layers the model has.
        seed: of the bootstrap.
    """

    model: str
    attribute: str
    granularity: str
    layers: int
    seed: int

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.model}, {self.attribute}"


def about(dataset: xr.Dataset) -> About:
    """Which run a dataset is, from its attributes; names that are missing become `model` and `attribute`."""
    settings = run_settings(dataset)
    model = settings.get("model", {}).get("name") or dataset.attrs.get("model_id", "model")
    attribute = settings.get("attr", {}).get("name", "attribute")
    granularity = "token" if "token" in dataset["recovery_rate"].dims else "layer"
    layers = int(dataset.attrs.get("model_layers", int(np.max(dataset["layer"].values, initial=0)) + 1))
    return About(str(model), str(attribute), granularity, layers, int(settings.get("seed", 0)))


def run_settings(dataset: xr.Dataset) -> dict[str, Any]:
    """The run's settings, from the dataset's attributes; empty if it has none."""
    settings: dict[str, Any] = json.loads(dataset.attrs.get("settings", "{}"))
    return settings


def planted_window(dataset: xr.Dataset) -> tuple[int, int] | None:
    """First layer and end of the window outside of which a planted model has no attention; None for other models."""
    if "planted_attention_layers" not in dataset.attrs:
        return None
    first, end = json.loads(dataset.attrs["planted_attention_layers"])
    return int(first), int(end)
