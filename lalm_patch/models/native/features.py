"""From waveforms to the spectrograms the native models take, and from Whisper to a transcript."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalm_patch.errors import ModelError
from lalm_patch.stimuli import SAMPLING_RATE

HOP = 160  # samples per spectrogram frame


def whisper_features(extractor: Any, waveforms: Sequence[np.ndarray]) -> Tensor:
    """Log-mel spectrograms [clips, mel, frames] of clips padded to Whisper's window: DeSTA's `input_features`.

    Args:
        extractor: the checkpoint's WhisperFeatureExtractor.
        waveforms: float32 [samples] at 16 kHz each.

    Raises:
        ModelError: no clip, an empty one, or one that is longer than the window.
    """
    if not waveforms:
        raise ModelError("expected at least one clip, got none")
    for index, waveform in enumerate(waveforms):
        if waveform.ndim != 1 or not 0 < len(waveform) <= extractor.n_samples:
            raise ModelError(
                f"clip {index}: expected one channel of 1 to {extractor.n_samples} samples "
                f"({extractor.n_samples / SAMPLING_RATE:g} s), got {list(waveform.shape)}; cut or mix it down first"
            )
    batch = extractor(list(waveforms), sampling_rate=SAMPLING_RATE, padding="max_length", return_tensors="pt")
    features: Tensor = batch["input_features"]
    return features


def qwen_audio_frames(samples: int) -> int:
    """Encoder frames of a clip (Qwen-Audio: one per 20 ms, of whole spectrogram frames)."""
    return (samples // HOP - 1) // 2 + 1


def qwen_audio_tokens(samples: int) -> int:
    """Audio vectors of a clip without the two tags: frames are averaged in pairs."""
    return (qwen_audio_frames(samples) - 2) // 2 + 1


def qwen_audio_features(extractor: Any, waveforms: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Qwen-Audio's `input_features` [clips, mel, 2 * most frames] and `feature_lengths` [clips].

    The spectrogram is that of the padded clip, cut where the longest clip ends.

    Raises:
        ModelError: as `whisper_features`; or a clip too short for one audio vector.
    """
    features = whisper_features(extractor, waveforms)
    frames = [qwen_audio_frames(len(waveform)) for waveform in waveforms]
    for index, waveform in enumerate(waveforms):
        if frames[index] < 2:
            raise ModelError(f"clip {index}: expected at least {3 * HOP} samples, got {len(waveform)}")
    return {"input_features": features[..., : 2 * max(frames)], "feature_lengths": torch.tensor(frames)}


def transcribe(
    model_or_whisper: Any, extractor: Any, tokenizer: Any, waveform: np.ndarray, max_new_tokens: int | None = None
) -> str:
    """What Whisper understands: the transcript DeSTA is given with the audio, with Whisper's leading space.

    Args:
        model_or_whisper: a WhisperForConditionalGeneration, or a DeSTA model that carries the one it came with; its
            encoder is the model's audio tower.
        extractor: Whisper's feature extractor.
        tokenizer: Whisper's tokenizer; None for the one the DeSTA model carries.
        waveform: float32 [samples] at 16 kHz, at most one window long.
        max_new_tokens: longest transcript; None is Whisper's own setting (DeSTA2), DeSTA2.5 uses 128.

    Raises:
        ModelError: a clip that does not fit, or a model without a transcriber.
    """
    whisper = model_or_whisper
    if hasattr(model_or_whisper, "attach_transcriber"):
        whisper, own_tokenizer = model_or_whisper.transcriber
        tokenizer = own_tokenizer if tokenizer is None else tokenizer
    weight = whisper.get_encoder().conv1.weight
    whisper.to(device=weight.device, dtype=weight.dtype)  # the decoder follows the encoder, which moves with the model
    features = whisper_features(extractor, [waveform]).to(weight)
    room = whisper.config.max_target_positions - 4  # start, language, task, no timestamps
    config = copy.copy(whisper.generation_config)
    if max_new_tokens is not None:
        config.max_new_tokens, config.max_length = min(max_new_tokens, room), None  # both would make it complain
    with torch.no_grad():
        ids = whisper.generate(input_features=features, generation_config=config)
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
