"""Circuits as data, and what they compute in exact arithmetic: the truth that a tracer is scored against.

A circuit is a list of attention heads, each of which moves the audio's class from one place to another. This module
says which channels of the residual stream hold what, and works out by hand what every intervention must give. It
knows no torch: `lalm_patch.truth.decoder` writes the same circuit into a real decoder.

Channels of the residual stream (`HIDDEN` of them):

    ballast     a constant at every position. It makes up nearly all of a state's norm, so that RMSNorm divides every
                state by nearly the same number, and what one head writes does not scale what the others read.
    tags        one channel for each kind of position: the sink before the audio, the audio, and each text token. A head
                finds its source and its target by them.
    registers   three places for a class of `CLASSES` options: as it comes from the audio, as a text position relays it,
                and as the answer that the output head reads. A head reads one register and adds to another.
    free        the rest; random background weights write there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from lalm_patch.interventions.patches import Intervention, Origin, Patch, Site
from lalm_patch.interventions.paths import Input, PathPatch, Sender
from lalm_patch.models import TokenTable
from lalm_patch.tracing.metrics import recovery_rate

FloatArray = NDArray[np.float64]

HIDDEN, HEADS, KEY_VALUE_HEADS = 64, 4, 2
CLASSES = 4
SINK_POSITIONS, AUDIO_POSITIONS, MOST_TEXT = 2, 6, 16
BALLAST, SINK_TAG, AUDIO_TAG, TEXT_TAG = 0, 1, 2, 3
REGISTERS = TEXT_TAG + MOST_TEXT
FREE = REGISTERS + 3 * CLASSES
BALLAST_VALUE = 8.0
"""The square root of `HIDDEN`: a state's root mean square is then about 1."""

SHARPNESS = 30.0
"""By how much a planted head's attention score for its source exceeds that of the sink, and the sink's all others."""

PAD_ID, SINK_ID, AUDIO_ID, OTHER_ID = range(4)
OPTION_IDS = tuple(range(4, 4 + CLASSES))
TEXT_ID = OPTION_IDS[-1] + 1
VOCABULARY = 64
OTHER_LOGIT = 1.5
"""Logit of the token that wins where the model hears nothing; all but it and the options have logit 0."""


class Register(IntEnum):
    """Where in a state the class stands."""

    AUDIO = 0
    RELAY = 1
    ANSWER = 2

    @property
    def channels(self) -> range:
        """Its channels of the residual stream."""
        start = REGISTERS + self * CLASSES
        return range(start, start + CLASSES)


@dataclass(frozen=True)
class Move:
    """One attention head that moves the class.

    Attributes:
        layer: decoder layer.
        head: query head.
        source: text position the head looks at, counted from the first after the audio; None: all audio positions.
        target: text position that looks, and gets the class; None: every audio position, from those up to it.
        reads: register read at the source.
        writes: register of the target to which it is added.
        gain: factor of what is added; negative suppresses.
    """

    layer: int
    head: int
    source: int | None
    target: int | None
    reads: Register
    writes: Register
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.source is not None and (self.target is None or self.source > self.target):
            raise ValueError(f"causal attention: text position {self.target} cannot look at {self.source} after it")
        if not 0 <= self.head < HEADS:
            raise ValueError(f"expected a head from 0 to {HEADS - 1}, got {self.head}")

    def targets(self, first_text: int) -> range:
        """Positions that look, in a prompt whose text begins at a position."""
        if self.target is None:
            return range(SINK_POSITIONS, first_text)
        return range(first_text + self.target, first_text + self.target + 1)


