"""FLAC: the header gives the number of samples and an MD5 of them (RFC 9639, section 8.2)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.containers.proven import REPLACE, REWRITE, ProvenFile, Samples

_BITS = (8, 16, 24)
_HEADER = 42


class FlacFile(ProvenFile):
    """See `ProvenFile`."""

    def check(self) -> None:
        """The header must be whole and say how many samples follow."""
        if len(self.data) < _HEADER:
            raise AudioError(
                f"{self.name}: expected a FLAC header of 42 bytes, got {len(self.data)} bytes in all; {REPLACE}",
                "truncated",
            )
        if self._declared() == 0:
            raise AudioError(
                f"{self.name}: expected a FLAC header that gives the number of samples, got 0: the file is empty or "
                f"was written by a streaming encoder, so a cut cannot be told from its end; {REWRITE}",
                "length unknown",
            )

    def samples(self, file: Any) -> Samples:
        """As decoded, compared with the header's MD5."""
        # libsndfile left-justifies integers, so this is the same value a float read would give, kept exact.
        integers = file.read(dtype="int32", always_2d=True)
        self._check_digest(integers)
        scaled: Samples = integers / np.float64(2**31)
        return scaled

    def frames(self, file: Any) -> int:
        """From the header."""
        return self._declared()

    def _declared(self) -> int:
        """Total samples per channel, 36 bits of STREAMINFO."""
        return (self.data[21] & 0x0F) << 32 | int.from_bytes(self.data[22:26], "big")

    def _check_digest(self, integers: npt.NDArray[np.int32]) -> None:
        """MD5 of the interleaved little-endian samples, stored in STREAMINFO; zero means unset."""
        stored = self.data[26:42]
        bits = ((self.data[20] & 0x01) << 4 | self.data[21] >> 4) + 1
        if not any(stored) or bits not in _BITS:
            return
        packed = (integers >> (32 - bits)).astype("<i4", order="C").view(np.uint8).reshape(-1, 4)[:, : bits // 8]
        if hashlib.md5(packed.tobytes(), usedforsecurity=False).digest() != stored:
            raise AudioError(
                f"{self.name}: expected samples matching the MD5 in the FLAC header, got others in {len(integers)} "
                f"decoded samples: the file is damaged or its header was changed; {REPLACE}",
                "damaged",
            )
