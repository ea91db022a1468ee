"""Labelled synthetic clips: for training, for evaluation, and the small corpus that ships with the package."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from training.animals import ANIMALS, call
from training.sentences import EVALUATION_SENTENCES, SENTENCES
from training.speech import EMOTIONS, LANGUAGES, SAMPLING_RATE, VARIANTS, Synthesiser, add_noise, speak

MAX_SECONDS = 4.5
COLUMNS = ("file", "attribute_label", "single_instruction", "single_answer", "multi_instruction", "multi_answer")
PER_CLASS = {"animal": 5, "emotion": 8, "gender": 20, "language": 5}


@dataclass(frozen=True)
class Clip:
    """A waveform, float32 [samples] at 16 kHz, and what is true of it, by attribute."""

    waveform: np.ndarray
    labels: dict[str, str]
    voice: str


def sentences(language: str, part: str) -> tuple[str, ...]:
    """The sentences of the training or of the evaluation part; no sentence is in both."""
    texts = SENTENCES[language]
    return texts[:-EVALUATION_SENTENCES] if part == "train" else texts[-EVALUATION_SENTENCES:]


def mixed_up(first: str, second: str, rng: np.random.Generator) -> str:
    """Words of two sentences in a random order: the language stays, no sentence can be learned by heart."""
    words = [word for text in (first, second) for word in re.findall(r"[^\s\u3002\uff0c\uff1f]+", text)]
    if len(words) <= 2:  # written without blanks
        words = [word[start : start + 2] for word in words for start in range(0, len(word), 2)]
    chosen = rng.permutation(words)[: max(3, len(words) // 2)]
    return " ".join(chosen)


def speech_clip(synthesiser: Synthesiser, part: str, rng: np.random.Generator, **fixed: str) -> Clip:
    """A sentence by a random voice; `fixed` holds attributes that are given (emotion, gender, language)."""
    language = fixed.get("language") or str(rng.choice(list(LANGUAGES)))
    gender = fixed.get("gender") or str(rng.choice(["male", "female"]))
    emotion = fixed.get("emotion") or str(rng.choice(list(EMOTIONS)))
    variant = str(rng.choice(VARIANTS[part][gender]))
    while True:
        text = str(rng.choice(sentences(language, part)))
        if part == "train" and rng.random() < 0.5:
            text = mixed_up(text, str(rng.choice(sentences(language, part))), rng)
        waveform = speak(synthesiser, text, language, gender, variant, emotion, rng)
        if len(waveform) <= MAX_SECONDS * SAMPLING_RATE:
            break
    if part == "train" and rng.random() < 0.5:
        waveform = add_noise(waveform, rng.uniform(15, 40), rng)
    return Clip(waveform, {"language": language, "gender": gender, "emotion": emotion}, variant)


def animal_clip(part: str, rng: np.random.Generator, animal: str | None = None) -> Clip:
    """A call of an animal."""
    animal = animal or str(rng.choice(list(ANIMALS)))
    waveform = call(animal, rng)
    if part == "train" and rng.random() < 0.5:
        waveform = add_noise(waveform, rng.uniform(15, 40), rng)
    return Clip(waveform, {"animal": animal}, "synth")


def clips(synthesiser: Synthesiser, part: str, speech: int, animals: int, seed: int) -> Iterator[Clip]:
    """A seeded mixture; the parts draw from different streams, so that no clip is in both."""
    rng = np.random.default_rng([seed, {"train": 0, "evaluation": 1}[part]])
    for index in range(speech):
        fixed = {"language": list(LANGUAGES)[index % len(LANGUAGES)]}
        yield speech_clip(synthesiser, part, rng, **fixed)
    for index in range(animals):
        yield animal_clip(part, rng, list(ANIMALS)[index % len(ANIMALS)])


def write_corpus(folder: Path, seed: int) -> int:
    """Write the shipped corpus in SAKURA's layout, FLAC; every attribute has its own clips. Returns their number."""
    synthesiser = Synthesiser()
    rng = np.random.default_rng([seed, 2])
    classes = {
        "animal": list(ANIMALS),
        "emotion": list(EMOTIONS),
        "gender": ["male", "female"],
        "language": list(LANGUAGES),
    }
    total = 0
    for attribute, labels in classes.items():
        place = folder / "data" / attribute.capitalize()
        (place / "audio").mkdir(parents=True, exist_ok=True)
        rows = []
        for label in labels:
            for number in range(PER_CLASS[attribute]):
                if attribute == "animal":
                    clip = animal_clip("evaluation", rng, label)
                else:
                    clip = _short(synthesiser, rng, attribute, label, number)
                name = f"{label.lower()}_{clip.voice}_{number:02d}.flac"
                soundfile.write(place / "audio" / name, clip.waveform, SAMPLING_RATE, subtype="PCM_16")
                rows.append({**dict.fromkeys(COLUMNS, ""), "file": name, "attribute_label": label})
                total += 1
        with (place / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return total


def _short(synthesiser: Synthesiser, rng: np.random.Generator, attribute: str, label: str, number: int) -> Clip:
    """A clip of at most 3 s, the other attributes in turn so that every class of theirs occurs."""
    turns = {"language": list(LANGUAGES), "gender": ["male", "female"], "emotion": list(EMOTIONS)}
    fixed = {name: options[number % len(options)] for name, options in turns.items()} | {attribute: label}
    for _ in range(20):
        clip = speech_clip(synthesiser, "evaluation", rng, **fixed)
        if len(clip.waveform) <= 3 * SAMPLING_RATE:
            return clip
    return clip