@dataclass(frozen=True)
class Circuit:
    """All heads that move the class, and how strongly the answer is read.

    Attributes:
        layers: decoder layers.
        text: text positions after the audio; the last one is where the answer is read.
        moves: the heads.
        answer_gain: logit per unit of the answer register.
    """

    layers: int
    text: int
    moves: tuple[Move, ...]
    answer_gain: float = 6.0

    def __post_init__(self) -> None:
        if not 2 <= self.text <= MOST_TEXT:
            raise ValueError(f"expected 2 to {MOST_TEXT} text positions, got {self.text}")
        for move in self.moves:
            if not 0 <= move.layer < self.layers or not 0 <= (move.target or 0) < self.text:
                raise ValueError(f"{move} lies outside of {self.layers} layers and {self.text} text positions")
        shared = [(move.layer, move.head * KEY_VALUE_HEADS // HEADS) for move in self.moves]
        if len(set(shared)) < len(shared):
            raise ValueError("two heads of a layer share their keys and values: give them other heads or layers")

    @property
    def last(self) -> int:
        """The text position at which the answer is read."""
        return self.text - 1

    def probabilities(self, audio: FloatArray, interventions: Sequence[Intervention]) -> FloatArray:
        """P(option) of patched runs, in exact arithmetic and without background: [intervention, option].

        Args:
            audio: the clip's class register [audio position, class]; silence has zeros.
            interventions: patches of text positions, or paths from attention to keys and values; the empty
                intervention is the corrupted run.
        """
        if any(each.path is not None for each in interventions):
            return self._with_paths(audio, interventions)
        clean = self._run(self._start(audio), [Intervention()], None)
        patched = self._run(self._start(np.zeros_like(audio)), interventions, clean)
        return self._read(patched.after[-1])

    def clean_probabilities(self, audio: FloatArray) -> FloatArray:
        """P(option) of the clean run: [option]."""
        return np.asarray(self._read(self._run(self._start(audio), [Intervention()], None).after[-1])[0])

    def back_patched(self, audio: FloatArray, interventions: Sequence[Intervention]) -> FloatArray:
        """P(option) of clean runs with states of that run itself written elsewhere: [intervention, option].

        Args:
            audio: the clip's class register [audio position, class].
            interventions: patches whose source is the run's own; the empty intervention is the clean run.
        """
        start = self._start(audio)
        return self._read(self._run(start, interventions, None, self._run(start, [Intervention()], None)).after[-1])

    def recovery(self, audio: FloatArray, answer: int, interventions: Sequence[Intervention]) -> FloatArray:
        """Recovery rate that each intervention must give: [intervention]."""
        patched = self.probabilities(audio, (*interventions, Intervention()))[:, answer]
        return np.asarray(recovery_rate(patched[:-1], self.clean_probabilities(audio)[answer], patched[-1]))

    def lost(self, audio: FloatArray, answer: int, interventions: Sequence[Intervention]) -> FloatArray:
        """Share of the gap that must be lost where attention is cut in the clean run: [intervention]."""
        cut = self._read(self._run(self._start(audio), interventions, None).after[-1])[:, answer]
        silent = self.probabilities(audio, [Intervention()])[0, answer]
        return np.asarray(recovery_rate(cut, silent, self.clean_probabilities(audio)[answer]))

    def _with_paths(self, audio: FloatArray, interventions: Sequence[Intervention]) -> FloatArray:
        """As `probabilities`, of paths and of empty interventions."""
        clean, silent = (
            [start, *(states[0] for states in self._run(start, [Intervention()], None).after)]
            for start in (self._start(audio), self._start(np.zeros_like(audio)))
        )
        unpatched = self._read(silent[-1][None])[0]
        rows = [unpatched if each.path is None else self._along(each.path, clean, silent) for each in interventions]
        return np.stack(rows)

    def _along(self, path: PathPatch, clean: Sequence[FloatArray], silent: Sequence[FloatArray]) -> FloatArray:
        """P(option) of the silent run with a path; both runs are given by their registers [position, register, class]
        before every layer and after the last."""
        sent = [(sender, self._sent(sender, clean[sender.layer], silent[sender.layer])) for sender in path.senders]
        states = silent[path.entry_layer]
        for layer in range(path.entry_layer, self.layers):
            more = sum((written for sender, written in sent if sender.reaches <= layer), np.zeros_like(states))
            leaving = states.copy()
            for move in self.moves:
                for target in move.targets(len(states) - self.text) if move.layer == layer else ():
                    keys, values = states.copy(), states.copy()
                    for receiver, positions in path.at(layer):
                        seen = receiver.seen_by is None or target in receiver.seen_by
                        if seen and receiver.head in (None, move.head):
                            read = keys if receiver.input is Input.KEY else values
                            read[list(positions)] += more[list(positions)]
                    leaving[target, move.writes] += self._moved(move, target, states, keys, values)
            states = leaving
        return np.asarray(self._read(states[None])[0])

    def _sent(self, sender: Sender, clean: FloatArray, silent: FloatArray) -> FloatArray:
        """What attention writes otherwise than in the silent run: [position, register, class]."""
        written = np.zeros_like(silent)
        read = silent.copy()
        if sender.reads is not None:
            read[list(sender.reads)] = clean[list(sender.reads)]
        for move in self.moves:
            if move.layer != sender.layer or sender.head not in (None, move.head):
                continue
            for target in set(move.targets(len(silent) - self.text)) & set(sender.positions):
                asks = clean if sender.reads is None else silent
                seen = clean if sender.reads is None else read
                written[target, move.writes] += self._moved(move, target, asks, seen, seen)
                written[target, move.writes] -= self._moved(move, target, silent, silent, silent)
        return written

    def _moved(self, move: Move, target: int, asks: FloatArray, keys: FloatArray, values: FloatArray) -> FloatArray:
        """What a head moves to a position, [class], with the states that its query, its keys and its values read."""
        first = len(asks) - self.text
        audio = list(range(SINK_POSITIONS, min(first, target + 1)))
        source = audio if move.source is None else [first + move.source]
        looks = _attention(_size(asks[None, target]), _size(keys[None, source]))[0]
        return np.asarray(move.gain * (looks * (values / _size(values))[source, move.reads]).sum(axis=0))

    def _start(self, audio: FloatArray) -> FloatArray:
        """Registers of all positions before the first layer: [position, register, class]."""
        states = np.zeros((SINK_POSITIONS + len(audio) + self.text, len(Register), CLASSES))
        states[SINK_POSITIONS : SINK_POSITIONS + len(audio), Register.AUDIO] = audio
        return states

    def _run(
        self,
        start: FloatArray,
        interventions: Sequence[Intervention],
        clean: _Run | None,
        own: _Run | None = None,
    ) -> _Run:
        """Runs with patches taken from a clean one, or from the unpatched run itself; there are no MLPs, so a patch of
        theirs changes nothing."""
        states = np.tile(start, (len(interventions), 1, 1, 1))
        for row, intervention in enumerate(interventions):
            for patch in intervention.patches:
                if patch.site is Site.EMBED and (taken := _taken(patch, clean, own)) is not None:
                    states[row, list(patch.positions)] = taken
        first = len(start) - self.text
        run = _Run([], {})
        for layer in range(self.layers):
            sizes = _size(states)
            seen, states = states / sizes, states.copy()
            for move in self.moves:
                for target in move.targets(first) if move.layer == layer else ():
                    audio = list(range(SINK_POSITIONS, min(first, target + 1)))
                    source = audio if move.source is None else [first + move.source]
                    looks = _attention(sizes[:, target], sizes[:, source])
                    looks *= _seen(interventions, move, source, target)[..., None]
                    # What is not looked at any more goes to the others; with none left, to the sink, which is empty.
                    total = looks.sum(axis=1, keepdims=True)
                    looks = np.divide(looks, total, out=np.zeros_like(looks), where=total > 0)
                    moved = move.gain * (looks * seen[:, source, move.reads]).sum(axis=1)
                    for row, intervention in enumerate(interventions):
                        replaced = any(_replaces(patch, move, target) for patch in intervention.at(layer))
                        if replaced and clean is not None:
                            moved[row] = clean.moved[move, target][0]
                    run.moved[move, target] = moved
                    states[:, target, move.writes] += moved
            for row, intervention in enumerate(interventions):
                for patch in intervention.at(layer):
                    if patch.site is Site.RESID and (taken := _taken(patch, clean, own)) is not None:
                        states[row, list(patch.positions)] = taken
            run.after.append(states)
        return run

    def _read(self, states: FloatArray) -> FloatArray:
        """P(option) over the whole vocabulary [intervention, option], from the registers after the last layer."""
        last = states[:, -1:]
        size = _size(last)
        logits = self.answer_gain * (last / size)[:, 0, Register.ANSWER]
        others = np.exp(OTHER_LOGIT / size.ravel()) + VOCABULARY - CLASSES - 1
        weights = np.exp(logits)
        return np.asarray(weights / (weights.sum(axis=1) + others)[:, None])


@dataclass(frozen=True)
class Window:
    """A model of random weights in which nothing can move between positions outside the layers [first, end).

    Attributes:
        layers: decoder layers.
        text: text positions after the audio.
        first, end: the window.
    """

    layers: int
    text: int
    first: int
    end: int

    def recovery(self, interventions: Sequence[Intervention]) -> FloatArray:
        """Recovery rate that each intervention must give: [intervention]; NaN where the weights decide.

        A state after the audio knows nothing of it before the window, and afterwards only its own position reads it.
        """
        last = SINK_POSITIONS + AUDIO_POSITIONS + self.text - 1
        return np.array([self._recovery(each, last) for each in interventions])

    def lost(self, interventions: Sequence[Intervention]) -> FloatArray:
        """Share of the gap that must be lost where attention is cut: 0 outside the window; NaN inside."""
        outside = [all(not self.first <= cut.layer < self.end for cut in each.cuts) for each in interventions]
        return np.where(outside, 0.0, np.nan)

    def _recovery(self, intervention: Intervention, last: int) -> float:
        if intervention.path is not None:
            return 0.0 if intervention.idle or not self._moves(intervention.path) else np.nan
        layers = [patch.layer for patch in intervention.patches]
        if any(patch.site is not Site.RESID for patch in intervention.patches):
            return np.nan
        if all(layer < self.first for layer in layers):
            return 0.0
        if all(layer >= self.end - 1 for layer in layers):
            return float(any(last in patch.positions for patch in intervention.patches))
        return np.nan

    def _moves(self, path: PathPatch) -> bool:
        """Whether attention writes where the path begins and is read where it ends; elsewhere its output is zero."""
        layers = [sender.layer for sender in path.senders] + [receiver.layer for receiver, _ in path.reached]
        return all(self.first <= layer < self.end for layer in layers)


Truth = Circuit | Window


def token_table(text: int) -> TokenTable:
    """The prompt of a planted model: sink, audio, and text tokens that all differ and have the usual roles."""
    ids = [SINK_ID] * SINK_POSITIONS + [AUDIO_ID] * AUDIO_POSITIONS + list(range(TEXT_ID, TEXT_ID + text))
    early, listed = text // 3, (text - text // 3) // 2
    after = ["early"] * early + ["object"] * listed + ["late"] * (text - early - listed - 1) + ["last"]
    roles = ["pre"] * SINK_POSITIONS + ["audio"] * AUDIO_POSITIONS + after
    texts = ["<s>"] * SINK_POSITIONS + ["<audio>"] * AUDIO_POSITIONS + [f" t{index}" for index in range(text)]
    return TokenTable(tuple(ids), tuple(texts), tuple(roles))


@dataclass(frozen=True)
class _Run:
    """Registers after each layer [intervention, position, register, class]; what heads moved to a position
    [intervention, class]."""

    after: list[FloatArray]
    moved: dict[tuple[Move, int], FloatArray]


def _taken(patch: Patch, clean: _Run | None, own: _Run | None) -> FloatArray | None:
    """Registers [position, register, class] that a patch of whole states puts in; None where that run is not given."""
    place = patch.taken_from
    if place is None or place.site is not Site.RESID or not patch.source.mix.replaces:
        raise ValueError(
            f"expected the residual stream after a layer of a run, whole, in place of another; got {patch}"
        )
    run = clean if place.origin is Origin.OTHER else own
    return None if run is None else np.asarray(run.after[place.layer][0, list(patch.taken_positions)])


def _replaces(patch: Patch, move: Move, target: int) -> bool:
    """Whether a patch puts another run's output of this head in its place."""
    mine = patch.site is Site.ATTN or (patch.site is Site.HEAD and patch.head == move.head)
    return mine and target in patch.positions


def _seen(interventions: Sequence[Intervention], move: Move, sources: Sequence[int], target: int) -> FloatArray:
    """Whether each intervention leaves a head the sight of its sources: [intervention, source]."""
    seen = np.ones((len(interventions), len(sources)))
    for row, intervention in enumerate(interventions):
        for cut in intervention.cuts:
            if cut.layer == move.layer and cut.head in (None, move.head) and target in cut.targets:
                seen[row, [source in cut.sources for source in sources]] = 0
    return seen


def _size(states: FloatArray) -> FloatArray:
    """Root mean square of states [..., register, class], as RMSNorm takes it; ballast and tag count."""
    square = BALLAST_VALUE**2 + 1 + (states**2).sum(axis=(-2, -1), keepdims=True)
    return np.asarray(np.sqrt(square / HIDDEN))


def _attention(target: FloatArray, sources: FloatArray) -> FloatArray:
    """Weights of the sources [..., source, 1], from the states' sizes: a larger state's tag is smaller once normed."""
    scores = 2 * SHARPNESS / (target[:, None] * sources)[..., 0]
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
