"""From a hub id or a folder to a folder: everything after works on local files, wherever they came from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lalm_patch.errors import ModelError

WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.pth")
UNWANTED_FILES = ("consolidated*", "original/*")  # the same weights once more, in their trainers' own layout
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "data" / "demo" / "model"
_LOOK_UP_SECONDS = 10.0
_PROBE_BYTES = 2**20
_FINGERPRINTED = (".json", ".safetensors", ".bin", ".pth", ".txt", ".jinja", ".model", ".tiktoken")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        folder: where its files are.
        id: what the user asked for.
        commit: the hub's commit; for a local folder a fingerprint of its files.
    """

    folder: Path
    id: str
    commit: str


def find_checkpoint(identifier: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint in a local folder, in the hub's cache, or on the hub (then download it).

    Raises:
        ModelError: no such folder or repository, gated, or unreachable and not in the cache; says what to do.
    """
    if identifier == "demo":
        if not (DEMO_FOLDER / "config.json").is_file():
            raise ModelError(f"model.id=demo: the demo is missing from {DEMO_FOLDER}; reinstall lalm_patch")
        return Checkpoint(DEMO_FOLDER, "demo", _fingerprint(DEMO_FOLDER))
    folder = Path(identifier).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.id={identifier}: the folder has no config.json, so it is not a checkpoint")
        return Checkpoint(folder, identifier, _fingerprint(folder))
    if identifier.startswith((".", "~", os.sep)):
        raise ModelError(f"model.id={identifier}: no such folder; give an existing folder or a hub id like owner/name")
    return _from_hub(identifier, revision)


def _fingerprint(folder: Path) -> str:
    """Tells two local checkpoints apart: names, sizes, and the first and last MiB of every file.

    Reading 15 GB of weights only to name them would take longer than many runs.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _FINGERPRINTED):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_PROBE_BYTES))
            file.seek(max(0, size - _PROBE_BYTES))
            digest.update(file.read(_PROBE_BYTES))
    return f"local:{digest.hexdigest()[:16]}"


def _from_hub(identifier: str, revision: str | None) -> Checkpoint:
    page = f"https://huggingface.co/{identifier}"
    try:
        # One short request decides whether the hub is there: downloads would retry for most of a minute first.
        info = HfApi().model_info(identifier, revision=revision, timeout=_LOOK_UP_SECONDS)
    except HFValidationError:
        raise ModelError(
            f"model.id={identifier}: neither an existing folder nor a hub id; expected a folder or owner/name"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"model.revision={revision}: {page} has no such branch, tag or commit") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"model.id={identifier}: {page} does not exist, or is private; "
            "check the name, and run `hf auth login` (or set HF_TOKEN) for a private one"
        ) from None
    except Exception as error:  # whatever else a network does: what is in the cache can still be used
        return _from_cache(identifier, revision, error)
    try:
        folder = snapshot_download(
            identifier, revision=info.sha, allow_patterns=list(WANTED_FILES), ignore_patterns=list(UNWANTED_FILES)
        )
    except GatedRepoError:
        raise ModelError(
            f"model.id={identifier} is gated: accept its licence at {page}, then run `hf auth login` "
            "(or set HF_TOKEN) with the same account"
        ) from None
    return Checkpoint(Path(folder), identifier, str(info.sha))


def _from_cache(identifier: str, revision: str | None, error: Exception) -> Checkpoint:
    try:
        folder = Path(snapshot_download(identifier, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model.id={identifier}: not in the local cache, and the hub cannot be reached "
            f"({type(error).__name__}: {error}); connect, or give a local folder with model.id=/path/to/checkpoint"
        ) from None
    return Checkpoint(folder, identifier, folder.name)
