"""A seeded population of planted models: kinds of circuits, with random layers, heads, positions and strengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lalm_patch.truth.circuit import HEADS, KEY_VALUE_HEADS, MOST_TEXT, Circuit, Move, Register, Truth, Window
from lalm_patch.truth.decoder import ARCHITECTURES, PlantedLALM, plant_circuit, plant_window

MOST_BACKGROUND = 0.7
"""Largest scale of the random weights around a circuit, unless asked for otherwise."""
FEWEST_LAYERS, MOST_LAYERS = 6, 12


@dataclass(frozen=True)
class Plan:
    """One model of a population, not built yet.

    Attributes:
        kind: one of `KINDS`.
        architecture: one of `ARCHITECTURES`.
        truth: what is planted.
        background: scale of the random weights around a circuit.
        seed: of its weights and clips.
    """

    kind: str
    architecture: str
    truth: Truth
    background: float
    seed: int

    def build(self) -> PlantedLALM:
        """The model."""
        if isinstance(self.truth, Window):
            return plant_window(self.truth, self.architecture, self.seed)
        return plant_circuit(self.truth, self.architecture, self.background, self.seed)


def make_population(count: int, seed: int, most_background: float = MOST_BACKGROUND) -> list[Plan]:
    """Plans of `count` models: all kinds in turn, both architectures in turn within each kind.

    Args:
        count: models.
        seed: model number i of a seed is the same however many there are.
        most_background: the circuits' background is drawn evenly between 0 and this.
    """
    plans = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        kind = list(KINDS)[index % len(KINDS)]
        architecture = ARCHITECTURES[index // len(KINDS) % len(ARCHITECTURES)]
        background = float(rng.uniform(0, most_background))
        plans.append(Plan(kind, architecture, KINDS[kind](rng), background, int(rng.integers(2**31))))
    return plans


def single(rng: np.random.Generator) -> Circuit:
    """Audio -> one text position -> last position."""
    layers, text = _size(rng)
    arrives, answers = _ascending(rng, 2, layers)
    (relay,) = _positions(rng, 1, text)
    moves = (_hear(arrives, _head(rng), relay), _answer(answers, _head(rng), relay, text - 1))
    return Circuit(layers, text, moves, rng.uniform(5, 8))


def distractor(rng: np.random.Generator) -> Circuit:
    """As `single`; another position gets the class from the audio too, but no head reads it there."""
    layers, text = _size(rng)
    arrives, answers = _ascending(rng, 2, layers)
    relay, unread = _positions(rng, 2, text)
    heads = _heads(rng)
    moves = (
        _hear(arrives, heads[0], relay),
        _answer(answers, _head(rng), relay, text - 1),
        # No later than the relay gets it, so that timing does not give away which of the two is read.
        _hear(int(rng.integers(0, arrives + 1)), heads[1], unread),
    )
    return Circuit(layers, text, moves, rng.uniform(5, 8))


def redundant(rng: np.random.Generator) -> Circuit:
    """Two text positions get the class and each gives the last position half of it, in layers of their own."""
    layers, text = _size(rng)
    arrives, answers = _ascending(rng, 2, layers)
    relays = _positions(rng, 2, text)
    first, second = _heads(rng), _heads(rng)
    # The second path takes the same layers, or others: then recovery rises in two steps.
    again, later = sorted(int(layer) for layer in rng.integers([arrives, answers], [answers, layers]))
    moves = (
        _hear(arrives, first[0], relays[0]),
        _answer(answers, second[0], relays[0], text - 1, 0.5),
        _hear(again, first[1], relays[1]),
        _answer(later, second[1], relays[1], text - 1, 0.5),
    )
    return Circuit(layers, text, moves, rng.uniform(6, 9))


def suppressed(rng: np.random.Generator) -> Circuit:
    """As `single`; after the answer has arrived, a head takes part of it away again: what it reads from the audio."""
    layers, text = _size(rng)
    arrives, answers, suppresses = _ascending(rng, 3, layers)
    (relay,) = _positions(rng, 1, text)
    moves = (
        _hear(arrives, _head(rng), relay),
        _answer(answers, _head(rng), relay, text - 1),
        Move(suppresses, _head(rng), None, text - 1, Register.AUDIO, Register.ANSWER, -rng.uniform(0.2, 0.4)),
    )
    return Circuit(layers, text, moves, rng.uniform(8, 10))


def gradual(rng: np.random.Generator) -> Circuit:
    """Several heads of different layers each take a share straight from the audio to the last position."""
    layers, text = _size(rng)
    count = int(rng.integers(2, 5))
    where = _ascending(rng, count, layers)
    shares = rng.dirichlet(np.full(count, 3.0))
    moves = tuple(
        Move(layer, _head(rng), None, text - 1, Register.AUDIO, Register.ANSWER, float(share))
        for layer, share in zip(where, shares, strict=True)
    )
    return Circuit(layers, text, moves, rng.uniform(5, 8))


def too_late(rng: np.random.Generator) -> Circuit:
    """The audio positions make something of the class in a layer above the one in which the last position looks for it.

    It finds nothing, and answers by a weaker head that takes the class as it comes. In no population: that there is
    more to be had shows only where late states are written into early layers.
    """
    layers, text = _size(rng)
    reads, makes = _ascending(rng, 2, layers)
    heads = _heads(rng)
    moves = (
        Move(makes, _head(rng), None, None, Register.AUDIO, Register.RELAY),
        Move(reads, heads[0], None, text - 1, Register.RELAY, Register.ANSWER),
        Move(reads, heads[1], None, text - 1, Register.AUDIO, Register.ANSWER, float(rng.uniform(0.5, 0.7))),
    )
    return Circuit(layers, text, moves, rng.uniform(5, 8))


def window(rng: np.random.Generator) -> Window:
    """Random weights with attention output in a window of layers only."""
    layers, text = _size(rng)
    first = int(rng.integers(0, layers - 1))
    end = int(rng.integers(first + 1, min(layers, first + 4) + 1))
    return Window(layers, text, first, end)


KINDS: dict[str, Callable[[np.random.Generator], Truth]] = {
    "window": window,
    "single path": single,
    "distractor": distractor,
    "two paths": redundant,
    "suppressed": suppressed,
    "gradual": gradual,
}
"""Kinds of models by name; add one here and it is part of every population."""

SINGLE_PATH = ("single path", "distractor")
"""Kinds in which all of the class goes through one text position."""


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Decoder layers and text positions."""
    return int(rng.integers(FEWEST_LAYERS, MOST_LAYERS + 1)), int(rng.integers(8, MOST_TEXT + 1))


def _ascending(rng: np.random.Generator, count: int, layers: int) -> list[int]:
    """Different layers in ascending order."""
    return sorted(int(layer) for layer in rng.choice(layers, count, replace=False))


def _positions(rng: np.random.Generator, count: int, text: int) -> list[int]:
    """Different text positions before the last one."""
    return [int(position) for position in rng.choice(text - 1, count, replace=False)]


def _head(rng: np.random.Generator) -> int:
    return int(rng.integers(HEADS))


def _heads(rng: np.random.Generator) -> list[int]:
    """Two heads that share no keys and values."""
    size = HEADS // KEY_VALUE_HEADS
    return [int(group * size + rng.integers(size)) for group in rng.permutation(KEY_VALUE_HEADS)[:2]]


def _hear(layer: int, head: int, relay: int) -> Move:
    return Move(layer, head, None, relay, Register.AUDIO, Register.RELAY)


def _answer(layer: int, head: int, relay: int, last: int, gain: float = 1.0) -> Move:
    return Move(layer, head, relay, last, Register.RELAY, Register.ANSWER, gain)
