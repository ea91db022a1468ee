"""From a hub id, a folder or a file to what is on this machine: everything after works on local files, wherever they
came from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lalm_patch.errors import ModelError
from lalm_patch.models.files import (
    check_all_weights,
    check_gguf,
    check_small_files,
    read_config,
    read_files,
    without_config,
)
from lalm_patch.models.fingerprint import check_against_hub, fingerprint, former_fingerprint, published_checksums, stamp
from lalm_patch.models.packaged import how_to_install, packaged_weights
from lalm_patch.settings import ModelSettings

SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
WEIGHT_FILES = ("*.safetensors", "*.pth")
OLD_WEIGHT_FILES = ("*.bin",)  # only where there is nothing else: most repositories hold the same weights twice
UNWANTED_FILES = ("consolidated*", "original/*", "*fp32*")  # the same weights once more
PART_FIELDS = {"decoder": ("llama_model_id", "llm_model_id"), "encoder": ("whisper_model_id", "encoder_model_id")}
"""Where the config.json of a checkpoint that is only a connector names the repositories of the rest."""
GGUF_PARTS = ("decoder",)
"""Parts that may be a GGUF file."""
_DATA = Path(__file__).resolve().parent.parent / "data"
_DEMO_DATA = _DATA / "demo"
BUNDLED = {
    "demo": _DEMO_DATA / "model",
    "demo_voxtral": _DEMO_DATA / "voxtral",
    "demo_desta": _DEMO_DATA / "desta" / "connector",
    "demo_desta_llama": _DEMO_DATA / "desta" / "llama",
    "demo_desta_whisper": _DEMO_DATA / "desta" / "whisper",
    "smol": _DATA / "smol" / "connector",
    "smol_whisper": _DATA / "smol" / "whisper",
}
"""Checkpoints that come with the package, by the id that means them."""
DEMO_FOLDER = BUNDLED["demo"]
LOCAL = "local:"
_BY_FILES = ":"  # before a fingerprint; a commit has none
_LOOK_UP_SECONDS = 10.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Attributes:
        folder: where its files are; or its only file, a GGUF.
        id: what the user asked for.
        commit: the hub's commit; for a local folder `local:` and a fingerprint of every byte of its files. A copy from
            the hub that lost its files' checksums on the way has both.
        parts: the repositories of a model that is published in several, by `PART_FIELDS`' names.
    """

    folder: Path
    id: str
    commit: str
    parts: Mapping[str, Checkpoint] = field(default_factory=dict)

    @property
    def local(self) -> bool:
        """Whether it is of the user's or of a package, not a copy of a repository on the hub."""
        return self.commit.startswith(LOCAL)

    @property
    def revision(self) -> str:
        """Commits of the checkpoint and of its parts: what the numbers depend on."""
        return "+".join([self.commit, *(part.commit for part in self.parts.values())])

    @property
    def former_revision(self) -> str:
        """What `revision` was while fingerprints of folders covered a part of each file."""
        repositories = (self, *self.parts.values())
        return "+".join(
            f"{LOCAL}{former_fingerprint(each.folder)}" if each.local else each.commit for each in repositories
        )

    @contextmanager
    def verified(self) -> Iterator[None]:
        """What is opened inside comes from whole files with the contents that `revision` says.

        Reads every byte once, whatever was remembered of the files, and looks afterwards whether one was written to.

        Raises:
            ModelError: names the file that is damaged or changed.
        """
        repositories = (self, *self.parts.values())
        for repository in repositories:
            check_all_weights(repository.folder)
            check_against_hub(repository.folder)
            repository._check_identity()
        before = {path: stamp(path) for repository in repositories for path in read_files(repository.folder)}
        yield
        for path, was in before.items():
            if not path.is_file() or stamp(path) != was:
                raise ModelError(f"{path}: was written to while the model was opened; run again when that is over")

    def _check_identity(self) -> None:
        kind, mark, noted = self.commit.rpartition(_BY_FILES)
        if not mark:
            return
        found = fingerprint(self.folder, remembered=False)
        if found != noted:
            files = ", ".join(path.name for path in read_files(self.folder))
            raise ModelError(
                f"{self.folder}: its files ({files}) are no longer those of {kind}{mark}{noted}, now {found}: they "
                "were changed since, or the disk is faulty; check them and run again"
            )


