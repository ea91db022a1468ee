"""Frequent words of the eight languages, for training only: phrases of them keep sentences from being learned."""

from __future__ import annotations

from functools import cache

import numpy as np
import wordfreq

_CODES = {
    "English": "en",
    "German": "de",
    "Spanish": "es",
    "French": "fr",
    "Italian": "it",
    "Chinese": "zh",
    "Japanese": "ja",
    "Korean": "ko",
}
_FREQUENT = 2500
_SCRIPTS = {  # first and last code point; espeak-ng spells out what is in another script
    "Chinese": ("\u4e00", "\u9fff"),
    "Japanese": ("\u3041", "\u30ff"),
    "Korean": ("\uac00", "\ud7a3"),
}
_LETTERS = 4  # of a script of letters: shorter words are shared between languages, or say little


def _fits(word: str, language: str) -> bool:
    if language in _SCRIPTS:
        first, last = _SCRIPTS[language]
        return len(word) > 1 and all(first <= letter <= last for letter in word)
    return len(word) >= _LETTERS and word.isalpha()


@cache
def words(language: str) -> tuple[str, ...]:
    """Frequent words that are in no other language's list."""
    lists = {name: wordfreq.top_n_list(code, _FREQUENT) for name, code in _CODES.items()}
    elsewhere = {word for name, listed in lists.items() if name != language for word in listed}
    return tuple(word for word in lists[language] if _fits(word, language) and word not in elsewhere)


def phrase(language: str, rng: np.random.Generator) -> str:
    """Two to five random words."""
    return " ".join(rng.choice(words(language), int(rng.integers(2, 6))))
