"""What the corrupted run hears instead of the clip."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lalm_patch.errors import ConfigError
from lalm_patch.stimuli.audio import SAMPLING_RATE, Waveform

LSB = 2.0**-15
"""One step of 16-bit audio, on a scale on which full scale is 1."""
FLOOR_FRAME, FLOOR_SHARE = 400, 0.1
"""Samples of a frame (25 ms), and the share of frames that are below the floor, for `silence_floor`."""
PIECE_SECONDS = 0.05
"""Pieces that `time_shuffle` puts into another order: shorter than a syllable, longer than a period of a voice."""


def silence(waveform: Waveform) -> Waveform:
    """Digital silence: exact zeros of the clip's length [samples] and dtype (arXiv 2603.13768, section 3)."""
    return np.zeros_like(waveform)


def dither(waveform: Waveform) -> Waveform:
    """The quietest noise of 16-bit audio: triangular, of one step at most, the same for all clips of a length.

    Exact zeros are a place where log-mel features are clamped; this is silence as a recording of it would be.
    """
    steps = _noise(waveform, "dither").triangular(-1, 0, 1, waveform.shape)
    return np.asarray(LSB * steps, dtype=waveform.dtype)


def silence_floor(waveform: Waveform) -> Waveform:
    """The clip's own background: noise with the spectrum that the clip has where it is quietest.

    In every band of frequencies the level is the one that a tenth of the clip's frames stay below; phases are random.
    What a recording is like when nobody speaks stays, and so does how the front-end scales it; all else goes.
    """
    from scipy import signal  # takes most of the time in which a wrong option is answered

    size = min(FLOOR_FRAME, len(waveform))
    transform = signal.ShortTimeFFT(signal.windows.hann(size, sym=False), max(1, size // 4), fs=SAMPLING_RATE)
    frames = transform.stft(waveform.astype(np.float64))
    levels = np.quantile(np.abs(frames), FLOOR_SHARE, axis=1, keepdims=True)
    phases = _noise(waveform, "silence_floor").uniform(0, 2 * np.pi, frames.shape)
    quiet = transform.istft(levels * np.exp(1j * phases), k1=len(waveform))
    return np.asarray(np.clip(quiet, -1, 1), dtype=waveform.dtype)


def noise(waveform: Waveform) -> Waveform:
    """White noise of the clip's own level: that there is sound, and how loud, stays; everything else goes."""
    white = _noise(waveform, "noise").standard_normal(waveform.shape)
    level = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    return np.clip(level * white, -1, 1).astype(waveform.dtype)


def time_shuffle(waveform: Waveform) -> Waveform:
    """Pieces of 50 ms in a random order: spectra and level stay, their order in time goes."""
    size = round(PIECE_SECONDS * SAMPLING_RATE)
    pieces = [waveform[start : start + size] for start in range(0, len(waveform), size)]
    order = _noise(waveform, "time_shuffle").permutation(len(pieces))
    return np.concatenate([pieces[index] for index in order])


def _noise(waveform: Waveform, name: str) -> np.random.Generator:
    """The same for clips of one length, so that corrupted runs that hear the same are computed once."""
    return np.random.default_rng([len(waveform), *name.encode()])


CORRUPTIONS: dict[str, Callable[[Waveform], Waveform]] = {
    "silence": silence,
    "dither": dither,
    "silence_floor": silence_floor,
    "noise": noise,
    "time_shuffle": time_shuffle,
}


def corrupt(waveform: Waveform, corruption: str) -> Waveform:
    """Apply a corruption by name. Raises ConfigError, listing the names there are, for an unknown one."""
    if corruption not in CORRUPTIONS:
        raise ConfigError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got {corruption!r}")
    return CORRUPTIONS[corruption](waveform)
