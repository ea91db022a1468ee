"""What the corrupted run hears instead of the clip."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lalm_patch.errors import ConfigError
from lalm_patch.stimuli.audio import Waveform


def silence(waveform: Waveform) -> Waveform:
    """Digital silence: exact zeros of the clip's length [samples] and dtype (arXiv 2603.13768, section 3)."""
    return np.zeros_like(waveform)


CORRUPTIONS: dict[str, Callable[[Waveform], Waveform]] = {"silence": silence}


def corrupt(waveform: Waveform, corruption: str) -> Waveform:
    """Apply a corruption by name. Raises ConfigError, listing the names there are, for an unknown one."""
    if corruption not in CORRUPTIONS:
        raise ConfigError(f"corruption: expected one of {', '.join(sorted(CORRUPTIONS))}, got {corruption!r}")
    return CORRUPTIONS[corruption](waveform)
