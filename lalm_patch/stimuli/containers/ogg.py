"""Ogg (RFC 3533): pages with numbers and checksums, the last one marked. Holds Vorbis, Opus or FLAC."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.containers.proven import REPLACE, REWRITE, ProvenFile

_POLYNOMIAL = 0x04C11DB7
_CONTINUED, _FIRST, _LAST = 1, 2, 4


def _checksum_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (_POLYNOMIAL if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_TABLE = _checksum_table()


def checksum(data: bytes) -> int:
    """CRC-32 as in RFC 3533: polynomial 0x04c11db7, most significant bit first, no inversion."""
    value = 0
    for byte in data:
        value = (value << 8 & 0xFFFFFFFF) ^ _TABLE[value >> 24 ^ byte]
    return value


@dataclass(frozen=True)
class _Page:
    flags: int
    serial: int
    number: int
    end: int


class OggFile(ProvenFile):
    """See `ProvenFile`."""

    def check(self) -> None:
        """Every page must be whole and in its place, and the last one must say that it is."""
        pages = list(self._pages())
        if len({page.serial for page in pages}) > 1:
            raise AudioError(
                f"{self.name}: expected one stream, got an Ogg file of several; convert the one that is meant, for "
                "example `ffmpeg -i CLIP -map 0:a:0 -c:a flac CLIP.flac`",
                "several streams",
            )
        numbers = [page.number for page in pages]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or not pages[0].flags & _FIRST:
            raise AudioError(
                f"{self.name}: expected Ogg pages without a gap, got pages {_runs(numbers)}; {REPLACE}", "damaged"
            )
        if not pages[-1].flags & _LAST:
            raise AudioError(
                f"{self.name}: expected an Ogg stream whose last page says so, got {len(pages)} pages without: the "
                f"file is truncated, or a streaming encoder did not end it; {REWRITE}",
                "truncated",
            )
        if behind := len(self.data) - pages[-1].end:
            self.notes.append(f"{behind} bytes behind the end of the Ogg stream were ignored")
            self.data = self.data[: pages[-1].end]

    def _pages(self) -> Iterator[_Page]:
        position = 0
        while self.data[position : position + 4] == b"OggS":
            header = self.data[position : position + 27]
            segments = header[26] if len(header) == 27 else 0
            lacing = self.data[position + 27 : position + 27 + segments]
            end = position + 27 + segments + sum(lacing)
            if len(header) < 27 or len(lacing) < segments or end > len(self.data):
                raise AudioError(
                    f"{self.name}: expected a whole Ogg page at byte {position}, got the end of the file inside it: "
                    f"the file is truncated; {REPLACE}",
                    "truncated",
                )
            flags, _, serial, number, stored = struct.unpack_from("<BqIII", header, 5)
            page = self.data[position:end]
            if checksum(page[:22] + b"\0\0\0\0" + page[26:]) != stored:
                raise AudioError(
                    f"{self.name}: expected an Ogg page that matches its checksum at byte {position}, got another: the "
                    f"file is damaged; {REPLACE}",
                    "damaged",
                )
            yield _Page(flags, serial, number, end)
            position = end
            if flags & _LAST and self.data[position : position + 4] != b"OggS":
                return


def _runs(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ..." if len(numbers) > 8 else shown
