"""A grounding score: whether the object tokens' attention to the audio tells, from one forward pass, wrong answers.

The paper reads its token-wise results as the listed options querying the audio. If that is what answers come from, a
clip the options do not listen to should more often be answered wrongly. The score of a clip is the share of the object
tokens' attention that falls on the audio, mean over heads, in one layer. Which layer, and whether more or less
attention speaks for a wrong answer, is chosen on other clips: the groups (speakers, recordings) are dealt to folds, and
every fold is scored with what the others say. Beside it stands what the same forward pass gives for nothing: the
largest probability among the options, and their entropy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import rankdata

from lalm_patch.analysis.ledger import is_readable, is_right
from lalm_patch.analysis.options import option_texts
from lalm_patch.analysis.recovery import group_names
from lalm_patch.analysis.resampling import CONFIDENCE, Estimate, Resampled, draws, too_few, unanimous
from lalm_patch.analysis.run_info import about
from lalm_patch.errors import DataError

FOLDS = 5
FEWEST = 3
"""Wrong, and right, answers without which nothing is said."""
FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Grounding:
    """How well scores of one forward pass tell wrong answers from right ones.

    Attributes:
        auroc: by score: `object attention` (held out), `max probability`, `entropy`; 0.5 is chance. NaN: see `reason`.
        gain: AUROC of `object attention` minus that of `max probability`, on the same draws of groups.
        wrong, right: answers of each kind.
        layers: how often each layer was chosen, over the folds.
        reason: why nothing can be said; else empty.
    """

    auroc: dict[str, Estimate]
    gain: Estimate
    wrong: int
    right: int
    layers: dict[int, int]
    reason: str = ""


def grounding(dataset: xr.Dataset, listener: str = "object", confidence: float = CONFIDENCE) -> Grounding:
    """Score a run that looked at attention.

    Args:
        dataset: dataset of a run with observe=grounding; all readable clips are used, also those that do not count.
        listener: segment of the text whose attention is the score.
        confidence: of the intervals, over groups like all others, with layers and signs chosen anew for each group
            left out. None where fewer than `analysis.resampling.fewest_groups` groups have wrong, or right, answers;
            where a score tells all answers apart, that of a share of which all groups say 1.

    Raises:
        DataError: a run that did not look, or a segment that its prompt lacks.
    """
    if "audio_attention" not in dataset:
        raise DataError("this run did not look at attention: expected a run with observe=grounding")
    if listener not in dataset["listener"].values:
        raise DataError(f"no segment {listener!r} listens in this run; it has {', '.join(dataset['listener'].values)}")
    readable = np.flatnonzero(is_readable(dataset))
    clips = dataset.isel(sample=readable)
    wrong = ~is_right(dataset, "clean")[readable]
    groups = group_names(clips)
    mass = clips["audio_attention"].sel(listener=listener).mean("attention_head")
    mass = mass.transpose("sample", "observed_layer")
    names = ("object attention" if listener == "object" else f"{listener} attention", "max probability", "entropy")
    if min(wrong.sum(), (~wrong).sum()) < FEWEST or len(set(groups)) < FOLDS:
        reason = (
            f"{wrong.sum()} wrong and {(~wrong).sum()} right answers of {len(set(groups))} groups: expected at least "
            f"{FEWEST} of each, and {FOLDS} groups"
        )
        nothing = Estimate(np.nan, np.nan, np.nan, len(wrong), len(set(groups)), reason)
        return Grounding(dict.fromkeys(names, nothing), nothing, int(wrong.sum()), int((~wrong).sum()), {}, reason)
    seed = about(dataset).seed
    folds, attention = _dealt(groups, seed), mass.values.astype(float)
    held_out, layers = _held_out(attention, wrong, folds)
    options = _among_options(clips)
    entropy = -(options * np.log(np.maximum(options, 1e-30))).sum(axis=1)
    scores = (held_out, -options.max(axis=1), entropy)  # larger speaks for a wrong answer
    values = _aurocs(scores, wrong, groups, seed)
    values[1 : 1 + len(set(groups)), 0] = _held_out_without(attention, wrong, groups, folds)
    n, count = len(wrong), len(set(groups))
    sides = min(len(set(groups[wrong])), len(set(groups[~wrong])))  # what a share of pairs rests on

    def estimate(found: NDArray[np.float64], least: float, exact: bool) -> Estimate:
        value = float(found[0])
        if reason := too_few(sides, confidence):
            return Estimate(value, np.nan, np.nan, n, count, f"{reason} with wrong, and with right, answers")
        whole = Resampled(found, count, n, count).estimate(confidence)
        low, high = np.clip([whole.low, whole.high], least, 1.0)
        if low == high and exact:  # all pairs agree, in every draw
            bound = float(unanimous(np.array(sides), confidence))
            low, high = (bound, 1.0) if value == 1 else (0.0, 1 - bound)
        elif low == high:
            return Estimate(value, np.nan, np.nan, n, count, "the same in all draws of groups")
        return replace(whole, low=float(low), high=float(high))

    auroc = {name: estimate(values[:, k], 0.0, True) for k, name in enumerate(names)}
    gain = estimate(values[:, 0] - values[:, 1], -1.0, False)
    chosen = {int(layer): int(times) for layer, times in zip(*np.unique(layers, return_counts=True), strict=True)}
    return Grounding(auroc, gain, int(wrong.sum()), int((~wrong).sum()), chosen)


def _among_options(clips: xr.Dataset) -> FloatArray:
    """Probabilities among the options alone, clean run: [sample, option]."""
    logits = clips["option_logit_clean"].transpose("sample", "option").values.astype(float)
    there = option_texts(clips).values != ""
    logits = np.where(there, logits, -np.inf)  # past a clip's last option
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _dealt(groups: NDArray[np.str_], seed: int) -> NDArray[np.int64]:
    """Fold of each clip; those of a group are in one."""
    names, members = np.unique(groups, return_inverse=True)
    order = np.random.default_rng([seed, 7]).permutation(len(names))
    fold_of = np.empty(len(names), np.int64)
    fold_of[order] = np.arange(len(names)) % FOLDS
    return np.asarray(fold_of[members])


def _held_out(
    mass: FloatArray, wrong: NDArray[np.bool_], folds: NDArray[np.int64]
) -> tuple[NDArray[np.float64], list[int]]:
    """Score of every clip by the layer and the sign that do best on the other folds, and the layers chosen.

    In each fold the score is standardised by the others' mean and spread, so that folds can be ranked together.
    """
    scores, layers = np.zeros(len(mass)), []
    for fold in range(FOLDS):
        inside, others = folds == fold, folds != fold
        bad = wrong[others]
        if not bad.any() or bad.all():  # the other folds have answers of one kind only: they say nothing
            continue
        each = _by_ranks(mass[others], bad)
        layer = int(np.abs(each - 0.5).argmax())
        sign = 1.0 if each[layer] >= 0.5 else -1.0
        centre, spread = mass[others, layer].mean(), mass[others, layer].std()
        scores[inside] = sign * (mass[inside, layer] - centre) / (spread or 1.0)
        layers.append(layer)
    return scores, layers


def _held_out_without(
    mass: FloatArray, wrong: NDArray[np.bool_], groups: NDArray[np.str_], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """AUROC of held-out scores with each group left out [group], layers and signs chosen anew without it.

    Its spread includes that of the choice, which draws of the scores as they are do not know of.
    """
    found = []
    for name in np.unique(groups):
        rest = groups != name
        scores, _ = _held_out(mass[rest], wrong[rest], folds[rest])
        both = wrong[rest].any() and not wrong[rest].all()
        found.append(float(_above(scores, wrong[rest]).mean()) if both else np.nan)
    return np.array(found)


def _by_ranks(scores: FloatArray, wrong: NDArray[np.bool_]) -> NDArray[np.float64]:
    """AUROC of each column [clip, column]: the probability that a wrong answer's score is above a right one's, ties one
    half; of answers of both kinds."""
    count = int(wrong.sum())
    above = rankdata(scores, axis=0)[wrong].sum(axis=0) - count * (count + 1) / 2
    return np.asarray(above / (count * (len(wrong) - count)))


def _above(scores: FloatArray, wrong: NDArray[np.bool_]) -> FloatArray:
    """Whether each wrong answer's score [wrong, 1] is above each right one's [1, right]: 1, 0, or 0.5 in a tie."""
    one, other = scores[wrong][:, None], scores[~wrong][None]
    return np.asarray((one > other) + 0.5 * (one == other), float)


def _aurocs(
    scores: tuple[FloatArray, ...], wrong: NDArray[np.bool_], groups: NDArray[np.str_], seed: int
) -> NDArray[np.float64]:
    """AUROC of each score [row, score]: of the data, with one group left out, and over draws of groups; the same rows
    for all; NaN without answers of both kinds."""
    names, members = np.unique(groups, return_inverse=True)
    times = draws(len(names), seed)[:, members]  # how often each clip counts
    total = times[:, wrong].sum(axis=1) * times[:, ~wrong].sum(axis=1)
    found = []
    for score in scores:
        sums = ((times[:, wrong] @ _above(score, wrong)) * times[:, ~wrong]).sum(axis=1)
        found.append(np.divide(sums, total, out=np.full(len(total), np.nan), where=total > 0))
    return np.stack(found, axis=1)
