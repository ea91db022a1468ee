"""One run, one folder: a sample at a time while it runs, one netCDF file when it is finished.

    journal.bin    while running: the samples stored so far (`lalm_patch.storage.journal`)
    result.nc      when finished: netCDF4, opens with plain `xarray.open_dataset`
    result.json    the receipt: size and SHA-256 of result.nc, the run's identity, the ids of its samples
    .lock          held by the process that writes; the kernel frees it however that process ends

A run is finished when its receipt is there. `finalise` writes both files beside under temporary names, then
renames result.nc, then the receipt, and removes the journal last: a kill before the second rename leaves
the journal in charge, a kill after it a finished run with a journal too many, which the next start removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from lalm_patch.errors import BusyError, StoreError
from lalm_patch.storage.journal import (
    Array,
    Journal,
    dump_json,
    load_json,
    salvage,
    snapshot,
    storage_error,
    sync_folder,
    write_file,
)
from lalm_patch.storage.netcdf import clean_text, from_bytes, sanitise, stored_as
from lalm_patch.storage.places import unwritable
from lalm_patch.storage.provenance import readable

if TYPE_CHECKING:
    import xarray as xr

log = logging.getLogger(__name__)

JSON: TypeAlias = str | int | float | bool | Sequence["JSON"] | Mapping[str, "JSON"] | None

JOURNAL, RESULT, RECEIPT, LOCK = "journal.bin", "result.nc", "result.json", ".lock"
_BESIDE = ".{}.tmp"


@dataclass(frozen=True)
class SampleRecord:
    """What one sample left behind: named arrays, bit for bit as added, and JSON (tuples come back as lists)."""

    id: str
    arrays: dict[str, Array]
    meta: dict[str, Any]


class RunStore:
    """The folder of one run, opened by its one writer; use it in a `with` statement.

    `identity` is what makes two runs the same, e.g. `{"config": <hash>, "data": <hash>, "lalm_patch": "0.1.0"}`.
    It is stored with the first byte and compared at every start. With `fsync` a stored sample also survives
    a power failure; without, only the end of the process.

    Raises BusyError if another process has the folder, StoreError if it holds a run of another identity (named entry by
    entry), or if what it holds is damaged. Nothing is ever overwritten or dropped on the way.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, str], *, fsync: bool = True) -> None:
        self.folder = Path(folder)
        self.identity = dict(identity)
        self._fsync = fsync
        self._journal: Journal | None = None
        self._receipt: dict[str, Any] | None = None
        self._read_back: xr.Dataset | None = None
        self._lock = -1
        try:
            with _explained(self.folder, "opening the run"):
                # A finished run is only read: that needs no lock, and works where nothing can be written.
                if not self._open_finished():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._lock = _lock(self.folder)
                    self._open()
        except BaseException:
            self.close()
            raise

    def _open_finished(self) -> bool:
        """Whether the run is finished, with nothing left to clear up; then its result was verified."""
        left = (JOURNAL, *(_BESIDE.format(name) for name in (RESULT, RECEIPT)))
        receipt = read_receipt(self.folder)
        if receipt is None or (any((self.folder / name).exists() for name in left) and not unwritable(self.folder)):
            return False
        self._verify_finished(receipt)
        return True

    def _verify_finished(self, receipt: dict[str, Any]) -> None:
        self._compare(receipt["identity"], "a finished run")
        _verify(self.folder / RESULT, receipt)
        self._receipt = receipt

    def _open(self) -> None:
        for name in (RESULT, RECEIPT):
            (self.folder / _BESIDE.format(name)).unlink(missing_ok=True)
        journal = self.folder / JOURNAL
        receipt = read_receipt(self.folder)
        if receipt is not None:
            self._verify_finished(receipt)
            if journal.exists():
                log.info("%s: removing the journal of the finished run", journal)
                journal.unlink()
            return
        if (self.folder / RESULT).exists() and not journal.exists():
            raise StoreError(
                f"{self.folder} holds a {RESULT} but no {RECEIPT}: whether it is whole and this run's cannot be told. "
                f"Put {RECEIPT} back, or move {RESULT} away, or give another folder."
            )
        self._journal = Journal(journal, {"identity": self.identity}, fsync=self._fsync)
        assert self._journal.head is not None
        self._compare(self._journal.head["identity"], f"an unfinished run with {len(self._journal.entries)} samples")
        if self._journal.entries:
            log.info("%s: %d samples are stored already", self.folder, len(self._journal.entries))

    def _compare(self, found: Mapping[str, str], what: str) -> None:
        if differing := _differences(found, self.identity):
            raise StoreError(
                f"{self.folder} holds {what} made with other settings ({differing}). "
                "Give another folder, remove this one, or go back to the old setting."
            )

    @property
    def finished(self) -> bool:
        """Whether the result is there. Its checksum was verified when the folder was opened."""
        return self._receipt is not None

    def completed(self) -> set[str]:
        """The ids of the samples stored so far; of a finished run all of them."""
        return set(self._receipt["samples"] if self._receipt is not None else self._running().entries)

    def sample(self, sample_id: str) -> SampleRecord:
        """One stored sample of an unfinished run. Raises KeyError if it is not stored."""
        meta, arrays = self._running().read(sample_id)
        return SampleRecord(sample_id, arrays, meta)

    def add(self, sample_id: str, arrays: Mapping[str, Array], meta: Mapping[str, JSON]) -> None:
        """Store one sample, all or nothing: it is safe when this returns, and absent after any exception.

        Arrays may hold booleans, integers and floats of at most 64 bits, in any shape. Raises ValueError if the id
        is stored already, TypeError for what cannot be stored, StoreError if the disk refuses.
        """
        self._running().append(sample_id, meta, arrays)

    def absorb(self, folder: Path) -> int:
        """Take over the samples that the unfinished run in another folder has stored so far, and return how many.

        The other folder is only read, also while its own process writes; samples stored here already are left alone.
        Raises StoreError if that run is of another identity.
        """
        taken = 0
        for sample_id, record in peek(folder, self.identity).items():
            if sample_id not in self._running().entries:
                self.add(sample_id, record.arrays, record.meta)
                taken += 1
        return taken

    def finalise(self, dataset: xr.Dataset) -> Path:
        """Store the run's dataset, made storable by `sanitise`, remove the journal and return the path of the result.

        The bytes are read back and compared before anything is renamed. An attribute `run_identity` (JSON) is added.
        Raises ValueError if a stored sample is missing from the dataset's coordinate `sample` (the only other
        copy is about to be removed), StoreError if the disk refuses; the journal is then untouched.
        """
        journal = self._running()
        stored = sanitise(dataset.assign_attrs(run_identity=self.identity))
        if "sample" in stored.coords:
            missing = {clean_text(key) for key in journal.entries} - set(stored["sample"].values.ravel().tolist())
            if missing:
                raise ValueError(f"the dataset lacks {len(missing)} stored samples, among them {min(missing)!r}")
        data, read_back = stored_as(stored)
        receipt: dict[str, Any] = {
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "identity": self.identity,
            "samples": list(journal.entries),
        }
        with _explained(self.folder / RESULT, f"writing the result ({len(data)} bytes)"):
            self._commit({RESULT: data, RECEIPT: dump_json({**receipt, "seal": _seal(receipt)})})
            journal.close()
            self._journal, self._receipt, self._read_back = None, receipt, read_back
            journal.path.unlink()
            self._sync()
        return self.folder / RESULT

    def _commit(self, files: Mapping[str, bytes]) -> None:
        beside = {name: self.folder / _BESIDE.format(name) for name in files}
        try:
            for name, data in files.items():
                write_file(beside[name], data, fsync=self._fsync)
            for name in files:
                os.replace(beside[name], self.folder / name)
                self._sync()
        except BaseException:
            for path in beside.values():
                path.unlink(missing_ok=True)
            raise

    def _sync(self) -> None:
        if self._fsync:
            sync_folder(self.folder)

    def load(self) -> xr.Dataset:
        """The dataset of a finished run, in memory."""
        if self._receipt is None:
            raise ValueError(f"{self.folder} is not finished")
        if (known := self._read_back) is None:
            return _load(self.folder / RESULT, self._receipt)
        # Of the process that wrote it: the same bytes were read a moment ago, which takes as long as a few cells.
        _verify(self.folder / RESULT, self._receipt)
        return known.copy(deep=True)

    def _running(self) -> Journal:
        if self._journal is None:
            state = "is finished: read it with load()" if self.finished else "is closed"
            raise ValueError(f"the run in {self.folder} {state}")
        return self._journal

    def close(self) -> None:
        """Free the folder for another process; closing twice is allowed."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_result(path: Path | str) -> xr.Dataset:
    """The dataset of a finished run, in memory, from its folder or its `result.nc`; checksum verified. Needs no lock.

    Raises StoreError if there is none, if the run is not finished, or if the file is not what the run wrote.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    result = path / RESULT if path.is_dir() else path
    with _explained(path, "reading the result"):
        receipt = read_receipt(folder)
        if receipt is not None:
            return _load(result, receipt)
        if (folder / JOURNAL).exists():
            raise StoreError(f"the run in {folder} is not finished: run its command again, it goes on where it stopped")
        if result.exists():
            raise StoreError(
                f"{result} has no {RECEIPT} beside it to be checked against. Copy the two together, "
                "or open it unchecked with xarray.open_dataset."
            )
    raise StoreError(f"there is no finished run at {path}: expected a folder with {RESULT} and {RECEIPT}")


