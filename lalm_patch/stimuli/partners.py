"""Another class's clip in place of the clip: which one, and how it is brought to the clip's length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from lalm_patch.errors import AudioError, DataError
from lalm_patch.stimuli.audio import Waveform
from lalm_patch.stimuli.records import Record


class Partners:
    """For every clip of a run another one with another answer, as like it as the run has.

    The same sentence in another way comes first (CREMA-D), then the same speaker or recording, then the nearest length;
    a longer clip before a shorter one, which would have to be filled with silence. Ties are broken by a hash of the
    names, so that the choice does not depend on the order of the clips.

    Args:
        records: the run's clips.
        seed: of the hash.
    """

    def __init__(self, records: Sequence[Record], seed: int = 0) -> None:
        self._records = tuple(records)
        self._seed = seed

    def of(self, record: Record) -> Record:
        """The clip that stands in for one.

        Raises:
            DataError: no usable clip of the run has another answer.
        """
        others = [other for other in self._records if other.label != record.label and other.id in self._lengths]
        if not others:
            raise DataError(
                f"corruption=counterfactual: no usable clip of the run has another answer than {record.label!r} of "
                f"{record.id}; raise data.limit, or choose another corruption"
            )
        length = self._lengths.get(record.id, 0)

        def distance(other: Record) -> tuple[bool, bool, bool, int, bytes]:
            own = self._lengths[other.id]
            said = not record.sentence or other.sentence != record.sentence
            name = f"{self._seed}:{record.id}:{other.id}".encode()
            return said, other.group != record.group, own < length, abs(own - length), hashlib.sha256(name).digest()

        return min(others, key=distance)

    @cached_property
    def _lengths(self) -> dict[str, int]:
        """Samples at 16 kHz of every usable clip."""
        lengths = {}
        for record in self._records:
            try:
                lengths[record.id] = len(record.waveform(None))
            except AudioError:
                continue  # an unusable clip is reported, or stops the run, where its own turn comes
        return lengths


def fitted(waveform: Waveform, length: int) -> Waveform:
    """A clip cut, or filled with silence at its end, to a number of samples."""
    return np.pad(waveform[:length], (0, max(0, length - len(waveform))))
