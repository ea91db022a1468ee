"""One run from settings to files: clips, model, samples, dataset, figure, summary."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from lalm_patch.analysis import METRICS, mean_recovery, with_metric
from lalm_patch.checks import Check, enforce, to_json, worst
from lalm_patch.config import compose
from lalm_patch.errors import AudioError, BusyError, ConfigError, DataError, StoreError
from lalm_patch.figures import plot_clip, plot_grounding, plot_lens, plot_run
from lalm_patch.models.checkpoint import find_checkpoint
from lalm_patch.results.dataset import build_dataset
from lalm_patch.settings import WHOLE_VOCABULARY, RunSettings
from lalm_patch.stimuli import Attribute, Record, check_records, data_fingerprint, load_demo, load_sakura
from lalm_patch.storage.netcdf import clean_text
from lalm_patch.storage.provenance import describe, identity
from lalm_patch.storage.run_store import RESULT, RunStore, is_finished
from lalm_patch.storage.shards import Shard, mark_complete, remove_journals, shard_folders, stored_elsewhere
from lalm_patch.summary import summary
from lalm_patch.terminal import Progress, command_line
from lalm_patch.tracing.metrics import Exclusion

if TYPE_CHECKING:
    from lalm_patch.tracing.tracer import Tracer

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


def trace(*overrides: str) -> RunOutcome:
    """Do from Python what `python -m lalm_patch OVERRIDES` does; returns the dataset, the files and the summary.

    Raises:
        LalmPatchError: anything a user can put right; samples computed so far are kept.
    """
    settings = compose(*overrides)
    return run(settings, Path(settings.outputs) / settings.run_name, command_line(overrides))


def run(settings: RunSettings, folder: Path, command: str = "") -> RunOutcome:
    """Carry out a run, or go on with one that was stopped, or show one that is finished.

    Args:
        settings: what to run.
        folder: the run's own folder, also of a shard; created if needed.
        command: how the run was started, stored with the result.

    Raises:
        LalmPatchError: anything a user can put right; samples computed so far are kept.
    """
    work = _Work(settings, folder, command)
    if settings.shard is None:
        return work.complete()
    return work.shard(Shard.parse(settings.shard))


def run_identity(settings: RunSettings) -> dict[str, str]:
    """What a run's folder is compared with: settings, clips, weights, versions.

    Raises:
        LalmPatchError: the clips or the checkpoint cannot be found.
    """
    attribute = _attribute(settings)
    return _identity(settings, load_records(settings, attribute))


def _identity(settings: RunSettings, records: Sequence[Record]) -> dict[str, str]:
    checkpoint = find_checkpoint(settings.model, weights=settings.backend.name == "local")
    return identity(settings, data_fingerprint(records), checkpoint.revision)


class _Work:
    """A run or a shard of it: what both need."""

    def __init__(self, settings: RunSettings, folder: Path, command: str) -> None:
        self.started = time.monotonic()
        self.settings, self.folder, self.command = settings, folder, command
        _check_backend(settings)
        self.attribute = _attribute(settings)
        self.records = load_records(settings, self.attribute)
        self.identity = _identity(settings, self.records)
        self.tracer: Tracer | None = None

    def complete(self) -> RunOutcome:
        """Everything that is missing, then the result."""
        # Every clip is decoded for this: not to show a result again.
        finished = is_finished(self.folder, self.identity)
        unusable = {} if finished else _unusable(self.records, len(self.records), self.settings)
        with RunStore(self.folder, self.identity) as store:
            if store.finished:
                log.info("this run is finished; its result is shown again")
            else:
                if taken := sum(store.absorb(folder) for folder in shard_folders(self.folder)):
                    log.info("taken over from shards: %d samples", taken)
                self._trace(store, self.records, unusable, self.settings.engine.spot_checks)
                self._finalise(store)
            remove_journals(self.folder)
            dataset = store.load()
        recovery = mean_recovery(dataset, seed=self.settings.seed)
        files = [self.folder / RESULT, *plot_run(dataset, self.folder, recovery), *self._plot_clip(dataset)]
        if self.settings.observe.lens and bool(dataset["kept"].any()):
            files += plot_lens(dataset, self.folder, recovery)
        if self.settings.observe.attention:
            files += plot_grounding(dataset, self.folder)
        shown = dataset
        for name in self._other_metrics(dataset):
            measured = with_metric(dataset, name)
            files += plot_run(measured, self.folder, name=f"figure-{name}")
            if self.settings.metric.name == name:
                shown, recovery = measured, mean_recovery(measured, seed=self.settings.seed)
        return RunOutcome(dataset, tuple(files), summary(shown, files, recovery))

    def _other_metrics(self, dataset: xr.Dataset) -> list[str]:
        """Metrics besides the probability that are to be drawn; `all` leaves out what the run could not store."""
        chosen = self.settings.metric.name
        if chosen != "all":
            return [] if chosen == "probability" else [chosen]
        stored = [name for name in METRICS if name not in WHOLE_VOCABULARY or f"{name}_patched" in dataset]
        return [name for name in stored if name != "probability"]

    def _plot_clip(self, dataset: xr.Dataset) -> list[Path]:
        """Where windows of the audio are patched: the first clip that counts, under its spectrogram."""
        counting = dataset["sample"].values[dataset["kept"].values.astype(bool)]
        if self.settings.granularity.name != "audio" or not len(counting):
            return []
        record = next(record for record in self.records if clean_text(record.id) == counting[0])
        return plot_clip(dataset, str(counting[0]), record.waveform(None), self.folder)

    def shard(self, shard: Shard) -> RunOutcome:
        """The shard's clips; and the result, if no other clips are missing then."""
        if is_finished(self.folder, self.identity):
            return self.complete()
        own, folder = shard.select(self.records), shard.folder(self.folder)
        with RunStore(folder, self.identity) as store:
            elsewhere = stored_elsewhere(self.folder, self.identity, but=folder)
            todo = [record for record in own if record.id not in elsewhere]
            if {record.id for record in todo} - store.completed():
                unusable = _unusable(todo, len(self.records), self.settings)
                self._trace(store, todo, unusable, shard.share(self.settings.engine.spot_checks))
            mark_complete(folder, self.identity, len(own))
        stored = stored_elsewhere(self.folder, self.identity)
        if missing := sum(record.id not in stored for record in self.records):
            text = f"{missing} of the run's {len(self.records)} clips are left to other shards; the last one merges"
        else:
            try:
                return self.complete()
            except BusyError as error:
                text = f"not merged here, because {error} It merges, or the same command does later."
        return RunOutcome(None, (), f"shard {shard.index}/{shard.count}: its {len(own)} clips are stored; {text}")

    def _trace(self, store: RunStore, records: Sequence[Record], unusable: dict[str, str], spot_checks: int) -> None:
        if self.tracer is None:
            self.tracer = _open_model(self.settings, self.attribute, self.records)
            if self.tracer.lalm.commit != self.identity["weights"]:
                raise StoreError(
                    f"{self.settings.model.id}: its files were {self.identity['weights']} when this run began and are "
                    f"now {self.tracer.lalm.commit}; nothing was computed with them, run again"
                )
            enforce(self.tracer.checks, self.settings.on_failed_check)
        _trace_all(store, self.settings, self.tracer, records, unusable, spot_checks, len(self.records))

    def _finalise(self, store: RunStore) -> None:
        assert self.tracer is not None
        attributes = {**describe(self.settings, self.command), **_about_model(self.tracer)}
        dataset = _dataset(store, self.tracer, self.records, attributes)
        dataset.attrs["seconds_of_last_process"] = round(time.monotonic() - self.started, 1)
        store.finalise(dataset)


