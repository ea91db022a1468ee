"""Windows of the audio along time: which audio positions, or frames of the audio encoder, are patched together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lalm_patch.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from lalm_patch.models import TokenTable

PADDING = "padding"
"""Name of the window of all positions after the clip's end: some models fill every clip up to 30 s."""


@dataclass(frozen=True)
class Spans:
    """How the audio is cut into windows.

    Attributes:
        seconds: length of a window; None to count positions instead.
        positions: audio positions in a window, where `seconds` is None.
    """

    seconds: float | None = 0.5
    positions: int | None = None

    def name(self, index: int) -> str:
        """Name of a window, the same for all clips: `0.5-1 s`, or `positions 4-7`."""
        if self.seconds is not None:
            return f"{index * self.seconds:g}-{(index + 1) * self.seconds:g} s"
        first = index * (self.positions or 1)
        last = first + (self.positions or 1) - 1
        return f"position {first}" if first == last else f"positions {first}-{last}"


def start_of(name: str) -> float:
    """Where a window with such a name begins, in seconds; NaN for the padding and for windows of positions."""
    return float(name.partition("-")[0]) if name.endswith(" s") else math.nan


def check_spans(spans: Spans) -> None:
    """Raises ConfigError unless windows are given in seconds, or in positions, and are not empty."""
    given = spans.seconds, spans.positions
    if (spans.seconds is None) == (spans.positions is None) or min(value for value in given if value is not None) <= 0:
        raise ConfigError(
            f"granularity=audio: expected granularity.seconds or granularity.positions, one of them and positive, got "
            f"seconds={spans.seconds}, positions={spans.positions}"
        )


def audio_windows(tokens: TokenTable, spans: Spans) -> dict[str, tuple[int, ...]]:
    """Audio positions of every window, by its name, in order; windows without a position are left out.

    Raises:
        ModelError: windows in seconds, and the model's audio positions have no known time.
    """
    positions = tokens.audio_positions
    if spans.seconds is None:
        size = spans.positions or 1
        return {spans.name(k): positions[k * size : (k + 1) * size] for k in range(-(-len(positions) // size))}
    clock = tokens.clock
    if clock is None or clock.rate is None:
        raise ModelError(
            f"granularity.seconds={spans.seconds:g}: this model's {len(positions)} audio positions are in no known "
            "order of time; use granularity.seconds=null granularity.positions=1, or site=tower"
        )
    found: dict[str, list[int]] = {}
    timed = len(positions) - 2 * clock.tags
    for index, position in enumerate(positions):
        start = min(max(index - clock.tags, 0), timed - 1) / clock.rate
        name = spans.name(int(start / spans.seconds + 1e-9)) if start < clock.seconds else PADDING
        found.setdefault(name, []).append(position)
    return {name: tuple(members) for name, members in found.items()}


def tower_windows(tokens: TokenTable, spans: Spans) -> dict[str, tuple[int, ...]]:
    """Frames of the audio encoder's layers in every window of the clip, by its name, in order.

    Raises:
        ModelError: the encoder's frame rate is not known, or windows are not given in seconds.
    """
    clock = tokens.clock
    if clock is None or clock.frame_rate is None or spans.seconds is None:
        why = "the frame rate of its audio encoder is not known" if spans.seconds else "granularity.seconds is null"
        raise ModelError(f"site=tower needs windows in seconds, and {why}; use site=embed")
    frames = int(clock.seconds * clock.frame_rate)
    count = max(1, math.ceil(clock.seconds / spans.seconds - 1e-9))
    edges = [round(k * spans.seconds * clock.frame_rate) for k in range(count + 1)]
    cut = {spans.name(k): tuple(range(edges[k], min(edges[k + 1], frames))) for k in range(len(edges) - 1)}
    return {name: window for name, window in cut.items() if window}
