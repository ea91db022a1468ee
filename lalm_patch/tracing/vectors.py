"""Vectors that are put in place of states or added to them: means over clips of a run, and directions between classes.

Both come from clean runs. A direction for a clip is made of other clips than its own and those of its group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lalm_patch.engine import DirectEngine
from lalm_patch.errors import DataError
from lalm_patch.interventions.grids import CLASS_DIRECTION, Place, direction_key, mean_key
from lalm_patch.interventions.patches import Site
from lalm_patch.interventions.segments import AUDIO
from lalm_patch.models import LALM, Encoding, TokenTable
from lalm_patch.stimuli import Record

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
MEAN_CLIPS = 32
"""Clips that make a mean, balanced over the classes."""
DIRECTION_CLIPS = 64
"""Clips that make directions, balanced likewise."""
FOLDS = 5
"""Parts of them, by groups; a clip's direction leaves out the part that its group is in."""

Clips = Callable[[int], Iterable[tuple[Record, Encoding]]]
"""Clean runs of at most so many clips, balanced over the classes, always the same ones in the same order."""


class Vectors:
    """The arrays that a run's grids name, computed when the first clip needs them.

    Args:
        lalm: the model.
        granularity: `ablate` or `steer`; others need none.
        place: what is patched.
        layers: layers of the grid.
        clips: gives the clips.
        seed: of the random directions.
    """

    def __init__(
        self, lalm: LALM, granularity: str, place: Place, layers: Sequence[int], clips: Clips, seed: int
    ) -> None:
        self.lalm = lalm
        self._means = granularity == "ablate" and place.replacement == "mean"
        self._steers = granularity == "steer"
        self._place, self._seed, self._clips = place, seed, clips
        self._layers = sorted({at for layer in layers for at in place.layers_from(layer)})

    def of(self, record: Record, encoding: Encoding) -> Mapping[str, np.ndarray]:
        """The arrays of one clip's grid.

        Raises:
            DataError: no clip can be read, or a class has no clip of another group.
        """
        if self._means:
            return self._fitting(encoding.tokens)
        return self._directions.of(record, len(encoding.tokens.text_positions)) if self._steers else {}

    def _fitting(self, tokens: TokenTable) -> dict[str, np.ndarray]:
        """The means for one clip; over positions, too, where a segment of its text has another length than theirs."""
        found = dict(self._mean_states)
        text = set(tokens.text_positions)
        for segment in tokens.segments:
            positions = sum(position in text for position in tokens.positions(segment))
            for layer in self._layers:
                key = mean_key(segment, self._place.site, layer)
                if key not in found:
                    raise DataError(
                        f"granularity.replacement=mean: none of the {MEAN_CLIPS} clips that make the mean has the "
                        f"segment {segment}; use replacement=zero"
                    )
                if found[key].ndim == 2 and len(found[key]) != positions:
                    found[key] = found[key].mean(0)
        return found

    @cached_property
    def _mean_states(self) -> dict[str, np.ndarray]:
        log.info("means of states over at most %d clips", MEAN_CLIPS)
        return mean_states(self.lalm, (clip for _, clip in self._clips(MEAN_CLIPS)), self._place.site, self._layers)

    @cached_property
    def _directions(self) -> Directions:
        log.info("directions between classes from at most %d clips", DIRECTION_CLIPS)
        clips = list(self._clips(DIRECTION_CLIPS))
        return Directions.between(self.lalm, clips, self._layers, self._place.controls, self._seed)


def mean_states(lalm: LALM, clips: Iterable[Encoding], site: Site, layers: Sequence[int]) -> dict[str, np.ndarray]:
    """Mean states of the audio and of each segment of the text, by `mean_key`.

    A segment whose tokens are the same in all clips has a mean for each of its positions, [positions, width]; the
    audio, and a segment that differs, has one over clips and positions, [width], where every position weighs the same.

    Raises:
        DataError: no clip.
    """
    sums: dict[tuple[str, int], FloatArray] = {}
    tokens: dict[str, tuple[int, ...] | None] = {}
    counts: dict[str, int] = {}
    pooled: dict[str, int] = {}
    for clip in clips:
        table = clip.tokens
        states = DirectEngine(lalm).states(clip, [(layer, site) for layer in layers])
        text = set(table.text_positions)
        for segment in (AUDIO, *table.segments):
            chosen = [p for p in table.positions(segment) if segment == AUDIO or p in text]
            ids = None if segment == AUDIO else tuple(table.ids[p] for p in chosen)
            same = tokens.setdefault(segment, ids) == ids and ids is not None
            if not same and tokens[segment] is not None:  # the first clip whose tokens differ
                tokens[segment] = None
                for layer in layers:
                    sums[segment, layer] = sums[segment, layer].sum(0, keepdims=True)
            counts[segment] = counts.get(segment, 0) + 1
            pooled[segment] = pooled.get(segment, 0) + len(chosen)
            for layer in layers:
                found = states[layer, site][0, chosen].double().cpu().numpy()
                found = found if tokens[segment] is not None else found.sum(0, keepdims=True)
                sums[segment, layer] = sums.get((segment, layer), np.zeros_like(found)) + found
    if not counts:
        raise DataError("a mean over clips: expected a clip that can be read, got none; see data.bad_clips")
    means = {}
    for (segment, layer), total in sums.items():
        differs = tokens[segment] is None
        mean = total[0] / pooled[segment] if differs else total / counts[segment]
        means[mean_key(segment, site, layer)] = mean.astype(np.float32)
    return means


