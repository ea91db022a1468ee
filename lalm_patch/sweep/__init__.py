"""Many runs in: which are launched, where, and how they ended; one table and one file of them out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from lalm_patch.sweep.collection import CollectedRun, collect, read_runs
    from lalm_patch.sweep.runs import RunStatus, State, status

__all__ = ["CollectedRun", "RunStatus", "State", "collect", "read_runs", "status"]

# Hydra looks for launchers here at every start, also for `--help`.
__getattr__, *_ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "collection": ["CollectedRun", "collect", "read_runs"],
        "runs": ["RunStatus", "State", "status"],
    },
)


def __dir__() -> list[str]:
    return __all__
