"""From finished runs to the page: numbers, figures, checks and provenance, put into the template."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined

from lalm_patch.analysis import (
    about,
    accuracy,
    check_claims,
    compare,
    exclusion_table,
    fusion,
    in_short,
    lost_classes,
    object_effect,
    peak_interval,
    planted_window,
    ratio_of_means,
    relevant,
    run_settings,
    variants,
    why_none_counts,
    with_metric,
)
from lalm_patch.analysis.resampling import fewest_groups
from lalm_patch.checks import from_json
from lalm_patch.errors import StoreError
from lalm_patch.figures import draw_run, plot_layers, plot_ledger, plot_segments, rendered, styled
from lalm_patch.report.explorer import Sounds, explore
from lalm_patch.storage.journal import storage_error
from lalm_patch.sweep.collection import CollectedRun, read_runs
from lalm_patch.sweep.runs import State

log = logging.getLogger(__name__)

PAGE = "report.html"
PAGE_DPI = 120
"""Of the runs' own pictures on the page; print-quality ones lie with the runs."""

FIGURES = "figures"
FEW = f"none with fewer than {fewest_groups()} groups"
SHOWN_APART = ("settings", "checks", "command")


def find_runs(folder: Path) -> tuple[list[CollectedRun], list[CollectedRun]]:
    """Finished runs at or below `folder`, and ones that are not finished.

    Raises:
        DataError: there is no such folder.
        StoreError: there is no finished run, or a damaged one.
    """
    runs = read_runs([folder])
    if damaged := [run.status.note for run in runs if run.status.state is State.DAMAGED]:
        raise StoreError("; ".join(damaged))
    finished = [run for run in runs if run.dataset is not None]
    unfinished = [run for run in runs if run.dataset is None]
    if not finished:
        more = f"; {len(unfinished)} not finished" if unfinished else ""
        raise StoreError(f"there is no finished run at {folder}{more}: give a run's folder, or a folder of runs")
    return finished, unfinished


def make_report(
    folder: Path, page: Path | None = None, clips: int = 8, audio: bool = True, metric: str = "probability"
) -> Path:
    """Write one HTML page on the runs at or below a folder; it needs no network and no other file.

    Args:
        folder: a run's folder, or a folder of runs.
        page: where to write; by default `report.html` in the folder. Figures over all runs go into the folder
            `figures` beside it, as PNG, PDF and the drawn numbers as CSV; each run's own lie with the run.
        clips: clips per run in the explorer.
        audio: whether their sound is put into the page.
        metric: what the rates are of, one of `METRICS`; another one than the probability follows from what is stored.

    Raises:
        StoreError: no finished run, a damaged one, or a page that cannot be written.
    """
    finished, unfinished = find_runs(folder)
    if metric != "probability":
        finished = [run.showing(with_metric(run.dataset, metric)) for run in finished if run.dataset is not None]
    runs = [run.dataset for run in finished if run.dataset is not None]
    page = folder / PAGE if page is None else page
    figures = page.parent / FIGURES
    sounds: Sounds = {}
    explored = [explore(run, clips, audio, sounds) for run in runs]
    try:
        figures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, figures, "making the folder of figures") from error
    text = _template().render(
        title=_title(runs),
        runs=[_run(run) | {"variant": variant} for run, variant in zip(finished, variants(runs), strict=True)],
        rounded=any(in_short(run) for run in runs),
        unfinished=[str(run.status.folder) for run in unfinished],
        findings=relevant(check_claims(runs)),
        comparisons=compare(runs),
        metric=metric.replace("_", " "),
        fewest=fewest_groups(),
        figures=_shared_figures(runs, figures),
        explorer={"runs": [run for run in explored if run["clips"]], "sounds": list(sounds)},
    )
    try:
        page.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise storage_error(error, page, "writing the report") from error
    return page


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("lalm_patch.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = lambda value: "-" if value is None or np.isnan(value) else f"{value:z.2f}"
    return environment.get_template("template.html")


def _title(runs: Sequence[xr.Dataset]) -> str:
    if len(runs) == 1:
        return str(runs[0].attrs.get("title", "Causal tracing"))
    models = {about(run).model for run in runs}
    attributes = {about(run).attribute for run in runs}
    counts = ((len(runs), "run"), (len(models), "model"), (len(attributes), "attribute"))
    return "Causal tracing: " + ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)


