"""The keyword of a decoder's cache of keys and values: transformers 5.24 calls `cache` what was `past_key_values`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lalm_patch.errors import ModelError

CACHE_KEYWORDS = ("cache", "past_key_values")
"""Newest first, for a function that still takes an old one, too."""


def cache_keyword(function: Callable[..., Any]) -> str:
    """The keyword under which a decoder's forward pass, or a class of outputs, takes the cache.

    Read off the signature and not off a version: a decoder whose code comes with its checkpoint keeps the old name
    under a new transformers.

    Raises:
        ModelError: it takes none.
    """
    parameters = inspect.signature(function).parameters
    for name in CACHE_KEYWORDS:
        if name in parameters:
            return name
    raise ModelError(
        f"{function.__qualname__}: expected a keyword for the cache of keys and values "
        f"({' or '.join(CACHE_KEYWORDS)}), got {', '.join(parameters)}; engine=direct runs without a cache"
    )
