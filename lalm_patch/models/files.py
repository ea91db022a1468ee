"""A checkpoint's files before a library opens them: which ones are read, and whether each is what its name says.

The libraries that read checkpoints answer a damaged file with whatever they stumbled over, often without its name. So
every file they would read is looked at first, and refused in one sentence: the file, what it is, what to do.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lalm_patch.errors import LalmPatchError, ModelError
from lalm_patch.models.gguf_format import read_gguf

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "tekken.json",
    "adapter_config.json",
)
TEXT_FILES = ("chat_template.jinja", "merges.txt", "vocab.txt", "qwen.tiktoken")
OTHER_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
WHOLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in transformers' order; each may be an index of shards
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_POINTER = b"version https://git-lfs.github.com/spec/"
_AGAIN = "download it again"
_SHOWN = 300


def check_file(path: Path) -> None:
    """There is a readable file with something in it.

    Raises:
        ModelError: a dangling link, no file, a folder, unreadable, empty, or a stand-in for the file itself.
    """
    if path.is_symlink() and not path.exists():
        raise ModelError(f"{path}: a symbolic link to {path.readlink()}, where there is nothing; {_AGAIN}")
    if path.is_dir():
        raise ModelError(f"{path}: a folder, expected a file; {_AGAIN}")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; the checkpoint is incomplete, {_AGAIN}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from error
    if not start:
        raise ModelError(f"{path}: an empty file; {_AGAIN}")
    if start.startswith(_POINTER):
        raise ModelError(
            f"{path}: a git-LFS pointer instead of the file itself; run `git lfs pull` in the folder, or {_AGAIN}"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise ModelError(f"{path}: a web page instead of the file; {_AGAIN}, with `hf download`")


def read_text(path: Path) -> str:
    """Text of a file in UTF-8.

    Raises:
        ModelError: as `check_file`, or another encoding.
    """
    check_file(path)
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not text in UTF-8 ({error}); {_AGAIN}, or save it as UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: as `read_text`, or not JSON, or something else than an object.
    """
    text = read_text(path)
    if text.startswith("\ufeff"):
        raise ModelError(f"{path}: begins with a byte-order mark, which JSON must not; save it as UTF-8 without BOM")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, got a {type(found).__name__}; {_AGAIN}")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json; raises as `read_json`."""
    return read_json(folder / "config.json")


def weights_entry(folder: Path) -> Path | None:
    """The file that transformers begins to read weights at: all of them, or the index of their shards; a GGUF file in
    place of a folder is its own."""
    if folder.is_file():
        return folder
    entries = (folder / name for whole in WHOLE_WEIGHTS for name in (whole, f"{whole}.index.json"))
    return next((path for path in entries if path.is_symlink() or path.exists()), None)


def shard_of_keys(index: Path) -> dict[str, str]:
    """Which file holds which tensor, from the index of a sharded checkpoint.

    Raises:
        ModelError: as `read_json`, or no map from names to files of the same folder.
    """
    found = read_json(index).get("weight_map")
    files = found.values() if isinstance(found, dict) else [None]
    if not found or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise ModelError(f"{index}: expected a `weight_map` from tensors to files of the same folder; {_AGAIN}")
    shards: dict[str, str] = found
    return shards


def weight_files(folder: Path) -> list[Path]:
    """The files a whole checkpoint's weights are in, as transformers chooses them; they need not exist.

    Raises:
        ModelError: no weights, or an index that cannot be read.
    """
    entry = weights_entry(folder)
    if entry is None:
        raise ModelError(
            f"{folder}: no weights; expected {' or '.join(WHOLE_WEIGHTS)}, or an index of shards; download them, or "
            "give the folder that has them"
        )
    if entry.name.endswith(".index.json"):
        return [folder / shard for shard in sorted(set(shard_of_keys(entry).values()))]
    return [entry]


def check_all_weights(folder: Path) -> None:
    """All files of weights a model is read from are there and whole.

    Args:
        folder: a checkpoint's folder, or one GGUF file.

    Raises:
        ModelError: as `weight_files` and `check_weights`.
    """
    if not folder.is_dir():
        check_gguf(folder)
        return
    others = [*_own_format(folder), *_adapters(folder)]
    if weights_entry(folder) is not None or not _own_format(folder):
        others += weight_files(folder)
    for path in others:
        check_weights(path)


