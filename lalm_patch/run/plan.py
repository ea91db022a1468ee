"""What a run is: its question, its clips and what tells it from other runs; known before any model is loaded."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lalm_patch.errors import AudioError, ConfigError, DataError, ModelError
from lalm_patch.models.checkpoint import find_checkpoint
from lalm_patch.settings import OWN_QUESTIONS, RunSettings
from lalm_patch.stimuli import (
    Attribute,
    Look,
    Record,
    data_fingerprint,
    grouped,
    load_demo,
    load_listed,
    load_sakura,
    load_sakura_multi,
    load_table,
    look_at,
    one_clip,
    usable_part,
    within,
)
from lalm_patch.storage.provenance import identity
from lalm_patch.storage.run_store import read_receipt
from lalm_patch.terminal import Waiting
from lalm_patch.tracing.metrics import Exclusion

if TYPE_CHECKING:
    from lalm_patch.models import LALM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeftOut:
    """Why a clip is not traced."""

    reason: Exclusion
    detail: str


@dataclass(frozen=True)
class RunPlan:
    """A run to be carried out.

    Attributes:
        settings: what was asked for.
        attribute: the question; None where each clip has its own.
        records: all clips of the run, in its order.
        identity: what the run's folder is compared with: settings, clips, weights, versions.
    """

    settings: RunSettings
    attribute: Attribute | None
    records: tuple[Record, ...]
    identity: dict[str, str]

    @cached_property
    def looks(self) -> dict[str, Look]:
        """What each clip turns out to be when it is read, by id; every clip is read, once."""
        found = {}
        with Waiting("looking at the clips") as waiting:
            for number, record in enumerate(self.records):
                waiting.step("reading", number, len(self.records))
                found[record.id] = look_at(record)
        return found


def plan_run(settings: RunSettings) -> RunPlan:
    """Find the clips and the checkpoint that settings name.

    Raises:
        LalmPatchError: they cannot be found, or the model cannot go to the server that was asked for.
    """
    check_backend(settings)
    attribute = attribute_of(settings)
    records = tuple(grouped(load_records(settings, attribute)))
    checkpoint = find_checkpoint(settings.model, weights=settings.backend.name == "local")
    return RunPlan(settings, attribute, records, identity(settings, data_fingerprint(records), checkpoint.revision))


def recognised(plan: RunPlan, folder: Path) -> RunPlan:
    """The plan, under the identity of the finished run in its folder, which may name the same weights the old way."""
    receipt = read_receipt(folder)
    if receipt is None or receipt["identity"] == plan.identity:
        return plan
    checkpoint = find_checkpoint(plan.settings.model, weights=plan.settings.backend.name == "local")
    before = plan.identity | {"weights": checkpoint.former_revision}
    return replace(plan, identity=before) if receipt["identity"] == before else plan


def check_backend(settings: RunSettings) -> None:
    """Refuse what cannot go to a server before clips or models are looked for.

    Raises:
        ConfigError, ModelError: see `lalm_patch.engine.ndif`.
    """
    if settings.backend.name == "ndif":
        from lalm_patch.engine.ndif import refuse_what_cannot_go

        refuse_what_cannot_go(settings.model, settings.backend)


def attribute_of(settings: RunSettings) -> Attribute | None:
    """The question that settings ask; None where each clip has its own."""
    return None if settings.data.name in OWN_QUESTIONS else _attribute(settings)


def _attribute(settings: RunSettings) -> Attribute:
    return Attribute(**vars(settings.attr))


def load_records(settings: RunSettings, attribute: Attribute | None) -> list[Record]:
    """The clips of a run.

    Raises:
        DataError, ConfigError: see `load_sakura`, `load_table`, `load_listed`.
    """
    data = settings.data
    if attribute is None:
        records = _with_own_questions(settings)
        # Their answers are no classes: any of them are as good as others.
        return records if data.limit is None else usable_part(records, None, data.limit, data.seed)
    name = settings.model.data if data.name == "auto" else data.name
    if data.name == "auto" and data.root is not None:
        name = "sakura"
    if name == "demo":
        if data.root is not None:
            raise ConfigError(f"data=demo takes no data.root (got {data.root}); use data=sakura data.root=...")
        return load_demo(attribute, data.limit, data.seed)
    return load_sakura(attribute, data.root, data.limit, data.seed)


def _with_own_questions(settings: RunSettings) -> list[Record]:
    data, attr = settings.data, settings.attr
    leave_out = data.bad_clips == "exclude"
    root, path = (None if place is None else Path(os.path.expanduser(place)) for place in (data.root, data.path))
    if data.name == "clip":
        assert data.audio is not None  # composed settings have one
        place = Path(os.path.expanduser(data.audio))
        return one_clip(place, attr.question or "", attr.options, attr.answer or "", attr.response)
    if data.name == "table":
        assert path is not None
        return load_table(path, attr.response, root, leave_out=leave_out)
    assert root is not None
    if data.name == "sakura_multi":
        return load_sakura_multi(_attribute(settings), root, leave_out=leave_out)
    return load_listed(data.name, root, attr.response, path, leave_out=leave_out)


def left_out(plan: RunPlan, max_seconds: float = math.inf) -> dict[str, LeftOut]:
    """Clips that are not traced, by id, found by reading them and before any weights are.

    Args:
        plan: the run.
        max_seconds: the longest clip that the model takes.

    Raises:
        AudioError: some cannot be used, all of them named, and `data.bad_clips` is `stop`.
        DataError: none of the run's clips is left.
    """
    found: dict[str, LeftOut] = {}
    errors: dict[str, AudioError] = {}
    for record in plan.records:
        look = within(plan.looks[record.id], record, max_seconds, plan.settings.model.name)
        if look.error is not None:
            errors[record.id] = look.error
            found[record.id] = LeftOut(Exclusion.UNREADABLE, _detail(record, look.error))
        elif not look.sounds:
            found[record.id] = LeftOut(Exclusion.SILENT, f"{record.id}: its peak is {look.peak:.1f} dBFS")
    if errors and plan.settings.data.bad_clips == "stop":
        raise AudioError(_all_named(plan, list(errors.values())))
    _report(plan, errors, silent=len(found) - len(errors))
    if len(found) == len(plan.records):
        reasons = sorted(clip.detail for clip in found.values())
        raise DataError(f"none of the {len(reasons)} clips can be used:\n  " + "\n  ".join(reasons))
    return found


def unaskable(plan: RunPlan, outline: LALM, out: Collection[str]) -> dict[str, LeftOut]:
    """Clips whose own question the model cannot answer, by id: its options cannot be told apart.

    Args:
        plan: the run.
        outline: the model, without weights.
        out: clips that are left out anyway.

    Raises:
        DataError: there are some, all of them named, and `data.bad_clips` is `stop`; or no clip is left.
    """
    from lalm_patch.tracing.questions import Questions

    questions = Questions(outline, plan.attribute, plan.settings)
    own = [record for record in plan.records if record.prompt is not None and record.id not in out]
    found = {}
    for record in own:
        try:
            questions.ask(record)
        except ModelError as error:
            found[record.id] = LeftOut(Exclusion.UNASKABLE, f"{record.id}: {error}")
    if questions.whole and (nested := [record.id for record in own if _nested(record)]):
        log.warning(
            "%d of %d questions have an option that is the beginning of another (%s%s): whole, the longer one is never "
            "more probable; prompt.options=letters treats them alike",
            len(nested),
            len(plan.records),
            ", ".join(nested[:3]),
            ", ..." if len(nested) > 3 else "",
        )
    if not found:
        return {}
    named = "\n  ".join(clip.detail for clip in found.values())
    if plan.settings.data.bad_clips == "stop":
        raise DataError(
            f"{len(found)} of {len(plan.records)} questions cannot be asked this model:\n  {named}\n"
            "To run without them: data.bad_clips=exclude"
        )
    if len(found) == len(own):
        raise DataError(f"none of the {len(found)} questions can be asked:\n  {named}")
    log.warning("%d of %d clips are left out: %s", len(found), len(plan.records), Exclusion.UNASKABLE)
    return found


def _nested(record: Record) -> bool:
    """Whether one of a clip's own options is the beginning of another."""
    options = () if record.prompt is None else record.prompt.options
    return any(long != short and long.startswith(f"{short} ") for long in options for short in options)


def _all_named(plan: RunPlan, errors: Sequence[AudioError]) -> str:
    if len(errors) == 1:
        return f"{errors[0]}. To run without it: data.bad_clips=exclude"
    named = "\n  ".join(str(error) for error in errors)
    return (
        f"{len(errors)} of {len(plan.records)} clips cannot be used ({_counted(errors)}):\n  {named}\n"
        "To run without them: data.bad_clips=exclude"
    )


def _report(plan: RunPlan, errors: Mapping[str, AudioError], silent: int) -> None:
    """One line for the terminal; the log file names every clip, and so does the dataset."""
    reasons = _counted(list(errors.values()), silent)
    if not reasons:
        return
    log.warning(
        "%d of %d clips are left out: %s; each is named in the log and in the result's exclusion_detail",
        len(errors) + silent,
        len(plan.records),
        reasons,
    )
    for error in errors.values():
        log.debug("left out: %s", error)


def _counted(errors: Sequence[AudioError], silent: int = 0) -> str:
    counts = Counter(error.kind for error in errors)
    if silent:
        counts["silent"] = silent
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _detail(record: Record, error: AudioError) -> str:
    """What is stored with a result, which travels: the clip's id in place of where it lies on this machine."""
    return str(error).replace(record.name, record.id)
