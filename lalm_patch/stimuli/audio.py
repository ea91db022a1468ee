"""Read one clip, or say why it must not be used.

A clip that is damaged still gives numbers, so its container is proven first (`containers/`), and what is decoded is
looked at after. What is wrong beside the samples is put right and noted.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from lalm_patch.errors import AudioError
from lalm_patch.stimuli.containers import REPLACE, REWRITE, ProvenFile, open_container

SAMPLING_RATE = 16_000
MAX_SECONDS = 30.0
MIN_SECONDS = 0.1
MIN_RATE, MAX_RATE = 4_000, 192_000
MAX_PEAK = 10.0  # times full scale, for float files
SILENT_BELOW = -84.0
"""Peak, in dB below full scale, up to which nothing sounds: one step of 16 bits is -90.3, two are -84.3."""

Waveform: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """A clip as it was read.

    Attributes:
        waveform: float32 [samples], mono, 16 kHz, full scale 1.0.
        notes: what was repaired or ignored in the file, one sentence each.
    """

    waveform: Waveform
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        """Largest sample in dB below full scale; minus infinity for digital silence."""
        return decibels(float(np.abs(self.waveform).max()))

    @property
    def level(self) -> float:
        """Root mean square in dB below full scale; minus infinity for digital silence."""
        return decibels(float(np.sqrt(np.mean(np.square(self.waveform, dtype=np.float64)))))

    @property
    def sounds(self) -> bool:
        """Whether anything is to be heard: more than the last bit of 16 flickers."""
        return self.peak > SILENT_BELOW


def decibels(amplitude: float) -> float:
    """20 log10 of an amplitude; minus infinity for 0."""
    return 20 * math.log10(amplitude) if amplitude > 0 else -math.inf


def read_audio(source: Path | bytes, name: str, max_seconds: float | None = MAX_SECONDS) -> Waveform:
    """The waveform of `read_clip`."""
    return read_clip(source, name, max_seconds).waveform


def read_clip(
    source: Path | bytes, name: str, max_seconds: float | None = MAX_SECONDS, whose: str = "the reader"
) -> Clip:
    """Decode a WAV, FLAC, MP3 or Ogg (Vorbis, Opus) clip to float32 [samples], mono, 16 kHz, full scale 1.0.

    Channels are averaged; other sampling rates go through soxr (HQ). A clip is never cut: one longer than
    `max_seconds` (None: no bound), the limit of `whose`, is refused.

    Raises AudioError, its message starting with `name`, for a clip that is missing, of another format, truncated,
    inconsistent with its own header, empty, shorter than 0.1 s, too long, not finite, or far over full scale.
    """
    container = open_container(source_bytes(source, name), name)
    samples, rate = _decode(container, name, max_seconds, whose)
    _check_samples(samples, name)
    mono = samples.mean(axis=1)
    if rate != SAMPLING_RATE:
        mono = soxr.resample(mono, rate, SAMPLING_RATE, quality="HQ")
    return Clip(np.ascontiguousarray(mono, dtype=np.float32), tuple(container.notes))


def source_bytes(source: Path | bytes, name: str) -> bytes:
    """The undecoded file. Raises AudioError if it cannot be opened."""
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except IsADirectoryError as error:
        raise AudioError(
            f"{name}: expected an audio file at {source}, got a folder of that name; put the clip there", "missing"
        ) from error
    except FileNotFoundError as error:
        raise AudioError(
            f"{name}: expected an audio file at {source}, found none; restore it or correct the path", "missing"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise AudioError(
            f"{name}: expected a readable audio file at {source}, got '{reason}'; check the path and its permissions",
            "unreadable",
        ) from error


def _decode(
    container: ProvenFile, name: str, max_seconds: float | None, whose: str
) -> tuple[npt.NDArray[np.float64], int]:
    """float64 [frames, channels] and the file's sampling rate, every declared frame accounted for."""
    try:
        with soundfile.SoundFile(io.BytesIO(container.data)) as file:
            rate = int(file.samplerate)
            if not MIN_RATE <= rate <= MAX_RATE:
                raise AudioError(
                    f"{name}: expected a sampling rate of {MIN_RATE} to {MAX_RATE} Hz, its header declares "
                    f"{rate} Hz; {REWRITE}",
                    "wrong header",
                )
            declared = container.frames(file)
            _check_duration(file.frames / rate, file.frames, name, max_seconds, whose)
            samples = container.samples(file)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name}: expected audio that decodes to its end, got '{error.error_string}': "
            f"the file is truncated or damaged; {REPLACE}",
            "damaged",
        ) from error
    if len(samples) != declared:
        raise AudioError(
            f"{name}: expected {declared} samples per channel as declared, decoded {len(samples)}; {REPLACE}", "damaged"
        )
    return samples, rate


def _check_duration(seconds: float, frames: int, name: str, max_seconds: float | None, whose: str) -> None:
    if frames == 0:
        raise AudioError(f"{name}: expected audio, got a header followed by no samples; {REPLACE}", "no samples")
    if seconds < MIN_SECONDS:
        raise AudioError(
            f"{name}: expected at least {MIN_SECONDS} s of audio, got {seconds:.4f} s ({frames} samples); "
            "replace it or leave it out of the table",
            "too short",
        )
    if max_seconds is not None and seconds > max_seconds:
        raise too_long(name, seconds, max_seconds, whose)


def too_long(name: str, seconds: float, max_seconds: float, whose: str) -> AudioError:
    """The error of a clip longer than somebody's window."""
    return AudioError(
        f"{name}: expected at most {max_seconds:g} s, what {whose} takes in one window, got {seconds:.2f} s; clips are "
        "never cut silently: cut it yourself, or leave it out of the table",
        "too long",
    )


def _check_samples(samples: npt.NDArray[np.float64], name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(samples).all(axis=1))
    if len(bad):
        raise AudioError(
            f"{name}: expected finite samples, got NaN or infinity in {len(bad)} of {len(samples)}, first at sample "
            f"{bad[0]}; {REWRITE}",
            "not finite",
        )
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name}: expected samples scaled to -1..1, got a peak of {peak:g}, "
            "perhaps integers stored as floats; divide them by full scale (32768 for 16-bit) and write it again",
            "over full scale",
        )