def is_finished(folder: Path | str, identity: Mapping[str, str]) -> bool:
    """Whether `folder` holds the finished result of this very run; fast, without lock and checksum.

    For schedulers that leave finished runs out. Raises StoreError if the receipt was altered.
    """
    with _explained(Path(folder), "reading the receipt"):
        receipt = read_receipt(Path(folder))
        return receipt is not None and receipt["identity"] == dict(identity) and (Path(folder) / RESULT).exists()


def peek(folder: Path | str, identity: Mapping[str, str]) -> dict[str, SampleRecord]:
    """What an unfinished run has stored so far, by sample id, without its lock: its process may go on writing.

    Raises StoreError if it is a run of another identity. Damage is for the folder's own process to report.
    """
    folder = Path(folder)
    with _explained(folder, "reading the journal"):
        head, records = snapshot(folder / JOURNAL)
    if head is not None and (differing := _differences(head["identity"], identity)):
        raise StoreError(
            f"{folder} holds {len(records)} samples made with other settings ({differing}). "
            "Remove it, or go back to the old setting."
        )
    return {key: SampleRecord(key, arrays, meta) for key, (meta, arrays) in records.items()}


def repair(folder: Path | str) -> int:
    """Keep the readable samples of a damaged journal; the damaged file stays as `journal.damaged`.

    Returns how many samples were kept; the run's command computes the others again. Raises StoreError if there
    is no journal, if another process has the folder, or if the journal does not tell any more what it belongs to.
    """
    folder = Path(folder)
    if not (folder / JOURNAL).is_file():
        raise StoreError(f"there is no {JOURNAL} in {folder}: nothing to repair")
    with _explained(folder, "repairing the journal"):
        lock = _lock(folder)
        try:
            return salvage(folder / JOURNAL)
        finally:
            os.close(lock)


