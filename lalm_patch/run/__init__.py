"""Settings in; a run's result, figures and summary out: plan it, do what is missing of it, show it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lalm_patch.config import compose
from lalm_patch.errors import DataError
from lalm_patch.run.plan import RunPlan, attribute_of, check_backend, left_out, load_records, plan_run, recognised
from lalm_patch.run.show import RunOutcome, show
from lalm_patch.run.work import complete, complete_shard
from lalm_patch.settings import RunSettings
from lalm_patch.storage.shards import Shard
from lalm_patch.terminal import command_line

__all__ = ["RunOutcome", "dry_run", "load_records", "run", "run_identity", "trace"]


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
    plan = recognised(plan_run(settings), folder)
    if settings.shard is None:
        return show(plan, folder, complete(plan, folder, command))
    done = complete_shard(plan, Shard.parse(settings.shard), folder, command)
    return RunOutcome(None, (), done) if isinstance(done, str) else show(plan, folder, done)


def run_identity(settings: RunSettings) -> dict[str, str]:
    """What a run's folder is compared with: settings, clips, weights, versions.

    Raises:
        LalmPatchError: the clips or the checkpoint cannot be found.
    """
    return plan_run(settings).identity


def dry_run(settings: RunSettings) -> str:
    """What `run` would do; needs no weights, and neither clips nor network where the model's small files are here.

    Clips that are there are looked at as the run would.

    Raises:
        LalmPatchError: a setting, model, prompt or clip that the run would refuse, too.
    """
    from lalm_patch.models import LALM, check_family
    from lalm_patch.tracing.dry_run import describe_run

    check_backend(settings)
    check_family(settings)
    attribute = attribute_of(settings)
    try:
        found = tuple(load_records(settings, attribute))
    except DataError as error:
        return describe_run(settings, attribute, error)
    plan = RunPlan(settings, attribute, found, identity={})
    out = left_out(plan, LALM.outline(settings.model).family.max_seconds)
    reasons = Counter(str(clip.reason) for clip in out.values())
    note = ", ".join(f"{count} left out: {reason}" for reason, count in reasons.items())
    return describe_run(settings, attribute, [record for record in found if record.id not in out], note)
