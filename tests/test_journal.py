from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lalm_patch.errors import StoreError
from lalm_patch.storage.journal import Journal, salvage

HEAD = {"identity": {"config": "é"}}
ROWS: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "a": ({"n": 1}, {"x": np.array([1.5, np.nan, -np.inf], np.float32)}),
    "β": ({}, {"x": np.zeros((0, 2)), "y": np.array(True)}),
    "c": ({"text": "\0"}, {"x": np.arange(4, dtype=">i2")}),
}


def written(path: Path, rows: dict[str, Any] = ROWS) -> bytes:
    journal = Journal(path, HEAD, fsync=False)
    for key, (meta, arrays) in rows.items():
        if key not in journal.entries:
            journal.append(key, meta, arrays)
    journal.close()
    return path.read_bytes()


def boundaries(path: Path) -> list[int]:
    """Ends of the head and of each record."""
    journal = Journal(path, HEAD, fsync=False)
    journal.close()
    entries = list(journal.entries.values())
    return [entries[0].start, *(entry.end for entry in entries)]


def holds(journal: Journal, keys: list[str]) -> None:
    assert list(journal.entries) == keys
    for key in keys:
        meta, arrays = journal.read(key)
        wanted_meta, wanted = ROWS[key]
        assert meta == wanted_meta
        assert {name: array.tolist() for name, array in arrays.items() if name != "x"} == {
            name: array.tolist() for name, array in wanted.items() if name != "x"
        }
        np.testing.assert_array_equal(arrays["x"], wanted["x"])


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    """The file, built by hand from the module's description."""

    def record(header: dict[str, Any], raw: bytes) -> bytes:
        text = json.dumps(header, ensure_ascii=False).encode()
        body = struct.pack("<I", len(text)) + text + raw
        length = struct.pack("<Q", len(body))
        return b"\x8aLPJR\n\x01\r" + length + hashlib.blake2b(length + body, digest_size=16).digest() + body

    rows = {"é": ({"k": None}, {"p": np.array([[1.0, np.nan]], ">f4"), "q": np.array([True])})}
    expected = record({"head": HEAD, "arrays": []}, b"") + record(
        {"key": "é", "meta": {"k": None}, "arrays": [["p", "<f4", [1, 2]], ["q", "|b1", [1]]]},
        bytes.fromhex("0000803f 0000c07f 01"),
    )
    assert written(tmp_path / "journal.bin", rows) == expected


