"""Simple parametric animal calls: a voiced or noisy source, resonances, an envelope. Stand-ins, not recordings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import signal

from training.speech import SAMPLING_RATE


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE


def _voiced(pitch: np.ndarray, brightness: float, rng: np.random.Generator, roughness: float = 0.0) -> np.ndarray:
    """Harmonics of a pitch contour in Hz; `brightness` is the slope over harmonics, `roughness` jitters the pitch."""
    jitter = signal.lfilter([0.05], [1, -0.95], rng.normal(size=len(pitch))) * roughness * 6
    phase = 2 * np.pi * np.cumsum(pitch * (1 + jitter)) / SAMPLING_RATE
    total = np.zeros_like(phase)
    for harmonic in range(1, 24):
        audible = pitch * harmonic < SAMPLING_RATE / 2 - 500
        total += np.where(audible, np.sin(harmonic * phase), 0) * harmonic**-brightness
    return total


def _noise(seconds: float, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    filter_ = signal.butter(2, [low, high], "bandpass", fs=SAMPLING_RATE, output="sos")
    return np.asarray(signal.sosfilt(filter_, rng.normal(size=len(_time(seconds)))))


def _resonate(sound: np.ndarray, formants: tuple[float, ...], width: float = 0.15) -> np.ndarray:
    parts = []
    for formant in formants:
        numerator, denominator = signal.iirpeak(formant, 1 / width, fs=SAMPLING_RATE)
        parts.append(signal.lfilter(numerator, denominator, sound))
    return np.asarray(sum(parts) + 0.15 * sound)


def _envelope(length: int, attack: float, release: float) -> np.ndarray:
    ramp = np.linspace(0, 1, length)
    return np.minimum(ramp / max(attack, 1e-3), 1) * np.minimum((1 - ramp) / max(release, 1e-3), 1)


def _normal(sound: np.ndarray) -> np.ndarray:
    return sound / (np.abs(sound).max() + 1e-9)


def _glide(seconds: float, *points: float) -> np.ndarray:
    """A contour through equally spaced points."""
    time = _time(seconds)
    return np.interp(time, np.linspace(0, time[-1], len(points)), points)


def _repeat(
    make: Callable[[], np.ndarray], count: int, gap: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    parts = []
    for _ in range(count):
        parts += [_normal(make()) * rng.uniform(0.7, 1), np.zeros(int(rng.uniform(*gap) * SAMPLING_RATE))]
    return np.concatenate(parts[:-1])


def dog(rng: np.random.Generator) -> np.ndarray:
    """Short falling barks."""
    base = rng.uniform(280, 520)

    def bark() -> np.ndarray:
        seconds = rng.uniform(0.12, 0.2)
        voice = _voiced(_glide(seconds, base * 0.8, base * 1.3, base * 0.6), 0.7, rng, 0.4)
        sound = _resonate(voice + 0.4 * _noise(seconds, 400, 3000, rng), (base * 2.2, 1700), 0.3)
        return sound * _envelope(len(sound), 0.08, 0.5)

    return _repeat(bark, int(rng.integers(2, 5)), (0.15, 0.4), rng)


def cat(rng: np.random.Generator) -> np.ndarray:
    """A meow: rising, then falling, long."""
    base = rng.uniform(450, 750)

    def meow() -> np.ndarray:
        seconds = rng.uniform(0.6, 1.0)
        voice = _voiced(_glide(seconds, base, base * 1.35, base * 1.25, base * 0.8), 1.2, rng, 0.05)
        sound = _resonate(voice, (rng.uniform(900, 1200), rng.uniform(2200, 2800)), 0.25)
        return sound * _envelope(len(sound), 0.2, 0.4)

    return _repeat(meow, int(rng.integers(1, 3)), (0.2, 0.5), rng)


def pig(rng: np.random.Generator) -> np.ndarray:
    """Grunts: low pulses with noise, some squealing up."""
    base = rng.uniform(70, 110)

    def grunt() -> np.ndarray:
        seconds = rng.uniform(0.18, 0.35)
        voice = _voiced(_glide(seconds, base, base * 1.2, base * 0.9), 0.3, rng, 1.2)
        sound = _resonate(voice + 2.0 * _noise(seconds, 300, 1800, rng), (rng.uniform(350, 500), 1100), 0.4)
        return sound * _envelope(len(sound), 0.15, 0.3)

    return _repeat(grunt, int(rng.integers(3, 6)), (0.08, 0.25), rng)


def cow(rng: np.random.Generator) -> np.ndarray:
    """A long low moo."""
    base = rng.uniform(110, 180)
    seconds = rng.uniform(1.2, 1.9)
    voice = _voiced(_glide(seconds, base * 0.8, base, base * 1.15, base * 1.1, base * 0.7), 0.9, rng, 0.1)
    sound = _resonate(voice, (rng.uniform(280, 380), rng.uniform(650, 800)), 0.2)
    return sound * _envelope(len(sound), 0.25, 0.3)


def frog(rng: np.random.Generator) -> np.ndarray:
    """Croaks: a carrier cut into fast pulses."""
    carrier, pulses = rng.uniform(700, 1400), rng.uniform(25, 45)

    def croak() -> np.ndarray:
        time = _time(rng.uniform(0.25, 0.5))
        gate = np.maximum(np.sin(2 * np.pi * pulses * time), 0) ** 2
        sound = gate * (np.sin(2 * np.pi * carrier * time) + 0.5 * np.sin(4 * np.pi * carrier * time))
        return sound * _envelope(len(sound), 0.3, 0.2)

    return _repeat(croak, int(rng.integers(2, 5)), (0.15, 0.4), rng)


def hen(rng: np.random.Generator) -> np.ndarray:
    """Quick clucks."""
    base = rng.uniform(450, 700)

    def cluck() -> np.ndarray:
        seconds = rng.uniform(0.05, 0.09)
        voice = _voiced(_glide(seconds, base * 1.4, base), 0.5, rng, 0.3)
        sound = _resonate(voice + 0.3 * _noise(seconds, 800, 3500, rng), (1200, 2600), 0.3)
        return sound * _envelope(len(sound), 0.05, 0.6)

    return _repeat(cluck, int(rng.integers(6, 12)), (0.06, 0.2), rng)


def rooster(rng: np.random.Generator) -> np.ndarray:
    """Four notes, the third long and high."""
    base = rng.uniform(480, 650)
    notes = []
    for factor, seconds in ((1.0, 0.15), (1.35, 0.18), (1.7, rng.uniform(0.5, 0.7)), (1.2, rng.uniform(0.3, 0.5))):
        voice = _voiced(
            _glide(seconds, base * factor * 0.9, base * factor * 1.05, base * factor * 0.92), 0.6, rng, 0.15
        )
        sound = _resonate(voice, (1500, 2900), 0.3)
        notes += [_normal(sound) * _envelope(len(sound), 0.1, 0.2), np.zeros(int(0.04 * SAMPLING_RATE))]
    return np.concatenate(notes)


def sheep(rng: np.random.Generator) -> np.ndarray:
    """A bleat: a nasal voice with strong vibrato in pitch and level."""
    base, wobble = rng.uniform(250, 380), rng.uniform(9, 14)

    def bleat() -> np.ndarray:
        time = _time(rng.uniform(0.6, 1.0))
        pitch = base * (1 + 0.08 * np.sin(2 * np.pi * wobble * time))
        sound = _resonate(_voiced(pitch, 0.6, rng, 0.1), (rng.uniform(700, 900), 1900, 3000), 0.2)
        sound = sound * (1 + 0.5 * np.sin(2 * np.pi * wobble * time + 1))
        return sound * _envelope(len(sound), 0.08, 0.2)

    return _repeat(bleat, int(rng.integers(1, 3)), (0.2, 0.4), rng)


def crow(rng: np.random.Generator) -> np.ndarray:
    """Harsh caws: a rough voice under broadband noise."""
    base = rng.uniform(480, 620)

    def caw() -> np.ndarray:
        seconds = rng.uniform(0.25, 0.4)
        voice = _voiced(_glide(seconds, base, base * 1.1, base * 0.85), 0.25, rng, 1.0)
        sound = _resonate(voice + 2.5 * _noise(seconds, 900, 4500, rng), (1300, 2400), 0.5)
        return sound * _envelope(len(sound), 0.06, 0.25)

    return _repeat(caw, int(rng.integers(2, 4)), (0.2, 0.45), rng)


ANIMALS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "dog": dog,
    "cat": cat,
    "pig": pig,
    "cow": cow,
    "frog": frog,
    "hen": hen,
    "rooster": rooster,
    "sheep": sheep,
    "crow": crow,
}


def call(animal: str, rng: np.random.Generator) -> np.ndarray:
    """One clip of an animal: float32 [samples] at 16 kHz, 0.6 to 3 s, at a random level."""
    sound = _normal(ANIMALS[animal](rng))[: 3 * SAMPLING_RATE]
    quiet = [np.zeros(int(rng.uniform(0.02, 0.3) * SAMPLING_RATE)) for _ in range(2)]
    clip = np.concatenate([quiet[0], sound, quiet[1]])
    level = 10 ** (rng.uniform(-28, -16) / 20)
    return np.clip(clip / np.sqrt(np.mean(clip**2)) * level, -0.99, 0.99).astype(np.float32)
