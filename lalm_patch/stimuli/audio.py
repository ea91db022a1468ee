"""Read one clip, or say why it must not be used.

libsndfile reads a truncated WAV, a WAV whose header lies, and a FLAC whose frame count was changed without a
word, and passes NaN on. A clip damaged like that still gives numbers, so every check here comes before decoding
is trusted. Only containers whose completeness can be proven are read: uncompressed WAV and FLAC.
"""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from lalm_patch.errors import AudioError

SAMPLING_RATE = 16_000
MAX_SECONDS = 30.0
MIN_SECONDS = 0.1
MIN_RATE, MAX_RATE = 4_000, 192_000
MAX_PEAK = 10.0  # times full scale, for float files

Waveform: TypeAlias = npt.NDArray[np.float32]

_WAV_MAGIC = (b"RIFF", b"RIFX", b"RF64")
_WAV_SAMPLE_BYTES = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1}
_FLAC_BITS = (8, 16, 24)
_UNKNOWN_SIZE = 0xFFFFFFFF
_REWRITE = "rewrite it from the original, for example `ffmpeg -i ORIGINAL -c:a flac CLIP.flac`"
_REPLACE = "replace it with an intact copy"


def read_audio(source: Path | bytes, name: str, max_seconds: float | None = MAX_SECONDS) -> Waveform:
    """Decode a WAV or FLAC clip to float32 [samples], mono, 16 kHz, full scale 1.0.

    Channels are averaged; other sampling rates go through soxr (HQ). A clip is never cut: one longer than
    `max_seconds` (None: no bound) is refused.

    Raises AudioError, its message starting with `name`, for a clip that is missing, of another format, truncated,
    inconsistent with its own header, empty, shorter than 0.1 s, too long, not finite, or far over full scale.
    """
    data = source_bytes(source, name)
    _check_container(data, name)
    samples, rate = _decode(data, name, max_seconds)
    _check_samples(samples, name)
    mono = samples.mean(axis=1)
    if rate != SAMPLING_RATE:
        mono = soxr.resample(mono, rate, SAMPLING_RATE, quality="HQ")
    return np.ascontiguousarray(mono, dtype=np.float32)


