"""Recordings, tables of labels and settings in; clips and prompts, before they are a model's own, out."""

from __future__ import annotations

from lalm_patch.stimuli.audio import MAX_SECONDS, SAMPLING_RATE, Clip, Waveform, read_audio, read_clip
from lalm_patch.stimuli.corruption import CORRUPTIONS, corrupt, silence
from lalm_patch.stimuli.demo import load_demo
from lalm_patch.stimuli.looks import Look, balanced_part, check_records, look_at, within
from lalm_patch.stimuli.partners import Partners, fitted
from lalm_patch.stimuli.prompt import Attribute, Prompt, PromptPart
from lalm_patch.stimuli.records import Record, data_fingerprint, grouped
from lalm_patch.stimuli.sakura import load_sakura

__all__ = [
    "CORRUPTIONS",
    "MAX_SECONDS",
    "SAMPLING_RATE",
    "Attribute",
    "Clip",
    "Look",
    "Partners",
    "Prompt",
    "PromptPart",
    "Record",
    "Waveform",
    "balanced_part",
    "check_records",
    "corrupt",
    "data_fingerprint",
    "fitted",
    "grouped",
    "load_demo",
    "load_sakura",
    "look_at",
    "read_audio",
    "read_clip",
    "silence",
    "within",
]
