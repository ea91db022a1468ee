"""Formant-synthesised speech through espeak-ng: language, voice and a prosody preset under an emotion's name."""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import espeakng_loader
import numpy as np
import soxr
from scipy import signal

SAMPLING_RATE = 16_000
THROATS = 40  # random voices of each gender, for training only
LANGUAGES = {
    "English": ("en", "en-us", "en-gb-scotland"),
    "German": ("de",),
    "Spanish": ("es", "es-419"),
    "French": ("fr", "fr-be"),
    "Italian": ("it",),
    "Chinese": ("cmn",),
    "Japanese": ("ja",),
    "Korean": ("ko",),
}
VARIANTS = {
    "train": {
        "male": (
            *("m1", "m2", "m4", "m5", "m6", "m7", "m8", "Andy", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Lee"),
            *("Mario", "Michael", "Mike", "Reed", "antonio", "david", "ed", "edward", "gustave", "michel", "miguel"),
            *("norbert", "pablo", "paul", "quincy", "robert", "sandro", "travis"),
        ),
        "female": (
            *("f1", "f3", "f4", "f5", "Alicia", "Andrea", "Annie", "aunty", "belinda", "grandma", "linda", "steph"),
        ),
    },
    "evaluation": {"male": ("m3", "john"), "female": ("f2", "anika")},
}


@dataclass(frozen=True)
class Prosody:
    """A preset: centres of espeak's parameters and what is done to the sound afterwards."""

    rate: int  # words per minute
    pitch: int  # 0 to 99
    range: int  # 0 to 99, how much the pitch moves
    level: float  # RMS, dB below full scale
    tilt: float = 0.0  # dB per octave above 1 kHz
    tremolo: float = 0.0  # depth at 7 Hz
    pauses: int = 0  # 10 ms between words


EMOTIONS = {
    "angry": Prosody(rate=215, pitch=45, range=80, level=-14, tilt=3),
    "disgust": Prosody(rate=120, pitch=25, range=60, level=-24, tilt=-1, pauses=6),
    "fear": Prosody(rate=240, pitch=80, range=25, level=-26, tremolo=0.6),
    "happy": Prosody(rate=175, pitch=75, range=99, level=-19, tilt=1),
    "sad": Prosody(rate=110, pitch=30, range=5, level=-31, tilt=-4),
}

_RATE, _PITCH, _RANGE, _WORDGAP = 1, 3, 4, 7  # espeak_PARAMETER
_RETRIEVAL, _CHARS_UTF8, _IPA = 1, 1, 2
_NOT_PHONES = re.compile(
    r"[\u02c8\u02cc\u02d0\u02d1\u2021\u2020'.,|0-9\u02e5-\u02e9-]|\([a-z-]+\)"
)  # stress, length, tones, voices


class Synthesiser:
    """espeak-ng. The library keeps global state and hangs when started twice: take it from `synthesiser()`.

    What it says depends a little on what it said before (pitch flutter goes on): only a fresh process repeats itself.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._data = TemporaryDirectory()
        path = with_throats(Path(espeakng_loader.get_data_path()), Path(self._data.name))
        self._rate = self._library.espeak_Initialize(_RETRIEVAL, 0, str(path).encode(), 0)
        if self._rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data in {path}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of breath and jitter
        self._chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._collect)  # kept: the library holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: object, count: int, _events: object) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())  # type: ignore[arg-type]
        return 0

    def say(self, text: str, voice: str, rate: int, pitch: int, pitch_range: int, gap: int) -> np.ndarray:
        """float32 [samples] at 16 kHz, within -1 and 1."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range), (_WORDGAP, gap)):
            self._library.espeak_SetParameter(parameter, int(value), 0)
        self._chunks.clear()
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 1, 0, _CHARS_UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._chunks).astype(np.float32) / 32768
        return np.asarray(soxr.resample(samples, self._rate, SAMPLING_RATE), np.float32)

    def phones(self, text: str, voice: str) -> list[str]:
        """What a voice pronounces, as IPA symbols without stress and length."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        translate = self._library.espeak_TextToPhonemes
        translate.restype = ctypes.c_char_p
        data = ctypes.create_string_buffer(text.encode())  # kept: the library reads it clause by clause
        rest = ctypes.c_void_p(ctypes.addressof(data))
        found: list[str] = []
        while rest.value:
            clause = translate(ctypes.byref(rest), _CHARS_UTF8, _IPA | ord("_") << 8) or b""
            found += [symbol for symbol in re.split(r"[_\s]+", _NOT_PHONES.sub("", clause.decode())) if symbol]
        return found


@cache
def throats() -> dict[str, dict[str, str]]:
    """Voice variants of random throats, by gender and name: the lines of their files.

    The library's own women differ little in their formants and its men in their pitch. A model that has heard only
    those takes an unusual voice for the other gender.
    """
    rng = np.random.default_rng(0)
    ranges = {"female": ((145, 210), (93, 118)), "male": ((60, 92), (84, 104))}  # Hz; per cent of espeak's formants
    made: dict[str, dict[str, str]] = {}
    for gender, (pitches, formants) in ranges.items():
        made[gender] = {}
        for number in range(THROATS):
            low, scale = rng.uniform(*pitches), rng.uniform(*formants)
            lines = [
                "language variant",
                f"name {gender}{number}",
                f"gender {gender}",
                f"pitch {low:.0f} {low * rng.uniform(1.25, 1.6):.0f}",
                f"flutter {rng.integers(2, 9)}",
                f"roughness {rng.integers(0, 3)}",
                f"voicing {rng.uniform(30, 150):.0f}",
                f"intonation {rng.integers(1, 11)}",
            ]
            for index in range(6):
                width, height = rng.uniform(75, 150, 2)
                lines.append(f"formant {index} {scale + rng.normal(0, 4):.0f} {height:.0f} {width:.0f}")
            if rng.random() < 0.5:
                levels = rng.integers((200, 60, 20, 50, 10), (256, 160, 110, 110, 70))
                tone = zip((100, 600, 1200, 2000, 3000), levels, strict=True)
                lines.append("tone " + " ".join(f"{frequency} {level}" for frequency, level in tone))
            made[gender][f"throat_{gender}{number}"] = "\n".join(lines) + "\n"
    return made


def with_throats(data: Path, folder: Path) -> Path:
    """espeak-ng's data in another folder, by links, with the throats among its voice variants."""
    copy = folder / "espeak-ng-data"
    shutil.copytree(data / "voices", copy / "voices")
    for entry in data.iterdir():
        if entry.name != "voices":
            (copy / entry.name).symlink_to(entry)
    for files in throats().values():
        for name, text in files.items():
            (copy / "voices" / "!v" / name).write_text(text)
    return copy


