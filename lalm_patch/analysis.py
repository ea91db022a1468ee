"""From a run's dataset to what is reported: means with intervals, the peak, who counts, how often the model is right.

Needs no model and no torch: it works on a dataset opened anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import bootstrap

KEPT = "kept"

SAME_PLATEAU = 1e-3
"""Means this close to the largest one count as tied: on a plateau, rounding would choose the layer otherwise."""

_BATCH_CELLS = 4_000_000
"""Numbers a batch of resamples may hold at once: some tens of MB."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Mean recovery at one place of a grid.

    Attributes:
        layer: decoder layer.
        mean: mean recovery rate over the kept samples.
        low, high: its interval; NaN where it cannot be estimated.
        n: samples in the mean.
        token: column of the grid; None in a layer-wise run.
        text: what the token says; empty in a layer-wise run.
        role: role of the token; empty in a layer-wise run.
    """

    layer: int
    mean: float
    low: float
    high: float
    n: int
    token: int | None = None
    text: str = ""
    role: str = ""


@dataclass(frozen=True)
class Peak:
    """Where mean recovery is largest.

    Attributes:
        over_layers: over the layers; of a token-wise run, at the last token.
        overall: over all cells of the grid.
        before_last: over the cells before the last token; None in a layer-wise run.
    """

    over_layers: Cell
    overall: Cell
    before_last: Cell | None

    @property
    def layer(self) -> int:
        """The layer of `over_layers`."""
        return self.over_layers.layer


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers.

    Attributes:
        clean: of the clean run; NaN without a readable clip.
        corrupted: of the corrupted run; NaN without a readable clip.
        chance: of guessing, one over the number of options.
        n: readable clips.
    """

    clean: float
    corrupted: float
    chance: float
    n: int