def source_bytes(source: Path | bytes, name: str) -> bytes:
    """The undecoded file. Raises AudioError if it cannot be opened."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except FileNotFoundError as error:
        raise AudioError(
            f"{name}: expected an audio file at {source}, found none; restore it or correct the path"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise AudioError(
            f"{name}: expected a readable audio file at {source}, got '{reason}'; check the path and its permissions"
        ) from error


def _check_container(data: bytes, name: str) -> None:
    """The header must describe exactly the bytes that follow it."""
    if not data:
        raise AudioError(f"{name}: expected a WAV or FLAC file, got an empty one (0 bytes); {_REPLACE}")
    if data.startswith(b"version https://git-lfs"):
        raise AudioError(f"{name}: expected audio, got a Git LFS pointer; run `git lfs pull` where the clip is kept")
    if data[:4] == b"fLaC":
        _check_flac_header(data, name)
    elif data[:4] in _WAV_MAGIC and data[8:12] == b"WAVE":
        _check_wav_sizes(data, name)
    else:
        raise AudioError(
            f"{name}: expected a WAV or FLAC file, got one that starts with {data[:12]!r}; if it is audio, "
            "convert it, for example `ffmpeg -i CLIP -c:a flac CLIP.flac`, else replace it"
        )


def _check_flac_header(data: bytes, name: str) -> None:
    if len(data) < 42:
        raise AudioError(f"{name}: expected a FLAC header of 42 bytes, got {len(data)} bytes in all; {_REPLACE}")
    if _flac_frames(data) == 0:
        raise AudioError(
            f"{name}: expected a FLAC header that gives the number of samples, got 0: the file is empty or was written "
            f"by a streaming encoder, so a cut cannot be told from its end; {_REWRITE}"
        )


def _flac_frames(data: bytes) -> int:
    """Total samples per channel, 36 bits of STREAMINFO (RFC 9639, section 8.2)."""
    return (data[21] & 0x0F) << 32 | int.from_bytes(data[22:26], "big")


def _check_wav_sizes(data: bytes, name: str) -> None:
    """The `data` chunk must end inside the file, and only whole chunks may follow it.

    RIFF: 32-bit sizes. RF64 (EBU Tech 3306): a size of 0xFFFFFFFF stands for the 64-bit one in the `ds64` chunk.
    """
    declared, start = _wav_chunk(data, b"data", name)
    held = len(data) - start
    if declared == _UNKNOWN_SIZE and held < declared:
        raise AudioError(
            f"{name}: expected a WAV header that gives the length of its audio, got the placeholder 0xFFFFFFFF of "
            f"a streaming encoder before {held} bytes, so a cut cannot be told from the end; {_REWRITE}"
        )
    if declared > held:
        raise AudioError(
            f"{name}: expected {declared} bytes of audio as its WAV header declares, got {held}: "
            f"the file is truncated or its header is wrong; {_REPLACE}"
        )
    rest = data[start + declared :]
    if _is_chunks(rest, data[:4]) or (declared % 2 == 1 and _is_chunks(rest[1:], data[:4])):
        return
    cause = "a streaming encoder wrote it or the header is wrong" if declared == 0 else "the header is wrong"
    raise AudioError(
        f"{name}: expected {declared} bytes of audio as its WAV header declares, got {len(rest)} further bytes after "
        f"them that are no WAV chunk: {cause}, and the clip would be read short; {_REWRITE}"
    )


def _wav_chunk(data: bytes, wanted: bytes, name: str) -> tuple[int, int]:
    """Declared size and first byte of a chunk's content."""
    order = ">" if data[:4] == b"RIFX" else "<"
    position = 12
    long_size: int | None = None
    while position + 8 <= len(data):
        chunk, size = struct.unpack_from(f"{order}4sI", data, position)
        position += 8
        if chunk == b"ds64" and position + 16 <= len(data):
            long_size = struct.unpack_from("<Q", data, position + 8)[0]
        if chunk == wanted == b"data" and data[:4] == b"RF64" and size == _UNKNOWN_SIZE and long_size is not None:
            return long_size, position
        if chunk == wanted:
            return size, position
        position += size + size % 2
    raise AudioError(f"{name}: expected a WAV file with a `{wanted.decode().strip()}` chunk, found none; {_REPLACE}")


def _is_chunks(rest: bytes, magic: bytes) -> bool:
    """Whether bytes are RIFF chunks to the end; fewer than 8, too few for a chunk, are padding."""
    order = ">" if magic == b"RIFX" else "<"
    position = 0
    while position + 8 <= len(rest):
        chunk, size = struct.unpack_from(f"{order}4sI", rest, position)
        if not all(32 <= byte < 127 for byte in chunk) or position + 8 + size > len(rest):
            return False
        position += 8 + size + size % 2
    return True


