"""What a dataset says about itself: which run it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from lalm_patch.analysis.licence import licence
from lalm_patch.errors import DataError
from lalm_patch.tracing.metrics import measured_as


@dataclass(frozen=True)
class About:
    """Which run a dataset is.

    Attributes:
        model: short name of the model.
        attribute: name of the attribute.
        granularity: `layer`, `token`, `segment`, `window` (of the audio), `edge`, `head`, `source_layer` (whose states
            are written back), `ablated`, `steering` or `receiver_layer` (of paths).
        layers: decoder layers the model has.
        seed: of the bootstrap.
        site: where states were exchanged: `resid`, `attn`, `mlp`, `head`, `embed` or `tower`.
        window: layers exchanged together.
        direction: `denoising` or `noising`.
        corruption: what the corrupted run hears: `silence`, or another.
        knockout: which attention was cut, in words; empty where states were exchanged.
        approximation: of approximate cells, the engine and how well it agrees with exact ones; else empty.
        metric: what the rate is of: `probability` of the answer, or another that `with_metric` put in its place.
        change: what was put in, in words, where that is not the other run's state of the same place; else empty.
    """

    model: str
    attribute: str
    granularity: str
    layers: int
    seed: int
    site: str = "resid"
    window: int = 1
    direction: str = "denoising"
    corruption: str = "silence"
    metric: str = "probability"
    knockout: str = ""
    approximation: str = ""
    change: str = ""

    @property
    def title(self) -> str:
        """For headings."""
        return ", ".join(filter(None, [self.model, self.attribute, self.departs]))

    @property
    def departs(self) -> str:
        """In what the run departs from the paper's method (site, window, direction, corruption, metric), if in any."""
        of_attention = self.knockout or self.granularity == "receiver_layer"
        parts = [
            self.knockout,
            self.change,
            "" if self.site == ("attn" if of_attention else "resid") else self.site,
            "" if self.window == 1 else f"windows of {self.window} layers",
            "" if self.direction == "denoising" or self.knockout or self.change else self.direction,
            "" if self.corruption == "silence" else self.corruption,
            "" if self.metric == "probability" else self.metric.replace("_", " "),
            self.approximation,
        ]
        return ", ".join(filter(None, parts))

    @property
    def measure(self) -> str:
        """What the rate is called: what comes back, or what goes."""
        return "share lost" if self.loses else "recovery rate"

    @property
    def loses(self) -> bool:
        """Whether the rate is the share of the gap that is lost, see `measured_as`."""
        return measured_as(self.direction, [self.granularity]) == "noising"

    @property
    def cumulative(self) -> bool:
        """Whether states hold everything that lower layers have done, so that a curve over layers ends at 1."""
        others = ("window", "source_layer", "ablated", "steering", "receiver_layer")
        return self.site == "resid" and self.granularity not in others


def about(dataset: xr.Dataset) -> About:
    """Which run a dataset is, from its attributes; names that are missing become `model` and `attribute`."""
    settings = run_settings(dataset)
    model = settings.get("model", {}).get("name") or dataset.attrs.get("model_id", "model")
    attribute = settings.get("attr", {}).get("name", "attribute")
    dims = dataset["recovery_rate"].dims
    granularity = next((str(dim) for dim in dims if dim not in ("sample", "layer")), "layer")
    layers = int(dataset.attrs.get("model_layers", int(np.max(dataset["layer"].values, initial=0)) + 1))
    site, direction = settings.get("site", {}), settings.get("direction", {})
    return About(
        str(model),
        str(attribute),
        granularity,
        layers,
        int(settings.get("seed", 0)),
        str(site.get("name", "resid")),
        int(site.get("window", 1)),
        str(direction.get("name", "denoising")),
        str(settings.get("corruption", {}).get("name", "silence")),
        str(dataset.attrs.get("metric", "probability")),
        _knockout(settings.get("granularity", {})),
        _approximation(dataset),
        _change(settings.get("granularity", {}), "clean" if direction.get("name") == "noising" else "corrupted"),
    )


def _approximation(dataset: xr.Dataset) -> str:
    try:
        found = licence(dataset)
    except DataError:
        return f"{dataset.attrs['engine']} without licence"
    return "" if found is None else str(found)


def _knockout(granularity: Mapping[str, Any]) -> str:
    name, edges = granularity.get("name"), granularity.get("edges")
    if name == "early_text_only":
        return "no audio for early text"
    return f"{', '.join(edges) if edges else 'attention'} cut" if name == "edge" else ""


def _change(granularity: Mapping[str, Any], run: str) -> str:
    strength = granularity.get("strength")
    return {
        "back": f"back-patched into the {run} run",
        "ablate": f"{granularity.get('replacement') or 'zero'} ablation",
        "steer": f"{run} run steered, strength {1.0 if strength is None else strength:g}",
        "path": f"path {granularity.get('path')} of the {run} run",
    }.get(str(granularity.get("name")), "")


def run_settings(dataset: xr.Dataset) -> dict[str, Any]:
    """The run's settings, from the dataset's attributes; empty if it has none."""
    settings: dict[str, Any] = json.loads(dataset.attrs.get("settings", "{}"))
    return settings


def variants(runs: Sequence[xr.Dataset]) -> list[str]:
    """What tells each run from the others of its model, attribute and granularity; empty where there are no others.

    The settings in which they differ, as one would type them: `data.seed=1`. Runs that differ in none are numbered.
    """
    names = [(info.model, info.attribute, info.granularity) for info in map(about, runs)]
    flat = [_identifying(run) for run in runs]
    found = []
    for index, name in enumerate(names):
        alike = [other for other, its in enumerate(names) if its == name]
        keys = sorted({key for other in alike for key in flat[other]})
        differing = [key for key in keys if len({flat[other].get(key) for other in alike}) > 1]
        own = [key for key in differing if flat[index].get(key, "null") != "null"]  # what is not set need not be said
        text = " ".join(f"{key}={flat[index].get(key, 'null')}" for key in own or differing)
        twins = [other for other in alike if all(flat[other].get(key) == flat[index].get(key) for key in differing)]
        if len(twins) > 1:
            text = f"{text} #{twins.index(index) + 1}".strip()
        found.append(text)
    return found


def _identifying(run: xr.Dataset) -> dict[str, str]:
    """The settings that tell runs apart, by their full names; not those that only say where or how it was computed."""
    flat = dict(_flattened(run_settings(run)))
    known = json.loads(run.attrs.get("run_identity", "{}"))
    return {key: value for key, value in flat.items() if key in known} if known else flat


def _flattened(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{before}{key}.")
        else:
            yield before + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def planted_window(dataset: xr.Dataset) -> tuple[int, int] | None:
    """First layer and end of the window outside of which a planted model has no attention; None for other models."""
    if "planted_attention_layers" not in dataset.attrs:
        return None
    first, end = json.loads(dataset.attrs["planted_attention_layers"])
    return int(first), int(end)