anything = st.text(st.characters(exclude_categories=()))  # NUL and lone surrogates too
number_types = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(endianness="?"), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes()
).filter(lambda dtype: dtype.itemsize <= 8)
arrays_ = st.dictionaries(anything, hnp.arrays(number_types, hnp.array_shapes(min_dims=0, min_side=0)), max_size=3)
metas = st.dictionaries(
    anything,
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), anything),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(anything, st.tuples(metas, arrays_), max_size=3))
def test_records_come_back_bit_for_bit(rows: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder, "journal.bin"), rows)
        journal = Journal(Path(folder, "journal.bin"), {}, fsync=False)
        assert journal.head == HEAD
        assert list(journal.entries) == list(rows)
        for key, (meta, arrays) in rows.items():
            found_meta, found = journal.read(key)
            assert found_meta == meta
            assert list(found) == list(arrays)
            for name, array in arrays.items():
                assert found[name].shape == array.shape
                assert found[name].dtype == array.dtype.newbyteorder("<")
                assert found[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()
                assert found[name].flags.writeable
        journal.close()


def test_cut_at_every_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.bin"
    whole = written(path)
    ends = boundaries(path)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        caplog.clear()
        journal = Journal(path, HEAD, fsync=False)
        holds(journal, [key for key, end in zip(ROWS, ends[1:], strict=True) if end <= cut])
        journal.close()
        torn = cut - max(end for end in [0, *ends] if end <= cut)
        assert [f"cut off {torn} bytes" in text for text in caplog.messages] == [True] * (torn > 0)
        assert written(path) == whole, f"cut at {cut}: adding the rest does not give the same file"


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_no_flipped_byte_gives_wrong_data(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "journal.bin"
    whole = written(path)
    last = boundaries(path)[-2]
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= mask
        path.write_bytes(altered)
        if position >= last:  # no whole record after it: the same as an append that was interrupted
            journal = Journal(path, HEAD, fsync=False)
            holds(journal, list(ROWS)[:-1])
            journal.close()
            continue
        with pytest.raises(StoreError, match=r"damaged at byte \d+ of .* [23] stored samples are readable"):
            Journal(path, HEAD, fsync=False)
        assert path.read_bytes() == altered, "a damaged journal must stay as it is"


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"\x8aLPJR\n\x01\r" * 40, b"?"])
def test_a_tail_that_is_no_record_is_cut(tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal.bin"
    whole = written(path)
    path.write_bytes(whole + tail)
    Journal(path, HEAD, fsync=False).close()
    assert path.read_bytes() == whole
    assert f"cut off {len(tail)} bytes" in caplog.text
    path.write_bytes(b"\0" * 5000)
    assert written(path) == whole


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    whole = written(path)
    ends = boundaries(path)
    path.write_bytes(b"my diary")
    with pytest.raises(StoreError, match="not a journal"):
        Journal(path, HEAD)
    assert path.read_bytes() == b"my diary"
    path.write_bytes(whole[ends[0] :])
    with pytest.raises(StoreError, match="beginning is lost"):
        Journal(path, HEAD)
    path.write_bytes(whole + whole[ends[0] : ends[1]])
    with pytest.raises(StoreError, match="'a' is stored twice"):
        Journal(path, HEAD)


def test_salvage_keeps_the_readable_and_the_original(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    whole = written(path)
    start, end = boundaries(path)[1:3]
    altered = whole[: start + 40] + b"\xff\xff" + whole[start + 42 :]
    path.write_bytes(altered)
    assert salvage(path) == 2
    assert path.read_bytes() == whole[:start] + whole[end:]
    assert (tmp_path / "journal.damaged").read_bytes() == altered
    path.write_bytes(b"x" + whole[1:])
    with pytest.raises(StoreError, match=r"damaged at byte 0 .* or remove the folder"):
        Journal(path, HEAD)
    with pytest.raises(StoreError, match="head is lost"):
        salvage(path)


def half_then(error: BaseException) -> Callable[[int, bytes], int]:
    real = os.write
    calls = iter([True])

    def write(fd: int, data: bytes) -> int:
        if next(calls, False):
            return real(fd, data[: len(data) // 2])
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (OSError(errno.ENOSPC, "full"), StoreError, "No space left .* storing 'c' .* Free some space .* same command"),
        (OSError(errno.EDQUOT, "quota"), StoreError, "Free some of your quota"),
        (OSError(errno.EIO, "broken"), StoreError, "Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("cut_fails", [False, True])
def test_a_failed_append_leaves_no_trace(
    tmp_path: Path, error: BaseException, raised: type[BaseException], says: str | None, call: str, cut_fails: bool
) -> None:
    path = tmp_path / "journal.bin"
    whole = written(path)
    path.unlink()
    before = written(path, {key: ROWS[key] for key in ("a", "β")})
    journal = Journal(path, HEAD)

    def fail(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, half_then(error) if call == "write" else fail)
        if cut_fails:
            patch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        with pytest.raises(raised, match=says):
            journal.append("c", *ROWS["c"])
    assert list(journal.entries) == ["a", "β"]
    assert (path.read_bytes() == before) is not cut_fails
    journal.append("c", *ROWS["c"])
    journal.close()
    assert path.read_bytes() == whole


def test_writes_that_take_a_few_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path / "whole.bin")
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    assert written(tmp_path / "journal.bin") == whole


def test_reads_that_give_a_few_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "journal.bin")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, position: real(fd, min(count, 7), position))
    journal = Journal(tmp_path / "journal.bin", HEAD)
    holds(journal, list(ROWS))
    journal.close()


def test_a_file_changed_underneath_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    written(path)
    journal = Journal(path, HEAD)
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(StoreError, match="'c' was altered"):
        journal.read("c")
    with path.open("ab") as file:
        file.write(b"another writer")
    with pytest.raises(StoreError, match="changed by another process"):
        journal.append("d", {}, {})
    assert path.read_bytes().endswith(b"another writer"), "what another process wrote is not ours to cut"
    path.unlink()
    with pytest.raises(StoreError, match="was removed"):
        journal.append("d", {}, {})
    journal.close()


@pytest.mark.parametrize("array", [np.array(["x"]), np.array([None]), np.array([1j]), np.array(["2020"], "M8[D]")])
def test_what_a_record_cannot_hold_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    journal = Journal(tmp_path / "journal.bin", HEAD)
    with pytest.raises(TypeError, match="array 'x' has dtype"):
        journal.append("a", {}, {"x": array})
    with pytest.raises(TypeError, match="not JSON serializable"):
        journal.append("a", {"x": array}, {})
    journal.append("a", {}, {})
    with pytest.raises(ValueError, match="already holds 'a'"):
        journal.append("a", {}, {})
    journal.close()
    with pytest.raises(ValueError, match="is closed"):
        journal.append("b", {}, {})


def test_every_append_is_synced_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("write", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _real=real, _name=name: (calls.append(_name), _real(*a))[1])
    journal = Journal(tmp_path / "journal.bin", HEAD)
    assert calls == ["write", "fsync", "fsync"]  # the file, then the folder that names it
    journal.append("a", *ROWS["a"])
    assert calls[3:] == ["write", "fsync"]
    journal.close()