def find_checkpoint(settings: ModelSettings, *, weights: bool = True) -> Checkpoint:
    """Find a model's checkpoint and, where it is only a connector, the repositories it stands between.

    Args:
        settings: `id`, `revision`, and the `decoder` and `encoder` to use instead of those the checkpoint names.
        weights: False for configuration and tokenizer only.

    Raises:
        ModelError: as `find_repository`.
    """
    pinned = settings.revision if (settings.revision or "").startswith(LOCAL) else None
    found = find_repository(settings.id, None if pinned else settings.revision, weights=weights)
    named = read_config(found.folder)
    parts = {}
    for part, fields in PART_FIELDS.items():
        own = next((named[name] for name in fields if name in named), None)
        if own is not None:
            parts[part] = find_part(part, str(own), getattr(settings, part) or None, weights=weights)
        elif getattr(settings, part):
            raise ModelError(
                f"model.{part}={getattr(settings, part)}: {settings.id} is one whole checkpoint, leave model.{part} out"
            )
    checkpoint = Checkpoint(found.folder, found.id, found.commit, parts)
    if pinned and checkpoint.revision != pinned:
        raise ModelError(
            f"model.revision={pinned}: the files of {found.folder} are {checkpoint.revision}, so not those that were "
            "asked for; give the folder that has them, or leave model.revision out"
        )
    return checkpoint


