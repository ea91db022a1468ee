"""A model, clips and a grid in; for each clip its base runs, its cells and what was verified about them, out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from lalm_patch.tracing.metrics import Exclusion, recovery_rate, share_moved

if TYPE_CHECKING:
    from lalm_patch.tracing.remote import RemoteTracer
    from lalm_patch.tracing.samples import SampleTrace
    from lalm_patch.tracing.tracer import Tracer

__all__ = ["Exclusion", "RemoteTracer", "SampleTrace", "Tracer", "recovery_rate", "share_moved"]

# Metrics are wanted by whoever reads results; torch only by who traces.
__getattr__, *_ = lazy_loader.attach(
    __name__, submod_attrs={"remote": ["RemoteTracer"], "samples": ["SampleTrace"], "tracer": ["Tracer"]}
)


def __dir__() -> list[str]:
    return __all__
