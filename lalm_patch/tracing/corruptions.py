"""The corrupted run's input: what replaces the clip, as sound or, behind the projector, as audio embeddings."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lalm_patch.errors import AudioError, DataError
from lalm_patch.models import LALM, Encoding
from lalm_patch.settings import ON_EMBEDDINGS, CorruptionSettings
from lalm_patch.stimuli import SAMPLING_RATE, Partners, Prompt, Record, balanced_part, corrupt, fitted

COUNTERFACTUAL = "counterfactual"
ENCODINGS_KEPT = 4
MEAN_CLIPS = 32
"""Clips whose audio embeddings make the mean, balanced over the classes."""


class Corruption:
    """Makes a run's corrupted inputs.

    Args:
        lalm: the model.
        settings: which corruption.
        layout: of the prompts.
        records: the run's clips, all of them: partners and means come from them.
    """

    def __init__(self, lalm: LALM, settings: CorruptionSettings, layout: str, records: Sequence[Record] = ()) -> None:
        self.lalm = lalm
        self.name = settings.name
        self._settings, self._layout = settings, layout
        self._records = tuple(records)
        self._partners = Partners(self._records, settings.seed)
        self._known: OrderedDict[bytes, Encoding] = OrderedDict()
        self._example: Prompt | None = None

    def heard(self, record: Record, waveform: np.ndarray) -> np.ndarray:
        """What the corrupted run hears, float32 [samples] of the clip's length; the clip for `ON_EMBEDDINGS`.

        Raises:
            DataError: `counterfactual`, and no clip of the run has another answer.
        """
        if self.name in ON_EMBEDDINGS:
            return waveform
        if self.name == COUNTERFACTUAL:
            return fitted(self._partners.of(record).waveform(None), len(waveform))
        return corrupt(waveform, self.name)

    def about(self, record: Record) -> dict[str, str]:
        """What a sample's record says of its corruption."""
        return {"partner": self._partners.of(record).id} if self.name == COUNTERFACTUAL else {}

    def encode(self, record: Record, heard: np.ndarray, prompt: Prompt, clean: Encoding) -> Encoding:
        """The corrupted run's encoding.

        Args:
            record: the clip.
            heard: from `heard`.
            prompt: of the corrupted run.
            clean: the clean run's encoding.
        """
        if self.name == "gaussian":
            return self._overwritten(clean, self._with_noise(record, _audio(clean)))
        if self.name == "mean":
            self._example = self._example or prompt
            return self._overwritten(clean, self._mean.to(clean.inputs_embeds))
        tokens, inputs = self.lalm.inputs(heard, prompt, self._layout)
        key = digest_of(inputs)
        # With silence the corrupted input depends on the prompt and the clip's length only: clips share it.
        if key not in self._known:
            self._known[key] = self.lalm.embed(tokens, inputs)
            while len(self._known) > ENCODINGS_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _overwritten(self, clean: Encoding, audio: Tensor) -> Encoding:
        """The clean encoding with other audio embeddings [audio positions or 1, hidden]."""
        embeds = clean.inputs_embeds.clone()
        embeds[0, list(clean.tokens.audio_positions)] = audio.to(embeds)
        return replace(clean, inputs_embeds=embeds, overwritten=True)

    def _with_noise(self, record: Record, audio: Tensor) -> Tensor:
        """Noise relative to the embeddings' own spread over positions and units (Meng et al., arXiv 2202.05262)."""
        assert self._settings.scale is not None  # composed settings have one
        seed = hashlib.sha256(f"{self._settings.seed}:{record.id}".encode()).digest()
        noise = np.random.default_rng(list(seed)).standard_normal(tuple(audio.shape))
        spread = audio.double().std()
        return audio.double() + self._settings.scale * spread * torch.from_numpy(noise).to(audio.device)

    @cached_property
    def _mean(self) -> Tensor:
        """Mean audio embedding [hidden] over positions of `MEAN_CLIPS` clips, float64; every position weighs the same.

        Raises:
            DataError: no clip can be read.
        """
        assert self._example is not None
        total, positions = None, 0
        for _, waveform in balanced_clips(self.lalm, self._records, MEAN_CLIPS, self._settings.seed):
            audio = _audio(self.lalm.encode(waveform, self._example, self._layout)).double()
            total = audio.sum(0) if total is None else total + audio.sum(0)
            positions += len(audio)
        if total is None:
            raise DataError("corruption=mean: expected a readable clip to take the mean over, got none")
        return total / positions


def balanced_clips(lalm: LALM, records: Sequence[Record], count: int, seed: int) -> Iterator[tuple[Record, np.ndarray]]:
    """Clips of a run that stand for all of it, balanced over the classes, with what the model takes of their sound.

    Which ones, and their order, depends on the run's clips and the seed alone.
    """
    labels = {record.id: record.label for record in records}
    chosen = balanced_part(labels, sorted(set(labels.values())), count, seed)
    seconds = lalm.family.max_seconds
    longest = None if math.isinf(seconds) else int(seconds * SAMPLING_RATE)
    for record in sorted(records, key=lambda record: record.id):
        if record.id not in chosen:
            continue
        try:
            waveform = record.waveform(None)[:longest]
        except AudioError:
            continue  # an unusable clip is reported, or stops the run, where its own turn comes
        yield record, waveform


def _audio(encoding: Encoding) -> Tensor:
    """Audio embeddings [audio positions, hidden] of an encoding."""
    return encoding.inputs_embeds[0, list(encoding.tokens.audio_positions)]


def digest_of(inputs: dict[str, Tensor]) -> bytes:
    """Equal inputs, equal key: tells when a corrupted run was seen before."""
    digest = hashlib.blake2b()
    for name in sorted(inputs):
        digest.update(name.encode())
        digest.update(inputs[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
