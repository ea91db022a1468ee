"""Settings in; a run's result, figures and summary out: plan it, do what is missing of it, show it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from lalm_patch.config import compose
from lalm_patch.config.words import override
from lalm_patch.errors import ConfigError, DataError
from lalm_patch.run.plan import RunPlan, attribute_of, check_backend, left_out, load_records, plan_run, recognised
from lalm_patch.run.show import RunOutcome, show
from lalm_patch.run.work import complete, complete_shard
from lalm_patch.settings import RunSettings
from lalm_patch.storage.journal import replace_file, storage_error
from lalm_patch.storage.shards import Shard
from lalm_patch.terminal import command_line

__all__ = ["RunOutcome", "dry_run", "load_records", "run", "run_identity", "trace", "trace_clip"]


def trace(*overrides: str) -> RunOutcome:
    """Do from Python what `python -m lalm_patch OVERRIDES` does; returns the dataset, the files and the summary.

    Raises:
        LalmPatchError: anything a user can put right; samples computed so far are kept.
    """
    settings = compose(*overrides)
    return run(settings, Path(settings.outputs) / settings.run_name, command_line(overrides))


def trace_clip(
    audio: str | Path | np.ndarray,
    *,
    question: str,
    options: Sequence[str],
    answer: str,
    rate: int | None = None,
    response: str = "The answer is",
    model: str = "demo",
    granularity: str = "token",
    overrides: Sequence[str] = (),
) -> RunOutcome:
    """Trace one recording: which layer and token carries the answer to a question about it.

    Args:
        audio: an audio file; or samples [samples] or [samples, channels], between -1 and 1, or
            signed integers of full scale.
        question: what is asked.
        options: the answers to choose from, two at least.
        answer: the right one of them.
        rate: sampling rate of samples, in Hz.
        response: how the answer begins.
        model: one of conf/model.
        granularity: one of conf/granularity.
        overrides: any other settings, as on the command line.

    Returns:
        The dataset with one sample, the files (`clip.png` is the picture) and the summary.

    Raises:
        LalmPatchError: anything a user can put right: an unreadable file, samples without a rate, ...
    """
    if isinstance(audio, np.ndarray) != (rate is not None):
        raise ConfigError("trace_clip: expected a file, or samples with their rate=..., got one without the other")
    given = {"question": question, "answer": answer, "response": response}
    if odd := [name for name, value in given.items() if not isinstance(value, str)]:
        raise ConfigError(f"trace_clip: expected {odd[0]} to be text, got {given[odd[0]]!r}; put it in quotes")
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        raise ConfigError(f"trace_clip: expected options as a list of texts, got {options!r}")
    asked = [
        f"model={model}",
        "data=clip",
        override("attr.question", question),
        override("attr.options", list(options)),
        override("attr.answer", answer),
        override("attr.response", response),
        f"granularity={granularity}",
        *overrides,
    ]
    if isinstance(audio, np.ndarray):
        assert rate is not None
        audio = _as_file(audio, rate, Path(compose(*asked, "data.audio=samples.wav").outputs))
    return trace(*asked, override("data.audio", str(audio)))


def _as_file(samples: np.ndarray, rate: int, outputs: Path) -> Path:
    """The samples as a WAV of floats beside the runs, named by what is in it: asked again, it is the same clip."""
    if samples.dtype.kind not in "if":
        raise ConfigError(f"trace_clip: expected samples that are floats or signed integers, got {samples.dtype}")
    full_scale = -float(np.iinfo(samples.dtype).min) if samples.dtype.kind == "i" else 1.0
    values = np.ascontiguousarray(samples / full_scale, np.float32)
    digest = hashlib.sha256(f"{rate}\0{values.shape}\0".encode() + values.tobytes()).hexdigest()
    folder = outputs / "recordings"
    path = folder / f"{digest[:16]}.wav"
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, values, rate, format="WAV", subtype="FLOAT")
        content = bytearray(buffer.getvalue())
        if (peak := content.find(b"PEAK", 0, 128)) >= 0:  # libsndfile writes the time there: another file every second
            content[peak + 12 : peak + 16] = bytes(4)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        raise ConfigError(
            f"trace_clip: expected samples [samples] or [samples, channels] and a rate in Hz, got shape {values.shape} "
            f"and rate {rate} ({error})"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, bytes(content))
    except OSError as error:
        raise storage_error(error, path, "keeping the samples") from error
    return path


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
