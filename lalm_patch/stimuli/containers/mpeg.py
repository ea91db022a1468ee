"""MPEG audio (MP3): frames one after another, each with its own header (ISO 11172-3, 13818-3).

Encoders that know the length write it into a first frame that holds no sound (Xing, Info).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.containers.proven import REPLACE, ProvenFile

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Sampling rates by the header's version bits: MPEG 1, 2 and 2.5."""
_KBITS_1 = {
    3: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_KBITS_2 = {
    3: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    1: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bit rates in kbit/s by the header's layer bits (3: layer I, 1: layer III), of MPEG 1 and of MPEG 2 and 2.5."""
_TAG_1 = 128


@dataclass(frozen=True)
class _Frame:
    length: int
    kind: tuple[int, int, int]
    mono: bool


def is_mpeg(data: bytes) -> bool:
    """Whether a file is a chain of MPEG frames, perhaps after a tag."""
    start = _after_tag(data)
    first = _frame(data, start)
    if first is None:
        return data[:3] == b"ID3"
    following = _frame(data, start + first.length)
    return following is not None or start + first.length >= len(data)


def _after_tag(data: bytes) -> int:
    """End of the ID3v2 tags at the start; 28 bits of size, seven to a byte, and a footer of ten bytes if it has one."""
    position = 0
    while data[position : position + 3] == b"ID3" and position + 10 <= len(data):
        size = 0
        for byte in data[position + 6 : position + 10]:
            size = size << 7 | byte & 0x7F
        position += 10 + size + (10 if data[position + 5] & 0x10 else 0)
    return position


def _frame(data: bytes, position: int) -> _Frame | None:
    """The frame whose header is at a position; None if there is none."""
    if position + 4 > len(data):
        return None
    (header,) = struct.unpack_from(">I", data, position)
    version, layer = header >> 19 & 3, header >> 17 & 3
    kbits, rate, padding = header >> 12 & 15, header >> 10 & 3, header >> 9 & 1
    if header >> 21 != 0x7FF or version == 1 or layer == 0 or kbits in (0, 15) or rate == 3:
        return None
    bits = (_KBITS_1 if version == 3 else _KBITS_2)[layer][kbits - 1] * 1000
    hertz = _RATES[version][rate]
    if layer == 3:
        length = (12 * bits // hertz + padding) * 4
    else:
        length = (72 if layer == 1 and version != 3 else 144) * bits // hertz + padding
    return _Frame(length, (version, layer, rate), mono=header >> 6 & 3 == 3)


class MpegFile(ProvenFile):
    """See `ProvenFile`."""

    def check(self) -> None:
        """Frame must follow frame to the end, the last one whole, as many as the first one says."""
        start = position = _after_tag(self.data)
        first = _frame(self.data, position)
        if first is None:
            raise AudioError(f"{self.name}: expected MPEG audio after an ID3 tag, found none; {REPLACE}", "damaged")
        frames = 0
        while (frame := _frame(self.data, position)) is not None and frame.kind == first.kind:
            if position + frame.length > len(self.data):
                raise AudioError(
                    f"{self.name}: expected a last MP3 frame of {frame.length} bytes, got {len(self.data) - position}: "
                    f"the file is truncated; {REPLACE}",
                    "truncated",
                )
            position += frame.length
            frames += 1
        self._check_rest(position)
        declared = self._declared(start, first)
        if declared is None:
            self.notes.append("the MP3 does not say how long it is: whole frames that were cut off are not noticed")
        elif frames - 1 < declared:
            raise AudioError(
                f"{self.name}: expected {declared} MP3 frames as its first one declares, got {frames - 1}: the file is "
                f"truncated; {REPLACE}",
                "truncated",
            )

    def _check_rest(self, position: int) -> None:
        """After the last frame: nothing, a tag, or zeros."""
        rest = self.data[position:]
        tagged = rest[:3] == b"TAG" and len(rest) == _TAG_1
        if tagged or rest[:8] == b"APETAGEX" or rest[:3] == b"ID3" or rest[:11] == b"LYRICSBEGIN":
            return
        if not rest.strip(b"\0"):
            if rest:
                self.notes.append(f"{len(rest)} zero bytes behind the last MP3 frame were ignored")
            return
        raise AudioError(
            f"{self.name}: expected an MP3 frame at byte {position}, got {rest[:8]!r}: the file is damaged; {REPLACE}",
            "damaged",
        )

    def _declared(self, start: int, first: _Frame) -> int | None:
        """Frames with sound that the first frame declares (Xing, Info); None if it is a frame like the others."""
        version = first.kind[0]
        side = (17 if first.mono else 32) if version == 3 else (9 if first.mono else 17)
        at = start + 4 + side
        if self.data[at : at + 4] not in (b"Xing", b"Info") or at + 12 > len(self.data):
            return None
        flags, frames = struct.unpack_from(">II", self.data, at + 4)
        return int(frames) if flags & 1 else None
