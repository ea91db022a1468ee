"""Doing a run: trace the clips that its folder does not have yet, then make the one dataset of them."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from lalm_patch.checks import Check, enforce, to_json, worst
from lalm_patch.errors import BusyError, StoreError
from lalm_patch.imports import uncollected
from lalm_patch.results import build_dataset
from lalm_patch.run.plan import LeftOut, RunPlan, left_out, unaskable
from lalm_patch.stimuli import Look, Record
from lalm_patch.storage.provenance import describe
from lalm_patch.storage.run_store import RunStore, is_finished
from lalm_patch.storage.shards import Shard, mark_complete, remove_journals, shard_folders, stored_elsewhere
from lalm_patch.terminal import Progress, Waiting
from lalm_patch.tracing.metrics import own_question
from lalm_patch.tracing.rechecks import Rechecks

if TYPE_CHECKING:
    from lalm_patch.models import LALM
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
    return _complete(plan, folder, command, _Preparation(plan), time.monotonic())


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
    started, preparation = time.monotonic(), _Preparation(plan)
    if is_finished(folder, plan.identity):
        return _complete(plan, folder, command, preparation, started)
    own, shard_folder = shard.select(plan.records), shard.folder(folder)
    with RunStore(shard_folder, plan.identity) as store:
        elsewhere = stored_elsewhere(folder, plan.identity, but=shard_folder)
        todo = [record for record in own if record.id not in elsewhere]
        if {record.id for record in todo} - store.completed():
            engine = plan.settings.engine
            rechecks = Rechecks(shard.share(engine.spot_checks), shard.share(engine.float32_clips))
            _trace_missing(plan, store, todo, rechecks, preparation.open())
        mark_complete(shard_folder, plan.identity, len(own))
    stored = stored_elsewhere(folder, plan.identity)
    if missing := sum(record.id not in stored for record in plan.records):
        left = f"{missing} of the run's {len(plan.records)} clips are left to other shards; the last one merges"
    else:
        try:
            return _complete(plan, folder, command, preparation, started)
        except BusyError as error:
            left = f"not merged here, because {error} It merges, or the same command does later."
    return f"shard {shard.index}/{shard.count}: its {len(own)} clips are stored; {left}"


def _complete(plan: RunPlan, folder: Path, command: str, preparation: _Preparation, started: float) -> xr.Dataset:
    if not is_finished(folder, plan.identity):
        preparation.look()  # what stops the run stops it before anything is written
    with RunStore(folder, plan.identity) as store:
        if store.finished:
            log.info("this run is finished; its result is shown again")
        else:
            if taken := sum(store.absorb(shard) for shard in shard_folders(folder)):
                log.info("taken over from shards: %d samples", taken)
            rechecks = Rechecks(plan.settings.engine.spot_checks, plan.settings.engine.float32_clips)
            _trace_missing(plan, store, plan.records, rechecks, preparation.open())
            dataset = _dataset(plan, store, preparation.open().tracer, command)
            dataset.attrs["seconds_of_last_process"] = round(time.monotonic() - started, 1)
            store.finalise(dataset)
        remove_journals(folder)
        return store.load()


# --- tracing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """The model, proven, and the clips that are not put through it."""

    tracer: Tracer
    left_out: dict[str, LeftOut]


class _Preparation:
    """What a process does at most once, and only if something is left to compute.

    Args:
        plan: the run.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.look: Callable[[], tuple[LALM, dict[str, LeftOut]]] = functools.cache(functools.partial(_look, plan))
        self.open: Callable[[], _Opened] = functools.cache(lambda: _open(plan, *self.look()))


