"""What is in a checkpoint's files: the identity that numbers carry, and the proof that they are the files meant.

Safetensors has no checksum, so a number changed on a disk or in a copy opens like any other. What can be promised:

- A local folder's identity is made from every byte its model is read from. Other bytes are another identity, and runs
  of another identity are never shown as this one, continued or merged with it.
- Files that came from the hub are compared with the checksums the hub gave for them, wherever its client keeps them:
  in the cache (a blob's name is its checksum) and in a folder that `hf download --local-dir` filled and nobody wrote to
  since. Damage is refused there.

Both are done anew on every byte when a model is loaded. In between, checksums of large files are remembered under the
file's place, size and times, so that looking at a finished run does not read them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants

from lalm_patch.errors import ModelError
from lalm_patch.models.files import check_file, read_files

LARGE = 64 * 2**20
"""Files from this size on, in bytes, are remembered between processes."""
_CHUNK = 2**22
_FORMER_PROBE = 2**20
_FORMER_FILES = (".json", ".safetensors", ".bin", ".pth", ".txt", ".jinja", ".model", ".tiktoken")
_SETTLED_SECONDS = 2.0  # a file written a moment ago can be written again within the resolution of its times
_SHA256, _GIT_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")

Stamp = tuple[str, int, int, int, int, int]
_hashed_here: dict[Stamp, str] = {}


def stamp(path: Path) -> Stamp:
    """What changes when a file is written or replaced: its place, size, times (ns) and inode."""
    resolved = path.resolve()
    found = resolved.stat()
    return str(resolved), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev


def checksums(paths: Iterable[Path], *, remembered: bool = True) -> dict[Path, str]:
    """SHA-256 of each file, as `sha256sum` prints it.

    Args:
        paths: files.
        remembered: take large files' checksums from former processes where nothing has written to the files since;
            False reads every byte, at least once in this process.

    Raises:
        ModelError: a file cannot be read.
    """
    files = list(paths)
    for path in files:
        check_file(path)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        found = pool.map(lambda path: _checksum(path, remembered), files)
        return dict(zip(files, found, strict=True))


def fingerprint(folder: Path, *, remembered: bool = True) -> str:
    """Identity of a folder's model: 16 hex digits over names and contents of all the files it is read from; of a GGUF
    file's, over its contents.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path, checksum in checksums(read_files(folder), remembered=remembered).items():
        digest.update(f"{path.relative_to(folder)}\0{checksum}\0".encode())
    return digest.hexdigest()[:16]


def former_fingerprint(folder: Path) -> str:
    """What `fingerprint` was before it read every byte: names, sizes, and the first and last MiB of every file.

    Finished runs that carry it are still found by it; nothing is computed under it any more. GGUF files never had one.
    """
    if folder.is_file():
        return fingerprint(folder)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _FORMER_FILES):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FORMER_PROBE))
            file.seek(max(0, size - _FORMER_PROBE))
            digest.update(file.read(_FORMER_PROBE))
    return digest.hexdigest()[:16]


def check_against_hub(folder: Path) -> None:
    """Files with a checksum from the hub are the files the hub has; reads every byte of them.

    Raises:
        ModelError: names the file that is not.
    """
    expected = published_checksums(folder)
    found = checksums((path for path, value in expected.items() if _SHA256.fullmatch(value)), remembered=False)
    for path, value in expected.items():
        if found.get(path, "") != value and (path in found or _git_checksum(path) != value):
            raise ModelError(
                f"{path}: not the file that was downloaded (its checksum on the hub is {value[:16]}...): the copy was "
                "damaged or changed; delete it and download it again"
            )


def published_checksums(folder: Path) -> Mapping[Path, str]:
    """The hub's own checksum of every file that has one here: SHA-256 of large files, git's SHA-1 of the others."""
    known = ((path, _blob_name(path) or _downloaded_as(path, folder)) for path in read_files(folder))
    return {path: value for path, value in known if value is not None}


def _blob_name(path: Path) -> str | None:
    """In the hub's cache a file is a link to a blob that is called by its checksum."""
    if not path.is_symlink():
        return None
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and _is_checksum(target.name) else None


def _downloaded_as(path: Path, folder: Path) -> str | None:
    """What `hf download --local-dir` noted of a file that was not written to since."""
    note = folder / ".cache" / "huggingface" / "download" / f"{path.relative_to(folder)}.metadata"
    if not note.is_file():
        return None
    lines = note.read_text(encoding="utf-8", errors="replace").split()
    if len(lines) < 3 or not _is_checksum(lines[1]):
        return None
    try:
        untouched = path.stat().st_mtime - 1 <= float(lines[2])  # the client's own rule
    except ValueError:
        return None
    return lines[1] if untouched else None


def _is_checksum(text: str) -> bool:
    return bool(_SHA256.fullmatch(text) or _GIT_SHA1.fullmatch(text))


def _git_checksum(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _checksum(path: Path, remembered: bool) -> str:
    before = stamp(path)
    if before in _hashed_here:
        return _hashed_here[before]
    large = before[1] >= LARGE
    memo = _memo(before)
    if remembered and large and memo.is_file():
        known = memo.read_text(encoding="ascii", errors="replace")
        if _SHA256.fullmatch(known):
            return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if stamp(path) != before:
        raise ModelError(f"{path}: is being written to; run again when that is over")
    found = digest.hexdigest()
    if large and time.time() - max(before[2], before[3]) / 1e9 > _SETTLED_SECONDS:
        _hashed_here[before] = found
        _remember(memo, found)
    return found


def _memo(file: Stamp) -> Path:
    key = hashlib.sha256("\0".join(map(str, file)).encode()).hexdigest()
    return Path(constants.HF_HOME) / "lalm_patch" / "checksums" / key


def _remember(memo: Path, checksum: str) -> None:
    partial = memo.with_suffix(f".{os.getpid()}")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(checksum, encoding="ascii")
        partial.replace(memo)
    except OSError:  # a cache folder that cannot be written to: the next process reads the file once more
        with contextlib.suppress(OSError):
            partial.unlink()
