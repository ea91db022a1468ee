"""A GGUF file as a file: its metadata, and where in it each tensor is. Nothing of a tensor is read.

The libraries that read GGUF believe its counts and lengths: a cut file gives shorter arrays, a changed count is counted
to its end. So every length is compared with the size of the file before it is followed.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lalm_patch.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counted in 32 bits; nothing writes it any more
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT, _MOST_DIMENSIONS = 32, 4
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 30: (1, 2)},  # float32, float16, bfloat16
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18), 39: (32, 17)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)},
    **{16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 21: (256, 110), 22: (256, 82), 23: (256, 136)},
    **{29: (256, 56), 34: (256, 54), 35: (256, 66)},
}
"""Numbers in a block and bytes it takes, by ggml's number of the type."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's place in the file.

    Attributes:
        shape: as torch writes it, the slowest dimension first.
        type: ggml's number of how its numbers are stored.
        offset: first byte in the file.
        row_bytes: what one row (the last dimension) takes.
    """

    shape: tuple[int, ...]
    type: int
    offset: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says of itself.

    Attributes:
        path: the file.
        metadata: by key: numbers, texts, arrays of numbers, lists of texts.
        tensors: by name, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether a file that can be read begins as GGUF does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Metadata and table of tensors of a file, every tensor's bytes being there.

    Raises:
        ModelError: it is no GGUF, of another version, cut, or its counts do not fit its size.
    """
    if not is_gguf(path):
        raise ModelError(
            f"{path}: no GGUF file (those begin with the letters GGUF); give one, or a checkpoint's folder"
        )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read(path, data)
        except (ValueError, struct.error, RecursionError) as error:  # texts that are none are ValueErrors, too
            raise ModelError(
                f"{path}: cannot be read as GGUF ({error}); it was cut or changed, download it again"
            ) from error


def _read(path: Path, data: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(data, len(MAGIC))
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, expected {' or '.join(map(str, _VERSIONS))} in little-endian")
    tensors, keys = cursor.count(24, "tensors"), cursor.count(13, "metadata")
    metadata = {cursor.text(): cursor.value() for _ in range(keys)}
    table = [(cursor.text(), *cursor.place()) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its general.alignment is {alignment!r}")
    begin = -(-cursor.place_now // alignment) * alignment
    found = {name: _stored(name, shape, kind, begin + offset) for name, shape, kind, offset in table}
    if len(found) != tensors:
        raise ValueError("two of its tensors have the same name")
    for name, tensor in found.items():
        if tensor.offset + tensor.bytes > len(data):
            raise ValueError(f"it ends at byte {len(data)}, and {name} would end at {tensor.offset + tensor.bytes}")
    return GGUFFile(path, metadata, found)


def _stored(name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    if kind not in _BLOCKS:
        raise ValueError(f"{name} is stored as type {kind}, which is not known here")
    numbers, size = _BLOCKS[kind]
    if not shape or shape[-1] % numbers:
        raise ValueError(f"{name} is of shape {list(shape)}, in blocks of {numbers}")
    return StoredTensor(shape, kind, offset, shape[-1] // numbers * size)


class _Cursor:
    """Reads on from a place in the file; raises ValueError where the file ends before what it says."""

    def __init__(self, data: mmap.mmap, start: int) -> None:
        self._data = data
        self.place_now = start

    def _step(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        start = self.place_now
        if size > len(self._data) - start:
            raise ValueError(f"{size} bytes are expected at byte {start}, and it has {len(self._data)}")
        self.place_now += size
        return start

    def number(self, form: str) -> Any:
        form = f"<{form}"
        return struct.unpack_from(form, self._data, self._step(struct.calcsize(form)))[0]

    def count(self, smallest: int, what: str) -> int:
        """How many things of at least so many bytes each follow."""
        found: int = self.number("Q")
        if found * smallest > len(self._data):
            raise ValueError(f"it says that it has {found} {what}, and has {len(self._data)} bytes")
        return found

    def text(self) -> str:
        size = self.number("Q")
        start = self._step(size)
        return self._data[start : start + size].decode("utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind != _ARRAY:
            return self._one(kind)
        inner = self.number("I")
        if inner in _FIXED:
            count = self.count(struct.calcsize(_FIXED[inner]), "values of a list")
            kind_of_all = np.dtype(f"<{_FIXED[inner]}")
            return np.frombuffer(self._data, kind_of_all, count, self._step(count * kind_of_all.itemsize)).copy()
        if inner != _STRING:
            raise ValueError(f"a list of values of type {inner} at byte {self.place_now}")
        return self._texts(self.count(8, "values of a list"))

    def _texts(self, count: int) -> list[str]:
        """As `text`, so many times: vocabularies have a hundred thousand, and are read several times in a run."""
        data, place, end, length = self._data, self.place_now, len(self._data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (size,) = length(data, place)  # raises where the file ends
            place += 8
            if size > end - place:
                raise ValueError(f"{size} bytes are expected at byte {place}, and it has {end}")
            found.append(data[place : place + size].decode("utf-8"))
            place += size
        self.place_now = place
        return found

    def _one(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind not in _FIXED:
            raise ValueError(f"a value of type {kind} at byte {self.place_now}")
        return self.number(_FIXED[kind])

    def place(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset in the data of one tensor."""
        dimensions = self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions at byte {self.place_now}")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return shape[::-1], self.number("I"), self.number("Q")
