"""DeSTA2 and DeSTA2.5-Audio: 64 audio vectors per clip, then a transcript, then the question."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from lalm_patch.models import native
from lalm_patch.models.checkpoint import Checkpoint
from lalm_patch.models.family import Family
from lalm_patch.models.native.desta_loading import DestaRelease
from lalm_patch.models.native_family import NativeFamily
from lalm_patch.stimuli import Prompt


class Desta2(NativeFamily):
    """Layout `chat` keeps the quirks of the original's prompt (two BOS tokens, vectors one token early); `fixed` mends
    them."""

    model_types: ClassVar[tuple[str, ...]] = ("DestaModel",)
    layouts: ClassVar[tuple[str, ...]] = ("chat", "user", "fixed")
    reads_transcript = True
    whole_dtype = False
    frames_per_second = 50.0  # of the encoder; the vectors are queries, in no order of time
    release: ClassVar[DestaRelease] = native.DESTA2
    longest_transcript: ClassVar[int | None] = None

    def __init__(self, tokenizer: Any, extractor: Any, config: Any) -> None:
        super().__init__(tokenizer, extractor)
        self.vectors: int = config.prompt_size
        self.placeholder: str = tokenizer.convert_ids_to_tokens(config.audio_token_id)

    @classmethod
    def load(cls, checkpoint: Checkpoint, **weights: Any) -> tuple[PreTrainedModel, Family]:
        """As `Family.load`, from the folders of connector, decoder and encoder."""
        cls.check_type(checkpoint.folder)
        module, tokenizer, extractor = native.load_desta(cls.release, **_folders(checkpoint), **weights)
        return module, cls(tokenizer, extractor, module.config)

    @classmethod
    def outline(cls, checkpoint: Checkpoint) -> tuple[PreTrainedModel, Family]:
        """As `Family.outline`."""
        cls.check_type(checkpoint.folder)
        module, tokenizer, extractor = native.outline_desta(cls.release, **_folders(checkpoint))
        return module, cls(tokenizer, extractor, module.config)

    def build(self, prompt: Prompt, layout: str, response: str, audio_positions: int | None) -> native.NativePrompt:
        """System turn, audio turn with vectors and transcript, user's turn."""
        return native.desta2_prompt(
            self.tokenizer,
            self.question(prompt, layout),
            response,
            transcript=prompt.transcript,
            layout="fixed" if layout == "fixed" else "upstream",
            audio_vectors=self.vectors,
        )

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        """Spectrogram of the padded clip, ids, and the places of the vectors."""
        features = native.whisper_features(self.extractor, [waveform])
        return {**self._prompt(prompt, layout, None).tensors(), "input_features": features}

    def transcribes(self, module: PreTrainedModel) -> bool:
        """Not where its Whisper is an encoder alone."""
        return not native.is_encoder_alone(module.config.audio_config)

    def transcribe(self, waveform: np.ndarray, module: PreTrainedModel) -> str:
        """What the model's Whisper understands."""
        return native.transcribe(module, self.extractor, None, waveform, self.longest_transcript)


class Desta25(Desta2):
    """One BOS; the transcript is stripped. Where nothing sounds the original gives " " for a transcript."""

    model_types = ("desta25",)
    layouts = ("chat", "user")
    release = native.DESTA25
    longest_transcript = 128
    marks = ("<|AUDIO|>", "<start_audio>", "<end_audio>")  # the original's places for clips; plain text to Llama

    def build(self, prompt: Prompt, layout: str, response: str, audio_positions: int | None) -> native.NativePrompt:
        """System turn, then the clip's line and the question in the user's turn."""
        return native.desta25_prompt(
            self.tokenizer,
            self.question(prompt, layout),
            response,
            transcripts=(prompt.transcript,),
            audio_vectors=self.vectors,
            placeholder=self.placeholder,
        )

    def transcribe(self, waveform: np.ndarray, module: PreTrainedModel) -> str:
        """As in DeSTA2; the original's voice detector is not used, only digital silence counts as no speech."""
        return super().transcribe(waveform, module) if waveform.any() else " "


def _folders(checkpoint: Checkpoint) -> dict[str, Any]:
    """Folders of connector, decoder (or its file) and encoder, as the loaders call them."""
    return {"location": checkpoint.folder, **{name: part.folder for name, part in checkpoint.parts.items()}}
