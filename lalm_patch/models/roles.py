"""Roles of tokens: what each position of a prompt is there for, in the order in which roles occur.

pre         before the audio: identical in the clean and the corrupted run (causal attention)
audio       audio embeddings
transcript  a transcript the model is given together with the audio (DeSTA)
early       the question, up to the options
object      the listed options
late        after the options: the full stop, the response phrase
template    the chat template's own tokens after the audio
last        the final position, whose logits are read
"""

from __future__ import annotations

from collections.abc import Iterable

ROLES = ("pre", "audio", "transcript", "early", "object", "late", "template", "last")


def segments_of(roles: Iterable[str]) -> tuple[str, ...]:
    """The segments that tokens with these roles make up, in the order of `ROLES`."""
    found = set(roles)
    return tuple(role for role in ROLES if role in found)
