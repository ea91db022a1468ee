"""A linear teacher: what a few hundred recordings can teach without being learned by heart.

Ridge regression on pooled encoder states has a closed form and generalises where a network trained on so few clips
remembers them. Its answers about a clip come from a fit to others (the clip's group left out), and the network is
trained on a mixture of these and the truth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from training.hearing import Shares, states_of
from training.spectra import normalised, varied
from training.train import attributes

PENALTY = 1.0
FOLDS = 5
TEMPERATURES = np.geomspace(0.02, 1.0, 30)


@torch.no_grad()
def pooled(encoder: WhisperEncoder, spectrum: Tensor) -> np.ndarray:
    """Mean, spread and spread of the changes over time of every layer's states, without padding: [features]."""
    frames = spectrum.shape[1] // 2 * 2
    layers = states_of(encoder, normalised(spectrum[:, :frames])[None])
    parts = [
        part for (states,) in layers for part in (states.mean(0), states.std(0), (states[2:] - states[:-2]).std(0))
    ]
    return torch.cat(parts).numpy()


def several(
    encoder: WhisperEncoder, spectrum: Tensor, frames: int, copies: int, rng: np.random.Generator
) -> np.ndarray:
    """`pooled` of a clip's first `frames` as it is and of so many varied copies: [1 + copies, features]."""
    spectra = [spectrum, *(varied(spectrum, rng) for _ in range(copies))]
    return np.stack([pooled(encoder, each[:, :frames]) for each in spectra])


@dataclass(frozen=True)
class Ridge:
    """A fitted regression onto an attribute's options.

    Attributes:
        mean: of the features.
        spread: of the features.
        weights: [features, options].
    """

    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, options: int) -> Ridge:
        """From features [clips, features] and labels [clips]; in the dual form, as clips are fewer than features."""
        mean, spread = features.mean(0), features.std(0) + 1e-6
        scaled = (features - mean) / spread
        kernel = scaled @ scaled.T / scaled.shape[1]
        dual = np.linalg.solve(kernel + PENALTY * np.eye(len(kernel)), np.eye(options)[labels] - 1 / options)
        return cls(mean, spread, scaled.T @ dual / scaled.shape[1])

    def values(self, features: np.ndarray) -> np.ndarray:
        """[clips, options]."""
        found: np.ndarray = ((features - self.mean) / self.spread) @ self.weights
        return found


@dataclass(frozen=True)
class Teacher:
    """What to answer about a clip, by attribute.

    Attributes:
        ridges: fitted to all clips, for clips that are not among them.
        temperatures: the values become probabilities as `softmax(values / temperature)`.
        others: by attribute and the clip's index: probabilities from a fit without the clip's group.
        accuracy: share of clips right by these.
    """

    ridges: dict[str, Ridge]
    temperatures: dict[str, float]
    others: dict[str, dict[int, np.ndarray]]
    accuracy: dict[str, float]

    @classmethod
    def taught(cls, features: Sequence[np.ndarray], labels: Sequence[dict[str, int]], groups: Sequence[str]) -> Teacher:
        """From features [copies, features], labels and the group of every clip."""
        ridges, temperatures, others, shares = {}, {}, {}, {}
        for name in sorted({name for known in labels for name in known}):
            options = len(attributes()[name].options)
            which = [index for index, known in enumerate(labels) if name in known]
            given = np.array([labels[index][name] for index in which])
            fold = np.array([_fold(groups[index]) for index in which])
            stacked = np.stack([features[index] for index in which])
            copies = stacked.shape[1]

            def fitted(chosen: np.ndarray, stacked=stacked, given=given, copies=copies, options=options) -> Ridge:
                return Ridge.fit(
                    stacked[chosen].reshape(-1, stacked.shape[-1]), np.repeat(given[chosen], copies), options
                )

            values = np.zeros((len(which), options))
            for number in range(FOLDS):
                values[fold == number] = fitted(fold != number).values(stacked[fold == number, 0])
            temperatures[name] = float(min(TEMPERATURES, key=lambda t: _surprise(values / t, given)))
            likely = _softmax(values / temperatures[name])
            others[name] = dict(zip(which, likely, strict=True))
            shares[name] = float((values.argmax(1) == given).mean())
            ridges[name] = fitted(np.ones(len(which), bool))
        return cls(ridges, temperatures, others, shares)

    def shares(self, features: np.ndarray, labels: dict[str, int], index: int | None = None) -> Shares:
        """What is to be said of a clip with features [copies, features]: all attributes the teacher knows.

        Where the truth is known it counts half; for one of the teacher's own clips (`index`) the other half is from a
        fit to other clips.
        """
        found: Shares = {}
        for name, ridge in self.ridges.items():
            if index is not None and index in self.others[name]:
                likely = self.others[name][index]
            else:
                likely = _softmax(ridge.values(features[:1]) / self.temperatures[name])[0]
            if name in labels:
                likely = (likely + np.eye(len(likely))[labels[name]]) / 2
            found[name] = torch.from_numpy(likely).float()
        return found


def _fold(group: str) -> int:
    return int(hashlib.sha256(group.encode()).hexdigest(), 16) % FOLDS


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    likely: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return likely


def _surprise(values: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(_softmax(values)[np.arange(len(labels)), labels] + 1e-9).mean())
