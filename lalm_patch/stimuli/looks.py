"""What clips turn out to be when they are read: whether they can be used, whether anything sounds, what is amiss."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.audio import MAX_SECONDS, SAMPLING_RATE, read_clip, too_long
from lalm_patch.stimuli.records import Record


@dataclass(frozen=True)
class Look:
    """A clip as it was found.

    Attributes:
        seconds: its length; NaN if it cannot be read.
        level: root mean square in dB below full scale; minus infinity for digital silence, NaN if it cannot be read.
        peak: largest sample, in the same units.
        sounds: whether anything is to be heard after mixing down.
        notes: what was repaired or ignored in the file.
        error: why it must not be used, or None.
    """

    seconds: float = math.nan
    level: float = math.nan
    peak: float = math.nan
    sounds: bool = False
    notes: tuple[str, ...] = ()
    error: AudioError | None = None


def look_at(record: Record, max_seconds: float | None = None) -> Look:
    """Read a clip once; what must not be used is in the answer and not raised."""
    try:
        clip = read_clip(record.source, record.name, max_seconds)
    except AudioError as error:
        return Look(error=error)
    seconds = len(clip.waveform) / SAMPLING_RATE
    return Look(seconds, clip.level, clip.peak, clip.sounds, clip.notes)


def within(look: Look, record: Record, max_seconds: float, whose: str) -> Look:
    """The same look by a model whose window is `max_seconds`."""
    if look.error is None and look.seconds > max_seconds:
        return replace(look, error=too_long(record.name, look.seconds, max_seconds, whose))
    return look


def check_records(
    records: Iterable[Record], max_seconds: float | None = MAX_SECONDS
) -> list[tuple[Record, AudioError]]:
    """Read every clip once and return those that must not be used, each with its reason; empty if all are good."""
    looks = ((record, look_at(record, max_seconds).error) for record in records)
    return [(record, error) for record, error in looks if error is not None]


def usable_part(records: Sequence[Record], options: Sequence[str] | None, limit: int, seed: int) -> list[Record]:
    """A class-balanced part of some records that has `limit` usable clips, if there are so many; in their order.

    Without options there are no classes to balance. A clip that cannot be used, or in which nothing sounds, is in the
    part with the clip that takes its place.
    """
    known = {record.id: record for record in records}

    def usable(sample: str) -> bool:
        look = look_at(known[sample])
        return look.error is None and look.sounds

    labels = {record.id: "" if options is None else record.label for record in records}
    part = balanced_part(labels, ("",) if options is None else options, limit, seed, usable)
    return [record for record in records if record.id in part]


def balanced_part(
    labels: Mapping[str, str],
    options: Sequence[str],
    limit: int,
    seed: int,
    usable: Callable[[str], bool] | None = None,
) -> set[str]:
    """Ids of `limit` usable samples of `labels` (id to label), classes equal to within one as far as they reach.

    Classes take turns in the order of `options`; within a class samples come in the order of SHA-256 of `seed:id`.
    So a smaller part lies inside every larger one, and the order of rows, the machine and the run do not matter.
    What is not usable on the way is in the part, too, and does not count: somebody has to say so.
    """

    def order(sample: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}:{sample}".encode()).digest(), sample

    waiting = [
        deque(sorted((sample for sample, label in labels.items() if label == option), key=order)) for option in options
    ]
    part: set[str] = set()
    counted = 0
    while any(waiting):
        for members in waiting:
            while members and counted < limit:
                sample = members.popleft()
                part.add(sample)
                if usable is None or usable(sample):
                    counted += 1
                    break
        if counted == limit:
            break
    return part