def check_weights(path: Path) -> None:
    """One file of weights is whole, as far as the file itself can tell.

    Safetensors says which bytes there must be, but carries no checksum: a changed number is not found here (see
    `fingerprint`). The archives of torch have one for every tensor.

    Raises:
        ModelError: as `check_file`; cut, changed, or of another format.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        with reading(path):
            safe_open(path, framework="pt")
    elif zipfile.is_zipfile(path):
        with reading(path), zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:  # torch can be told to write none
                    with archive.open(record) as content:
                        while content.read(2**24):
                            pass
    elif path.read_bytes()[:1] != b"\x80":  # a pickle: torch before 1.6 wrote no archives
        raise ModelError(f"{path}: cannot be read as weights (no file of torch); it was cut or changed, {_AGAIN}")


def check_gguf(path: Path) -> None:
    """One GGUF file is whole, as far as its table of tensors can tell; like safetensors it carries no checksum.

    Raises:
        ModelError: as `check_file` and `read_gguf`.
    """
    check_file(path)
    read_gguf(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a library raises over a damaged file becomes one sentence with the file's name."""
    try:
        yield
    except Exception as error:  # safetensors, zipfile and pickle have errors of their own
        raise ModelError(
            f"{path}: cannot be read as weights ({type(error).__name__}: {_one_line(error)}); it was cut or changed, "
            f"{_AGAIN}"
        ) from error


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Whatever a library raises while it opens a checkpoint's files becomes one sentence about `what`.

    Raises:
        ModelError: with the library's reason, or the package it misses.
    """
    import torch

    try:
        yield
    except (LalmPatchError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ModelError(
            f"{what}: needs a package that is missing ({_one_line(error)}); install it with pip"
        ) from error
    except Exception as error:  # anything, by what is wrong in the files
        raise ModelError(
            f"{what}: cannot be opened ({type(error).__name__}: {_one_line(error)}); one of these files is missing, "
            "damaged or of another checkpoint: download them again"
        ) from error


def check_small_files(folder: Path) -> None:
    """Configuration, tokenizer and templates, as far as they are there, can be read.

    Raises:
        ModelError: names the first that cannot.
    """
    config = folder / "config.json"
    if not (config.is_symlink() or config.exists()):
        raise ModelError(f"{folder}: {without_config(path.name for path in folder.iterdir())}")
    if (folder / "tokenizer.json").exists():  # without its settings it would open as a tokenizer of another class
        check_file(folder / "tokenizer_config.json")
    for name in (*JSON_FILES, *TEXT_FILES, *OTHER_FILES):
        path = folder / name
        if not (path.is_symlink() or path.exists()):
            continue
        if name in JSON_FILES:
            read_json(path)
        elif name in TEXT_FILES:
            read_text(path)
        else:
            check_file(path)


def processor_files(folder: Path) -> str:
    """The files a processor is made from, for messages."""
    if folder.is_file():
        return f"{folder}: its tokenizer and chat template"
    names = [name for name in (*JSON_FILES[2:-1], *TEXT_FILES, *OTHER_FILES) if (folder / name).is_file()]
    return f"{folder}: its processor ({', '.join(names) or 'no file of one is there'})"


def without_config(names: Iterator[str]) -> str:
    """What is to be said of a folder or repository with these files and no config.json."""
    if ADAPTER_CONFIG in set(names):
        return (
            f"is a LoRA adapter ({ADAPTER_CONFIG} without config.json), not a model; merge it into its base model "
            "(peft: `merge_and_unload()`, then `save_pretrained`) and give that folder"
        )
    return "has no config.json, so it is not a checkpoint; give the folder that holds the model's config.json"


def read_files(folder: Path) -> list[Path]:
    """Every file a model's numbers can depend on, whatever reads it; links that lead nowhere are left out. A GGUF file
    in place of a folder is all of them."""
    if folder.is_file():
        return [folder]
    names: list[Path] = [folder / name for name in (*JSON_FILES, *TEXT_FILES, *OTHER_FILES)]
    entry = weights_entry(folder)
    if entry is None or "transformers_weights" in _lenient(folder / "config.json"):
        names += [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    else:
        shards = _lenient(entry).get("weight_map") if entry.suffix == ".json" else None
        names += [entry, *(folder / str(shard) for shard in (shards.values() if isinstance(shards, dict) else ()))]
    names += [*_own_format(folder), *_adapters(folder), *folder.glob(f"*/{ADAPTER_CONFIG}")]
    names += folder.glob("additional_chat_templates/*.jinja")
    return sorted(path for path in set(names) if path.is_file())


def _own_format(folder: Path) -> list[Path]:
    """Weights beside transformers' layout, such as DeSTA2's connector. Llama's `consolidated` are the weights twice."""
    return [path for path in folder.glob("*.pth") if not path.name.startswith("consolidated")]


def _adapters(folder: Path) -> list[Path]:
    """LoRA weights beside a model's own, in its folder or the next below."""
    places = [path.parent for path in (*folder.glob(ADAPTER_CONFIG), *folder.glob(f"*/{ADAPTER_CONFIG}"))]
    paths = (place / name for place in places for name in _ADAPTER_WEIGHTS)
    return [path for path in paths if path.is_symlink() or path.exists()]


def _lenient(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where it cannot be read: who opens the checkpoint says so."""
    try:
        return read_json(path)
    except ModelError:
        return {}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
