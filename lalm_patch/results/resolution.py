"""Which clips a run can resolve: those whose gap between the two runs is well above a number's error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lalm_patch.checks import from_json
from lalm_patch.tracing.metrics import error_of_probabilities

REPEATED = ("noise_floor", "replay_at_load", "replay_equals_direct", "remote_rows_equal_whole")
"""Checks that compute the same twice: what they measured is rounding, where nothing else is known."""


@dataclass(frozen=True)
class Resolution:
    """How large a gap has to be.

    Attributes:
        error: of a probability; NaN where it is unknown.
        how: how it was measured.
        least: smallest gap of a clip that counts.
    """

    error: float
    how: str
    least: float


def resolution(found: np.ndarray, exact: np.ndarray, checks: str, min_gap: float | None) -> Resolution:
    """How large a gap has to be in a run.

    Args:
        found: probabilities of the answer [clip, number], as the run computed them.
        exact: the same in float32, NaN where none was computed.
        checks: the run's, as JSON.
        min_gap: smallest gap in units of the error; None: any gap will do.
    """
    known = np.isfinite(found) & np.isfinite(exact)
    if known.any():
        error = error_of_probabilities(found, exact)
        how = (
            f"root mean square at most, from {known.sum()} probabilities of {known.any(axis=1).sum()} clips in float32"
        )
    else:
        # What a failed check measured is a fault, and no rounding.
        repeated = [check for check in from_json(checks) if check.name in REPEATED and check.passed]
        error = max((check.value for check in repeated), default=np.nan)
        how = f"largest difference between two ways to compute the same ({', '.join(one.name for one in repeated)})"
    least = 0.0 if min_gap is None or np.isnan(error) else min_gap * error
    return Resolution(error, how, least)
