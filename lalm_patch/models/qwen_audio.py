"""Qwen-Audio and Qwen-Audio-Chat: 25 audio positions per second and a tag on either side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lalm_patch.models import native
from lalm_patch.models.checkpoint import Checkpoint
from lalm_patch.models.family import Family
from lalm_patch.models.native_family import NativeFamily
from lalm_patch.stimuli import Prompt

TAGS = 2  # learned vectors overwrite the embeddings of <audio> and </audio>, too


class QwenAudio(NativeFamily):
    """The base model has no chat format: layout `flat`."""

    model_types = ("qwen",)
    layouts = ("chat", "user", "flat")
    positions_per_second = 25.0
    audio_tags = TAGS // 2
    frames_per_second = 50.0

    @classmethod
    def load(cls, checkpoint: Checkpoint, **weights: Any) -> tuple[PreTrainedModel, Family]:
        """As `Family.load`."""
        cls.check_type(checkpoint.folder)
        module, *rest = native.load_qwen_audio(checkpoint.folder, **weights)
        return module, cls(*rest)

    @classmethod
    def outline(cls, checkpoint: Checkpoint) -> tuple[PreTrainedModel, Family]:
        """As `Family.outline`."""
        cls.check_type(checkpoint.folder)
        module, *rest = native.outline_qwen_audio(checkpoint.folder)
        return module, cls(*rest)

    def build(self, prompt: Prompt, layout: str, response: str, audio_positions: int | None) -> native.NativePrompt:
        """ChatML, or the clip, the question and the phrase in a row."""
        builder = native.qwen_audio_base_prompt if layout == "flat" else native.qwen_audio_chat_prompt
        tokens = 1 if audio_positions is None else audio_positions - TAGS
        return builder(self.tokenizer, self.question(prompt, layout), response, audio_tokens=[tokens])

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        """Spectrogram cut where the clip ends, ids, and the places of the vectors."""
        features = native.qwen_audio_features(self.extractor, [waveform])
        positions = native.qwen_audio_tokens(len(waveform)) + TAGS
        return {**self._prompt(prompt, layout, positions).tensors(), **features}