def dry_run(settings: RunSettings) -> str:
    """What `run` would do; needs no weights, and neither clips nor network where the model's small files are here.

    Raises:
        LalmPatchError: a setting, model or prompt that the run would refuse, too.
    """
    from lalm_patch.tracing.dry_run import describe_run

    _check_backend(settings)
    attribute = _attribute(settings)
    records: list[Record] | DataError
    try:
        records = load_records(settings, attribute)
    except DataError as error:
        records = error
    return describe_run(settings, attribute, records)


def _check_backend(settings: RunSettings) -> None:
    """Refuse what cannot go to a server before clips or models are looked for."""
    if settings.backend.name == "ndif":
        from lalm_patch.engine.ndif import refuse_what_cannot_go

        refuse_what_cannot_go(settings.model, settings.backend)


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
    return Attribute(**asdict(settings.attr))


def _unusable(records: Sequence[Record], total: int, settings: RunSettings) -> dict[str, str]:
    """Clips that must not be used, with reasons, found before anything is computed; `total` clips has the run."""
    failures = {record.id: str(error) for record, error in check_records(records, max_seconds=None)}
    _report_unusable(failures, total, settings)
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
    tracer: Tracer,
    records: Sequence[Record],
    unusable: dict[str, str],
    spot_checks: int,
    total: int,
) -> None:
    """Trace every sample the store does not have yet."""
    done = store.completed()
    todo = [record for record in records if record.id not in done]
    if done:
        log.info("going on: %d of %d samples are stored already", len(records) - len(todo), len(records))
    unusable = unusable | _too_long(todo, tracer, unusable, total, settings)
    spot_checked = sum(int(store.sample(id).meta.get("spot_checked_cells", 0)) for id in done)
    title = f"{settings.model.name} {settings.attr.name} {settings.granularity.name}"
    with Progress(len(todo) * tracer.cells_per_sample, title) as progress:
        for record in todo:
            if record.id in unusable:
                progress.drop(tracer.cells_per_sample)
                store.add(record.id, {}, _unusable_meta(record, unusable[record.id]))
        usable = [record for record in todo if record.id not in unusable]
        for record, trace in tracer.traces(usable, spot_checks - spot_checked, progress, store.folder):
            enforce([Check(**check) for check in trace.meta.get("checks", [])], settings.on_failed_check)
            store.add(record.id, trace.arrays, trace.meta)


def _open_model(settings: RunSettings, attribute: Attribute, records: Sequence[Record]) -> Tracer:
    import torch

    from lalm_patch.models import LALM
    from lalm_patch.tracing.tracer import Tracer

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.backend.name == "ndif":
        from lalm_patch.tracing.remote import RemoteTracer

        log.info("%s stays on the server; %s clips at most are in flight", settings.model.id, settings.backend.max_jobs)
        return RemoteTracer(LALM.outline(settings.model), attribute, settings, records)
    log.info("loading %s (%s)", settings.model.name, settings.model.id)
    return Tracer(LALM.load(settings.model), attribute, settings, records)


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
        **tracer.about,
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
    if servers := sorted({json.dumps(sample.meta["server"]) for sample in samples if "server" in sample.meta}):
        attributes["servers"] = f"[{', '.join(servers)}]"
    attributes["data_fingerprint"] = store.identity["clips"]
    return build_dataset(samples, tracer.attribute.options, tracer.dims, tracer.coords, attributes)