def _run(found: CollectedRun) -> dict[str, Any]:
    """Everything the page says about one finished run, as plain values."""
    run, recovery = found.dataset, found.recovery
    assert run is not None
    assert recovery is not None
    info = about(run)
    with styled():
        picture = rendered(draw_run(run, recovery), "png", PAGE_DPI)
    table = exclusion_table(run)
    counts = bool(run["kept"].any())
    last = recovery.isel(token=-1) if "token" in recovery.dims else recovery
    effect = object_effect(run, seed=info.seed) if counts and info.granularity == "token" else None
    return {
        "info": info,
        "folder": found.status.folder.name,
        "n": run.sizes["sample"],
        "kept": int(run["kept"].sum()),
        "groups": int(recovery["groups"].max()),
        "accuracy": accuracy(run),
        "fusion": fusion(run),
        "peak": found.peak,
        "peak_between": peak_interval(run),
        "mean_of_ratios": float(last["mean"].mean()),
        "ratio_of_means": _ratio_of_means(run) if counts else np.nan,
        "effect": effect,
        "precision": in_short(run),
        "planted": planted_window(run),
        "nothing": "" if counts else why_none_counts(run),
        "notes": lost_classes(run),
        "ledger": {
            "reasons": [str(reason) for reason in table["reason"].values],
            "rows": [(str(name), [int(x) for x in table.sel(label=name).values]) for name in table["label"].values],
        },
        "checks": from_json(str(run.attrs.get("checks", "[]"))),
        "command": str(run.attrs.get("command", "")),
        "settings": json.dumps(run_settings(run), indent=1, ensure_ascii=False),
        "provenance": {key: str(value) for key, value in run.attrs.items() if key not in SHOWN_APART},
        "picture": _embedded(picture),
    }


def _ratio_of_means(run: xr.Dataset) -> float:
    """The headline's ratio of means, averaged over layers; of single heads or segments, over these too."""
    column = about(run).granularity
    runs = [run] if column in ("layer", "token") else [run.sel({column: one}, drop=True) for one in run[column].values]
    return float(np.nanmean([ratio_of_means(one, n_resamples=2)["mean"].mean() for one in runs]))


def _shared_figures(runs: Sequence[xr.Dataset], folder: Path) -> list[dict[str, str]]:
    """Figures over all runs, written beside the page and embedded in it."""
    layer_wise = [run for run in runs if about(run).granularity == "layer" and bool(run["kept"].any())]
    token_wise = [run for run in runs if about(run).granularity == "token" and bool(run["kept"].any())]
    drawn = []
    if layer_wise:
        text = f"Mean recovery over layers; bands are 95 % intervals over groups ({FEW})."
        drawn.append(("Figure 2", text, plot_layers(layer_wise, folder)))
        if len({about(run).layers for run in layer_wise}) > 1:
            text = "The same against the share of depth, so that models of different depth compare."
            drawn.append(("Figure 2, relative depth", text, plot_layers(layer_wise, folder, "figure2_relative", True)))
    if token_wise:
        text = f"Mean recovery of one token of each segment; bands are 95 % intervals over groups ({FEW})."
        drawn.append(("Segments", text, plot_segments(token_wise, folder)))
    drawn.append(("Who counts", "Clips by class and reason of exclusion.", plot_ledger(runs, folder)))
    found = []
    for title, text, files in drawn:
        png = next(path for path in files if path.suffix == ".png")
        found.append({"title": title, "text": text, "name": png.stem, "picture": _embedded(png.read_bytes())})
    return found


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