@dataclass
class Directions:
    """Class means of the states after some layers at the last positions, those whose tokens all clips share.

    Attributes:
        layers: the layers.
        fold_of: which part each group of clips is in.
        sums: by part and class, the sum of states [layer, position, width].
        counts: likewise, clips.
        controls: random directions beside that of the class.
        seed: of these; every clip has its own.
    """

    layers: Sequence[int]
    fold_of: dict[str, int]
    controls: int
    seed: int
    sums: dict[tuple[int, str], FloatArray] = field(default_factory=dict)
    counts: dict[tuple[int, str], int] = field(default_factory=dict)

    @classmethod
    def between(
        cls, lalm: LALM, clips: Sequence[tuple[Record, Encoding]], layers: Sequence[int], controls: int, seed: int
    ) -> Directions:
        """From clean runs.

        Args:
            lalm: the model.
            clips: of all classes.
            layers: after which layers.
            controls: random directions beside them.
            seed: of these.

        Raises:
            DataError: fewer than two classes.
        """
        if len({record.label for record, _ in clips}) < 2:
            raise DataError("granularity=steer: expected clips of two classes at least, for a direction between them")
        found = cls(layers, folds([record for record, _ in clips]), controls, seed)
        positions = _common_end([clip for _, clip in clips])
        for record, clip in clips:
            states = DirectEngine(lalm).states(clip, [(layer, Site.RESID) for layer in layers])
            each = [states[layer, Site.RESID][0, -positions:].double().cpu().numpy() for layer in layers]
            key = found.fold_of[record.group], record.label
            found.sums[key] = found.sums.get(key, np.zeros((1, 1, 1))) + np.stack(each)
            found.counts[key] = found.counts.get(key, 0) + 1
        return found

    def of(self, record: Record, text: int) -> dict[str, np.ndarray]:
        """Directions [text positions, width] for a clip, by `direction_key`; zero before the positions that all share.

        The class direction is the mean of the clip's class minus the mean of the other classes' means; random ones have
        its length at every position.

        Raises:
            DataError: without the clip's group no clip of a class is left.
        """
        mean = self._means_without(record)
        if record.label not in mean:
            raise DataError(
                f"granularity=steer: the {DIRECTION_CLIPS} clips that make directions have none of class "
                f"{record.label}; expected fewer classes, or clips of it that can be read"
            )
        others = [of_class for label, of_class in mean.items() if label != record.label]
        direction = mean[record.label] - np.mean(others, axis=0)
        named = {CLASS_DIRECTION: direction}
        rng = np.random.default_rng([self.seed, *record.id.encode()])
        for number in range(1, self.controls + 1):
            drawn = rng.normal(size=direction.shape)
            lengths = [np.linalg.norm(each, axis=-1, keepdims=True) for each in (direction, drawn)]
            named[f"random {number}"] = drawn * lengths[0] / lengths[1]
        arrays = {}
        for name, states in named.items():
            for index, layer in enumerate(self.layers):
                whole = np.zeros((text, states.shape[-1]), np.float32)
                known = min(text, states.shape[1])
                whole[text - known :] = states[index, states.shape[1] - known :]
                arrays[direction_key(name, layer)] = whole
        return arrays

    def _means_without(self, record: Record) -> dict[str, FloatArray]:
        """Mean states of each class, without the part that a clip's group is in."""
        left_out = self.fold_of.get(record.group)
        means = {}
        for label in sorted({label for _, label in self.sums}):
            parts = [key for key in self.sums if key[1] == label and key[0] != left_out]
            if not parts:
                raise DataError(
                    f"granularity=steer: without the group of {record.name} no clip of class {label} is left to make a "
                    "direction of; expected two groups (speakers, recordings) in each class, use more clips"
                )
            means[label] = np.sum([self.sums[key] for key in parts], axis=0) / sum(self.counts[key] for key in parts)
        return means


def folds(records: Sequence[Record]) -> dict[str, int]:
    """Parts of the groups, at most `FOLDS`; those of each class are dealt in turn, so that no part has all of one."""
    dealt: dict[str, int] = {}
    for label in sorted({record.label for record in records}):
        for record in sorted(records, key=lambda record: record.id):
            if record.label == label and record.group not in dealt:
                dealt[record.group] = len(dealt) % FOLDS
    return dealt


def _common_end(clips: Sequence[Encoding]) -> int:
    """Positions at the end of the text whose tokens are the same in all clips."""
    ends = [[clip.tokens.ids[p] for p in reversed(clip.tokens.text_positions)] for clip in clips]
    shortest = min(map(len, ends))
    return next((k for k in range(shortest) if any(end[k] != ends[0][k] for end in ends)), shortest)
