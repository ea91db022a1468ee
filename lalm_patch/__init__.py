"""Causal tracing of large audio language models: when and where sound becomes words.

    import lalm_patch

    outcome = lalm_patch.trace("model=demo", "attr=gender", "granularity=token", "data.limit=8")
    outcome.dataset                                  # xarray.Dataset, labelled
    lalm_patch.trace_clip("door.wav", question="What made this sound?", options=["door", "dog"], answer="door")
    lalm_patch.open_result("outputs/demo-gender-...")  # a finished run, its checksum verified

`trace` takes the overrides of the command line and does the same: a run is started, gone on with, or shown again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from lalm_patch.errors import (
    AudioError,
    BusyError,
    CheckError,
    ConfigError,
    DataError,
    HostError,
    LalmPatchError,
    ModelError,
    StoreError,
)

if TYPE_CHECKING:
    from lalm_patch.config import compose
    from lalm_patch.run import RunOutcome, trace, trace_clip
    from lalm_patch.settings import RunSettings
    from lalm_patch.storage import open_result

__all__ = [
    "AudioError",
    "BusyError",
    "CheckError",
    "ConfigError",
    "DataError",
    "HostError",
    "LalmPatchError",
    "ModelError",
    "RunOutcome",
    "RunSettings",
    "StoreError",
    "compose",
    "open_result",
    "trace",
    "trace_clip",
]

# The verbs are imported when they are used: torch and transformers take seconds, a wrong option should not.
__getattr__, *_ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["compose"],
        "run": ["RunOutcome", "trace", "trace_clip"],
        "settings": ["RunSettings"],
        "storage": ["open_result"],
    },
)


def __dir__() -> list[str]:
    return __all__
