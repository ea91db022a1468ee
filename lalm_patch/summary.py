"""The page of text a run ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lalm_patch.analysis import (
    KEPT,
    About,
    Cell,
    Estimate,
    about,
    accuracy,
    classes,
    exclusion_table,
    grounding,
    is_inexact,
    is_readable,
    is_right,
    licence,
    lost_classes,
    mean_recovery,
    over_layers,
    peak_layer,
    planted_window,
    precision,
    seen_at_tokens,
    why_none_counts,
)
from lalm_patch.checks import from_json
from lalm_patch.terminal import as_typed

OF_EACH_LAYER = {
    "source_layer": "with the best states at the start of each layer",
    "ablated": "without what matters most in each layer",
    "steering": "along the best direction in each layer",
    "receiver_layer": "by the best receiving layer of each sending one",
}
"""What the line over layers shows where something else than the other run's states was put in."""


def summary(dataset: xr.Dataset, files: Sequence[Path], recovery: xr.Dataset | None = None) -> str:
    """What a run found, whom it counted, and whether to trust it.

    Args:
        dataset: the run's dataset.
        files: what was written.
        recovery: its `mean_recovery`, where that is there already.
    """
    attributes = dataset.attrs
    lines = [
        "",
        str(attributes["title"]),
        f"model    {attributes['model_id']} ({attributes['model_revision']}), {attributes['model_layers']} layers, "
        f"{_type(attributes)}, engine {attributes['engine']}",
        *_samples(dataset),
        *_findings(dataset, mean_recovery(dataset, seed=about(dataset).seed) if recovery is None else recovery),
        *_seen(dataset),
        *_checks(dataset),
        "files    " + "\n         ".join(as_typed(path) for path in files),
    ]
    return "\n".join(lines)


def _repaired(dataset: xr.Dataset) -> list[str]:
    """How many files were not as they should be, and were read all the same."""
    found = [str(text) for text in dataset["repaired"].values] if "repaired" in dataset else []
    notes = [text for text in found if text]
    if not notes:
        return []
    return [f"repaired {len(notes)} of {len(found)} clips (each says how, in `repaired`), for example: {notes[0]}"]


def _samples(dataset: xr.Dataset) -> list[str]:
    table = exclusion_table(dataset)
    counts = {str(reason): int(table.sel(reason=reason).sum()) for reason in table["reason"].values}
    readable, clean, corrupted = is_readable(dataset), is_right(dataset, "clean"), is_right(dataset, "corrupted")
    excluded = ", ".join(f"{reason} {count}" for reason, count in counts.items() if reason != KEPT and count)
    right = accuracy(dataset)
    lines = [
        f"samples  {counts[KEPT]} of {dataset.sizes['sample']} count" + (f"; excluded: {excluded}" if excluded else ""),
    ]
    if not right.n:
        return [*lines, "right    unknown: no clip could be used"]
    lines.append(
        f"right    clean {right.clean:.0%}, corrupted {right.corrupted:.0%}, chance {right.chance:.0%} (n={right.n})"
    )
    lines += _repaired(dataset)
    _, labels = classes(dataset)
    width = max(len(str(label)) for label in table["label"].values)
    lines.append(f"         {'class':<{width}}     n  clean right  corrupted right  count")
    for label in table["label"].values:
        of_class = (labels == str(label)) & readable
        kept = int(table.sel(label=label, reason=KEPT))
        numbers = f"{of_class.sum():>5}{(clean & of_class).sum():>13}{(corrupted & of_class).sum():>17}{kept:>7}"
        lines.append(f"         {label!s:<{width}} {numbers}")
    return lines + [f"         {note}" for note in lost_classes(dataset)]


def _findings(dataset: xr.Dataset, recovery: xr.Dataset) -> list[str]:
    peak = peak_layer(dataset, recovery)
    if peak is None:
        return [why_none_counts(dataset), *_one_clip(dataset)]
    kept = dataset.isel(sample=np.flatnonzero(dataset["kept"].values))
    line = over_layers(recovery)
    info = about(dataset)
    exchanged = "all text positions" if info.site == "resid" else f"{info.site} at all text positions"
    column = OF_EACH_LAYER.get(info.granularity, f"the best {info.granularity} of each layer")
    where = {"token": "at the last token", "layer": info.knockout or exchanged}.get(info.granularity, column)
    what = "lost    " if info.loses else "recovery"
    half = next((cell for cell in line if cell.mean > 0.5), None)
    reached = "never" if half is None else f"from layer {half.layer}"
    best = peak.over_layers
    before, after = (float(kept[name].mean()) for name in ("p_clean", "p_corrupted"))
    lines = [
        f"{_measured(info)} clean {before:.3f}, corrupted {after:.3f}",
        f"{what} {where}: layer {line[0].layer}: {line[0].mean:z.2f}; above one half {reached}; "
        f"layer {line[-1].layer}: {line[-1].mean:z.2f}",
        f"peak     {best.place}: {_mean(best)}, n={best.n} of {best.groups} groups (95 % bootstrap over groups; the "
        "first of equals)",
    ]
    lines += _put_in(info, recovery)
    if (other := peak.before_last) is not None:
        place = f"layer {other.layer}, token {other.text!r} ({other.role})"
        lines.append(f"         before the last token: {place}: {_mean(other)}")
    if (window := planted_window(dataset)) is not None:
        lines.append(f"truth    attention planted in layers {window[0]} to {window[1] - 1} only")
    lines += _precision(dataset, recovery)
    if (found := licence(dataset)) is not None:
        lines.append(f"licence  {found}; mean error of the rate {found.error:.2g}")
    return lines