def _lock(folder: Path) -> int:
    fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise BusyError(
            f"{folder} is in use by another process ({holder}). Wait for it, stop it, or give another folder."
        ) from None
    except OSError as error:
        # Some cluster file systems are mounted without locks. The journal still notices a second writer, only later.
        log.warning("%s: this file system has no locks (%s); make sure that one process uses the folder", folder, error)
    with contextlib.suppress(OSError):  # who holds it is a courtesy to the reader, not needed for the lock
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return fd


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """Size, SHA-256, identity and sample ids of a finished run; None where none is. Raises StoreError if altered."""
    path = folder / RECEIPT
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        receipt: dict[str, Any] = load_json(data)
        if receipt.pop("seal") == _seal(receipt):
            return receipt
    except (ValueError, KeyError, AttributeError, TypeError):
        pass  # not a receipt at all: the same message
    raise StoreError(f"{path} was altered or cut short. Put back an intact copy{_or_recompute(folder)}.")


def _seal(receipt: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(dict(sorted(receipt.items())))).hexdigest()


def _or_recompute(folder: Path) -> str:
    how = "build it again from the journal" if (folder / JOURNAL).exists() else "compute it again"
    return f", or remove {RESULT} and {RECEIPT} and run the same command again to {how}"


def _verify(path: Path, receipt: Mapping[str, Any]) -> bytes:
    """The bytes of the result, checked, so that what is read is what was verified."""
    advice = f"Put back an intact copy{_or_recompute(path.parent)}."
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"{path} is missing, though {RECEIPT} says that the run is finished. {advice}") from None
    if len(data) != receipt["size"]:
        raise StoreError(f"{path} is damaged: it has {len(data)} bytes, the run wrote {receipt['size']}. {advice}")
    if hashlib.sha256(data).hexdigest() != receipt["sha256"]:
        raise StoreError(f"{path} was altered: its SHA-256 is not the one in {RECEIPT}. {advice}")
    return data


def _load(path: Path, receipt: Mapping[str, Any]) -> xr.Dataset:
    return from_bytes(_verify(path, receipt))


def _differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    parts = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = (repr(readable(side[key])) if key in side else "nothing" for side in (found, wanted))
        if old != new:
            parts.append(f"{key}: {old} there, {new} now")
    return "; ".join(parts)


@contextlib.contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, doing) from error
