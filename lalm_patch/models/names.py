"""Names of the families, known without torch: a misspelt one is refused before anything is imported."""

from __future__ import annotations

import sys

BUILT_IN = ("desta2", "desta25", "qwen_audio", "qwen2_audio", "voxtral", "generic")


def family_names() -> tuple[str, ...]:
    """Families there are: the package's own and, where somebody imported the registry to add to it, those there."""
    registry = sys.modules.get("lalm_patch.models.registry")
    return BUILT_IN if registry is None else tuple(registry.FAMILIES)
