"""Doing a run: trace the clips that its folder does not have yet, then make the one dataset of them."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from lalm_patch.checks import Check, enforce, to_json, worst
from lalm_patch.errors import BusyError
from lalm_patch.results import build_dataset
from lalm_patch.run.plan import RunPlan, unusable
from lalm_patch.stimuli import Record
from lalm_patch.storage.provenance import describe
from lalm_patch.storage.run_store import RunStore, is_finished
from lalm_patch.storage.shards import Shard, mark_complete, remove_journals, shard_folders, stored_elsewhere
from lalm_patch.terminal import Progress
from lalm_patch.tracing.metrics import Exclusion

if TYPE_CHECKING:
    from lalm_patch.tracing import Tracer

log = logging.getLogger(__name__)


def complete(plan: RunPlan, folder: Path, command: str) -> xr.Dataset:
    """Trace everything that is missing and return the run's dataset, which then is in its folder.

    Args:
        plan: the run.
        folder: its folder.
        command: how it was started, stored with the result.

    Raises:
        LalmPatchError: anything a user can put right; samples computed so far are kept.
    """
    return _complete(plan, folder, command, _opened_once(plan), time.monotonic())


def complete_shard(plan: RunPlan, shard: Shard, folder: Path, command: str) -> xr.Dataset | str:
    """Trace what is missing of a shard's clips; the run's dataset if no other clip is missing then, else what is left.

    Args:
        plan: the whole run.
        shard: which part of it.
        folder: the run's folder.
        command: how it was started.

    Raises:
        LalmPatchError: anything a user can put right; samples computed so far are kept.
    """
    started, tracer = time.monotonic(), _opened_once(plan)
    if is_finished(folder, plan.identity):
        return _complete(plan, folder, command, tracer, started)
    own, shard_folder = shard.select(plan.records), shard.folder(folder)
    with RunStore(shard_folder, plan.identity) as store:
        elsewhere = stored_elsewhere(folder, plan.identity, but=shard_folder)
        todo = [record for record in own if record.id not in elsewhere]
        if {record.id for record in todo} - store.completed():
            spot_checks = shard.share(plan.settings.engine.spot_checks)
            _trace_missing(plan, store, todo, unusable(plan, todo), spot_checks, tracer())
        mark_complete(shard_folder, plan.identity, len(own))
    stored = stored_elsewhere(folder, plan.identity)
    if missing := sum(record.id not in stored for record in plan.records):
        left = f"{missing} of the run's {len(plan.records)} clips are left to other shards; the last one merges"
    else:
        try:
            return _complete(plan, folder, command, tracer, started)
        except BusyError as error:
            left = f"not merged here, because {error} It merges, or the same command does later."
    return f"shard {shard.index}/{shard.count}: its {len(own)} clips are stored; {left}"


def _complete(plan: RunPlan, folder: Path, command: str, tracer: Callable[[], Tracer], started: float) -> xr.Dataset:
    # Every clip is decoded for this: not to show a result again.
    failures = {} if is_finished(folder, plan.identity) else unusable(plan, plan.records)
    with RunStore(folder, plan.identity) as store:
        if store.finished:
            log.info("this run is finished; its result is shown again")
        else:
            if taken := sum(store.absorb(shard) for shard in shard_folders(folder)):
                log.info("taken over from shards: %d samples", taken)
            _trace_missing(plan, store, plan.records, failures, plan.settings.engine.spot_checks, tracer())
            dataset = _dataset(plan, store, tracer(), command)
            dataset.attrs["seconds_of_last_process"] = round(time.monotonic() - started, 1)
            store.finalise(dataset)
        remove_journals(folder)
        return store.load()


# --- tracing ---------------------------------------------------------------------------------------------------


def _opened_once(plan: RunPlan) -> Callable[[], Tracer]:
    """Opens the model when it is first needed: what is stored already needs none."""
    return functools.cache(functools.partial(_open_tracer, plan))


def _open_tracer(plan: RunPlan) -> Tracer:
    """The model, proven.

    Raises:
        LalmPatchError: the model cannot be opened, or fails a check that the settings do not tolerate.
    """
    import torch

    from lalm_patch.models import LALM
    from lalm_patch.tracing import RemoteTracer, Tracer

    settings = plan.settings
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    tracer: Tracer
    if settings.backend.name == "ndif":
        log.info("%s stays on the server; %s clips at most are in flight", settings.model.id, settings.backend.max_jobs)
        tracer = RemoteTracer(LALM.outline(settings.model), plan.attribute, settings, plan.records)
    else:
        log.info("loading %s (%s)", settings.model.name, settings.model.id)
        tracer = Tracer(LALM.load(settings.model), plan.attribute, settings, plan.records)
    enforce(tracer.checks, settings.on_failed_check)
    return tracer


def _trace_missing(
    plan: RunPlan,
    store: RunStore,
    records: Sequence[Record],
    failures: dict[str, str],
    spot_checks: int,
    tracer: Tracer,
) -> None:
    """Trace every one of some clips that the store does not have yet.

    Args:
        plan: the run.
        store: where samples go.
        records: the clips.
        failures: clips that must not be used, with reasons.
        spot_checks: how many cells of them to compute twice in all.
        tracer: the model.
    """
    settings = plan.settings
    done = store.completed()
    todo = [record for record in records if record.id not in done]
    if done:
        log.info("going on: %d of %d samples are stored already", len(records) - len(todo), len(records))
    limit = tracer.lalm.family.max_seconds
    if limit < float("inf"):  # the model's window is only known once the model is there
        failures = failures | unusable(plan, [record for record in todo if record.id not in failures], limit)
    spot_checked = sum(int(store.sample(id).meta.get("spot_checked_cells", 0)) for id in done)
    title = f"{settings.model.name} {settings.attr.name} {settings.granularity.name}"
    with Progress(len(todo) * tracer.cells_per_sample, title) as progress:
        for record in todo:
            if record.id in failures:
                progress.drop(tracer.cells_per_sample)
                store.add(record.id, {}, _unusable_meta(record, failures[record.id]))
        usable = [record for record in todo if record.id not in failures]
        for record, trace in tracer.traces(usable, spot_checks - spot_checked, progress, store.folder):
            enforce([Check(**check) for check in trace.meta.get("checks", [])], settings.on_failed_check)
            store.add(record.id, trace.arrays, trace.meta)


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


# --- the dataset -----------------------------------------------------------------------------------------------


def _dataset(plan: RunPlan, store: RunStore, tracer: Tracer, command: str) -> xr.Dataset:
    samples = [store.sample(record.id) for record in plan.records]
    checks = [Check(**check) for sample in samples for check in sample.meta.get("checks", [])]
    attributes = {**describe(plan.settings, command), **_about_model(tracer)}
    attributes["checks"] = to_json([*tracer.checks, *worst(checks)])
    attributes["spot_checked_cells"] = sum(int(sample.meta.get("spot_checked_cells", 0)) for sample in samples)
    if servers := sorted({json.dumps(sample.meta["server"]) for sample in samples if "server" in sample.meta}):
        attributes["servers"] = f"[{', '.join(servers)}]"
    attributes["data_fingerprint"] = store.identity["clips"]
    return build_dataset(samples, tracer.attribute.options, tracer.dims, tracer.coords, attributes)


def _about_model(tracer: Tracer) -> dict[str, Any]:
    """Attributes that say which model computed the numbers, and how."""
    lalm = tracer.lalm
    planted = getattr(lalm.module.config.get_text_config(), "planted_attention_layers", None)
    return {
        "model_id": lalm.id,
        "model_revision": lalm.commit,
        "model_class": type(lalm.module).__name__,
        "model_layers": lalm.num_layers,
        **tracer.about,
        "prompt_layout": tracer.layout,
        "prompt_as_sent": tracer.example_prompt,
        "target_token_ids": json.dumps(
            dict(zip(tracer.attribute.options, tracer.option_ids, strict=True)), ensure_ascii=False
        ),
        **({} if planted is None else {"planted_attention_layers": json.dumps(list(planted))}),
    }
