"""Ways through the prompt, segment by segment: `audio-object-last` is what the object reads from the audio, passed on.

Each step is attention of one segment to an earlier one; the last but one is the relay.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lalm_patch.errors import ConfigError
from lalm_patch.interventions.patches import Intervention, Site
from lalm_patch.interventions.paths import Input, PathPatch, Receiver, Sender
from lalm_patch.interventions.segments import TEXT, check_edges, check_present

if TYPE_CHECKING:
    from lalm_patch.models import TokenTable

SETTING = "granularity.path"
STANDARD = "audio-object-last"


def check_way(name: str, segments: Sequence[str] | None = None) -> None:
    """Raises ConfigError for what is no way of two or three segments, or leads through ones that a prompt lacks.

    Args:
        name: the way.
        segments: of the prompt; None where it is not known yet.
    """
    parts = name.split("-")
    if len(parts) not in (2, 3) or TEXT in parts:
        raise ConfigError(
            f"{SETTING}={name}: expected two or three segments like audio-object-last, object-last or audio-last"
        )
    edges = [f"{one}-{other}" for one, other in itertools.pairwise(parts)]
    check_edges(edges, SETTING)
    if segments is not None:
        check_present(edges, segments, SETTING)


def way_cell(
    tokens: TokenTable, name: str, sending: Sequence[int], receiving: Sequence[int], site: Site = Site.ATTN
) -> Intervention:
    """The paths of a way: what some layers write at the relay, as attention of other layers reads it.

    Of three segments the relay's attention sends what it reads from the first of them, of two the relay sends all that
    it has at a site. The receivers are the relay's keys and values, in all heads, as the last segment sees them.

    Args:
        tokens: of the prompt.
        name: the way.
        sending: decoder layers of the senders.
        receiving: of the receivers.
        site: what sends; attention where there are three segments.

    Raises:
        ConfigError: the prompt has no such way.
    """
    check_way(name, tokens.segments)
    *first, relay, target = name.split("-")
    at, seen_by = tokens.positions(relay), tokens.positions(target)
    reads = tokens.positions(first[0]) if first else None
    senders = tuple(Sender(layer, at, site, reads=reads) for layer in sending)
    receivers = (Receiver(layer, at, kind, seen_by=seen_by) for layer in receiving for kind in (Input.KEY, Input.VALUE))
    return Intervention(path=PathPatch(senders, tuple(receivers)))
