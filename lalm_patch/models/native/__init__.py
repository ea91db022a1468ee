"""DeSTA2, DeSTA2.5-Audio and Qwen-Audio as modules of transformers 5, read from their published checkpoints.

Their own code runs on older versions of transformers only, so it is not used: nothing here executes code from a hub.
"""

from __future__ import annotations

from lalm_patch.models.native.audio_lm import NativeAudioLM
from lalm_patch.models.native.desta_loading import (
    DESTA2,
    DESTA25,
    is_encoder_alone,
    load_desta,
    load_desta2,
    load_desta25,
    outline_desta,
)
from lalm_patch.models.native.features import (
    qwen_audio_features,
    qwen_audio_frames,
    qwen_audio_tokens,
    transcribe,
    whisper_features,
)
from lalm_patch.models.native.prompts import (
    NativePrompt,
    Piece,
    desta2_prompt,
    desta25_prompt,
    qwen_audio_base_prompt,
    qwen_audio_chat_prompt,
)
from lalm_patch.models.native.qwen_audio_loading import load_qwen_audio, outline_qwen_audio

__all__ = [
    "DESTA2",
    "DESTA25",
    "NativeAudioLM",
    "NativePrompt",
    "Piece",
    "desta2_prompt",
    "desta25_prompt",
    "is_encoder_alone",
    "load_desta",
    "load_desta2",
    "load_desta25",
    "load_qwen_audio",
    "outline_desta",
    "outline_qwen_audio",
    "qwen_audio_base_prompt",
    "qwen_audio_chat_prompt",
    "qwen_audio_features",
    "qwen_audio_frames",
    "qwen_audio_tokens",
    "transcribe",
    "whisper_features",
]