def find_part(part: str, named: str, given: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Find one of the repositories that a connector stands between.

    Args:
        part: its name in `PART_FIELDS`.
        named: the one that the connector's config.json names. Where a package with its weights is installed, they are
            taken from there.
        given: the one to use instead.
        weights: False for configuration and tokenizer only.

    Raises:
        ModelError: as `find_repository`.
    """
    setting = f"model.{part}"
    if given is not None:
        return find_repository(given, setting=setting, weights=weights)
    if (file := packaged_weights(named)) is not None:
        return _file(file, named)
    try:
        return find_repository(named, setting=setting, weights=weights)
    except ModelError as error:
        raise ModelError(f"{error}{how_to_install(named)}") from error


def find_repository(
    identifier: str, revision: str | None = None, *, setting: str = "model.id", weights: bool = True
) -> Checkpoint:
    """Find one repository in a local folder, in the hub's cache, or on the hub (then download it).

    Args:
        identifier: folder or hub id; for one of `GGUF_PARTS` also a GGUF file.
        revision: branch, tag or commit on the hub.
        setting: the setting that gave the identifier, for messages: the place to put a local folder instead.
        weights: False to leave the weights out.

    Raises:
        ModelError: no such folder or repository, gated, or unreachable and not in the cache; says what to do.
    """
    if bundled := BUNDLED.get(identifier):
        if not (bundled / "config.json").is_file():
            raise ModelError(
                f"{setting}={identifier}: comes with lalm_patch and is missing from {bundled}; reinstall lalm_patch"
            )
        return _local(bundled, identifier, revision, setting)
    folder = Path(identifier).expanduser()
    try:
        is_folder = folder.is_dir()
        if is_folder:
            next(folder.iterdir(), None)
    except OSError as error:
        raise ModelError(
            f"{setting}={identifier}: the folder cannot be read ({error.strerror}); check its permissions"
        ) from error
    if is_folder:
        return _local(folder, identifier, revision, setting)
    if folder.exists():
        if setting in (f"model.{part}" for part in GGUF_PARTS):
            return _file(folder, identifier)
        raise ModelError(f"{setting}={identifier}: a file, expected a checkpoint's folder; give the folder it is in")
    if folder.is_symlink():
        raise ModelError(f"{setting}={identifier}: a symbolic link to {folder.readlink()}, where there is no folder")
    if identifier.endswith(".gguf"):
        raise ModelError(
            f"{setting}={identifier}: no such file; give an existing file or folder, or a hub id like owner/name"
        )
    if identifier.startswith((".", "~", os.sep)):
        raise ModelError(f"{setting}={identifier}: no such folder; give an existing folder or a hub id like owner/name")
    return _from_hub(identifier, revision, setting, weights)


def _local(folder: Path, identifier: str, revision: str | None, setting: str) -> Checkpoint:
    if revision is not None:
        raise ModelError(
            f"model.revision={revision}: {setting}={identifier} is a folder, which has no branches or commits; leave "
            "model.revision out, or give the fingerprint of the folder that is meant (local:..., as in its results)"
        )
    check_small_files(folder)
    return Checkpoint(folder, identifier, f"{LOCAL}{fingerprint(folder)}")


def _file(path: Path, identifier: str) -> Checkpoint:
    check_gguf(path)
    return Checkpoint(path, identifier, f"{LOCAL}{fingerprint(path)}")


def _downloaded(folder: Path, identifier: str, commit: str, setting: str) -> Checkpoint:
    """A copy of a hub's repository. Its commit says what is in it only where the files can be compared with it."""
    try:
        check_small_files(folder)
    except ModelError as error:
        raise ModelError(f"{setting}={identifier}: {error}") from error
    known = published_checksums(folder)
    if all(path in known for path in read_files(folder)):
        return Checkpoint(folder, identifier, commit)
    return Checkpoint(folder, identifier, f"{commit}{_BY_FILES}{fingerprint(folder)}")


def _from_hub(identifier: str, revision: str | None, setting: str, weights: bool) -> Checkpoint:
    page = f"https://huggingface.co/{identifier}"
    try:
        # One short request decides whether the hub is there: downloads would retry for most of a minute first.
        info = HfApi().model_info(identifier, revision=revision, timeout=_LOOK_UP_SECONDS)
    except HFValidationError:
        raise ModelError(
            f"{setting}={identifier}: neither an existing folder nor a hub id; expected a folder or owner/name"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{setting}={identifier}: {page} has no branch, tag or commit {revision}") from None
    except GatedRepoError:  # before RepositoryNotFoundError, of which it is a kind
        raise _gated(identifier, page, setting) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{setting}={identifier}: {page} does not exist, or is private; "
            "check the name, and run `hf auth login` (or set HF_TOKEN) for a private one"
        ) from None
    except Exception as error:  # whatever else a network does: what is in the cache can still be used
        return _from_cache(identifier, revision, setting, error)
    names = [file.rfilename for file in info.siblings or []]
    if "config.json" not in names:
        raise ModelError(f"{setting}={identifier}: {page} {without_config(iter(names))}")
    patterns = [*SMALL_FILES, *(_weight_patterns(names) if weights else ())]
    try:
        folder = snapshot_download(
            identifier, revision=info.sha, allow_patterns=patterns, ignore_patterns=list(UNWANTED_FILES)
        )
    except GatedRepoError:
        raise _gated(identifier, page, setting) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{setting}={identifier}: the download failed ({type(error).__name__}: {error}); try again, or give a "
            f"local folder with {setting}=/path/to/folder"
        ) from error
    return _downloaded(Path(folder), identifier, str(info.sha), setting)


def _weight_patterns(names: Sequence[str]) -> tuple[str, ...]:
    modern = any(Path(name).suffix in (".safetensors", ".pth") and "/" not in name for name in names)
    return WEIGHT_FILES if modern else (*WEIGHT_FILES, *OLD_WEIGHT_FILES)


def _gated(identifier: str, page: str, setting: str) -> ModelError:
    return ModelError(
        f"{setting}={identifier} is gated: accept its licence at {page}, then run `hf auth login` (or set HF_TOKEN) "
        f"with the same account; or give a local copy with {setting}=/path/to/folder"
    )


def _from_cache(identifier: str, revision: str | None, setting: str, error: Exception) -> Checkpoint:
    try:
        folder = Path(snapshot_download(identifier, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{setting}={identifier}: not in the local cache, and the hub cannot be reached "
            f"({type(error).__name__}: {error}); connect, or give a local folder with {setting}=/path/to/checkpoint"
        ) from None
    return _downloaded(folder, identifier, folder.name, setting)
