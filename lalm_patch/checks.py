"""Checks: what a run verifies about itself, kept with its results."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from lalm_patch.errors import CheckError

log = logging.getLogger(__name__)

STATEMENTS = {
    "same_layout": "noise and silence of the same length give the same positions; if not, positions cannot be "
    "exchanged",
    "audio_reaches_model": "noise in place of silence moves the logits (relative); if not, the model answers without "
    "hearing: look at the audio encoder, the connector and the processor",
    "layers_keep_length": "every decoder layer's output has one state per position; if not, this architecture needs "
    "another site",
    "decoder_from_embeddings": "decoder, final norm and head on the embeddings give the whole model's probabilities; "
    "if not, the model computes something after or beside its decoder, use engine=direct",
    "restore_all": "restoring every position after the middle layer gives back the clean run; if not, layers share "
    "states past the residual stream and recovery rates do not mean what they say",
    "replay_at_load": "replay gives the direct engine's probabilities on random cells of noise against silence",
    "replay_in_float32": "in float32, replay gives the direct engine's probabilities on the same cells: the measure of "
    "how far this run is from float32 is itself exact",
    "site_adds_up": "attention (or all its heads) and MLP of every layer, taken from the other run at the last "
    "position, restore that run; if not, layers add something else besides, use site=resid",
    "noise_floor": "corrupted states patched into the corrupted run leave its probabilities; smaller differences mean "
    "nothing",
    "replay_equals_direct": "random cells computed again by the direct engine have the same probabilities; if not, use "
    "engine=direct",
    "remote_rows_equal_whole": "random cells computed again on the server, one at a time and from the audio, have "
    "the same probabilities; if not, batching changes this model there: run it here, backend=local",
    "lens_ends_at_the_answer": "the logit lens after the last layer is the model's own probability of the answer",
    "last_layer_identity": "patching the last layer restores the clean probability at the last position and nothing "
    "elsewhere",
    "own_states_identity": "a run's own states written back where they are (back-patching from the layer before) leave "
    "its probabilities",
}
"""What each check verifies, in words, and what to do if it does not hold; in the order in which a run makes them."""


@dataclass(frozen=True)
class Check:
    """One verified statement.

    Attributes:
        name: short identifier.
        passed: whether it holds.
        value: the measured number.
        bound: what it was compared with.
        statement: from `STATEMENTS`.
    """

    name: str
    passed: bool
    value: float
    bound: float
    statement: str

    @classmethod
    def at_most(cls, name: str, value: float, bound: float, statement: str | None = None) -> Check:
        """A check that holds if `value` is at most `bound` (NaN never is), with the name's statement."""
        return cls(name, bool(value <= bound), float(value), float(bound), statement or STATEMENTS[name])

    @classmethod
    def more_than(cls, name: str, value: float, bound: float, statement: str | None = None) -> Check:
        """A check that holds if `value` exceeds `bound` (NaN never does)."""
        return cls(name, bool(value > bound), float(value), float(bound), statement or STATEMENTS[name])

    def __str__(self) -> str:
        return f"{self.name}: {'passed' if self.passed else 'FAILED'} ({self.value:.3g}, bound {self.bound:.3g})"


def enforce(checks: Iterable[Check], on_failure: str) -> None:
    """Stop at failed checks, or only warn.

    Args:
        checks: the checks.
        on_failure: `stop` or `warn`.

    Raises:
        CheckError: a check failed and `on_failure` is `stop`; the message has all that failed.
    """
    failed = [check for check in checks if not check.passed]
    if not failed:
        return
    message = "; ".join(f"check {check} — {check.statement}" for check in failed)
    if on_failure == "stop":
        raise CheckError(f"{message}. To store the results all the same, marked as failed: on_failed_check=warn")
    log.warning("%s", message)


def worst(checks: Iterable[Check]) -> list[Check]:
    """One check per name, of checks that repeat for every sample: the one nearest to its bound or furthest beyond."""
    kept: dict[str, Check] = {}
    for check in checks:
        other = kept.get(check.name)
        if other is None or _margin(check) < _margin(other):
            kept[check.name] = check
    return list(kept.values())


def _margin(check: Check) -> float:
    distance = abs(check.bound - check.value)
    return distance if check.passed else -distance


def to_json(checks: Iterable[Check]) -> str:
    """The checks as JSON text, for a dataset's attributes."""
    return json.dumps([asdict(check) for check in checks])


def from_json(text: str) -> list[Check]:
    """The checks of a dataset's attribute."""
    return [Check(**entry) for entry in json.loads(text)]
