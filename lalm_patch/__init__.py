"""Causal tracing of large audio language models: when and where sound becomes words.

    import lalm_patch

    outcome = lalm_patch.trace("model=demo", "attr=gender", "granularity=token", "data.limit=8")
    outcome.dataset                                  # xarray.Dataset, labelled
    lalm_patch.open_result("outputs/demo-gender-...")  # a finished run, its checksum verified

`trace` takes the overrides of the command line and does the same: a run is started, gone on with, or shown again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lalm_patch.errors import (
    AudioError,
    CheckError,
    ConfigError,
    DataError,
    LalmPatchError,
    ModelError,
    StoreError,
)

if TYPE_CHECKING:
    from lalm_patch.config import compose
    from lalm_patch.run import RunOutcome, trace
    from lalm_patch.storage.run_store import open_result

__all__ = [
    "AudioError",
    "CheckError",
    "ConfigError",
    "DataError",
    "LalmPatchError",
    "ModelError",
    "RunOutcome",
    "StoreError",
    "compose",
    "open_result",
    "trace",
]

_WHERE = {
    "compose": "lalm_patch.config",
    "RunOutcome": "lalm_patch.run",
    "trace": "lalm_patch.run",
    "open_result": "lalm_patch.storage.run_store",
}


def __getattr__(name: str) -> Any:
    """Import the verbs when they are used: torch and transformers take seconds, a wrong option should not."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