def mean_recovery(dataset: xr.Dataset, confidence: float = 0.95, seed: int = 0, n_resamples: int = 2000) -> xr.Dataset:
    """Mean recovery rate over the kept samples, with a bootstrap interval.

    Clusters are drawn with replacement, not samples: all samples with the same coordinate `group` (a speaker, a source
    recording) are drawn together, since they are not independent. The mean stays the mean over samples. Where every
    sample has a group of its own this is the ordinary bootstrap. One draw serves all cells, so the intervals of
    neighbouring layers are comparable.

    The interval is the percentile one. BCa corrects for skew, but is undefined where all samples agree, and they
    do agree in the cells where recovery is 0 or 1 by construction. With fewer than some 20 groups it is a little too
    narrow, as every bootstrap is.

    Args:
        dataset: a run's dataset; token-wise ones go through `align_tokens`.
        confidence: of the interval.
        seed: of the draws.
        n_resamples: number of draws.

    Returns:
        `mean`, `low`, `high`, `n` (samples) and `groups` (clusters) along `layer` or (`layer`, `token`). Cells that a
        sample lacks (NaN) are left out, with their own n. No sample: the mean is NaN; one group: it has no interval.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share between 0 and 1, got {confidence}")
    samples = align_tokens(dataset) if "token" in dataset["recovery_rate"].dims else _kept(dataset)
    rates = samples["recovery_rate"].transpose("sample", "layer", ...)
    values = rates.values.astype(np.float64).reshape(rates.sizes["sample"], prod(rates.shape[1:]))
    present = ~np.isnan(values)
    names = samples["group"].values if "group" in samples.coords else np.arange(rates.sizes["sample"])
    _, cluster = np.unique(names.astype(str), return_inverse=True)
    sums = _per_cluster(np.where(present, values, 0.0), cluster)
    counts = _per_cluster(present.astype(np.float64), cluster)
    n = counts.sum(axis=0)
    mean = np.divide(sums.sum(axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)
    low, high = np.full((2, n.size), np.nan)
    # Cells that the same clusters have are resampled together, and only from the clusters that have them.
    patterns, pattern = np.unique(counts > 0, axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        clusters, cells = patterns[:, index], pattern.ravel() == index
        if clusters.sum() > 1:
            block = np.ix_(clusters, cells)
            low[cells], high[cells] = _interval(sums[block], counts[block], confidence, seed, n_resamples)
    dims, shape = rates.dims[1:], rates.shape[1:]
    described = {
        "mean": (mean, "mean recovery rate over the kept samples", {"units": "1"}),
        "low": (low, f"lower end of the {confidence:.0%} interval", {"units": "1"}),
        "high": (high, f"upper end of the {confidence:.0%} interval", {"units": "1"}),
        "n": (n.astype(np.int64), "samples in the mean", {}),
        "groups": ((counts > 0).sum(axis=0), "groups (speakers, recordings) the samples come from", {}),
    }
    variables = {
        name: (dims, array.reshape(shape), {"long_name": text, **units})
        for name, (array, text, units) in described.items()
    }
    coords = {name: coord for name, coord in rates.coords.items() if set(coord.dims) <= set(dims)}
    attrs = {
        "interval": f"{confidence:.0%} percentile bootstrap over groups, {n_resamples} draws, seed {seed}",
        "n_samples": dataset.sizes["sample"],
        "n_kept": rates.sizes["sample"],
        **{key: samples.attrs[key] for key in ("token_alignment",) if key in samples.attrs},
    }
    return xr.Dataset(variables, coords, attrs)


def _per_cluster(values: FloatArray, cluster: NDArray[np.intp]) -> FloatArray:
    """Sums of the rows [sample, cell] of each cluster: [cluster, cell]."""
    total = np.zeros((int(cluster.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(total, cluster, values)
    return total


def _interval(
    sums: FloatArray, counts: FloatArray, confidence: float, seed: int, n_resamples: int
) -> tuple[FloatArray, FloatArray]:
    """Percentile interval of sum / count per cell, from [cluster, cell] sums and counts."""
    n_clusters, n_cells = sums.shape

    def statistic(drawn: NDArray[np.intp], axis: int) -> FloatArray:
        # How often each cluster was drawn times its sum: one matrix product instead of gathering all drawn cells.
        rows = np.moveaxis(drawn, axis, -1).reshape(-1, n_clusters)
        offset = np.arange(len(rows))[:, None] * n_clusters
        times = np.bincount((rows + offset).ravel(), minlength=rows.size).reshape(rows.shape).astype(np.float64)
        means = (times @ sums) / (times @ counts)
        return means.T.reshape(n_cells, *drawn.shape[:-1])

    result = bootstrap(
        (np.arange(n_clusters),),
        statistic,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=n_resamples,
        batch=max(1, min(n_resamples, _BATCH_CELLS // max(n_cells, n_clusters))),
        random_state=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return np.asarray(interval.low), np.asarray(interval.high)


def peak_layer(dataset: xr.Dataset, recovery: xr.Dataset | None = None) -> Peak | None:
    """Where mean recovery is largest; the first layer in a tie (within `SAME_PLATEAU`).

    At the last token of the last layer, recovery is 1 by construction: `before_last` looks at the other tokens.

    Args:
        dataset: a run's dataset.
        recovery: its `mean_recovery`, where that is there already.

    Returns:
        None if no sample counts.
    """
    recovery = mean_recovery(dataset) if recovery is None else recovery
    if not recovery["mean"].notnull().any():
        return None
    if "token" not in recovery.dims:
        best = _largest(recovery)
        return Peak(best, best, None)
    last = recovery.isel(token=[-1])
    before = recovery.isel(token=slice(0, -1))
    elsewhere = _largest(before) if before["mean"].notnull().any() else None
    return Peak(_largest(last), _largest(recovery), elsewhere)


def _largest(recovery: xr.Dataset) -> Cell:
    means = recovery["mean"].transpose("layer", ...).values
    first = np.argwhere(means >= np.nanmax(means) - SAME_PLATEAU)[0]
    return _cell(recovery.isel(dict(zip(recovery["mean"].dims, first.tolist(), strict=True))))


def _cell(place: xr.Dataset) -> Cell:
    texts: dict[str, Any] = {}
    if "token" in place.coords:
        texts = {"token": int(place["token"]), "text": str(place["token_text"].item())}
        texts["role"] = str(place["token_role"].item())
    mean, low, high = (float(place[name]) for name in ("mean", "low", "high"))
    return Cell(int(place["layer"]), mean, low, high, int(place["n"]), **texts)


def over_layers(recovery: xr.Dataset) -> list[Cell]:
    """Mean recovery layer by layer, of a token-wise run at the last token; from `mean_recovery`."""
    line = recovery.isel(token=-1) if "token" in recovery.dims else recovery
    return [_cell(line.isel(layer=index)) for index in range(line.sizes["layer"])]


def align_tokens(dataset: xr.Dataset) -> xr.Dataset:
    """The kept samples of a token-wise run on one common `token` axis, so that a mean over samples has a meaning.

    With a fixed prompt all samples have the same tokens, and nothing changes. Otherwise (shuffled options, transcripts)
    position k is another word in every sample, and:

    - where all samples have the same segments in the same order (a segment: neighbouring tokens of one role), segments
      with the same tokens stay as they are, and in the others each sample's recovery is averaged over the segment;
    - where the segments differ too, each sample's recovery is averaged over each role.

    Returns:
        `recovery_rate` (sample, layer, token) with the coordinates `token_text`, `token_role` and `averaged` (whether
        the column is a mean over several tokens); the attribute `token_alignment` says in words what was done.
        Without a kept sample: no samples, and the tokens of the first readable one.
    """
    if "token" not in dataset["recovery_rate"].dims:
        raise ValueError("align_tokens takes the dataset of a token-wise run; this one has no dimension `token`")
    kept = _kept(dataset)
    shown = kept if kept.sizes["sample"] else dataset.isel(sample=_first_readable(dataset))
    texts, roles = _tokens(shown)
    rates = kept["recovery_rate"].transpose("sample", "layer", "token")
    columns, how = _columns(texts, roles)
    values = np.full((*rates.shape[:2], len(columns)), np.nan)
    for index, column in enumerate(columns):
        for row in range(rates.sizes["sample"]):
            if places := column.places[row]:
                values[row, :, index] = rates.values[row][:, places].mean(axis=1)
    coords: dict[str, Any] = {name: kept[name] for name in ("sample", "group", "label") if name in kept.coords}
    coords |= {
        "layer": kept["layer"],
        "token": ("token", np.arange(len(columns)), dataset["token"].attrs),
        "token_text": ("token", np.array([column.text for column in columns], object)),
        "token_role": ("token", np.array([column.role for column in columns], object)),
        "averaged": ("token", np.array([column.averaged for column in columns], bool)),
    }
    variables = {"recovery_rate": (("sample", "layer", "token"), values, rates.attrs)}
    return xr.Dataset(variables, coords, {**dataset.attrs, "token_alignment": how})


@dataclass(frozen=True)
class _Column:
    """One column of an aligned grid: which of each sample's tokens it is the mean of."""

    text: str
    role: str
    averaged: bool
    places: list[list[int]]


