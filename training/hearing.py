"""Teach a small encoder and a Q-Former connector to hear, before a language model is there: the first stages of
`training.smol`.

First the encoder alone, on excerpts of three seconds, with linear classifiers on its states. Then encoder and
connector, on clips padded to the model's window, with heads whose classes are the decoder's own embeddings of the
options' words: an audio vector that looks like the word is something a frozen language model can already use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.models.native.qformer import DestaConnector
from training.spectra import excerpt, in_window, masked, normalised, varied
from training.stages import Stage
from training.train import ATTRIBUTES, IGNORED, attributes

EXCERPT_FRAMES = 300
SHARE_MASKED, SHARE_SYNTHETIC = 0.8, 0.2
EVERY = 300  # steps between looks at clips that are not trained on
ASKED = (0.2, 0.15, 0.15, 0.5)
"""How often each attribute is asked, in the order of ATTRIBUTES: what is hard is asked more often."""


@dataclass
class Examples:
    """Spectra with labels, drawn evenly over classes.

    Attributes:
        spectra: log10 mel [mel bins, frames] each.
        labels: index of the right option by attribute, for those that apply.
    """

    spectra: Sequence[Tensor]
    labels: Sequence[dict[str, int]]
    _by_class: dict[str, list[list[int]]] = field(init=False)

    def __post_init__(self) -> None:
        self._by_class = {}
        for name, attribute in attributes().items():
            classes = [
                [index for index, labels in enumerate(self.labels) if labels.get(name) == option]
                for option in range(len(attribute.options))
            ]
            self._by_class[name] = [members for members in classes if members]

    def __len__(self) -> int:
        return len(self.spectra)

    def of(self, name: str) -> list[int]:
        """Indices of the clips with a label for the attribute."""
        return sorted(index for members in self._by_class[name] for index in members)

    def draw(self, name: str, rng: np.random.Generator) -> int:
        """A clip of a random class of the attribute."""
        classes = self._by_class[name]
        members = classes[int(rng.integers(len(classes)))]
        return members[int(rng.integers(len(members)))]


@dataclass(frozen=True)
class Material:
    """Real and synthetic examples; animals are synthetic only."""

    real: Examples
    synthetic: Examples

    def draw(self, share_synthetic: float, rng: np.random.Generator) -> tuple[str, Tensor, dict[str, int]]:
        """An attribute, and the spectrum and labels of a clip that has it."""
        name = str(rng.choice(ATTRIBUTES, p=ASKED))
        synthetic = rng.random() < share_synthetic or not self.real.of(name)
        source = self.synthetic if synthetic else self.real
        index = source.draw(name, rng)
        return name, source.spectra[index], source.labels[index]


class Classifiers(nn.Module):
    """An encoder with a linear classifier per attribute on the mean and spread of its states over time."""

    def __init__(self, encoder: WhisperEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.d_model
        self.heads = nn.ModuleDict({n: nn.Linear(2 * width, len(a.options)) for n, a in attributes().items()})

    def forward(self, spectra: Tensor) -> dict[str, Tensor]:
        """Normalised spectra [clips, mel bins, frames] to logits [clips, options] by attribute."""
        states = states_of(self.encoder, spectra)[-1]
        pooled = torch.cat([states.mean(1), states.std(1)], -1)
        return {name: head(pooled) for name, head in self.heads.items()}


class WordHeads(nn.Module):
    """Encoder and connector; the classes are the embeddings of the options' words in the frozen decoder.

    Every attribute reads a weighted mean of the audio vectors; the weights are learned, and thrown away afterwards.

    Args:
        encoder: Whisper's.
        connector: from its states to audio vectors.
        words: [options, hidden] of every attribute, the embedding of each option's first token.
    """

    def __init__(self, encoder: WhisperEncoder, connector: DestaConnector, words: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder, self.connector = encoder, connector
        vectors = connector.layer_weights.shape[0]
        self.places = nn.ParameterDict({name: nn.Parameter(torch.zeros(vectors)) for name in words})
        self.scale = nn.Parameter(torch.tensor(1.0))
        for name, embedded in words.items():
            self.register_buffer(f"words_{name}", embedded - embedded.mean(0), persistent=False)

    def forward(self, spectra: Tensor) -> dict[str, Tensor]:
        """Normalised spectra [clips, mel bins, frames of the window] to logits [clips, options] by attribute."""
        vectors = self.connector(states_of(self.encoder, spectra))
        logits = {}
        for name, weights in self.places.items():
            read = torch.einsum("v,cvh->ch", weights.softmax(0), vectors)
            logits[name] = self.scale * read @ getattr(self, f"words_{name}").T
        return logits


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


def train_encoder(
    classifiers: Classifiers,
    material: Material,
    path: Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    held_out: Examples,
) -> Stage:
    """The first stage: the encoder on excerpts, half synthetic at first and real in the end."""

    def loss(stage: Stage) -> Tensor:
        spectra, labels = [], []
        for _ in range(batch):
            _, spectrum, known = material.draw(0.5 * (1 - stage.step / stage.steps), stage.rng)
            part = normalised(excerpt(varied(spectrum, stage.rng), EXCERPT_FRAMES, stage.rng))
            spectra.append(masked(part, stage.rng, EXCERPT_FRAMES) if stage.rng.random() < SHARE_MASKED else part)
            labels.append(known)
        return label_loss(classifiers(torch.stack(spectra)), labels)

    stage = Stage(path, classifiers, steps=steps, rate=rate, seed=seed)
    stage.run(loss, EVERY, lambda: written(accuracy(held_out, partial(in_pieces, classifiers))))
    return stage


def train_connector(
    heads: WordHeads,
    material: Material,
    path: Path,
    *,
    frames: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    held_out: Examples,
) -> Stage:
    """The second stage: encoder and connector on clips in the model's window of so many frames."""

    def loss(stage: Stage) -> Tensor:
        drawn = [material.draw(SHARE_SYNTHETIC, stage.rng) for _ in range(batch)]
        spectra = torch.stack([windowed(spectrum, frames, stage.rng) for _, spectrum, _ in drawn])
        return label_loss(heads(spectra), [known for _, _, known in drawn])

    stage = Stage(path, heads, steps=steps, rate=rate, seed=seed)
    stage.run(loss, EVERY, lambda: written(accuracy(held_out, partial(whole, heads, frames))))
    return stage


