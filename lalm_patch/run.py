"""One run from settings to files: clips, model, samples, dataset, figure, summary."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from lalm_patch.checks import Check, enforce, to_json, worst
from lalm_patch.config import compose
from lalm_patch.errors import AudioError, ConfigError, DataError
from lalm_patch.figures import plot_run
from lalm_patch.metrics import Exclusion
from lalm_patch.models.checkpoint import find_checkpoint
from lalm_patch.progress import Progress
from lalm_patch.provenance import describe, identity
from lalm_patch.results import build_dataset
from lalm_patch.settings import RunSettings
from lalm_patch.stimuli import Attribute, Record, check_records, data_fingerprint, load_demo, load_sakura
from lalm_patch.store import RESULT, RunStore
from lalm_patch.summary import summary

if TYPE_CHECKING:
    from lalm_patch.tracing import Tracer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutcome:
    """What a run left behind.

    Attributes:
        dataset: the result.
        files: the result's file and the figures.
        summary: a page of text for the terminal.
    """

    dataset: xr.Dataset
    files: tuple[Path, ...]
    summary: str


def trace(*overrides: str) -> RunOutcome:
    """Do from Python what `python -m lalm_patch OVERRIDES` does; returns the dataset, the files and the summary.

    Raises:
        LalmPatchError: anything a user can put right; samples computed so far are kept.
    """
    settings = compose(*overrides)
    command = shlex.join(["python", "-m", "lalm_patch", *overrides])
    return run(settings, Path(settings.outputs) / settings.run_name, command)


def run(settings: RunSettings, folder: Path, command: str = "") -> RunOutcome:
    """Carry out a run, or go on with one that was stopped, or show one that is finished.

    Args:
        settings: what to run.
        folder: the run's own folder; created if needed.
        command: how the run was started, stored with the result.

    Raises:
        LalmPatchError: anything a user can put right; samples computed so far are kept.
    """
    started = time.monotonic()
    attribute = _attribute(settings)
    records = load_records(settings, attribute)
    unusable = _unusable(records, settings)
    checkpoint = find_checkpoint(settings.model)
    this_run = identity(settings, data_fingerprint(records), checkpoint.revision)
    with RunStore(folder, this_run) as store:
        if store.finished:
            log.info("this run is finished; its result is shown again")
            dataset = store.load()
        else:
            tracer = _trace_all(store, settings, attribute, records, unusable)
            dataset = _dataset(store, tracer, records, {**describe(settings, command), **_about_model(tracer)})
            dataset.attrs["seconds_of_last_process"] = round(time.monotonic() - started, 1)
            store.finalise(dataset)
            dataset = store.load()
    files = (folder / RESULT, *plot_run(dataset, folder))
    return RunOutcome(dataset, files, summary(dataset, files))


def dry_run(settings: RunSettings) -> str:
    """What `run` would do; needs no weights, and neither clips nor network where the model's small files are here.

    Raises:
        LalmPatchError: a setting, model or prompt that the run would refuse, too.
    """
    from lalm_patch.dry_run import describe_run

    attribute = _attribute(settings)
    records: list[Record] | DataError
    try:
        records = load_records(settings, attribute)
    except DataError as error:
        records = error
    return describe_run(settings, attribute, records)


def load_records(settings: RunSettings, attribute: Attribute) -> list[Record]:
    """The clips of a run.

    Raises:
        DataError, ConfigError: see `load_sakura`.
    """
    data = settings.data
    name = settings.model.data if data.name == "auto" else data.name
    if data.name == "auto" and data.root is not None:
        name = "sakura"
    if name == "demo":
        if data.root is not None:
            raise ConfigError(f"data=demo takes no data.root (got {data.root}); use data=sakura data.root=...")
        return load_demo(attribute, data.limit, data.seed)
    return load_sakura(attribute, data.root, data.limit, data.seed)


def _attribute(settings: RunSettings) -> Attribute:
    attr = settings.attr
    return Attribute(attr.name, attr.question, tuple(attr.options), attr.response, attr.folder)


def _unusable(records: Sequence[Record], settings: RunSettings) -> dict[str, str]:
    """Clips that must not be used, with reasons, found before anything is computed."""
    failures = {record.id: str(error) for record, error in check_records(records, max_seconds=None)}
    _report_unusable(failures, len(records), settings)
    return failures


def _report_unusable(failures: dict[str, str], total: int, settings: RunSettings) -> None:
    if not failures:
        return
    if settings.data.bad_clips == "stop":
        shown = "; ".join(list(failures.values())[:3])
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise AudioError(
            f"{shown}{more}. To run without {'it' if len(failures) == 1 else 'them'}: data.bad_clips=exclude"
        )
    for message in failures.values():
        log.warning("excluded: %s", message)
    if len(failures) == total:
        raise DataError("none of the clips can be used; see the reasons above")


def _trace_all(
    store: RunStore,
    settings: RunSettings,
    attribute: Attribute,
    records: Sequence[Record],
    unusable: dict[str, str],
) -> Tracer:
    """Trace every sample the store does not have yet."""
    done = store.completed()
    todo = [record for record in records if record.id not in done]
    if done:
        log.info("going on: %d of %d samples are stored already", len(records) - len(todo), len(records))
    tracer = _open_model(settings, attribute)
    enforce(tracer.checks, settings.on_failed_check)
    unusable = unusable | _too_long(todo, tracer, unusable, len(records), settings)
    spot_checked = sum(int(store.sample(id).meta.get("spot_checked_cells", 0)) for id in done)
    title = f"{settings.model.name} {settings.attr.name} {settings.granularity.name}"
    with Progress(len(todo) * tracer.cells_per_sample, title) as progress:
        for record in todo:
            if record.id in unusable:
                progress.drop(tracer.cells_per_sample)
                store.add(record.id, {}, _unusable_meta(record, unusable[record.id]))
                continue
            wanted = spot_checked < settings.engine.spot_checks
            trace = tracer.trace(record, record.waveform(None), wanted, progress)
            spot_checked += int(trace.meta.get("spot_checked_cells", 0))
            enforce([Check(**check) for check in trace.meta.get("checks", [])], settings.on_failed_check)
            store.add(record.id, trace.arrays, trace.meta)
    return tracer


def _open_model(settings: RunSettings, attribute: Attribute) -> Tracer:
    import torch

    from lalm_patch.models import LALM
    from lalm_patch.tracing import Tracer

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    log.info("loading %s (%s)", settings.model.name, settings.model.id)
    return Tracer(LALM.load(settings.model), attribute, settings)


def _too_long(
    records: Sequence[Record], tracer: Tracer, known: dict[str, str], total: int, settings: RunSettings
) -> dict[str, str]:
    """Clips longer than the model's window: only known once the model is there."""
    limit = tracer.lalm.family.max_seconds
    if limit == float("inf"):
        return {}
    readable = [record for record in records if record.id not in known]
    failures = {record.id: str(error) for record, error in check_records(readable, max_seconds=limit)}
    _report_unusable(failures, total, settings)
    return failures


