"""Labelled synthetic clips: for training, for evaluation, and the small corpus that ships with the package."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile

from training.animals import ANIMALS, call
from training.sentences import EVALUATION_SENTENCES, SENTENCES
from training.speech import EMOTIONS, LANGUAGES, SAMPLING_RATE, VARIANTS, add_noise, other_throat, speak, throats
from training.words import phrase

MAX_SECONDS = 4.5
BLOCK = 500  # clips that one process makes
SHORT_SECONDS = 2.5  # of the shipped clips: fewer audio positions to trace
COLUMNS = ("file", "attribute_label", "single_instruction", "single_answer", "multi_instruction", "multi_answer")
PER_CLASS = {"animal": 5, "emotion": 8, "gender": 20, "language": 5}


@dataclass(frozen=True)
class Clip:
    """A waveform, float32 [samples] at 16 kHz, what is true of it, by attribute, and what is said, where known."""

    waveform: np.ndarray
    labels: dict[str, str]
    voice: str
    text: str = ""


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


def training_text(language: str, rng: np.random.Generator) -> str:
    """A phrase of frequent words, a sentence, or two sentences mixed up."""
    first, second = (str(text) for text in rng.choice(sentences(language, "train"), 2))
    kind = rng.random()
    if kind < 0.5:
        return phrase(language, rng)
    return first if kind < 0.75 else mixed_up(first, second, rng)


def speech_clip(part: str, rng: np.random.Generator, **fixed: str) -> Clip:
    """A sentence by a random voice; `fixed` holds attributes that are given (emotion, gender, language)."""
    language = fixed.get("language") or str(rng.choice(list(LANGUAGES)))
    gender = fixed.get("gender") or str(rng.choice(["male", "female"]))
    emotion = fixed.get("emotion") or str(rng.choice(list(EMOTIONS)))
    variants: Sequence[str] = VARIANTS[part][gender]
    if part == "train" and rng.random() < 0.6:
        variants = list(throats()[gender])
    variant = str(rng.choice(variants))
    while True:
        text = training_text(language, rng) if part == "train" else str(rng.choice(sentences(language, part)))
        waveform = speak(text, language, gender, variant, emotion, rng)
        if len(waveform) <= MAX_SECONDS * SAMPLING_RATE:
            break
    if part == "train" and rng.random() < 0.5:
        waveform = other_throat(waveform, rng.uniform(0.94, 1.06))
    if part == "train" and rng.random() < 0.5:
        waveform = add_noise(waveform, rng.uniform(15, 40), rng)
    return Clip(waveform, {"language": language, "gender": gender, "emotion": emotion}, variant, text)


def animal_clip(part: str, rng: np.random.Generator, animal: str | None = None) -> Clip:
    """A call of an animal."""
    animal = animal or str(rng.choice(list(ANIMALS)))
    waveform = call(animal, rng)
    if part == "train" and rng.random() < 0.5:
        waveform = add_noise(waveform, rng.uniform(15, 40), rng)
    return Clip(waveform, {"animal": animal}, "synth")


def _clip(part: str, speech: int, seed: int, index: int) -> Clip:
    """Clip `index` of a mixture; every clip has its own stream, and no stream is in both parts."""
    rng = np.random.default_rng([seed, {"train": 0, "evaluation": 1}[part], index])
    if index >= speech:
        return animal_clip(part, rng, list(ANIMALS)[(index - speech) % len(ANIMALS)])
    return speech_clip(part, rng, language=list(LANGUAGES)[index % len(LANGUAGES)])


def _block(part: str, speech: int, seed: int, indices: range) -> list[Clip]:
    return [_clip(part, speech, seed, index) for index in indices]


def clips(part: str, speech: int, animals: int, seed: int, processes: int = 1) -> Iterator[Clip]:
    """A seeded mixture, the same for any number of processes: every block is made by a fresh synthesiser."""
    total = speech + animals
    blocks = [range(start, min(start + BLOCK, total)) for start in range(0, total, BLOCK)]
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for block in pool.map(partial(_block, part, speech, seed), blocks):
            yield from block


def write_corpus(folder: Path, seed: int) -> int:
    """Write the shipped corpus in SAKURA's layout, FLAC; every attribute has its own clips. Returns their number."""
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
                    clip = _short(rng, attribute, label, number)
                name = f"{label.lower()}_{clip.voice}_{number:02d}.flac"
                soundfile.write(place / "audio" / name, clip.waveform, SAMPLING_RATE, subtype="PCM_16")
                rows.append({**dict.fromkeys(COLUMNS, ""), "file": name, "attribute_label": label})
                total += 1
        with (place / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return total


def _short(rng: np.random.Generator, attribute: str, label: str, number: int) -> Clip:
    """A clip of at most 2.5 s, the other attributes in turn so that every class of theirs occurs."""
    turns = {"language": list(LANGUAGES), "gender": ["male", "female"], "emotion": list(EMOTIONS)}
    fixed = {name: options[number % len(options)] for name, options in turns.items()} | {attribute: label}
    for _ in range(20):
        clip = speech_clip("evaluation", rng, **fixed)
        if len(clip.waveform) <= SHORT_SECONDS * SAMPLING_RATE:
            return clip
    return clip