@cache
def synthesiser() -> Synthesiser:
    """The one synthesiser of this process."""
    return Synthesiser()


def speak(
    text: str,
    language: str,
    gender: str,
    variant: str,
    emotion: str,
    rng: np.random.Generator,
) -> np.ndarray:
    """One sentence with a voice and a prosody, parameters drawn around the preset's centres."""
    preset = EMOTIONS[emotion]
    voice = f"{rng.choice(LANGUAGES[language])}+{variant}"
    shift = -10 if gender == "male" else 10  # voices keep their own base; this keeps pitch honest within a gender
    clip = synthesiser().say(
        text,
        voice,
        rate=round(preset.rate * rng.uniform(0.93, 1.07)),
        pitch=int(np.clip(preset.pitch + shift + rng.normal(0, 4), 0, 99)),
        pitch_range=int(np.clip(preset.range + rng.normal(0, 5), 0, 99)),
        gap=preset.pauses,
    )
    return shape(clip, preset, rng)


def shape(clip: np.ndarray, preset: Prosody, rng: np.random.Generator) -> np.ndarray:
    """Spectral tilt, tremolo and level of a preset; leading and trailing quiet taken off."""
    loud = np.flatnonzero(np.abs(clip) > 0.01)
    clip = clip[max(0, loud[0] - 400) : loud[-1] + 800]
    if preset.tilt:
        spectrum = np.fft.rfft(clip)
        octaves = np.log2(np.maximum(np.fft.rfftfreq(len(clip), 1 / SAMPLING_RATE), 1000) / 1000)
        clip = np.fft.irfft(spectrum * 10 ** (preset.tilt * octaves / 20), len(clip))
    if preset.tremolo:
        time = np.arange(len(clip)) / SAMPLING_RATE
        clip = clip * (1 - preset.tremolo * 0.5 * (1 + np.sin(2 * np.pi * rng.uniform(6, 8) * time)))
    level = 10 ** ((preset.level + rng.normal(0, 1.5)) / 20)
    clip = clip / np.sqrt(np.mean(clip**2)) * level
    return np.clip(clip, -0.99, 0.99).astype(np.float32)


def other_throat(clip: np.ndarray, factor: float) -> np.ndarray:
    """The clip played `factor` times as fast: pitch, formants and tempo all move, as if another throat spoke."""
    return np.asarray(soxr.resample(clip, SAMPLING_RATE * factor, SAMPLING_RATE), np.float32)


def add_noise(clip: np.ndarray, snr: float, rng: np.random.Generator) -> np.ndarray:
    """Pinkish background noise at a signal-to-noise ratio in dB."""
    noise = signal.lfilter([1.0], [1.0, -0.9], rng.normal(size=len(clip)))
    noise *= np.sqrt(np.mean(clip**2) / np.mean(noise**2)) * 10 ** (-snr / 20)
    return np.clip(clip + noise, -0.99, 0.99).astype(np.float32)