def _columns(texts: list[list[str]], roles: list[list[str]]) -> tuple[list[_Column], str]:
    rows = range(len(roles))
    if all(texts[row] == texts[0] and roles[row] == roles[0] for row in rows):
        pairs = zip(texts[0], roles[0], strict=True) if roles else ()
        columns = [_Column(text, role, False, [[k]] * len(roles)) for k, (text, role) in enumerate(pairs)]
        return columns, "all samples have the same tokens"
    runs = [_runs(row) for row in roles]
    names = [[role for role, _ in row] for row in runs]
    if any(row != names[0] for row in names):
        order = list(dict.fromkeys(role for row in roles for role in row if role != "last"))
        order += ["last"] if any("last" in row for row in roles) else []
        of_role = {role: [[k for k, r in enumerate(row) if r == role] for row in roles] for role in order}
        columns = [_averaged(role, places) for role, places in of_role.items()]
        return columns, "samples differ in their segments: averaged over each role within a sample"
    columns, differing = [], []
    for index, role in enumerate(names[0]):
        places = [row[index][1] for row in runs]
        words = [[texts[row][k] for k in places[row]] for row in rows]
        if all(row == words[0] for row in words):
            columns += [_Column(word, role, False, [[row[k]] for row in places]) for k, word in enumerate(words[0])]
        else:
            columns.append(_averaged(role, places))
            differing.append(role)
    return columns, f"samples differ in their {', '.join(differing)} tokens: averaged over these within a sample"


def _averaged(role: str, places: list[list[int]]) -> _Column:
    lengths = sorted({len(row) for row in places})
    count = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    if lengths[-1] == 1:
        return _Column(f"({role})", role, False, places)
    return _Column(f"(mean of {count})", role, True, places)


