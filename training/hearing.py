"""What a frozen encoder makes of recordings, and the connector's first stage: heads instead of a language model.

The heads' classes are the decoder's own embeddings of the options' words: an audio vector that looks like the word is
something a frozen language model can already use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.models.native.qformer import DestaConnector
from training.spectra import in_window, masked, normalised, varied
from training.stages import Stage
from training.train import ATTRIBUTES, attributes

SHARE_MASKED, SHARE_SYNTHETIC = 0.8, 0.15
DROPOUT = 0.1
NEAR_WORDS = 0.01
"""Weight of the squared distance to the options' words, which are about 3 long."""
SHARPNESS = 5.0
"""Vectors half-way to a word already say it clearly: the rest of the way is the last stage's."""
EVERY = 100  # steps between looks at clips that are not trained on
ASKED = (0.15, 0.25, 0.15, 0.45)
"""How often each attribute is asked, in the order of ATTRIBUTES: what is hard is asked more often."""

Shares = dict[str, Tensor]
"""How probable each option of some attributes is, [options] each."""


def windowed(spectrum: Tensor, frames: int, rng: np.random.Generator | None = None) -> Tensor:
    """A clip as the model gets it, [mel bins, frames of the window]; with random numbers, varied and perhaps masked."""
    if rng is None:
        return normalised(in_window(spectrum, frames)[0])
    window, held = in_window(varied(spectrum, rng), frames, rng)
    window = normalised(window)
    return masked(window, rng, held) if rng.random() < SHARE_MASKED else window


def states_of(encoder: WhisperEncoder, spectra: Tensor) -> list[Tensor]:
    """The output [clips, positions, width] of every layer, before the last norm, as the connector reads them.

    As the encoder computes them, but for windows of any length.
    """
    states = functional.gelu(encoder.conv1(spectra))
    states = functional.gelu(encoder.conv2(states)).transpose(1, 2)
    states = states + encoder.embed_positions.weight[: states.shape[1]]
    states = functional.dropout(states, encoder.dropout, encoder.training)
    found = []
    for layer in encoder.layers:
        states = layer(states, None)
        found.append(states)
    return found


@torch.no_grad()
def taps(encoder: WhisperEncoder, spectrum: Tensor, frames: int, rng: np.random.Generator | None = None) -> Tensor:
    """[layers, positions, width] float16 of one clip in the window; see `windowed`."""
    return torch.cat(states_of(encoder, windowed(spectrum, frames, rng)[None])).half()


@dataclass(frozen=True)
class Heard:
    """Clips as a frozen encoder hears them.

    Attributes:
        states: of every clip its `taps`, plain and varied ones, [copies, layers, positions, width].
        labels: index of the right option, by attribute, for those that apply.
        answers: what the connector has to say of each clip, for some attributes.
    """

    states: Sequence[Tensor]
    labels: Sequence[dict[str, int]]
    answers: Sequence[Shares]

    def __len__(self) -> int:
        return len(self.states)

    def of(self, name: str) -> list[int]:
        """Indices of the clips with a label for the attribute."""
        return [index for members in self._by_class[name] for index in members]

    def draw(self, name: str, rng: np.random.Generator) -> int:
        """A clip of a random class of the attribute."""
        classes = self._by_class[name]
        members = classes[int(rng.integers(len(classes)))]
        return members[int(rng.integers(len(members)))]

    @cached_property
    def _by_class(self) -> dict[str, list[list[int]]]:
        found = {}
        for name, attribute in attributes().items():
            classes: list[list[int]] = [[] for _ in attribute.options]
            for index, labels in enumerate(self.labels):
                if name in labels:
                    classes[labels[name]].append(index)
            found[name] = [members for members in classes if members]
        return found


