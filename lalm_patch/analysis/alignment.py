"""One token axis for all samples of a token-wise run, also where their texts differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray


def kept_samples(dataset: xr.Dataset) -> xr.Dataset:
    """The samples that count."""
    return dataset.isel(sample=np.flatnonzero(dataset["kept"].values))


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
    kept = kept_samples(dataset)
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


def _first_readable(dataset: xr.Dataset) -> list[int]:
    return [int(row) for row in np.flatnonzero((dataset["token_role"] != "").any("token").values)[:1]]
