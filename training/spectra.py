"""Log-mel spectra for training: made once from waveforms, and varied anew every time one is drawn.

A few hundred recordings are few. What a voice, a language or an emotion is must not depend on the microphone (a smooth
filter), on the gain, on noise, or on a little more or less speed; so all of that is drawn at random.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import WhisperFeatureExtractor

FLOOR = -10.0  # log10 of what digital silence becomes in Whisper's extractor


def log_mel(waveform: np.ndarray, extractor: WhisperFeatureExtractor) -> Tensor:
    """[mel bins, frames], log10, as Whisper's extractor has it before it is clamped and scaled."""
    samples = torch.from_numpy(np.ascontiguousarray(waveform)).float()
    window = torch.hann_window(extractor.n_fft)
    spectrum = torch.stft(samples, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)
    power = spectrum[..., :-1].abs() ** 2
    return (torch.from_numpy(extractor.mel_filters).float().T @ power).clamp(min=10**FLOOR).log10()


def normalised(spectrum: Tensor) -> Tensor:
    """As the extractor ends: clamped to 8 below the largest value, shifted and scaled."""
    return (torch.maximum(spectrum, spectrum.max() - 8.0) + 4.0) / 4.0


def varied(spectrum: Tensor, rng: np.random.Generator) -> Tensor:
    """The same sound through another microphone, in other noise, at another speed: [mel bins, other frames]."""
    bins = len(spectrum)
    spectrum = functional.interpolate(spectrum[None], scale_factor=rng.uniform(0.85, 1.18), mode="linear")[0]
    filtered = np.interp(np.arange(bins), np.linspace(0, bins - 1, 6), rng.normal(0, 0.25, 6))
    spectrum = spectrum + torch.from_numpy(filtered + rng.normal(0, 0.3)).float()[:, None]
    if rng.random() < 0.5:
        tilt = torch.from_numpy(np.linspace(0, rng.uniform(-1, 0.5), bins)).float()[:, None]
        jitter = torch.from_numpy(rng.normal(0, 0.25, tuple(spectrum.shape))).float()
        noise = spectrum.max() - rng.uniform(2.5, 6) + tilt + jitter
        spectrum = torch.log10(10**spectrum + 10**noise)
    return spectrum


def masked(spectrum: Tensor, rng: np.random.Generator, frames: int) -> Tensor:
    """Two bands of mel bins and two stretches of time within the first `frames` replaced by the mean (SpecAugment,
    arXiv 1904.08779)."""
    spectrum = spectrum.clone()
    mean = spectrum[:, :frames].mean()
    for _ in range(2):
        width = int(rng.integers(0, len(spectrum) // 6))
        start = int(rng.integers(0, len(spectrum) - width))
        spectrum[start : start + width, :frames] = mean
        width = int(rng.integers(0, max(1, frames // 10)))
        start = int(rng.integers(0, frames - width))
        spectrum[:, start : start + width] = mean
    return spectrum


def in_window(spectrum: Tensor, frames: int, rng: np.random.Generator | None = None) -> tuple[Tensor, int]:
    """Padded with silence to the window, [mel bins, frames], and how many frames are the clip's; of what is longer, a
    random stretch, or the beginning."""
    if spectrum.shape[1] > frames:
        start = 0 if rng is None else int(rng.integers(0, spectrum.shape[1] - frames + 1))
        spectrum = spectrum[:, start : start + frames]
    held = spectrum.shape[1]
    return functional.pad(spectrum, (0, frames - held), value=FLOOR), held