def _unusable_meta(record: Record, detail: str) -> dict[str, Any]:
    """A sample's entry when its clip could not be used."""
    return {
        "label": record.label,
        "group": record.group,
        "exclusion": str(Exclusion.UNREADABLE),
        "detail": detail,
        "samples": 0,
        "positions": 0,
        "audio_positions": 0,
        "first_text_position": 0,
        "token_ids": [],
        "token_texts": [],
        "token_roles": [],
        "option_order": [],
    }


def _about_model(tracer: Tracer) -> dict[str, Any]:
    """Attributes that say which model computed the numbers, and how."""
    lalm = tracer.lalm
    planted = getattr(lalm.module.config.get_text_config(), "planted_attention_layers", None)
    return {
        "model_id": lalm.id,
        "model_revision": lalm.commit,
        "model_class": type(lalm.module).__name__,
        "model_layers": lalm.num_layers,
        "dtype": str(lalm.dtype).removeprefix("torch."),
        "device": str(lalm.device),
        "engine": tracer.engine.name,
        "prompt_layout": tracer.layout,
        "prompt_as_sent": tracer.example_prompt,
        "target_token_ids": json.dumps(dict(zip(tracer.attribute.options, tracer.option_ids, strict=True))),
        **({} if planted is None else {"planted_attention_layers": json.dumps(list(planted))}),
    }


def _dataset(store: RunStore, tracer: Tracer, records: Sequence[Record], attributes: dict[str, Any]) -> xr.Dataset:
    samples = [store.sample(record.id) for record in records]
    checks = [Check(**check) for sample in samples for check in sample.meta.get("checks", [])]
    attributes["checks"] = to_json([*tracer.checks, *worst(checks)])
    attributes["spot_checked_cells"] = sum(int(sample.meta.get("spot_checked_cells", 0)) for sample in samples)
    attributes["data_fingerprint"] = store.identity["clips"]
    return build_dataset(samples, tracer.attribute.options, tracer.dims, tracer.layers, attributes)
