"""One run as one labelled dataset: stored samples in, `xarray.Dataset` out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from lalm_patch.interventions.segments import AUDIO, has_edge
from lalm_patch.interventions.spans import PADDING, start_of
from lalm_patch.models.roles import segments_of
from lalm_patch.results.observations import observed
from lalm_patch.results.questions import numbers, own_questions, tags
from lalm_patch.results.resolution import Resolution, resolution
from lalm_patch.stimuli import SAMPLING_RATE
from lalm_patch.storage.netcdf import clean_text
from lalm_patch.storage.run_store import SampleRecord
from lalm_patch.tracing.metrics import Exclusion, measured_as, share_moved

_AXES = {
    "layer": "decoder layer, from 0",
    "head": "attention head, from 0",
    "segment": "segment of the text",
    "edge": "attention that is cut",
    "window": "window of the audio",
    "source_layer": "states of layer, from 0",
    "ablated": "what is replaced",
    "steering": "direction that is added",
    "receiver_layer": "read there in layer, from 0",
}
_LAYERS = {"tower": "audio encoder layer, from 0", "embed": "decoder layer, whose input is patched"}
"""What layers are at the sites that are not of all decoder layers."""
_MISSING_CELL = "NaN: the sample is excluded (see `exclusion`)"
_MISSING = {
    "token": f"{_MISSING_CELL}, or its text has fewer tokens than the longest one",
    "segment": f"{_MISSING_CELL}, or its text lacks the segment",
    "edge": f"{_MISSING_CELL}, or its text lacks one of the segments",
    "window": f"{_MISSING_CELL}, or its clip is over before the window",
    "ablated": f"{_MISSING_CELL}, or its text lacks the segment",
}


def build_dataset(
    samples: Sequence[SampleRecord],
    options: Sequence[str],
    dims: Sequence[str],
    coords: Mapping[str, Sequence[int] | np.ndarray],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """Dataset of a run.

    Args:
        samples: one record per sample, as `Tracer.trace` made them, in the order of the data set.
        options: the attribute's options; none where each sample has a question of its own: then option k is another
            one in every sample, unless all have the same, and `option_text` says which.
        dims: dimensions of the run's grid, `layer` first.
        coords: labels along the dimensions; along `token` none are needed, samples have their own tokens.
        attributes: provenance, stored as the dataset's attributes. With `direction` noising, the recovery rate is the
            share of the gap that is lost: the base run is the clean one.

    Returns:
        Dimensions sample, option, `dims`; per sample the probabilities, the recovery rate, why it is excluded, and the
        option logits and logsumexp from which other metrics follow.
    """
    if "window" in dims:  # clips have as many windows as they are long
        coords = {**coords, "window": _windows(samples)}
    own = [list(sample.meta.get("options", options)) for sample in samples]
    if own and not options:
        options = own[0] if all(each == own[0] for each in own) else numbers(max(map(len, own)))
    text_length = max((len(sample.meta["token_ids"]) for sample in samples), default=0)
    sizes = {name: len(labels) for name, labels in coords.items()} | {"token": text_length}
    shape = tuple(sizes[dim] for dim in dims)
    n_samples, n_options = len(samples), len(options)
    base_logits = np.full((n_samples, 2, n_options), np.nan, np.float32)
    base_sums = np.full((n_samples, 2), np.nan, np.float32)
    base_top = np.full((n_samples, 2), -1, np.int64)
    logits = np.full((n_samples, *shape, n_options), np.nan, np.float32)
    sums = np.full((n_samples, *shape), np.nan, np.float32)
    for row, sample in enumerate(samples):
        if "base_logsumexp" in sample.arrays:
            base_logits[row, :, : len(own[row])] = sample.arrays["base_option_logits"]
            base_sums[row] = sample.arrays["base_logsumexp"]
            base_top[row] = sample.arrays["base_top_id"]
        if "patched_logsumexp" in sample.arrays:
            cells = sample.arrays["patched_logsumexp"]
            where = np.ix_(*_places(sample, dims, coords, cells.shape))
            sums[row][where] = cells
            logits[row][where] = _widened(sample.arrays["patched_option_logits"], n_options)
    answers = np.array([its.index(sample.meta["label"]) for its, sample in zip(own, samples, strict=True)], dtype=int)
    rows = np.arange(n_samples)
    p_base = np.exp(base_logits[rows, :, answers] - base_sums)
    p_patched = _of_answers(logits, sums, answers)
    float32_base, float32_cells = _in_float32(samples, dims, coords, logits.shape, answers)
    rows_of = (n_samples, -1)
    resolved = resolution(
        np.concatenate([p_base, p_patched.reshape(rows_of)], axis=1),
        np.concatenate([float32_base, float32_cells.reshape(rows_of)], axis=1),
        str(attributes["checks"]) if "checks" in attributes else "[]",
        None if "settings" not in attributes else json.loads(attributes["settings"]).get("min_gap"),
    )
    reasons, details = _exclusions(samples, p_base, resolved)
    gap_shape = (n_samples, *[1] * len(shape))
    clean, corrupted = (p_base[:, column].reshape(gap_shape) for column in (0, 1))
    direction = str(attributes.get("direction", "denoising"))
    measured = measured_as(direction, dims)
    rate = share_moved(p_patched, clean, corrupted, measured)
    rate_name = "share of the gap that is lost (noising)" if measured == "noising" else "recovery rate"

    cell_dims = ("sample", *dims)
    missing = next((_MISSING[dim] for dim in dims if dim in _MISSING), _MISSING_CELL)
    variables: dict[str, Any] = {
        "recovery_rate": _variable(cell_dims, rate.astype(np.float32), rate_name, "1", missing=missing),
        "p_patched": _variable(cell_dims, p_patched, "probability of the answer, patched run", "1", missing=missing),
        "p_clean": _variable("sample", p_base[:, 0], "probability of the answer, clean run", "1"),
        "p_corrupted": _variable("sample", p_base[:, 1], "probability of the answer, corrupted run", "1"),
        "option_logit_patched": _variable((*cell_dims, "option"), logits, "logit, patched run", "nat", missing=missing),
        "logsumexp_patched": _variable(cell_dims, sums, "logsumexp of the logits, patched run", "nat", missing=missing),
        "exclusion": _variable("sample", np.array(reasons, object), "why the sample does not count; else empty"),
        "exclusion_detail": _variable("sample", np.array(details, object), "more on the exclusion"),
        "kept": _variable("sample", np.array([not reason for reason in reasons], bool), "whether the sample counts"),
    }
    if np.isfinite(float32_base).any():
        note = "NaN: not computed a second time"
        for column, run in enumerate(("clean", "corrupted")):
            text = f"probability of the answer in float32, {run} run"
            variables[f"p_{run}_float32"] = _variable("sample", float32_base[:, column], text, "1", missing=note)
        text = "probability of the answer in float32, patched run"
        variables["p_patched_float32"] = _variable(cell_dims, float32_cells, text, "1", missing=note)
    for column, run in enumerate(("clean", "corrupted")):
        name = f"{run} run"
        top = base_top[:, column]
        logit = base_logits[:, column]
        variables[f"option_logit_{run}"] = _variable(("sample", "option"), logit, f"logit, {name}", "nat")
        variables[f"logsumexp_{run}"] = _variable(
            "sample", base_sums[:, column], f"logsumexp of the logits over the vocabulary, {name}", "nat"
        )
        variables[f"prediction_{run}"] = _variable(
            "sample", _predictions(logit, own), f"option with the largest logit, {name}"
        )
        variables[f"top_token_id_{run}"] = _variable("sample", top, f"most probable token id, {name}; -1 if not run")
        if any(sample.meta.get(f"transcript_{run}") is not None for sample in samples):
            variables[f"transcript_{run}"] = _variable(
                "sample",
                np.array([clean_text(sample.meta.get(f"transcript_{run}") or "") for sample in samples], object),
                f"transcript given beside the audio, {name}; empty for none",
            )
    if any("licence_cells" in sample.meta for sample in samples):
        exact_logits, exact_sums = _some_cells(samples, dims, coords, logits.shape, "licence_cells", "exact")
        exact = _of_answers(exact_logits, exact_sums, answers)
        beside, note = "computed exactly beside the approximation", f"{missing}; or the cell was not chosen"
        text = f"probability of the answer, patched run, {beside}"
        variables["p_exact"] = _variable(cell_dims, exact, text, "1", missing=note)
        text = f"logit, patched run, {beside}"
        variables["option_logit_exact"] = _variable((*cell_dims, "option"), exact_logits, text, "nat", missing=note)
        text = f"logsumexp of the logits, patched run, {beside}"
        variables["logsumexp_exact"] = _variable(cell_dims, exact_sums, text, "nat", missing=note)
    if any("partner" in sample.meta for sample in samples):
        partners = np.array([clean_text(sample.meta.get("partner") or "") for sample in samples], object)
        variables["partner"] = _variable("sample", partners, "clip that the corrupted run hears; empty if not run")
    variables |= _whole_vocabulary(samples, answers, dims, coords, shape, direction, missing)
    variables |= own_questions(samples, options)
    variables |= _token_variables(samples, text_length)
    seen = observed(samples, text_length)
    dataset = xr.Dataset(
        variables, coords=_coordinates(samples, options, coords, text_length, str(attributes.get("site")))
    )
    dataset = dataset.assign(seen.data_vars).assign_coords(seen.coords).assign_coords(tags(samples))
    counts = Counter(reasons)
    dataset.attrs = {
        **attributes,
        "error_of_a_probability": resolved.error,
        "error_measured_as": resolved.how,
        "smallest_gap_that_counts": resolved.least,
        "n_samples": n_samples,
        "n_kept": counts[Exclusion.KEPT],
        "n_excluded_by_reason": json.dumps({reason: count for reason, count in sorted(counts.items()) if reason}),
    }
    return dataset


def _widened(values: np.ndarray, options: int) -> np.ndarray:
    """Values [..., option] with NaN up to a number of options."""
    missing = options - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=np.nan) if missing else values


def _of_answers(logits: np.ndarray, sums: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Probability of each sample's answer, from logits [sample, ..., option] and their logsumexp [sample, ...]."""
    chosen = answers.reshape(-1, *[1] * (logits.ndim - 1))
    return np.asarray(np.exp(np.take_along_axis(logits, chosen, -1)[..., 0] - sums))


