"""WAV: RIFF, RIFX and RF64 (EBU Tech 3306). What the header says wrongly beside the samples is put right."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.containers.proven import REPLACE, REWRITE, ProvenFile

WAV_MAGIC = (b"RIFF", b"RIFX", b"RF64")
UNKNOWN_SIZE = 0xFFFFFFFF
_SAMPLE_BYTES = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1}
_UNCOMPRESSED = (1, 3, 6, 7, 0xFFFE)
"""Format tags: integers, floats, A-law, mu-law, and the extensible form of these."""


@dataclass(frozen=True)
class _Chunk:
    """A chunk's size as declared, and where its content begins."""

    size: int
    start: int


class WavFile(ProvenFile):
    """See `ProvenFile`."""

    def check(self) -> None:
        """The `data` chunk must end inside the file; sizes that are written twice must not contradict each other."""
        self._order = ">" if self.data[:4] == b"RIFX" else "<"
        audio = self._chunk(b"data")
        frame = self._check_format()
        held = len(self.data) - audio.start
        if audio.size == UNKNOWN_SIZE and held < audio.size:
            self._take_all(audio, held, frame)
        elif audio.size > held:
            raise AudioError(
                f"{self.name}: expected {audio.size} bytes of audio as its WAV header declares, got {held}: "
                f"the file is truncated or its header is wrong; {REPLACE}",
                "truncated",
            )
        else:
            self._check_rest(audio)

    def frames(self, file: Any) -> int:
        """From the `data` chunk's size.

        Raises:
            AudioError: samples that are no plain numbers, or no whole number of frames.
        """
        if file.subtype not in _SAMPLE_BYTES:
            raise AudioError(
                f"{self.name}: expected an uncompressed WAV (integer, float, A-law or mu-law), got WAV holding "
                f"{file.subtype}; convert it, for example `ffmpeg -i CLIP -c:a flac CLIP.flac`",
                "another format",
            )
        size, frame = self._chunk(b"data").size, _SAMPLE_BYTES[file.subtype] * int(file.channels)
        if size % frame:
            raise AudioError(
                f"{self.name}: expected audio in whole frames of {frame} bytes, got {size} bytes: "
                f"the file was cut inside a sample; {REPLACE}",
                "truncated",
            )
        return size // frame

    def _chunks(self) -> Iterator[tuple[bytes, _Chunk]]:
        position, long_size = 12, None
        while position + 8 <= len(self.data):
            kind, size = struct.unpack_from(f"{self._order}4sI", self.data, position)
            position += 8
            if kind == b"ds64" and position + 16 <= len(self.data):
                long_size = struct.unpack_from("<Q", self.data, position + 8)[0]
            if kind == b"data" and self.data[:4] == b"RF64" and size == UNKNOWN_SIZE and long_size is not None:
                size = long_size
            yield kind, _Chunk(size, position)
            position += size + size % 2

    def _chunk(self, wanted: bytes) -> _Chunk:
        for kind, chunk in self._chunks():
            if kind == wanted:
                return chunk
        raise AudioError(
            f"{self.name}: expected a WAV file with a `{wanted.decode().strip()}` chunk, found none; {REPLACE}",
            "truncated",
        )

    def _check_format(self) -> int:
        """Bytes of a frame. Its size and the bytes per second say again what channels, bits and rate say.

        Where one of the two is wrong it is ignored; where both say the same other thing, the header is not believed.
        """
        start = self._chunk(b"fmt ").start
        fields: tuple[int, ...] = struct.unpack(f"{self._order}HHIIHH", self.data[start : start + 16].ljust(16, b"\0"))
        tag, channels, rate, byte_rate, align, bits = fields
        if rate == 0:
            raise AudioError(
                f"{self.name}: expected a sampling rate, its header declares 0 Hz; {REWRITE}", "wrong header"
            )
        frame = channels * -(-bits // 8)
        if tag not in _UNCOMPRESSED or not frame or frame * rate > UNKNOWN_SIZE:
            return frame  # the decoder says what it is
        if (align, byte_rate) == (frame, frame * rate):
            return frame
        if align != frame and byte_rate != frame * rate and align != 0:
            raise AudioError(
                f"{self.name}: expected a WAV header that agrees with itself, {frame} bytes per frame and "
                f"{frame * rate} per second for {bits} bits in {channels} channels at {rate} Hz, got {align} and "
                f"{byte_rate}; {REWRITE}",
                "wrong header",
            )
        said = f"{align} bytes per frame" if align != frame else f"{byte_rate} bytes per second"
        self.notes.append(f"the WAV header's {said} were ignored: it is {frame} and {frame * rate}")
        right = struct.pack(f"{self._order}IH", frame * rate, frame)
        self.data = self.data[: start + 8] + right + self.data[start + 14 :]
        return frame

    def _take_all(self, audio: _Chunk, held: int, frame: int) -> None:
        """A streaming encoder left the size open: all that follows is audio."""
        if frame and held % frame:
            raise AudioError(
                f"{self.name}: expected audio in whole frames of {frame} bytes, got {held} bytes after a header of a "
                f"streaming encoder: the file was cut inside a sample; {REPLACE}",
                "truncated",
            )
        self.notes.append("the WAV header leaves the length open (a streaming encoder); read to the end of the file")
        self._end_at(audio, held)

    def _check_rest(self, audio: _Chunk) -> None:
        """What follows the audio: chunks, or bytes behind the end of the RIFF, which are no part of it."""
        end = audio.start + audio.size
        rest = self.data[end:]
        if self._is_chunks(rest) or (audio.size % 2 == 1 and self._is_chunks(rest[1:])):
            return
        declared_end = max(8 + struct.unpack_from(f"{self._order}I", self.data, 4)[0], end)
        inside, behind = self.data[end:declared_end], self.data[declared_end:]
        if 0 < len(behind) <= audio.size and self._is_chunks(inside):
            self.notes.append(f"{len(behind)} bytes behind the end of the WAV were ignored")
            self.data = self.data[:declared_end]
            return
        cause = "a streaming encoder wrote it or the header is wrong" if audio.size == 0 else "the header is wrong"
        raise AudioError(
            f"{self.name}: expected {audio.size} bytes of audio as its WAV header declares, got {len(rest)} further "
            f"bytes after them that are no WAV chunk: {cause}, and the clip would be read short; {REWRITE}",
            "wrong header",
        )

    def _end_at(self, audio: _Chunk, size: int) -> None:
        """Write sizes into the header for audio that ends the file."""
        sizes = (len(self.data) - 8, size)
        head = b"RIFX" if self._order == ">" else b"RIFF"
        self.data = (
            head
            + struct.pack(f"{self._order}I", sizes[0])
            + self.data[8 : audio.start - 4]
            + struct.pack(f"{self._order}I", sizes[1])
            + self.data[audio.start :]
        )

    def _is_chunks(self, rest: bytes) -> bool:
        """Whether bytes are RIFF chunks to the end; fewer than 8, too few for a chunk, are padding."""
        position = 0
        while position + 8 <= len(rest):
            kind, size = struct.unpack_from(f"{self._order}4sI", rest, position)
            if not all(32 <= byte < 127 for byte in kind) or position + 8 + size > len(rest):
                return False
            position += 8 + size + size % 2
        return True
