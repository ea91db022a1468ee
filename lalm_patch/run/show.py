"""What a finished run shows: figures beside its result, and a page of text for the terminal."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from lalm_patch.analysis import METRICS, mean_recovery, with_metric
from lalm_patch.figures import plot_clip, plot_grounding, plot_lens, plot_run, was_patched
from lalm_patch.run.plan import RunPlan
from lalm_patch.settings import WHOLE_VOCABULARY
from lalm_patch.storage.netcdf import clean_text
from lalm_patch.storage.places import unwritable
from lalm_patch.storage.run_store import RESULT
from lalm_patch.summary import summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutcome:
    """What a run left behind.

    Attributes:
        dataset: the result; None of a shard that other shards still have to complete.
        files: the result's file and the figures.
        summary: a page of text for the terminal.
    """

    dataset: xr.Dataset | None
    files: tuple[Path, ...]
    summary: str


def show(plan: RunPlan, folder: Path, dataset: xr.Dataset) -> RunOutcome:
    """Draw a run's figures into its folder and write its summary; where nothing can be written, show what is there."""
    settings = plan.settings
    if (why := unwritable(folder)) is not None:
        log.warning("the result is shown, the figures are left as they are: %s", why)
        return _shown_again(settings.metric.name, settings.seed, folder, dataset)
    recovery = mean_recovery(dataset, seed=settings.seed)
    files = [folder / RESULT, *plot_run(dataset, folder, recovery), *_plot_clip(plan, folder, dataset)]
    if settings.observe.lens and bool(dataset["kept"].any()):
        files += plot_lens(dataset, folder, recovery)
    if settings.observe.attention:
        files += plot_grounding(dataset, folder)
    shown = dataset
    for name in _other_metrics(settings.metric.name, dataset):
        measured = with_metric(dataset, name)
        files += plot_run(measured, folder, name=f"figure-{name}")
        if settings.metric.name == name:
            shown, recovery = measured, mean_recovery(measured, seed=settings.seed)
    return RunOutcome(dataset, tuple(files), summary(shown, files, recovery))


def _shown_again(metric: str, seed: int, folder: Path, dataset: xr.Dataset) -> RunOutcome:
    """A finished run with the figures that are there."""
    files = (folder / RESULT, *sorted(folder.glob("*.png")), *sorted(folder.glob("*.pdf")))
    shown = dataset if metric in ("probability", "all") else with_metric(dataset, metric)
    return RunOutcome(dataset, files, summary(shown, files, mean_recovery(shown, seed=seed)))


def _other_metrics(chosen: str, dataset: xr.Dataset) -> list[str]:
    """Metrics besides the probability that are to be drawn; `all` leaves out what the run could not store."""
    if chosen != "all":
        return [] if chosen == "probability" else [chosen]
    stored = [name for name in METRICS if name not in WHOLE_VOCABULARY or f"{name}_patched" in dataset]
    return [name for name in stored if name != "probability"]


def _plot_clip(plan: RunPlan, folder: Path, dataset: xr.Dataset) -> list[Path]:
    """A single recording; or, where windows of the audio are patched, the first clip that counts."""
    single = plan.settings.data.name == "clip"
    if plan.settings.granularity.name != "audio" and not single:
        return []
    shown = dataset["sample"].values[was_patched(dataset) if single else dataset["kept"].values.astype(bool)]
    if not len(shown):
        return []
    record = next(record for record in plan.records if clean_text(record.id) == shown[0])
    return plot_clip(dataset, str(shown[0]), record.waveform(None), folder, answers=single)
