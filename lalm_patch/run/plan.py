"""What a run is: its question, its clips and what tells it from other runs; known before any model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lalm_patch.errors import AudioError, ConfigError, DataError
from lalm_patch.models.checkpoint import find_checkpoint
from lalm_patch.settings import RunSettings
from lalm_patch.stimuli import Attribute, Record, check_records, data_fingerprint, load_demo, load_sakura
from lalm_patch.storage.provenance import identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """A run to be carried out.

    Attributes:
        settings: what was asked for.
        attribute: the question.
        records: all clips of the run, in its order.
        identity: what the run's folder is compared with: settings, clips, weights, versions.
    """

    settings: RunSettings
    attribute: Attribute
    records: tuple[Record, ...]
    identity: dict[str, str]


def plan_run(settings: RunSettings) -> RunPlan:
    """Find the clips and the checkpoint that settings name.

    Raises:
        LalmPatchError: they cannot be found, or the model cannot go to the server that was asked for.
    """
    check_backend(settings)
    attribute = attribute_of(settings)
    records = tuple(load_records(settings, attribute))
    checkpoint = find_checkpoint(settings.model, weights=settings.backend.name == "local")
    return RunPlan(settings, attribute, records, identity(settings, data_fingerprint(records), checkpoint.revision))


def check_backend(settings: RunSettings) -> None:
    """Refuse what cannot go to a server before clips or models are looked for.

    Raises:
        ConfigError, ModelError: see `lalm_patch.engine.ndif`.
    """
    if settings.backend.name == "ndif":
        from lalm_patch.engine.ndif import refuse_what_cannot_go

        refuse_what_cannot_go(settings.model, settings.backend)


def attribute_of(settings: RunSettings) -> Attribute:
    """The question that settings ask."""
    return Attribute(**asdict(settings.attr))


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


def unusable(plan: RunPlan, records: Sequence[Record], max_seconds: float | None = None) -> dict[str, str]:
    """Clips that must not be used, by id, with reasons, found by decoding them and before anything is computed.

    Args:
        plan: the run.
        records: those of its clips that are looked at.
        max_seconds: the longest clip that the model takes, once the model is known.

    Raises:
        AudioError: there are some, and `data.bad_clips` is `stop`.
        DataError: none of the run's clips is left.
    """
    failures = {record.id: str(error) for record, error in check_records(records, max_seconds=max_seconds)}
    if not failures:
        return {}
    if plan.settings.data.bad_clips == "stop":
        shown = "; ".join(list(failures.values())[:3])
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        raise AudioError(
            f"{shown}{more}. To run without {'it' if len(failures) == 1 else 'them'}: data.bad_clips=exclude"
        )
    for message in failures.values():
        log.warning("excluded: %s", message)
    if len(failures) == len(plan.records):
        raise DataError("none of the clips can be used; see the reasons above")
    return failures
