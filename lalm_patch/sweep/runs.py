"""How the runs of a folder stand, why one failed, and the page of text a sweep ends with."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from lalm_patch.errors import BusyError, StoreError
from lalm_patch.settings import CHOICES
from lalm_patch.storage.journal import replace_file, snapshot
from lalm_patch.storage.run_store import JOURNAL, RECEIPT, RESULT, open_result, read_receipt
from lalm_patch.storage.shards import is_complete, run_folder_of, shard_folders
from lalm_patch.terminal import as_typed, command_line

if TYPE_CHECKING:
    import xarray as xr

log = logging.getLogger(__name__)

ERROR = "error.txt"
LAST_FIGURE_FILE = "figure.csv"


class State(StrEnum):
    """How a run stands."""

    FINISHED = "finished"
    SHARD = "shard done"
    FAILED = "failed"
    STOPPED = "stopped"
    MISSING = "not started"
    DAMAGED = "damaged"


DONE = (State.FINISHED, State.SHARD)


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        folder: of the run or the shard.
        state: see `State`. `stopped` has samples stored or began to, and did not say why it ended: killed, or running.
        samples: stored so far.
        note: why it failed, or what is damaged; else empty.
    """

    folder: Path
    state: State
    samples: int = 0
    note: str = ""


def status(folder: Path) -> RunStatus:
    """How the run or the shard in `folder` stands, from its files; no lock is taken and no checksum is verified."""
    run = run_folder_of(folder)
    try:
        receipt = read_receipt(run)
    except StoreError as error:
        return RunStatus(folder, State.DAMAGED, note=str(error))
    if receipt is not None and (run / RESULT).exists():
        return RunStatus(folder, State.FINISHED, len(receipt["samples"]))
    if receipt is not None:
        return RunStatus(folder, State.DAMAGED, note=f"{run / RESULT} is missing, though {RECEIPT} is there")
    stored: set[str] = set()
    for place in (folder, *(shard_folders(folder) if folder == run else ())):
        stored |= snapshot(place / JOURNAL)[1].keys()
    failure = folder / ERROR
    if failure.exists():
        return RunStatus(folder, State.FAILED, len(stored), failure.read_text("utf-8", "replace").partition("\n")[0])
    if folder != run and is_complete(folder):
        return RunStatus(folder, State.SHARD, len(stored))
    began = stored or (folder / JOURNAL).exists() or (folder / ".hydra").exists()
    return RunStatus(folder, State.STOPPED if began else State.MISSING, len(stored))


def read_result(folder: Path) -> tuple[RunStatus, xr.Dataset | None]:
    """How the run or the shard in `folder` stands, and its dataset if the run is finished; the checksum is verified.

    Whoever reads results of several runs reads them here: what is damaged is named, and the others are read.
    """
    found = status(folder)
    if found.state is not State.FINISHED:
        return found, None
    try:
        return found, open_result(run_folder_of(folder))
    except StoreError as error:
        return RunStatus(folder, State.DAMAGED, found.samples, str(error)), None


@contextlib.contextmanager
def failure_recorded(folder: Path, command: str) -> Iterator[None]:
    """Leave the traceback of what is raised inside in the folder's `error.txt`; remove one of an earlier attempt.

    An interrupt or an exit leaves none (a requeued job goes on later), nor does a folder that another process has:
    it is that process's story.
    """
    failure = folder / ERROR
    try:
        failure.unlink(missing_ok=True)
        yield
    except BusyError:
        raise
    except Exception as error:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(failure, _report(error, command).encode("utf-8", "backslashreplace"))
        except OSError as refused:
            said = any(isinstance(link, OSError) and link.errno == refused.errno for link in (error, error.__cause__))
            log.log(logging.DEBUG if said else logging.ERROR, "%s could not be written: %s", failure, refused)
        raise


def _report(error: Exception, command: str) -> str:
    message = " ".join(str(error).split())
    where = {"process": f"{os.getpid()} on {socket.gethostname()}"}
    if "SLURM_JOB_ID" in os.environ:
        where["Slurm job"] = os.environ["SLURM_JOB_ID"]
    facts = {"command": command, "time": datetime.now(UTC).isoformat(timespec="seconds"), **where}
    lines = [f"{type(error).__name__}: {message}", "", *(f"{key}: {value}" for key, value in facts.items()), ""]
    return "\n".join(lines) + "\n" + "".join(traceback.format_exception(error))


@dataclass(frozen=True)
class SweepRun:
    """One run (or shard) of a sweep.

    Attributes:
        overrides: what this run's command line says.
        folder: where its process works.
        before: whether it was finished before the sweep began.
    """

    overrides: tuple[str, ...]
    folder: Path
    before: bool = False

    @property
    def command(self) -> str:
        """The command that carries out or goes on with this run alone."""
        return command_line(self.overrides)


def sweep_summary(runs: Sequence[SweepRun]) -> tuple[str, bool]:
    """The page of text a sweep ends with, and whether every run is done."""
    rows = [(run, *read_result(run.folder)) for run in runs]
    counts = Counter(state.state for _, state, _ in rows)
    before = sum(run.before for run, state, _ in rows if state.state is State.FINISHED)
    parts = [f"{count} {state}" for state, count in counts.items() if state is not State.FINISHED]
    heading = f"sweep    {counts[State.FINISHED]} of {len(rows)} runs finished"
    heading += f" ({before} of them before)" if before else ""
    lines = ["", "; ".join([heading, *parts])]
    names = [" ".join(run.overrides) or "(defaults)" for run in runs]
    width = min(max(map(len, names), default=0), 60)
    for name, (run, state, dataset) in zip(names, rows, strict=True):
        lines.append(f"         {name:<{width}}  {state.state:<10}  {_detail(run, state, dataset)}")
    damaged = [state for _, state, _ in rows if state.state is State.DAMAGED]
    lines += [f"{'damaged' if i == 0 else '':<9}{state.note}" for i, state in enumerate(damaged)]
    undone = [run for run, state, _ in rows if state.state not in DONE]
    lines += [f"{'redo' if i == 0 else '':<9}{run.command}" for i, run in enumerate(undone)]
    if undone:
        lines.append("         or all of these: the same command again leaves out what is finished")
    if undone or len({run_folder_of(run.folder) for run in runs}) > 1:
        varied = "".join(f" --by {key}" for key in _varied([run.overrides for run in runs]))
        lines.append(f"collect  python -m lalm_patch.collect {shlex.quote(_root(runs))}{varied}")
    return "\n".join(lines), not undone


def _varied(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Settings that runs differ in, by the names `collect --by` takes; not those that it tells apart by itself."""
    rows = [dict(override.lstrip("+").partition("=")[::2] for override in row) for row in overrides]
    keys = dict.fromkeys(key for row in rows for key in row if key not in ("model", "attr", "granularity", "shard"))
    differ = [key for key in keys if len({row.get(key) for row in rows}) > 1]
    return [f"{key}.name" if f"{key}.name" in CHOICES else key for key in differ]


def _detail(run: SweepRun, state: RunStatus, dataset: xr.Dataset | None) -> str:
    where = as_typed(run.folder)
    if dataset is not None:
        return f"{dataset.attrs['n_kept']} of {dataset.attrs['n_samples']} samples count  {where}"
    stored = f"{state.samples} samples stored"
    note = "" if state.state is State.DAMAGED else _cut(state.note)  # what is damaged is said below, in full
    return "  ".join(part for part in (stored, where, note) if part)


def _root(runs: Sequence[SweepRun]) -> str:
    return as_typed(Path(os.path.commonpath([run_folder_of(run.folder).parent for run in runs])))


def _cut(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
