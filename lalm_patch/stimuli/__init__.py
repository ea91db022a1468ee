"""Clips and questions: what a model is given, before it is a model's own."""

from __future__ import annotations

from lalm_patch.stimuli.audio import MAX_SECONDS, SAMPLING_RATE, Waveform, read_audio
from lalm_patch.stimuli.corruption import CORRUPTIONS, corrupt, silence
from lalm_patch.stimuli.demo import load_demo
from lalm_patch.stimuli.prompt import Attribute, Prompt, PromptPart
from lalm_patch.stimuli.sakura import Record, check_records, data_fingerprint, load_sakura

__all__ = [
    "CORRUPTIONS",
    "MAX_SECONDS",
    "SAMPLING_RATE",
    "Attribute",
    "Prompt",
    "PromptPart",
    "Record",
    "Waveform",
    "check_records",
    "corrupt",
    "data_fingerprint",
    "load_demo",
    "load_sakura",
    "read_audio",
    "silence",
]