def _some_cells(
    samples: Sequence[SampleRecord],
    dims: Sequence[str],
    coords: Mapping[str, Sequence[int] | np.ndarray],
    shape: tuple[int, ...],
    which: str,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Options' logits and logsumexp of cells that were computed a second time; NaN elsewhere.

    Args:
        samples: the run's.
        dims: of its grid.
        coords: along them.
        shape: of the logits, [sample, *dims, option].
        which: where a sample's record has the cells' indices.
        name: of the arrays.
    """
    logits = np.full(shape, np.nan, np.float32)
    sums = np.full(shape[:-1], np.nan, np.float32)
    for row, sample in enumerate(samples):
        if not sample.meta.get(which):
            continue
        own = sample.arrays["patched_logsumexp"].shape
        cells = np.unravel_index(sample.meta[which], own)
        places = [where[index] for where, index in zip(_places(sample, dims, coords, own), cells, strict=True)]
        logits[(row, *places)] = _widened(sample.arrays[f"{name}_option_logits"], shape[-1])
        sums[(row, *places)] = sample.arrays[f"{name}_logsumexp"]
    return logits, sums


def _in_float32(
    samples: Sequence[SampleRecord],
    dims: Sequence[str],
    coords: Mapping[str, Sequence[int] | np.ndarray],
    shape: tuple[int, ...],
    answers: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The answers' probabilities that were computed in float32, too: [sample, 2] of clean and corrupted run, and of
    cells [sample, *dims]; NaN elsewhere."""
    base = np.full((len(samples), 2), np.nan, np.float32)
    for row, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        if "float32_base_logsumexp" in sample.arrays:
            logits = sample.arrays["float32_base_option_logits"][:, answer]
            base[row] = np.exp(logits - sample.arrays["float32_base_logsumexp"])
    logits, sums = _some_cells(samples, dims, coords, shape, "float32_cells", "float32")
    return base, _of_answers(logits, sums, answers)


def _exclusions(
    samples: Sequence[SampleRecord], p_base: np.ndarray, resolved: Resolution
) -> tuple[list[str], list[str]]:
    """Why each sample does not count, and more on it: by its record, or because its gap [sample, 2] is too small."""
    reasons = [str(sample.meta["exclusion"]) for sample in samples]
    details = [str(sample.meta["detail"]) for sample in samples]
    for row, (clean, corrupted) in enumerate(p_base.astype(np.float64)):
        if reasons[row] == Exclusion.KEPT and clean - corrupted < resolved.least != 0:
            reasons[row] = str(Exclusion.UNRESOLVED)
            details[row] = (
                f"its gap of {clean - corrupted:.2g} is below {resolved.least:.2g}, "
                f"{resolved.least / resolved.error:g} times the error of a probability ({resolved.how})"
            )
    return reasons, details


def _windows(samples: Sequence[SampleRecord]) -> np.ndarray:
    """Names of all windows that the clips have, in time, what is after the clips last."""
    lists = [sample.meta.get("windows", []) for sample in samples]
    names = dict.fromkeys(name for names in sorted(lists, key=len, reverse=True) for name in names)
    return np.array(sorted(names, key=lambda name: name == PADDING), object)


def _places(
    sample: SampleRecord, dims: Sequence[str], coords: Mapping[str, Sequence[int] | np.ndarray], shape: tuple[int, ...]
) -> list[np.ndarray]:
    """Where a sample's cells belong along each dimension of the run's grid; a clip may lack a segment of others."""
    places = [np.arange(length) for length in shape]
    segments = segments_of(sample.meta["token_roles"])
    for axis, dim in enumerate(dims):
        if dim == "segment":
            places[axis] = np.flatnonzero([name in segments for name in coords[dim]])
        elif dim == "ablated":
            places[axis] = np.flatnonzero([name in (AUDIO, *segments) for name in coords[dim]])
        elif dim == "window":
            places[axis] = np.flatnonzero([name in sample.meta["windows"] for name in coords[dim]])
        elif dim == "edge":
            places[axis] = np.flatnonzero([has_edge(str(name), segments) for name in coords[dim]])
    return places


def _whole_vocabulary(
    samples: Sequence[SampleRecord],
    answers: np.ndarray,
    dims: Sequence[str],
    coords: Mapping[str, Sequence[int] | np.ndarray],
    shape: tuple[int, ...],
    direction: str,
    missing: str,
) -> dict[str, Any]:
    """The answer's rank and the divergence from the clean run, where the engine could tell (a server cannot)."""
    clean = 1 if direction == "noising" else 0  # which of source and target the clean run is
    variables: dict[str, Any] = {}
    for name, array, long_name, units in (
        ("rank", "option_rank", "rank of the answer in the vocabulary, 1 is the most probable", "1"),
        ("kl", "divergence", "KL(clean run || this run) over the vocabulary", "nat"),
    ):
        if not any(f"base_{array}" in sample.arrays for sample in samples):
            continue
        base = np.full((len(samples), 2), np.nan, np.float32)
        cells = np.full((len(samples), *shape), np.nan, np.float32)
        for row, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            column = answer if array == "option_rank" else clean
            if f"base_{array}" in sample.arrays:
                base[row] = sample.arrays[f"base_{array}"][:, column]
            if f"patched_{array}" in sample.arrays:
                found = sample.arrays[f"patched_{array}"][..., column]
                cells[row][np.ix_(*_places(sample, dims, coords, found.shape))] = found
        for index, run in enumerate(("clean", "corrupted")):
            variables[f"{name}_{run}"] = _variable("sample", base[:, index], f"{long_name}; {run} run", units)
        if np.isnan(cells).all() and any("patched_logsumexp" in sample.arrays for sample in samples):
            continue  # an approximation does not tell
        described = f"{long_name}; patched run"
        variables[f"{name}_patched"] = _variable(("sample", *dims), cells, described, units, missing=missing)
    return variables


def _coordinates(
    samples: Sequence[SampleRecord],
    options: Sequence[str],
    coords: Mapping[str, Sequence[int] | np.ndarray],
    length: int,
    site: str,
) -> dict[str, Any]:
    coordinates: dict[str, Any] = {
        "sample": ("sample", np.array([clean_text(sample.id) for sample in samples], object), {"long_name": "clip"}),
        "option": ("option", np.array(list(options), object), {"long_name": "answer option"}),
        **{name: (name, np.asarray(labels), {"long_name": _AXES.get(name, name)}) for name, labels in coords.items()},
        "label": ("sample", _texts(samples, "label"), {"long_name": "right answer"}),
        "group": ("sample", _texts(samples, "group"), {"long_name": "speaker or source recording"}),
    }
    if "window" in coords:
        starts = np.array([start_of(str(name)) for name in coords["window"]])
        described = {"long_name": "start of the window; NaN where it has no time", "units": "s"}
        coordinates["window_start"] = ("window", starts, described)
    if site in _LAYERS:
        coordinates["layer"][2]["long_name"] = _LAYERS[site]
    if "source_layer" in coords:
        coordinates["layer"][2]["long_name"] = "at the start of layer, from 0"
    if "receiver_layer" in coords:
        coordinates["layer"][2]["long_name"] = "written in layer, from 0"
    attributes = {"long_name": "position, counted from the first one after the audio"}
    coordinates["token"] = ("token", np.arange(length), attributes)
    return coordinates


def _token_variables(samples: Sequence[SampleRecord], length: int) -> dict[str, Any]:
    def padded(key: str) -> np.ndarray:
        rows = [[*sample.meta[key], *[""] * (length - len(sample.meta[key]))] for sample in samples]
        return np.array(rows, object).reshape(len(samples), length)

    def numbers(key: str) -> np.ndarray:
        return np.array([sample.meta[key] for sample in samples], np.int64)

    seconds = numbers("samples") / SAMPLING_RATE
    unknown = np.full(2, np.nan, np.float32)  # of runs made before it was stored
    loudness = np.array([sample.arrays.get("loudness", unknown) for sample in samples], np.float32).reshape(-1, 2)
    repaired = np.array(["; ".join(sample.meta.get("repaired", [])) for sample in samples], object)
    first = numbers("first_text_position")
    return {
        "token_text": _variable(
            ("sample", "token"), padded("token_texts"), "token after the audio; empty past the last"
        ),
        "token_role": _variable(("sample", "token"), padded("token_roles"), "role of the token; empty past the last"),
        "duration": _variable("sample", seconds.astype(np.float32), "length of the clip", "s"),
        "level": _variable("sample", loudness[:, 0], "root mean square of the clip; -inf for digital silence", "dBFS"),
        "peak": _variable("sample", loudness[:, 1], "largest sample of the clip; -inf for digital silence", "dBFS"),
        "repaired": _variable("sample", repaired, "what was repaired or ignored in the clip's file; else empty"),
        "positions": _variable("sample", numbers("positions"), "positions of the whole prompt, audio included"),
        "audio_positions": _variable("sample", numbers("audio_positions"), "audio embeddings in the prompt"),
        "first_text_position": _variable("sample", first, "position of the first token after the audio"),
    }


def _variable(
    dims: Any, values: np.ndarray, long_name: str, units: str | None = None, missing: str | None = None
) -> tuple[Any, np.ndarray, dict[str, str]]:
    attributes = {"long_name": long_name}
    if units is not None:
        attributes["units"] = units
    if missing is not None:
        attributes["missing"] = missing
    return dims, values, attributes


def _texts(samples: Sequence[SampleRecord], key: str) -> np.ndarray:
    return np.array([str(sample.meta[key]) for sample in samples], object)


def _predictions(logits: np.ndarray, options: Sequence[Sequence[str]]) -> np.ndarray:
    """Each sample's best option, from logits [sample, option] with NaN past its last one; empty if it was not run."""
    known = ~np.isnan(logits).all(axis=1)
    chosen = np.where(np.isnan(logits), -np.inf, logits).argmax(axis=1)
    found = zip(options, chosen, known, strict=True)
    return np.array([clean_text(its[i]) if ok else "" for its, i, ok in found], object)
