"""What the adapters of the natively implemented models share: their prompts are built from pieces that know roles."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lalm_patch.models.family import Family
from lalm_patch.models.native import NativePrompt
from lalm_patch.stimuli import Prompt

ROLE_OF_KIND = {"response": "late", "system": "template", "question": "template"}  # other kinds are roles themselves


class NativeFamily(Family):
    """A tokenizer and Whisper's feature extractor; the prompt in pieces.

    Attributes:
        extractor: the feature extractor.
    """

    def __init__(self, tokenizer: Any, extractor: Any) -> None:
        super().__init__(processor=None)
        self._tokenizer = tokenizer
        self.extractor = extractor

    @property
    def tokenizer(self) -> Any:
        """The decoder's tokenizer."""
        return self._tokenizer

    @property
    def max_seconds(self) -> float:
        """Whisper's window in seconds."""
        return float(self.extractor.n_samples / self.extractor.sampling_rate)

    @property
    def mel_bins(self) -> int | None:
        """Bins of Whisper's spectrogram."""
        return int(self.extractor.feature_size)

    @abstractmethod
    def build(self, prompt: Prompt, layout: str, response: str, audio_positions: int | None) -> NativePrompt:
        """The prompt with `response` in the assistant's turn; `audio_positions` None for any number."""

    def text_ids(self, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        """Ids with some number of audio positions."""
        return list(self._prompt(prompt, layout, None, continuation).ids)

    def audio_mask(self, inputs: dict[str, torch.Tensor], module: PreTrainedModel) -> torch.Tensor:
        """The positions whose embeddings audio vectors overwrite."""
        return inputs["audio_mask"][0]

    def roles(self, inputs: dict[str, torch.Tensor], prompt: Prompt, layout: str) -> tuple[str, ...]:
        """Roles by the pieces the tokens come from."""
        built = self._prompt(prompt, layout, int(inputs["audio_mask"].sum()))
        roles = [ROLE_OF_KIND.get(kind, kind) for kind in built.kinds]
        first = roles.index("audio")
        return (*["pre"] * first, *roles[first:-1], "last")

    def _prompt(self, prompt: Prompt, layout: str, audio_positions: int | None, continuation: str = "") -> NativePrompt:
        """The prompt up to the end of the response phrase and what continues it."""
        if layout != "user":
            return self.build(prompt, layout, prompt.response + continuation, audio_positions)
        # The phrase ends the user's turn, which stays open: what the template puts after it is cut off.
        open_turn = self.build(replace(prompt, response=prompt.response + continuation), layout, "", audio_positions)
        end = max(index for index, kind in enumerate(open_turn.kinds) if kind == "late") + 1
        return NativePrompt(
            open_turn.ids[:end],
            open_turn.audio_mask[:end],
            open_turn.sources[:end],
            open_turn.pieces,
            open_turn.spans[:end],
        )

    @staticmethod
    def question(prompt: Prompt, layout: str) -> tuple[tuple[str, str], ...]:
        """The user's turn in pieces with roles; in layout `user` the response phrase belongs to it."""
        phrase = ((f" {prompt.response}", "late"),) if layout == "user" else ()
        return (*prompt.user_parts, *phrase)
