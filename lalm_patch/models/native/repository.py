"""Published checkpoints as files: their configuration's fields, their tensors."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lalm_patch.errors import ModelError
from lalm_patch.models.files import check_weights, reading, weight_files


def field(config: dict[str, Any], name: str, folder: Path) -> Any:
    """A field the checkpoint's config.json must have.

    Raises:
        ModelError: it has not.
    """
    if name not in config:
        raise ModelError(f"{folder / 'config.json'}: expected a field {name!r}, found {', '.join(sorted(config))}")
    return config[name]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, memory-mapped: nothing is copied before it is used.

    Reads model.safetensors or its shards, else pytorch_model.bin or its shards (without executing what is in them).

    Raises:
        ModelError: no weights, or a shard is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_file(path)
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of one .safetensors, .bin or .pth file.

    Raises:
        ModelError: missing or damaged.
    """
    check_weights(path)
    with reading(path):
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
        else:  # files of torch before 1.6 are no archives and cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}; download it again")
    return tensors
