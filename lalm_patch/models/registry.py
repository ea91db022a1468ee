"""The families: which adapter serves a model."""

from __future__ import annotations

from lalm_patch.models.desta import Desta2, Desta25
from lalm_patch.models.family import Family
from lalm_patch.models.generic import Generic
from lalm_patch.models.qwen2_audio import Qwen2Audio
from lalm_patch.models.qwen_audio import QwenAudio
from lalm_patch.models.voxtral import Voxtral

FAMILIES: dict[str, type[Family]] = {
    "desta2": Desta2,
    "desta25": Desta25,
    "qwen_audio": QwenAudio,
    "qwen2_audio": Qwen2Audio,
    "voxtral": Voxtral,
    "generic": Generic,
}
"""Adapters by the name a model's YAML gives in `family`."""
