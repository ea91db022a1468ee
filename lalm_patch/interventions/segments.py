"""Segments of a prompt by the roles of its tokens, and attention edges between them.

An edge `audio-last` is attention of the last position to the audio: what would flow from the one to the other. The
target `text` stands for all positions after the audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lalm_patch.errors import ConfigError
from lalm_patch.interventions.patches import Cut
from lalm_patch.models.roles import ROLES

if TYPE_CHECKING:
    from lalm_patch.models import TokenTable

SETTING = "granularity.edges"
TEXT = "text"
AUDIO = "audio"
AUDIO_TEXT = f"{AUDIO}-{TEXT}"
KNOCKOUTS = ("edge", "early_text_only")
"""Granularities that cut attention, and exchange no states."""


def edge_names(segments: Sequence[str]) -> tuple[str, ...]:
    """The edges of a prompt with these segments: from the audio to each and to all, and from each to the last."""
    from_audio = [f"{AUDIO}-{segment}" for segment in (*segments, TEXT)]
    return (*from_audio, *(f"{segment}-last" for segment in segments if segment != "last"))


def check_edges(names: Sequence[str], setting: str = SETTING) -> None:
    """Raises ConfigError for what is no edge between two segments, or an edge that causal attention does not have."""
    order = {role: place for place, role in enumerate(ROLES)} | {TEXT: len(ROLES)}
    for name in names:
        source, found, target = name.partition("-")
        if not found or source not in ROLES[1:] or target not in (*ROLES[2:], TEXT) or source == target:
            raise ConfigError(
                f"{setting}: {name!r} is no edge; expected SOURCE-TARGET like audio-last, object-last or "
                f"audio-text, of {', '.join(ROLES[1:])} and, as target, {TEXT}"
            )
        if target == TEXT and source != AUDIO:
            raise ConfigError(f"{setting}: {name!r}: a segment belongs to the text itself; expected audio-text")
        if order[source] > order[target] and "template" not in (source, target):
            raise ConfigError(f"{setting}: {name!r}: causal attention, {target} comes before {source}")


def edge(tokens: TokenTable, name: str, layer: int) -> Cut:
    """The cut of an edge in one layer.

    Raises:
        ConfigError: the prompt has no such segments, or none of the targets comes after a source.
    """
    check_edges([name])
    source, _, target = name.partition("-")
    text = set(tokens.text_positions)
    targets = tokens.text_positions if target == TEXT else tuple(p for p in tokens.positions(target) if p in text)
    sources = tokens.positions(source)
    if not targets or not sources or sources[0] > targets[-1]:
        raise ConfigError(f"granularity.edges: {name}: no token of the one comes before a token of the other")
    return Cut(layer, targets, sources)


def has_edge(name: str, segments: Sequence[str]) -> bool:
    """Whether a prompt with these segments has an edge."""
    source, _, target = name.partition("-")
    return source in (AUDIO, *segments) and target in (TEXT, *segments)


def check_present(names: Sequence[str], segments: Sequence[str], setting: str = SETTING) -> None:
    """Raises ConfigError for an edge that a prompt with these segments lacks."""
    if missing := [name for name in names if not has_edge(name, segments)]:
        known = ", ".join(edge_names(segments))
        raise ConfigError(f"{setting}: this prompt has no edge {', '.join(missing)}; it has {known}")
