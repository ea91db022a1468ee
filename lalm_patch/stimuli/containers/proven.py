"""What a container is after it was looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

REWRITE = "rewrite it from the original, for example `ffmpeg -i ORIGINAL -c:a flac CLIP.flac`"
REPLACE = "replace it with an intact copy"

Samples = npt.NDArray[np.float64]


class ProvenFile:
    """A file that holds all that its container says, ready to be decoded.

    Args:
        data: the file's bytes.
        name: where the clip comes from, for messages.

    Attributes:
        data: bytes for the decoder: the file's own, with its header put right.
        notes: what was repaired, ignored or could not be proven, one sentence each.

    Raises:
        AudioError: the container is not complete or contradicts itself.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.data = data
        self.name = name
        self.notes: list[str] = []
        self.check()

    def check(self) -> None:
        """Prove that the file is complete before it is decoded."""
        raise NotImplementedError

    def samples(self, file: Any) -> Samples:
        """Decoded samples [frames, channels] of the opened `soundfile.SoundFile`, with what decoding alone can show."""
        decoded: Samples = file.read(dtype="float64", always_2d=True)
        return decoded

    def frames(self, file: Any) -> int:
        """Samples per channel that the file must decode to."""
        return int(file.frames)
