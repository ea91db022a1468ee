"""Clips that are not read yet: what they are called, what they are, and which belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.audio import MAX_SECONDS, Waveform, read_audio, source_bytes
from lalm_patch.stimuli.prompt import Prompt


@dataclass(frozen=True)
class Record:
    """One clip, not yet read.

    Attributes:
        id: unique in its corpus and the same on every machine (`dog4.wav`).
        label: the right answer, one of the options.
        source: the file, or its bytes.
        name: says in messages where the clip comes from.
        group: shared by clips that are not independent (the CREMA-D speaker, the Common Voice recording), for
            clustered statistics, and else the id.
        sentence: what is said, as CREMA-D's file names tell it, and else empty.
        prompt: the clip's own question, with a transcript if the data has one; None to ask the run's attribute.
        tags: what else the data says of the clip (task, difficulty), by column.
    """

    id: str
    label: str
    source: Path | bytes = field(repr=False)
    name: str
    group: str
    sentence: str = ""
    prompt: Prompt | None = None
    tags: tuple[tuple[str, str], ...] = ()

    def waveform(self, max_seconds: float | None = MAX_SECONDS) -> Waveform:
        """float32 [samples], mono, 16 kHz. Raises AudioError, see `read_audio`."""
        return read_audio(self.source, self.name, max_seconds)


def data_fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 (hex) over ids, labels, own questions with tags, and undecoded audio; of no order or folder."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: record.id):
        try:
            content = source_bytes(record.source, record.name)
        except AudioError as error:
            content = f"\0{error.kind}".encode()  # another data set than with the file
        asked = record.prompt and (astuple(record.prompt), record.group, record.tags)
        own = [] if asked is None else [json.dumps(asked).encode()]
        for part in (record.id.encode(), record.label.encode(), content, *own):
            # The length first: without it ("ab", "c") and ("a", "bc") would be one data set.
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def grouped(records: Sequence[Record]) -> list[Record]:
    """The records, with one group for those whose files are the same byte for byte, and all of their groups' clips."""
    same: dict[bytes, list[str]] = {}
    for record in records:
        try:
            content = source_bytes(record.source, record.name)
        except AudioError:  # what cannot be opened is like nothing else; it is named when clips are looked at
            continue
        same.setdefault(hashlib.sha256(content).digest(), []).append(record.group)
    joined: dict[str, str] = {}

    def root(group: str) -> str:
        while joined.get(group, group) != group:
            group = joined[group]
        return group

    for groups in same.values():
        for other in groups[1:]:
            first, second = sorted((root(groups[0]), root(other)))
            joined[second] = first
    return [replace(record, group=root(record.group)) if joined else record for record in records]
