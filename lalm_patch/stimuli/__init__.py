"""Recordings, tables of labels and settings in; clips and prompts, before they are a model's own, out."""

from __future__ import annotations

from lalm_patch.stimuli.audio import MAX_SECONDS, SAMPLING_RATE, Clip, Waveform, read_audio, read_clip
from lalm_patch.stimuli.benchmarks import load_listed, load_sakura_multi
from lalm_patch.stimuli.corruption import CORRUPTIONS, corrupt, silence
from lalm_patch.stimuli.demo import load_demo
from lalm_patch.stimuli.looks import Look, balanced_part, check_records, look_at, usable_part, within
from lalm_patch.stimuli.own_questions import load_table, one_clip
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
    "load_listed",
    "load_sakura",
    "load_sakura_multi",
    "load_table",
    "look_at",
    "one_clip",
    "read_audio",
    "read_clip",
    "silence",
    "usable_part",
    "within",
]
