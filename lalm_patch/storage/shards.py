"""One run's clips dealt to several processes that share nothing but the run's folder.

    outputs/<run>/                    the run: its result, and its journal when it is merged
    outputs/<run>/shards/2-of-4/      one shard: its own lock, journal, log and error.txt
        complete.json                 the shard's clips are all stored

Every shard writes only into its own folder, so that no two processes ever write one file. Before it computes
anything a shard looks at what the run and the other shards have stored, whatever their number: a run begun with four
shards can go on with two, or without. Whoever finds all clips stored merges them under the run's own lock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lalm_patch.errors import ConfigError
from lalm_patch.storage.journal import dump_json, replace_file, storage_error
from lalm_patch.storage.places import unwritable
from lalm_patch.storage.run_store import JOURNAL, SampleRecord, peek

SHARDS, COMPLETE = "shards", "complete.json"

_Clip = TypeVar("_Clip")


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from `i/n`.

        Raises:
            ConfigError: another form, or i not within 1..n.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"shard={text}: expected i/n, part i of n with i from 1 to n, for example shard=1/4")
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """Name of the shard's folder inside the run's folder."""
        return f"{SHARDS}/{self.index}-of-{self.count}"

    def folder(self, run: Path) -> Path:
        """The shard's folder, from the run's folder."""
        return run / self.name

    def select(self, clips: Sequence[_Clip]) -> list[_Clip]:
        """The shard's clips: every n-th one, so that all shards get their share of every class."""
        return list(clips[self.index - 1 :: self.count])

    def share(self, number: int) -> int:
        """The shard's share of a number of things to do, rounded up."""
        return -(-number // self.count)


def run_folder_of(folder: Path) -> Path:
    """The run's folder, from that of the run or of one of its shards."""
    return folder.parent.parent if folder.parent.name == SHARDS else folder


def shard_folders(run: Path) -> list[Path]:
    """Folders of all shards that were started, of any number of shards."""
    return sorted(path for path in (run / SHARDS).glob("*-of-*") if path.is_dir())


def stored_elsewhere(run: Path, identity: Mapping[str, str], but: Path | None = None) -> dict[str, SampleRecord]:
    """Samples that the unfinished run and its shards have stored, by id; read without their locks.

    Args:
        run: the run's folder.
        identity: the run's identity.
        but: a shard's folder to leave out.

    Raises:
        StoreError: a shard is of another identity; says in what.
    """
    found: dict[str, SampleRecord] = {}
    for folder in (run, *shard_folders(run)):
        if folder != but:
            found |= peek(folder, identity)
    return found


def mark_complete(folder: Path, identity: Mapping[str, str], samples: int) -> None:
    """Note that all clips of a shard are stored."""
    path = folder / COMPLETE
    try:
        replace_file(path, dump_json({"samples": samples, "identity": dict(identity)}))
    except OSError as error:
        raise storage_error(error, path, "noting that the shard is complete") from error


def is_complete(folder: Path) -> bool:
    """Whether a shard noted that all its clips are stored."""
    try:
        return "samples" in json.loads((folder / COMPLETE).read_bytes())
    except (FileNotFoundError, ValueError):
        return False


def remove_journals(run: Path) -> None:
    """Remove the shards' journals, where that can be done: the run's result holds their samples."""
    if unwritable(run) is not None:
        return
    for folder in shard_folders(run):
        (folder / JOURNAL).unlink(missing_ok=True)