@dataclass(frozen=True)
class Material:
    """Real and synthetic clips."""

    real: Heard
    synthetic: Heard

    def draw(self, rng: np.random.Generator) -> tuple[str, Tensor, Shares]:
        """An attribute, the states [layers, positions, width] of a clip that has it, and what is to be said of it."""
        name = str(rng.choice(ATTRIBUTES, p=ASKED))
        source = self.synthetic if not self.real.of(name) or rng.random() < SHARE_SYNTHETIC else self.real
        index = source.draw(name, rng)
        copies = source.states[index]
        return name, copies[int(rng.integers(len(copies)))].float(), source.answers[index]


class WordHeads(nn.Module):
    """A connector; the classes are the embeddings of the options' words in the frozen decoder.

    Every attribute has audio vectors of its own, an equal share of them, whose mean is read.

    Args:
        connector: from encoder states to audio vectors.
        words: [options, hidden] of every attribute, the embedding of each option's first token.
    """

    def __init__(self, connector: DestaConnector, words: dict[str, Tensor]) -> None:
        super().__init__()
        self.connector = connector
        self.names = tuple(words)
        for name, embedded in words.items():
            self.register_buffer(f"words_{name}", embedded, persistent=False)

    def words(self, name: str) -> Tensor:
        """Embeddings of an attribute's options, [options, hidden]."""
        found: Tensor = getattr(self, f"words_{name}")
        return found

    def read(self, states: Tensor) -> dict[str, Tensor]:
        """States [clips, layers, positions, width] to each attribute's vectors [clips, vectors, hidden]."""
        states = functional.dropout(states, DROPOUT, self.training)
        vectors = self.connector(list(states.unbind(1)))
        return dict(zip(self.names, vectors.chunk(len(self.names), 1), strict=True))

    def logits(self, name: str, vectors: Tensor) -> Tensor:
        """An attribute's vectors [clips, vectors, hidden] to logits [clips, options]."""
        words = self.words(name)
        return SHARPNESS * vectors.mean(1) @ (words - words.mean(0)).T

    def loss(self, states: Tensor, answers: Sequence[Shares]) -> Tensor:
        """Cross-entropy of all answers, and how far the vectors are from the words they should say."""
        total = torch.zeros(())
        for name, vectors in self.read(states).items():
            rows = [row for row, shares in enumerate(answers) if name in shares]
            if rows:
                wanted = torch.stack([answers[row][name] for row in rows])
                said = vectors[rows]
                total = total - (wanted * self.logits(name, said).log_softmax(-1)).sum()
                distance = said - (wanted @ self.words(name))[:, None]
                total = total + NEAR_WORDS * distance.square().sum(-1).mean(1).sum()
        return total / len(answers)


def train_connector(
    heads: WordHeads, material: Material, path: Path, *, steps: int, batch: int, rate: float, seed: int, held_out: Heard
) -> Stage:
    """Train on all that is to be said of every clip that is drawn."""

    def loss(stage: Stage) -> Tensor:
        drawn = [material.draw(stage.rng) for _ in range(batch)]
        return heads.loss(torch.stack([states for _, states, _ in drawn]), [answers for _, _, answers in drawn])

    def answer(name: str, states: Tensor) -> Tensor:
        return heads.logits(name, heads.read(states[None])[name])[0]

    stage = Stage(path, heads, steps=steps, rate=rate, seed=seed)
    stage.run(loss, EVERY, lambda: written(accuracy(held_out, answer)))
    return stage


Answer = Callable[[str, Tensor], Tensor]
"""From an attribute and a clip's states [layers, positions, width] to a value for every option."""


def accuracy(heard: Heard, answer: Answer) -> dict[str, tuple[float, int]]:
    """Share of clips whose largest value is the right option's, and their number, by attribute."""
    found = {}
    for name in ATTRIBUTES:
        if which := heard.of(name):
            right = [int(answer(name, heard.states[i][0].float()).argmax()) == heard.labels[i][name] for i in which]
            found[name] = (float(np.mean(right)), len(which))
    return found


def written(found: dict[str, tuple[float, int]]) -> str:
    """Accuracies as a line of the log."""
    return "held out: " + ", ".join(f"{name} {100 * share:.1f} % (n={n})" for name, (share, n) in found.items())