def _runs(roles: Sequence[str]) -> list[tuple[str, list[int]]]:
    return [(role, [k for k, _ in run]) for role, run in groupby(enumerate(roles), key=lambda pair: pair[1])]


def segments(roles: Sequence[str]) -> list[tuple[str, int, int]]:
    """Neighbouring tokens of one role, as (role, first column, last column)."""
    return [(role, places[0], places[-1]) for role, places in _runs(roles)]


def _tokens(dataset: xr.Dataset) -> tuple[list[list[str]], list[list[str]]]:
    """Texts and roles per sample, without the padding after shorter texts (which has no role)."""
    texts, roles = (dataset[name].transpose("sample", "token").values for name in ("token_text", "token_role"))
    lengths = [sum(1 for role in row if role) for row in roles]

    def cut(rows: NDArray[Any]) -> list[list[str]]:
        return [[str(item) for item in row[:length]] for row, length in zip(rows, lengths, strict=True)]

    return cut(texts), cut(roles)


def exclusion_table(dataset: xr.Dataset) -> xr.DataArray:
    """How many samples of each class count, and how many do not, by reason.

    Returns:
        Counts (label, reason); labels in the options' order, reason `kept` first. Each sample is counted once.
    """
    labels = [str(option) for option in dataset["option"].values]
    found = [str(reason) or KEPT for reason in dataset["exclusion"].values]
    reasons = [KEPT, *sorted(set(found) - {KEPT})]
    counts = np.zeros((len(labels), len(reasons)), dtype=np.int64)
    for label, reason in zip(dataset["label"].values, found, strict=True):
        counts[labels.index(str(label)), reasons.index(reason)] += 1
    coords = {"label": np.array(labels, object), "reason": np.array(reasons, object)}
    return xr.DataArray(counts, coords, ("label", "reason"), name="samples")


def accuracy(dataset: xr.Dataset) -> Accuracy:
    """How often the clean and the corrupted run are right, over the readable clips.

    A prediction is what the run's setting `prompt.correct` says: the best option, or the best token of the vocabulary.
    """
    readable = is_readable(dataset)
    n = int(readable.sum())
    clean, corrupted = (
        float(is_right(dataset, run)[readable].mean()) if n else np.nan for run in ("clean", "corrupted")
    )
    return Accuracy(clean, corrupted, 1 / max(dataset.sizes["option"], 1), n)


def is_readable(dataset: xr.Dataset) -> NDArray[np.bool_]:
    """Which samples were run at all."""
    return np.array([bool(str(text)) for text in dataset["prediction_clean"].values], bool)


def is_right(dataset: xr.Dataset, run: str) -> NDArray[np.bool_]:
    """Which samples the `clean` or `corrupted` run answers rightly; see `accuracy`."""
    labels = [str(label) for label in dataset["label"].values]
    if run_settings(dataset).get("prompt", {}).get("correct") == "vocabulary":
        target = json.loads(dataset.attrs["target_token_ids"])
        top = dataset[f"top_token_id_{run}"].values
        return np.array([target[label] == int(token) for label, token in zip(labels, top, strict=True)], bool)
    predicted = dataset[f"prediction_{run}"].values
    return np.array([label == str(text) for label, text in zip(labels, predicted, strict=True)], bool)


def why_none_counts(dataset: xr.Dataset) -> str:
    """The sentence that stands in for results where no sample counts: the reasons and what they mean."""
    if not dataset.sizes["sample"]:
        return "no sample counts: the run has no samples"
    table = exclusion_table(dataset)
    totals = {str(reason): int(table.sel(reason=reason).sum()) for reason in table["reason"].values}
    reasons = ", ".join(f"{reason} ({count})" for reason, count in totals.items() if count)
    text = f"no sample counts: {reasons}."
    answers = {str(option) for option in dataset["prediction_corrupted"].values if str(option)}
    if len(answers) == 1:
        text += (
            f" Without the sound the model always answers '{answers.pop()}', so clips of that class never count;"
            " the others count once the clean run names them rightly."
        )
    return text


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


def _kept(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.isel(sample=np.flatnonzero(dataset["kept"].values))


def _first_readable(dataset: xr.Dataset) -> list[int]:
    return [int(row) for row in np.flatnonzero((dataset["token_role"] != "").any("token").values)[:1]]
