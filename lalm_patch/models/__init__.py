"""Checkpoint, clip and question in; decoder inputs and a table of tokens with roles out.

Nothing outside this package asks which model it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from lalm_patch.models.roles import ROLES

if TYPE_CHECKING:
    from lalm_patch.models.family import Family
    from lalm_patch.models.lalm import LALM, Encoding
    from lalm_patch.models.registry import FAMILIES, check_family
    from lalm_patch.models.tokens import TokenTable

__all__ = ["FAMILIES", "LALM", "ROLES", "Encoding", "Family", "TokenTable", "check_family"]

# Roles are wanted by whoever reads results; torch and transformers only by who loads a model.
__getattr__, *_ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "family": ["Family"],
        "lalm": ["LALM", "Encoding"],
        "registry": ["FAMILIES", "check_family"],
        "tokens": ["TokenTable"],
    },
)


def __dir__() -> list[str]:
    return __all__
