"""The families: which adapter serves a model."""

from __future__ import annotations

from lalm_patch.errors import ConfigError
from lalm_patch.models.desta import Desta2, Desta25
from lalm_patch.models.family import Family
from lalm_patch.models.generic import Generic
from lalm_patch.models.qwen2_audio import Qwen2Audio
from lalm_patch.models.qwen_audio import QwenAudio
from lalm_patch.models.voxtral import Voxtral
from lalm_patch.settings import RunSettings

FAMILIES: dict[str, type[Family]] = {
    "desta2": Desta2,
    "desta25": Desta25,
    "qwen_audio": QwenAudio,
    "qwen2_audio": Qwen2Audio,
    "voxtral": Voxtral,
    "generic": Generic,
}
"""Adapters by the name a model's YAML gives in `family`."""


def check_family(settings: RunSettings) -> None:
    """Raises ConfigError for a prompt layout or a transcript that the model's family has not: before it is loaded."""
    model = settings.model
    family, layout = FAMILIES[model.family], settings.prompt.layout or model.prompt_layout
    if layout not in family.layouts:
        setting = "model.prompt_layout" if settings.prompt.layout is None else "prompt.layout"
        raise ConfigError(
            f"{setting}={layout}: expected one of {', '.join(family.layouts)}, which family {model.family} has"
        )
    transcript = settings.transcript if settings.transcript is not None else model.transcript
    if transcript is not None and not family.reads_transcript:
        raise ConfigError(f"transcript={transcript}: {model.name} reads no transcript; leave it out")