def windowed(spectrum: Tensor, frames: int, rng: np.random.Generator | None = None) -> Tensor:
    """A clip as the model gets it, [mel bins, frames]; with random numbers, varied and partly masked."""
    if rng is None:
        return normalised(in_window(spectrum, frames)[0])
    window, held = in_window(varied(spectrum, rng), frames, rng)
    window = normalised(window)
    return masked(window, rng, held) if rng.random() < SHARE_MASKED else window


def label_loss(logits: dict[str, Tensor], labels: Sequence[dict[str, int]]) -> Tensor:
    """Cross-entropy of every label that is known, smoothed, per clip."""
    total = torch.zeros(())
    for name, values in logits.items():
        known = torch.tensor([clip.get(name, IGNORED) for clip in labels])
        if (known != IGNORED).any():
            total = total + functional.cross_entropy(
                values, known, ignore_index=IGNORED, reduction="sum", label_smoothing=0.05
            )
    return total / len(labels)


Answer = Callable[[str, Tensor], Tensor]


def in_pieces(classifiers: Classifiers, name: str, spectrum: Tensor) -> Tensor:
    """Log-probabilities [options] of a clip: the mean over its overlapping excerpts."""
    starts = range(0, max(1, spectrum.shape[1] - EXCERPT_FRAMES // 2), EXCERPT_FRAMES // 2)
    rng = np.random.default_rng(0)  # an excerpt of what is as long, or shorter, is not random
    pieces = [normalised(excerpt(spectrum[:, start : start + EXCERPT_FRAMES], EXCERPT_FRAMES, rng)) for start in starts]
    return classifiers(torch.stack(pieces))[name].log_softmax(-1).mean(0)


def whole(heads: WordHeads, frames: int, name: str, spectrum: Tensor) -> Tensor:
    """Logits [options] of a clip in the window."""
    return heads(windowed(spectrum, frames)[None])[name][0]


def accuracy(examples: Examples, answer: Answer) -> dict[str, tuple[float, int]]:
    """Share of clips whose largest value is the right option's, and their number, by attribute."""
    found = {}
    for name in ATTRIBUTES:
        which = examples.of(name)
        if which:
            right = [int(answer(name, examples.spectra[i]).argmax()) == examples.labels[i][name] for i in which]
            found[name] = (float(np.mean(right)), len(which))
    return found


def written(found: dict[str, tuple[float, int]]) -> str:
    """Accuracies as a line of the log."""
    return "held out: " + ", ".join(f"{name} {100 * share:.1f} % (n={n})" for name, (share, n) in found.items())
