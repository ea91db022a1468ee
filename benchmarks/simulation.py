"""Simulated runs whose truth is known: planted fusion depth, width and object-token effect; clustered, skewed noise."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xarray as xr

ROLES = ("template", *["early"] * 4, *["object"] * 5, *["late"] * 3, "template", "late", "last")
TEXTS = (
    ".",
    " What",
    " is",
    " the",
    " sound",
    " cat",
    ",",
    " dog",
    ",",
    " pig",
    ".",
    " The",
    " sound",
    "\n",
    "'s",
    " is",
)


@dataclass(frozen=True)
class Planted:
    """What is true of a simulated population of clips.

    Attributes:
        layers: decoder layers.
        centre: layer at which the rise is steepest.
        scale: of the logistic rise, in layers.
        object_peak: mean recovery that the option tokens have beyond the text around them, in the middle layer.
    """

    layers: int = 24
    centre: float = 14.3
    scale: float = 1.6
    object_peak: float = 0.0

    @property
    def curve(self) -> np.ndarray:
        """Mean recovery of the population over layers: [layer], ends at 1."""
        rise = 1 / (1 + np.exp(-(np.arange(self.layers) - self.centre) / self.scale))
        return rise / rise[-1]

    @property
    def object_effect(self) -> np.ndarray:
        """Mean recovery of the object tokens minus that of their neighbours: [layer]."""
        return self.object_peak * np.exp(-(((np.arange(self.layers) - self.layers / 2) / 2.5) ** 2))

    def crossing(self, level: float) -> float:
        """Layer at which the curve, drawn as straight pieces between layers, reaches a share of its end."""
        return float(np.interp(level, self.curve, np.arange(self.layers)))


def simulate(
    planted: Planted,
    seed: int,
    groups: int = 40,
    token_wise: bool = False,
    name: tuple[str, str] = ("model", "pet"),
    skewness: float = 1.0,
) -> xr.Dataset:
    """A run of clips drawn from the population: 1 to 4 clips per group, which share part of their deviation.

    The deviations have mean 0 and are skewed (gamma) for a group and normal for a clip, largest where the curve
    is steepest and nothing in the last layer, as recovery is there by construction. Differences between object tokens
    and neighbours are symmetric with heavy tails.
    """
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rng.integers(1, 5, groups))
    n, curve = len(group), planted.curve
    room = 4 * curve * (1 - curve) + 0.05
    room[-1] = 0.0
    shape = 4 / skewness**2  # of the gamma distribution with this skewness
    shared = 0.15 * (rng.gamma(shape, 1.0, groups)[group] - shape) / np.sqrt(shape)
    rates = curve + room * (shared[:, None] + 0.1 * rng.normal(size=(n, planted.layers)))
    dims: tuple[str, ...] = ("sample", "layer")
    coords = {
        "sample": np.array([f"clip{index}" for index in range(n)], object),
        "layer": np.arange(planted.layers),
        "group": ("sample", np.array([f"speaker{index}" for index in group], object)),
        "label": ("sample", np.array(["cat"] * n, object)),
        "option": np.array(["cat", "dog"], object),
    }
    variables: dict[str, object] = {}
    if token_wise:
        dims = (*dims, "token")
        coords["token"] = np.arange(len(ROLES))
        roles = np.array(ROLES)
        tokens = 0.05 * rng.standard_t(5, (n, planted.layers, len(ROLES)))
        own = 0.05 * rng.standard_t(5, (groups, planted.layers))[group]
        tokens[:, :, roles == "object"] += (planted.object_effect + own)[:, :, None]
        tokens[:, :, roles == "last"] = rates[:, :, None]
        rates = tokens
        for key, texts in (("token_text", TEXTS), ("token_role", ROLES)):
            variables[key] = (("sample", "token"), np.tile(np.array(texts, object), (n, 1)))
    p_corrupted, gap = 0.1, rng.uniform(0.2, 0.8, n)
    variables |= {
        "recovery_rate": (dims, rates),
        "p_patched": (dims, p_corrupted + gap.reshape(-1, *[1] * (rates.ndim - 1)) * rates),
        "p_clean": ("sample", p_corrupted + gap),
        "p_corrupted": ("sample", np.full(n, p_corrupted)),
        "kept": ("sample", np.ones(n, bool)),
        "exclusion": ("sample", np.array([""] * n, object)),
        "prediction_clean": ("sample", np.array(["cat"] * n, object)),
        "prediction_corrupted": ("sample", np.array(["dog"] * n, object)),
    }
    granularity = "token" if token_wise else "layer"
    settings = {"model": {"name": name[0]}, "attr": {"name": name[1]}, "granularity": {"name": granularity}, "seed": 0}
    attributes = {
        "title": f"Simulated run of {name[0]} on {name[1]}, {granularity}-wise",
        "settings": json.dumps(settings),
        "model_id": name[0],
        "model_revision": "simulated",
        "model_layers": planted.layers,
        "dtype": "float32",
        "engine": "none",
        "checks": "[]",
        "command": "simulated",
        "prompt_as_sent": "simulated",
    }
    return xr.Dataset(variables, coords, attributes)
