"""An append-only file of checksummed records, readable after a kill at any instant.

    file    = record*                               (the first one is the head)
    record  = MAGIC | length of body, uint64 | BLAKE2b-128 of length and body | body
    body    = length of header, uint32 | header, JSON in UTF-8 | bytes of the arrays, in the header's order

Integers and arrays are little-endian. A record that is not whole, with no whole record after it, is what
a kill in the middle of an append leaves behind: it is cut away, with a warning. A bad record with a whole
one after it cannot come from a kill. That is damage, and nothing is changed or dropped without being asked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lalm_patch.errors import StoreError

log = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]

# No text file starts like this, line-ending conversion breaks it visibly, and its seventh byte is the format's version.
MAGIC = b"\x8aLPJR\n\x01\r"
_FRAME = struct.Struct("<8sQ16s")
_HEADER_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Entry:
    """Where one record lies: byte `start` up to, not including, byte `end`."""

    start: int
    end: int


class Journal:
    """Records in one file, each under a key of its own. One writer at a time: the caller holds the folder's lock.

    `head` describes what the records belong to. It is written when the file is new; of an existing file
    the head found there is kept, for the caller to compare.

    Raises StoreError if the file is damaged or is no journal.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], *, fsync: bool = True) -> None:
        self.path = path
        self._fsync = fsync
        self._dirty = False
        self._head_end = 0
        self.entries: dict[str, Entry] = {}
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self.head = self._scan()
            if self.head is None:
                self._head_end = self._write(_frame({"head": dict(head)}, {}), "the journal's head")
                self._dirty = False
                self.head = dict(head)
                if fsync:
                    sync_folder(path.parent)
        except BaseException:
            self._undo()
            self.close()
            raise

    def append(self, key: str, meta: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Store one record; when this returns, it survives a kill (and with fsync a power failure).

        Raises ValueError for a key that is there already, TypeError for what a record cannot hold, and
        StoreError if the disk refuses. After any exception the journal is as it was before.
        """
        if key in self.entries:
            raise ValueError(f"{self.path} already holds {key!r}")
        frame = _frame({"key": key, "meta": dict(meta)}, arrays)
        start = self._end
        try:
            end = self._write(frame, repr(key))
            # The commit in memory: an interrupt before this assignment undoes the write, one after it does not.
            self.entries[key] = Entry(start, end)
        except BaseException:
            self._undo()
            raise
        self._dirty = False

    def read(self, key: str) -> tuple[dict[str, Any], dict[str, Array]]:
        """The meta and arrays of `key`, checked again. Raises KeyError, or StoreError if they changed on disk."""
        entry = self.entries[key]
        body = _body(self._read_at(entry.start, entry.end - entry.start), 0)
        if body is None:
            raise StoreError(f"{self.path}: the record of {key!r} was altered while the file was open")
        return _content(body)

    def close(self) -> None:
        """Free the file; closing twice is allowed."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    @property
    def _end(self) -> int:
        return next(reversed(self.entries.values())).end if self.entries else self._head_end

    def _scan(self) -> dict[str, Any] | None:
        """Index the whole records, cut a torn tail, and return the head, or None if there is none yet."""
        head: dict[str, Any] | None = None
        size, position = os.fstat(self._fd).st_size, 0
        while position < size:
            frame = self._read_at(position, _FRAME.size)
            length = _FRAME.unpack(frame)[1] if len(frame) == _FRAME.size else size
            body = _body(frame + self._read_at(position + _FRAME.size, min(length, size)), 0)
            if body is None:
                break
            end = position + _FRAME.size + len(body)
            header, _ = _header(body)
            if head is None:
                if "head" not in header:
                    raise StoreError(
                        f"{self.path}: the first record is not a head, its beginning is lost. {_NO_REPAIR}"
                    )
                head, self._head_end = header["head"], end
            elif header["key"] in self.entries:
                raise StoreError(
                    f"{self.path}: {header['key']!r} is stored twice, so two processes wrote here. {_NO_REPAIR}"
                )
            else:
                self.entries[header["key"]] = Entry(position, end)
            position = end
        if position < size:
            self._cut_torn_tail(position, size)
        return head

    def _cut_torn_tail(self, position: int, size: int) -> None:
        tail = self._read_at(position, size - position)
        later = sum("key" in _header(body)[0] for _, _, body in _records(tail))
        if later:
            repair = (
                "Put back an intact copy of the file; or keep the readable samples and compute the others again with "
                f'`python -c "from lalm_patch.storage.run_store import repair; repair({str(self.path.parent)!r})"`; '
                "or remove the folder to start over."
            )
            raise StoreError(
                f"{self.path} is damaged at byte {position} of {size}, with whole records after it. "
                f"{len(self.entries) + later} stored samples are readable; nothing was changed. "
                + (repair if self._head_end else _NO_REPAIR)
            )
        # Zeros are a tail too: after a power failure a file may have its new length without its new bytes.
        if position == 0 and not MAGIC.startswith(tail[: len(MAGIC)]) and any(tail):
            raise StoreError(f"{self.path} is not a journal of this version of lalm_patch. {_NO_REPAIR}")
        os.ftruncate(self._fd, position)
        log.warning("%s: cut off %d bytes of an append that was interrupted", self.path, size - position)

    def _write(self, frame: bytes, what: str) -> int:
        """Write at the end of the file and return the new end."""
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        if self._dirty:
            os.ftruncate(self._fd, self._end)
        found = os.fstat(self._fd)
        if found.st_nlink == 0 or found.st_size != self._end:
            raise StoreError(
                f"{self.path} was removed, replaced or changed by another process while this run was writing it. "
                "Let only one process use the folder, then run the same command again."
            )
        self._dirty = True
        try:
            write_all(self._fd, frame)
            if self._fsync:
                os.fsync(self._fd)
        except OSError as error:
            raise storage_error(error, self.path, f"storing {what} ({len(frame)} bytes)") from error
        return found.st_size + len(frame)

    def _undo(self) -> None:
        # If the disk refuses this too, the file stays marked dirty: the next append, or the next start, cuts the tail.
        if self._dirty and self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
                self._dirty = False

    def _read_at(self, position: int, count: int) -> bytes:
        if self._fd < 0:
            raise ValueError(f"{self.path} is closed")
        parts = []
        while count > 0 and (part := os.pread(self._fd, count, position)):
            parts.append(part)
            position += len(part)
            count -= len(part)
        return b"".join(parts)


_NO_REPAIR = "Nothing was changed. Put back an intact copy of the file, or remove the folder to start over."


def snapshot(path: Path) -> tuple[dict[str, Any] | None, dict[str, tuple[dict[str, Any], dict[str, Array]]]]:
    """The head and the whole records (meta and arrays by key) of a journal that another process may be writing.

    Nothing is changed; what is not whole is left out. The head is None, and there are no records, where there is no
    journal yet.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, {}
    head: dict[str, Any] | None = None
    found: dict[str, tuple[dict[str, Any], dict[str, Array]]] = {}
    for start, _, body in _records(data):
        header, _ = _header(body)
        if start == 0 and "head" in header:
            head = header["head"]
        elif "key" in header:
            found[header["key"]] = _content(body)
    return head, found if head is not None else {}


def salvage(path: Path) -> int:
    """Rewrite a damaged journal with its whole records only; the damaged file is kept beside it as `*.damaged`.

    Returns how many samples were kept. Raises StoreError if the head, which says what the samples belong to, is lost.
    """
    data = path.read_bytes()
    frames: dict[str, bytes] = {}
    head = b""
    for start, end, body in _records(data):
        header, _ = _header(body)
        if "head" in header:
            head = head or data[start:end]
        else:
            frames.setdefault(header["key"], data[start:end])
    if not head:
        raise StoreError(f"{path}: the head is lost, so what its samples were made with is unknown. {_NO_REPAIR}")
    names = (path.with_suffix(f".damaged{number or ''}") for number in itertools.count())
    write_file(next(name for name in names if not name.exists()), data)
    beside = path.with_suffix(".tmp")
    write_file(beside, head + b"".join(frames.values()))
    os.replace(beside, path)
    sync_folder(path.parent)
    return len(frames)


def dump_json(value: Any) -> bytes:
    """JSON as UTF-8 that keeps any `str`: lone surrogates too, which `\\u` escapes would join into other characters."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def load_json(data: bytes) -> Any:
    """The inverse of `dump_json`. Raises ValueError."""
    return json.loads(data.decode("utf-8", "surrogatepass"))


def write_all(fd: int, data: bytes) -> None:
    """os.write until everything is written: one call may take only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_file(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """Write a whole file, replacing one that is there (not atomic: for temporaries)."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(fd, data)
        if fsync:
            os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file beside and rename it: at `path` there is the old content or the new one, never a part."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write_file(beside, data)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in `folder` survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room, on the disk or in a quota: no defect, wherever it comes up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(error: OSError, path: Path, doing: str) -> StoreError:
    """The StoreError that explains an OSError of a write."""
    advice = {
        errno.ENOSPC: "Free some space on that disk",
        errno.EDQUOT: "Free some of your quota",
        errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`)",
    }.get(error.errno or 0, "Repair the cause")
    return StoreError(
        f"{path}: {os.strerror(error.errno) if error.errno else error} while {doing}. What was stored before is safe. "
        f"{advice}, then run the same command again: it goes on where it stopped."
    )


def _frame(header: dict[str, Any], arrays: Mapping[str, Array]) -> bytes:
    little = {name: _little_endian(name, array) for name, array in arrays.items()}
    header["arrays"] = [[name, array.dtype.str, array.shape] for name, array in little.items()]
    text = dump_json(header)
    body = b"".join([_HEADER_LENGTH.pack(len(text)), text, *(array.tobytes() for array in little.values())])
    return _FRAME.pack(MAGIC, len(body), _digest(body)) + body


def _little_endian(name: str, array: Array) -> Array:
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(
            f"array {name!r} has dtype {array.dtype}: a record holds booleans, integers and floats of at most 64 bits; "
            "put text into meta"
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _header(body: bytes) -> tuple[dict[str, Any], int]:
    """The header, and the position in `body` where the arrays start."""
    (length,) = _HEADER_LENGTH.unpack_from(body)
    end = _HEADER_LENGTH.size + length
    header: dict[str, Any] = load_json(body[_HEADER_LENGTH.size : end])
    return header, end


def _content(body: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """Meta and arrays of a whole record."""
    header, position = _header(body)
    arrays: dict[str, Array] = {}
    for name, dtype, shape in header["arrays"]:
        count = int(np.prod(shape, dtype=np.int64))
        # A copy: frombuffer is read-only, and would keep the whole record alive for one of its arrays.
        arrays[name] = np.frombuffer(body, dtype, count, position).reshape(shape).copy()
        position += arrays[name].nbytes
    return header["meta"], arrays


def _digest(body: bytes) -> bytes:
    digest = hashlib.blake2b(struct.pack("<Q", len(body)), digest_size=16)
    digest.update(body)
    return digest.digest()


def _body(data: bytes, position: int) -> bytes | None:
    """The body of the whole record at `position`, or None if there is none."""
    if len(data) < position + _FRAME.size:
        return None
    magic, length, digest = _FRAME.unpack_from(data, position)
    start = position + _FRAME.size
    if magic != MAGIC or length > len(data) - start:
        return None
    body = data[start : start + length]
    return body if _digest(body) == digest else None


def _records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Start, end and body of every whole record anywhere in `data`."""
    position = data.find(MAGIC)
    while position >= 0:
        body = _body(data, position)
        end = position + 1
        if body is not None:
            end = position + _FRAME.size + len(body)
            yield position, end, body
        position = data.find(MAGIC, end)