def _decode(data: bytes, name: str, max_seconds: float | None) -> tuple[npt.NDArray[np.float64], int]:
    """float64 [frames, channels] and the file's sampling rate, every declared frame accounted for."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_format(file, name)
            if file.format != "FLAC":
                _check_wav_format(file, data, name)
            _check_duration(file.frames / file.samplerate, file.frames, name, max_seconds)
            if file.format == "FLAC":
                # libsndfile left-justifies integers, so this is the same value a float read would give, kept exact.
                integers = file.read(dtype="int32", always_2d=True)
                _check_flac_digest(integers, data, name)
                samples = integers / np.float64(2**31)
            else:
                samples = file.read(dtype="float64", always_2d=True)
            declared, rate = _declared_frames(file, data, name), int(file.samplerate)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name}: expected audio that decodes to its end, got '{error.error_string}': "
            f"the file is truncated or damaged; {_REPLACE}"
        ) from error
    if len(samples) != declared:
        raise AudioError(
            f"{name}: expected {declared} samples per channel as declared, decoded {len(samples)}; {_REPLACE}"
        )
    return samples, rate


def _check_format(file: soundfile.SoundFile, name: str) -> None:
    if file.format != "FLAC" and file.subtype not in _WAV_SAMPLE_BYTES:
        raise AudioError(
            f"{name}: expected an uncompressed WAV (integer, float, A-law or mu-law) or FLAC, got WAV holding "
            f"{file.subtype}; convert it, for example `ffmpeg -i CLIP -c:a flac CLIP.flac`"
        )
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise AudioError(
            f"{name}: expected a sampling rate of {MIN_RATE} to {MAX_RATE} Hz, its header declares "
            f"{file.samplerate} Hz; {_REWRITE}"
        )


def _check_wav_format(file: soundfile.SoundFile, data: bytes, name: str) -> None:
    """Sampling rate and sample size are each written twice; libsndfile reads one and ignores the other."""
    order = ">" if data[:4] == b"RIFX" else "<"
    _, start = _wav_chunk(data, b"fmt ", name)
    byte_rate, frame_bytes = struct.unpack(f"{order}IH", data[start + 8 : start + 14].ljust(6, b"\0"))
    expected = _WAV_SAMPLE_BYTES[file.subtype] * int(file.channels)
    if (byte_rate, frame_bytes) != (expected * file.samplerate, expected):
        raise AudioError(
            f"{name}: expected a WAV header that agrees with itself, {expected} bytes per frame and "
            f"{expected * file.samplerate} per second for {file.subtype} with {file.channels} channels at "
            f"{file.samplerate} Hz, got {frame_bytes} and {byte_rate}; {_REWRITE}"
        )


def _check_duration(seconds: float, frames: int, name: str, max_seconds: float | None) -> None:
    if frames == 0:
        raise AudioError(f"{name}: expected audio, got a header followed by no samples; {_REPLACE}")
    if seconds < MIN_SECONDS:
        raise AudioError(
            f"{name}: expected at least {MIN_SECONDS} s of audio, got {seconds:.4f} s ({frames} samples); "
            "replace it or leave it out of the table"
        )
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(
            f"{name}: expected at most {max_seconds:g} s, what most audio encoders take in one window, got "
            f"{seconds:.2f} s; clips are never cut silently: cut it yourself, or leave it out of the table"
        )


def _declared_frames(file: soundfile.SoundFile, data: bytes, name: str) -> int:
    if file.format == "FLAC":
        return _flac_frames(data)
    size, _ = _wav_chunk(data, b"data", name)
    frame_bytes = _WAV_SAMPLE_BYTES[file.subtype] * int(file.channels)
    if size % frame_bytes:
        raise AudioError(
            f"{name}: expected audio in whole frames of {frame_bytes} bytes, got {size} bytes: "
            f"the file was cut inside a sample; {_REPLACE}"
        )
    return size // frame_bytes


def _check_flac_digest(integers: npt.NDArray[np.int32], data: bytes, name: str) -> None:
    """MD5 of the interleaved little-endian samples, stored in STREAMINFO (RFC 9639, section 8.2); zero means unset."""
    stored = data[26:42]
    bits = ((data[20] & 0x01) << 4 | data[21] >> 4) + 1
    if not any(stored) or bits not in _FLAC_BITS:
        return
    packed = (integers >> (32 - bits)).astype("<i4", order="C").view(np.uint8).reshape(-1, 4)[:, : bits // 8]
    if hashlib.md5(packed.tobytes(), usedforsecurity=False).digest() != stored:
        raise AudioError(
            f"{name}: expected samples matching the MD5 in the FLAC header, got others in {len(integers)} decoded "
            f"samples: the file is damaged or its header was changed; {_REPLACE}"
        )


def _check_samples(samples: npt.NDArray[np.float64], name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(samples).all(axis=1))
    if len(bad):
        raise AudioError(
            f"{name}: expected finite samples, got NaN or infinity in {len(bad)} of {len(samples)}, first at sample "
            f"{bad[0]}; {_REWRITE}"
        )
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name}: expected samples scaled to -1..1, got a peak of {peak:g}, "
            "perhaps integers stored as floats; divide them by full scale (32768 for 16-bit) and write it again"
        )