def _look(plan: RunPlan) -> tuple[LALM, dict[str, LeftOut]]:
    """The model's outline and the clips that are not put through it.

    Raises:
        LalmPatchError: clips cannot be used, or there is no such model.
    """
    with uncollected():
        import torch

        from lalm_patch.models import LALM, check_family
        from lalm_patch.tracing import tracer  # noqa: F401
        from lalm_patch.tracing.transcripts import Transcripts

    settings = plan.settings
    check_family(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    outline = LALM.outline(settings.model)  # the window is known without weights, which can take long to load
    Transcripts(outline, settings)  # one that this model cannot have is refused before its weights are read
    out = left_out(plan, outline.family.max_seconds)
    return outline, out | unaskable(plan, outline, out)


def _open(plan: RunPlan, outline: LALM, out: dict[str, LeftOut]) -> _Opened:
    """Load and prove the model.

    Raises:
        LalmPatchError: it cannot be opened, or fails a check that the settings do not tolerate.
    """
    from lalm_patch.models import LALM
    from lalm_patch.tracing import RemoteTracer, Tracer

    settings = plan.settings
    records = [record for record in plan.records if record.id not in out]
    tracer: Tracer
    if settings.backend.name == "ndif":
        log.info("%s stays on the server; %s clips at most are in flight", settings.model.id, settings.backend.max_jobs)
        tracer = RemoteTracer(outline, plan.attribute, settings, records)
    else:
        log.info("loading %s (%s)", settings.model.name, settings.model.id)
        with Waiting(f"loading {settings.model.name}") as waiting:
            lalm = LALM.load(settings.model, waiting.step, settings.engine.precision or "float32")
            tracer = Tracer(lalm, plan.attribute, settings, records, waiting)
    if tracer.lalm.commit != plan.identity["weights"]:
        raise StoreError(
            f"{settings.model.id}: its files were {plan.identity['weights']} when this run began and are now "
            f"{tracer.lalm.commit}; nothing was computed with them, run again"
        )
    enforce(tracer.checks, settings.on_failed_check)
    return _Opened(tracer, out)


def _trace_missing(
    plan: RunPlan, store: RunStore, records: Sequence[Record], rechecks: Rechecks, opened: _Opened
) -> None:
    """Trace every one of some clips that the store does not have yet.

    Args:
        plan: the run.
        store: where samples go.
        records: the clips.
        rechecks: how much of them to compute twice in all.
        opened: the model.
    """
    settings, tracer = plan.settings, opened.tracer
    done = store.completed()
    todo = [record for record in records if record.id not in done]
    if done:
        log.info("going on: %d of %d samples are stored already", len(records) - len(todo), len(records))
    for id in done:
        rechecks.less(store.sample(id).meta)
    title = f"{settings.model.name} {settings.attr.name} {settings.granularity.name}"
    with Progress(len(todo) * tracer.cells_per_sample, title) as progress:
        for record in todo:
            if record.id in opened.left_out:
                progress.drop(tracer.cells_per_sample)
                arrays, meta = _heard(plan.looks[record.id])
                store.add(record.id, arrays, _left_out_meta(record, opened.left_out[record.id]) | meta)
        usable = [record for record in todo if record.id not in opened.left_out]
        for record, trace in tracer.traces(usable, rechecks, progress, store.folder):
            enforce([Check(**check) for check in trace.meta.get("checks", [])], settings.on_failed_check)
            arrays, meta = _heard(plan.looks[record.id])
            store.add(record.id, trace.arrays | arrays, trace.meta | meta)


def _heard(look: Look) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is stored of a clip itself: level and peak in dB below full scale, and what was repaired."""
    return {"loudness": np.array([look.level, look.peak], np.float32)}, {"repaired": list(look.notes)}


def _left_out_meta(record: Record, left_out: LeftOut) -> dict[str, Any]:
    """A sample's entry when its clip was not traced."""
    return {
        "label": record.label,
        "group": record.group,
        "exclusion": str(left_out.reason),
        "detail": left_out.detail,
        "samples": 0,
        "positions": 0,
        "audio_positions": 0,
        "first_text_position": 0,
        "token_ids": [],
        "token_texts": [],
        "token_roles": [],
        "option_order": [],
        **own_question(record),
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
    options = () if plan.attribute is None else plan.attribute.options
    return build_dataset(samples, options, tracer.dims, tracer.coords, attributes)


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
        **({} if tracer.attribute is None else {"target_token_ids": _targets(tracer)}),
        **({} if planted is None else {"planted_attention_layers": json.dumps(list(planted))}),
    }


def _targets(tracer: Tracer) -> str:
    """First token of every option's answer, as JSON."""
    prompt = tracer.questions.example()
    ids = dict(zip(prompt.options, (answer[0] for answer in tracer.questions.answers(prompt)), strict=True))
    return json.dumps(ids, ensure_ascii=False)
