"""Published checkpoints as files: reading their tensors, comparing their keys."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lalm_patch.errors import ModelError

SHOWN_KEYS = 10


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        ModelError: not readable as JSON.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: not valid JSON ({error})") from error
    return config


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
    for path in _weight_files(folder):
        tensors |= read_file(path)
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of one .safetensors, .bin or .pth file.

    Raises:
        ModelError: missing or damaged.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; the checkpoint is incomplete, download it again")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
        else:  # files of torch before 1.6 are no archives and cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # safetensors and pickle have errors of their own for a damaged file
        raise ModelError(f"{path}: cannot be read as weights ({type(error).__name__}: {error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / shard for shard in shards]
        if (folder / single).is_file():
            return [folder / single]
    raise ModelError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or an index of shards")


def check_keys(found: Iterable[str], expected: Iterable[str], where: str, ignorable: tuple[str, ...] = ()) -> None:
    """Exactly the expected keys, apart from those that end with an ignorable suffix.

    Raises:
        ModelError: names what is missing and what is too much.
    """
    expected = set(expected)
    surplus = {key for key in found if not key.endswith(ignorable)} - expected
    missing = expected - set(found)
    if missing or surplus:
        complaints = [_listed("missing", missing)] * bool(missing) + [_listed("unexpected", surplus)] * bool(surplus)
        raise ModelError(f"{where}: not a checkpoint of this architecture and size: {'; '.join(complaints)}")


def check_shapes(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Every tensor has the shape the model needs.

    Raises:
        ModelError: names those that have not.
    """
    wrong = [
        f"{key} is {list(found[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if found[key].shape != tensor.shape
    ]
    if wrong:
        raise ModelError(f"{where}: {len(wrong)} tensors of another shape: {'; '.join(wrong[:SHOWN_KEYS])}")


def _listed(what: str, keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:SHOWN_KEYS])
    return f"{len(keys)} {what} keys: {shown}" + (", ..." if len(keys) > SHOWN_KEYS else "")
