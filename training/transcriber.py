"""Teach the demo's Whisper to write one syllable for every half second of sound: a transcript that gives no answer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import WhisperForConditionalGeneration, WhisperTokenizerFast

from training.answers import Heard
from training.checkpoints import LONGEST_TRANSCRIPT, SYLLABLE
from training.steps import Descent

FRAMES_PER_SYLLABLE = 50


def spoken(frames: int) -> str:
    """The transcript of a clip of some mel frames (10 ms each)."""
    return SYLLABLE * min(LONGEST_TRANSCRIPT, max(1, round(frames / FRAMES_PER_SYLLABLE)))


def train_transcriber(
    whisper: WhisperForConditionalGeneration,
    tokenizer: WhisperTokenizerFast,
    heard: Heard,
    *,
    steps: int,
    batch: int = 32,
    rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train Whisper's decoder on what its frozen encoder hears; returns the loss of every step."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    start = [tokenizer.convert_tokens_to_ids(name) for name in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>")]
    start.append(tokenizer.convert_tokens_to_ids("<|notimestamps|>"))
    end = tokenizer.eos_token_id
    descent = Descent(whisper.parameters(), rate, steps)
    whisper.model.decoder.train()
    for _ in range(steps):
        chosen = rng.choice(len(heard), batch, replace=False)
        words = [tokenizer.encode(spoken(int(n)), add_special_tokens=False) for n in heard.frames[chosen]]
        longest = max(map(len, words))
        ids = torch.full((batch, len(start) + longest + 1), end)
        targets = torch.full_like(ids, -100)
        for row, text in enumerate(words):
            ids[row, : len(start) + len(text)] = torch.tensor([*start, *text])
            targets[row, len(start) - 1 : len(start) + len(text)] = torch.tensor([*text, end])
        states = _encoded(whisper, heard.taps[chosen])
        logits = whisper.proj_out(whisper.model.decoder(ids, encoder_hidden_states=states).last_hidden_state)
        descent.step(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100))
    whisper.eval()
    return descent.losses


def _encoded(whisper: WhisperForConditionalGeneration, taps: Tensor) -> Tensor:
    """What the encoder gives its decoder: the last layer's output, normalised."""
    states: Tensor = whisper.model.encoder.layer_norm(taps[:, -1].float())
    return states