def _put_in(info: About, recovery: xr.Dataset) -> list[str]:
    """Where something else than the other run's states was put in: what came of it, column by column."""
    if info.granularity not in OF_EACH_LAYER:
        return []
    means = recovery["mean"].transpose("layer", info.granularity)
    if info.granularity == "source_layer":
        best = means.max()
        return [f"back     at most {float(best) - 1:+.2f} beyond the clean run, whose rate is 1"]
    if info.granularity == "receiver_layer":
        row, column = np.unravel_index(int(np.abs(means.values).argmax()), means.shape)
        low, high = int(means["layer"][row]), int(means["receiver_layer"][column])
        most = float(means[row, column])
        return [f"path     {info.change}: {most:z.2f} where it is most, written in layer {low}, read in layer {high}"]
    largest = means.max("layer")
    where = means.fillna(-np.inf).argmax("layer")
    said = [
        f"{name} {float(value):z.2f} (layer {int(means['layer'][int(index)])})"
        for name, value, index in zip(means[info.granularity].values, largest.values, where.values, strict=True)
        if np.isfinite(value)
    ]
    heading = "lost     at most without" if info.granularity == "ablated" else "steered  at most along"
    return [f"{heading} {', '.join(said)}"]


def _precision(dataset: xr.Dataset, recovery: xr.Dataset) -> list[str]:
    """How far the numbers are from float32, if they are not computed in it."""
    if (found := precision(dataset)) is not None:
        return [f"precise  {found}; {recovery.attrs.get('rounding', '')}".rstrip("; ")]
    if is_inexact(dataset):
        return ["precise  how far these numbers are from float32 was not measured; intervals are without that error"]
    return []


def _one_clip(dataset: xr.Dataset) -> list[str]:
    """Of a single clip that does not count: what the model says, and how to see its map all the same."""
    if dataset.sizes["sample"] != 1 or "top_token_clean" not in dataset or not str(dataset["top_token_clean"].item()):
        return []
    said = {
        run: f"{str(dataset[f'prediction_{run}'].item())!r} (most probable token: "
        f"{str(dataset[f'top_token_{run}'].item()).strip()!r})"
        for run in ("clean", "corrupted")
    }
    lines = [
        f"said     on the clip {said['clean']}, on the corrupted one {said['corrupted']}; right is "
        f"{str(dataset['label'].item())!r}: p {dataset['p_clean'].item():.3f} and {dataset['p_corrupted'].item():.3f}"
    ]
    if bool(dataset["p_patched"].isnull().all()):
        lines.append("         to see its map all the same: trace_excluded=true")
    else:
        lines.append("         the map is drawn all the same (trace_excluded=true), and marked")
    return lines


def _measured(info: About) -> str:
    """What is recovered: the answer's probability, or another metric in its place."""
    return "p(right)" if info.metric == "probability" else info.metric.replace("_", " ")


def _seen(dataset: xr.Dataset) -> list[str]:
    """What was looked at besides: the logit lens, and whether attention to the audio tells wrong answers."""
    lines = []
    if "lens_p_clean" in dataset and bool(dataset["kept"].any()):
        line = over_layers(seen_at_tokens(dataset))
        half = next((f"from layer {cell.layer}" for cell in line if cell.mean > 0.5), "never")
        lines.append(f"lens     the logit lens sees the answer at the last token: above one half of the gap {half}")
    if "audio_attention" in dataset and "object" in dataset["listener"].values:
        found = grounding(dataset)
        scores = ", ".join(f"{name} {_auroc(value)}" for name, value in found.auroc.items())
        said = found.reason or f"AUROC for wrong answers (n={found.wrong + found.right}, {found.wrong} wrong): {scores}"
        lines.append(f"grounded {said}")
    return lines


def _auroc(estimate: Estimate) -> str:
    return str(estimate)


def _mean(cell: Cell) -> str:
    """A mean with its interval, or why there is none."""
    return str(cell)


def _checks(dataset: xr.Dataset) -> list[str]:
    checks = from_json(str(dataset.attrs["checks"]))
    failed = [check for check in checks if not check.passed]
    heading = f"checks   {len(checks) - len(failed)} of {len(checks)} passed"
    measured = [check for check in checks if check.name in ("replay_equals_direct", "last_layer_identity")]
    details = [f"{check.name} {check.value:.1g} (bound {check.bound:.0e})" for check in measured]
    lines = [heading + (f"; {', '.join(details)}" if details else "")]
    return lines + [f"         FAILED {check} - {check.statement}" for check in failed]


def _type(attributes: Mapping[str, Any]) -> str:
    """Type of the weights, and what was computed with them if that is another."""
    precision = attributes.get("precision", "as_loaded")  # runs before there was a choice
    return str(attributes["dtype"]) + ("" if precision == "as_loaded" else f" weights, {precision} states")
