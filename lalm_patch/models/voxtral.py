"""Voxtral Mini and Small."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import soundfile
import torch

from lalm_patch.errors import ModelError
from lalm_patch.models.family import Family
from lalm_patch.stimuli import SAMPLING_RATE, Prompt


class Voxtral(Family):
    """375 audio positions per started 30 s; clips may be longer than one window.

    The processor cannot continue a turn. Layout `chat`: the response phrase's ids are appended to the user's turn,
    which gives the ids of the tokenizer's own prefix mode. Layout `user`: the phrase ends the user's turn, whose
    closing token is taken off.
    """

    model_types = ("voxtral",)
    layouts = ("chat", "user")
    hosted_task = "any-to-any"
    positions_per_second = 12.5
    frames_per_second = 50.0

    @property
    def max_seconds(self) -> float:
        """Voxtral cuts a long clip into windows itself."""
        return math.inf

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        """Mel features of all windows (30 s each, as published) and the ids with one `[AUDIO]` per audio position."""
        batch = self._processed(waveform, prompt, layout)
        ids = torch.tensor([self._ids(batch, prompt, layout)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": batch["input_features"]}

    def text_ids(self, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        """Ids with the audio positions of one window."""
        silence = np.zeros(SAMPLING_RATE, dtype=np.float32)
        return self._ids(self._processed(silence, prompt, layout, continuation), prompt, layout, continuation)

    def _processed(self, waveform: np.ndarray, prompt: Prompt, layout: str, continuation: str = "") -> Any:
        buffer = io.BytesIO()
        soundfile.write(buffer, waveform, SAMPLING_RATE, format="WAV", subtype="FLOAT")  # float: nothing is rounded
        audio = base64.b64encode(buffer.getvalue()).decode()
        question = prompt.text if layout == "chat" else prompt.flat_text + continuation
        content = [{"type": "audio", "base64": audio}, {"type": "text", "text": question}]
        extractor = self.processor.feature_extractor
        window = {"pad_to_multiple_of": extractor.n_samples, "max_source_positions": extractor.nb_max_frames}
        return self.processor.apply_chat_template([{"role": "user", "content": content}], processor_kwargs=window)

    def _ids(self, batch: Any, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        ids: list[int] = batch["input_ids"][0].tolist()
        if layout == "chat":
            return [*ids, *self.tokenizer.encode(prompt.response + continuation, add_special_tokens=False)]
        closing = self.tokenizer.decode(ids[-1:], skip_special_tokens=False)
        if closing != "[/INST]":
            raise ModelError(f"Voxtral's user turn was expected to end with [/INST], it ends with {closing!r}")
        return ids[:-1]
