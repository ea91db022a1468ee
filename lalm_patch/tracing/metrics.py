"""From logits to numbers: probabilities, the recovery rate, and which samples count.

Definitions of Chen, Huang and Lee, arXiv 2603.13768, section 3; probabilities are taken over the whole vocabulary.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lalm_patch.engine import Readout
    from lalm_patch.stimuli import Record

FloatArray = NDArray[np.floating[Any]]


class Exclusion(StrEnum):
    """Why a sample does not count; the first that applies. The empty one is a sample that counts."""

    KEPT = ""
    UNREADABLE = "clip unusable"
    SILENT = "nothing sounds in the clip"
    UNASKABLE = "options cannot be told apart"
    CLEAN_WRONG = "clean prediction wrong"
    CORRUPTED_RIGHT = "corrupted prediction right"
    LAYOUT = "clean and corrupted prompt differ in length"
    NO_EFFECT = "corruption does not lower the answer's probability"
    UNRESOLVED = "unresolved"


def recovery_rate(patched: FloatArray, clean: float | FloatArray, corrupted: float | FloatArray) -> FloatArray:
    """(p_patched - p_corrupted) / (p_clean - p_corrupted), not clipped.

    Args:
        patched: probabilities of the answer, any shape.
        clean: of the clean run, broadcastable.
        corrupted: of the corrupted run, broadcastable.

    Returns:
        0 where nothing is recovered, 1 where all of it is; NaN where clean and corrupted are equal.
    """
    gap = np.asarray(clean, dtype=np.float64) - np.asarray(corrupted, dtype=np.float64)
    gained = np.asarray(patched, dtype=np.float64) - np.asarray(corrupted, dtype=np.float64)
    undefined = np.full(np.broadcast(gained, gap).shape, np.nan)
    return np.asarray(np.divide(gained, gap, out=undefined, where=gap != 0))


def share_moved(
    patched: FloatArray, clean: float | FloatArray, corrupted: float | FloatArray, direction: str
) -> FloatArray:
    """The recovery rate of a denoising run; of a noising one the share of the gap that is lost.

    Both are the recovery rate from the run that is patched to the run that the states are taken from.
    """
    source, target = (corrupted, clean) if direction == "noising" else (clean, corrupted)
    return recovery_rate(patched, source, target)


def own_question(record: Record) -> dict[str, Any]:
    """What a sample's record says of a question of its own; nothing where it has none."""
    if record.prompt is None:
        return {}
    return {"question": record.prompt.question, "options": list(record.prompt.options), "tags": dict(record.tags)}


def predictions(readout: Readout, option_ids: tuple[int, ...], correct: str) -> list[int]:
    """Index of the predicted option per run; -1 where `correct` is `vocabulary` and another token is on top."""
    if correct == "options":
        return [int(index) for index in readout.option_logits.argmax(axis=1)]
    return [option_ids.index(int(top)) if int(top) in option_ids else -1 for top in readout.top_id]


def exclusion(base: Readout, option_ids: tuple[int, ...], answer: int, correct: str) -> Exclusion:
    """Whether a sample counts.

    Args:
        base: readout with the clean run in row 0 and the corrupted run in row 1.
        option_ids: target tokens.
        answer: index of the right option.
        correct: `options` or `vocabulary`, see `PromptSettings`.
    """
    clean, corrupted = predictions(base, option_ids, correct)
    if clean != answer:
        return Exclusion.CLEAN_WRONG
    if corrupted == answer:
        return Exclusion.CORRUPTED_RIGHT
    if not base.probabilities[0, answer] > base.probabilities[1, answer]:
        return Exclusion.NO_EFFECT
    return Exclusion.KEPT
