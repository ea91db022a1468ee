"""Teach an encoder phones from synthesised speech, whose phones are known: what a language is, is in its phones, and a
few hundred real recordings are too few to find them.

Connectionist temporal classification (Graves et al. 2006) on the encoder's last layer, over all languages' IPA symbols.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from training.corpus import Clip
from training.hearing import states_of, windowed
from training.speech import LANGUAGES, synthesiser
from training.stages import Stage

RAREST = 20
"""A symbol that is rarer is left out of the labels."""


def spoken_phones(clips: Sequence[Clip]) -> list[list[str]]:
    """The phones of every clip by its text and language; none for what is not speech."""
    return [
        synthesiser().phones(clip.text, LANGUAGES[clip.labels["language"]][0]) if clip.text else [] for clip in clips
    ]


def as_numbers(phones: Sequence[Sequence[str]]) -> tuple[list[list[int]], int]:
    """Every symbol as a number from 1 (0 is CTC's blank), and how many numbers there are with the blank."""
    counts = Counter(symbol for clip in phones for symbol in clip)
    known = {symbol: place for place, symbol in enumerate(sorted(s for s, n in counts.items() if n >= RAREST), start=1)}
    return [[known[symbol] for symbol in clip if symbol in known] for clip in phones], len(known) + 1


class PhoneReader(nn.Module):
    """An encoder and a linear layer to phones."""

    def __init__(self, encoder: WhisperEncoder, symbols: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.d_model, symbols)

    def forward(self, spectra: Tensor) -> Tensor:
        """Normalised spectra [clips, mel bins, frames] to log-probabilities [positions, clips, symbols]."""
        logits: Tensor = self.head(states_of(self.encoder, spectra)[-1])
        return logits.log_softmax(-1).transpose(0, 1)


def train_phones(
    reader: PhoneReader,
    spectra: Sequence[Tensor],
    phones: Sequence[Sequence[int]],
    path: Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> Stage:
    """Train on clips, by spectra and the numbers of their phones, in a window as long as the longest varied clip."""
    which = [index for index, spelled in enumerate(phones) if spelled]
    frames = int(1.2 * max(spectra[index].shape[1] for index in which)) // 2 * 2

    def loss(stage: Stage) -> Tensor:
        chosen = [which[int(place)] for place in stage.rng.integers(len(which), size=batch)]
        windows = torch.stack([windowed(spectra[index], frames, stage.rng) for index in chosen])
        spelled = [torch.tensor(phones[index]) for index in chosen]
        lengths = torch.tensor([len(each) for each in spelled])
        found = reader(windows)
        held = torch.full((batch,), len(found))
        lost = functional.ctc_loss(found, torch.cat(spelled), held, lengths, reduction="none", zero_infinity=True)
        return (lost / lengths).mean()

    stage = Stage(path, reader, steps=steps, rate=rate, seed=seed)
    stage.run(loss)
    return stage
