"""From logits to numbers: probabilities, the recovery rate, and which samples count.

Definitions of Chen, Huang and Lee, arXiv 2603.13768, section 3; probabilities are taken over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def measured_as(direction: str, dims: Iterable[Any]) -> str:
    """The direction whose rate a run's is: its own, but for back-patching.

    That puts the clean run's own states into it, so that nothing is there to be lost: in either direction its rate is
    the recovery rate, 1 where as much of the answer is there as in the clean run, and above 1 where more is.
    """
    return "denoising" if "source_layer" in dims else direction


def error_of_probabilities(found: FloatArray, exact: FloatArray) -> float:
    """Root mean square error of all probabilities, at most, from some clips of which they are known exactly.

    What rounding disturbs are logits, by about as much in every clip; a probability p moves by p (1 - p) times as much
    as its log-odds do. So clips whose probabilities are undecided have large errors, and a few clips say little about
    others unless that is taken into account: the errors' mean square is scaled by the mean square of p (1 - p) over
    all numbers, against that over the known ones (a ratio estimate). As clips differ all the same, what is given is
    the upper end of a one-sided interval of 90 % over clips: Student's, with the standard error from leaving out one
    clip at a time, and none of it where all clips are known.

    Args:
        found: as computed [clip, number], of clean and corrupted run and cells; NaN where there is none. Clips without
            cells say nothing: they do not count.
        exact: NaN where it is not known.

    Returns:
        NaN where nothing is known; twice the error of a single clip; with all clips known the root mean square error.
    """
    # Imported here: it takes a quarter of a second, and this module is read by every command.
    from scipy.special import stdtrit

    values, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    there = np.isfinite(values) & np.isfinite(values[:, 2:]).any(axis=1, keepdims=True)
    known = there & np.isfinite(exact)
    moves = (values * (1 - values)) ** 2
    clips, every = int(known.any(axis=1).sum()), int(there.any(axis=1).sum())
    if not clips:
        return np.nan
    squares = np.where(known, values - exact, 0.0) ** 2
    top, bottom = squares.sum(axis=1), np.where(known, moves, 0.0).sum(axis=1)
    if not bottom.sum() > 0:  # decided beyond what float64 tells from 0 and 1
        return float(np.sqrt(squares.sum() / known.sum()))
    ratio = top.sum() / bottom.sum()
    if clips < every:
        rows = known.any(axis=1) & (bottom.sum() - bottom > 0)
        without = ((top.sum() - top) / np.where(rows, bottom.sum() - bottom, 1.0))[rows]
        spread = (len(without) - 1) * without.var() * (1 - clips / every) if len(without) > 1 else np.nan
        ratio = ratio + stdtrit(len(without) - 1, 0.9) * np.sqrt(spread) if np.isfinite(spread) else 4 * ratio
    return float(np.sqrt(ratio * moves[there].mean()))


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
