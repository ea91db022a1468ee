"""Qwen2-Audio (base and Instruct), and the demo model, which is one."""

from __future__ import annotations

import numpy as np
import torch

from lalm_patch.models.family import Family
from lalm_patch.stimuli import SAMPLING_RATE, Prompt


class Qwen2Audio(Family):
    """25 audio positions per second. The chat template adds its default system text, which stays in the prompt."""

    model_types = ("qwen2_audio",)
    layouts = ("chat", "user", "flat")
    hosted_task = "any-to-any"
    positions_per_second = 25.0
    frames_per_second = 50.0

    def _text(self, prompt: Prompt, layout: str, continuation: str = "") -> str:
        if layout == "flat":
            return f"<|audio_bos|><|AUDIO|><|audio_eos|>{prompt.flat_text}{continuation}"
        question = prompt.text if layout == "chat" else prompt.flat_text + continuation
        conversation = [
            {"role": "user", "content": [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": question}]}
        ]
        if layout == "chat":
            response = {"type": "text", "text": prompt.response + continuation}
            conversation.append({"role": "assistant", "content": [response]})
        return str(self.processor.apply_chat_template(conversation, continue_final_message=True, tokenize=False))

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        """Mel features of the clip and the ids with one `<|AUDIO|>` per audio position."""
        text = self._text(prompt, layout)
        batch = self.processor(text=[text], audio=[waveform], sampling_rate=SAMPLING_RATE, return_tensors="pt")
        return dict(batch)

    def text_ids(self, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        """Ids with a single `<|AUDIO|>`."""
        return list(self.tokenizer(self._text(prompt, layout, continuation))["input_ids"])
