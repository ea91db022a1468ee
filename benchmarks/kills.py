"""kill -9 at random moments of a run, the same run again, until it ends; every result must equal the undisturbed one.

    python benchmarks/kills.py --kills 50
    python benchmarks/kills.py --kills 50 model=demo attr=gender granularity=layer data.limit=10

Every attempt is a process of its own, forked after the imports, which carries out what `python -m lalm_patch OVERRIDES`
does. Half of the kills come at a moment drawn from the whole run (loading, figures and all), half at one drawn from
the time after the first sample of that attempt was stored. Results are compared byte by byte, array by array.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import xarray as xr

from lalm_patch.config import compose
from lalm_patch.figures import plot_run
from lalm_patch.models import LALM
from lalm_patch.run import run
from lalm_patch.settings import RunSettings
from lalm_patch.storage.run_store import open_result
from lalm_patch.tracing.tracer import Tracer

IMPORTED = (LALM, Tracer, plot_run)
"""What a run imports when it needs it, here before the forks."""

VARYING = {"created", "command", "settings", "seconds_of_last_process", "git_revision"}
"""Attributes that say when and how a run was made."""

MOST_KILLS_OF_ONE_RUN = 4


@contextmanager
def started(settings: RunSettings, folder: Path) -> Iterator[BaseProcess]:
    """A child process that carries out or goes on with a run.

    It does not outlive the block: it would write into a folder that is being removed.
    """
    child = multiprocessing.get_context("fork").Process(target=run, args=(settings, folder))
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def ended(child: BaseProcess) -> bool:
    """Whether the child ended by itself, well."""
    if child.exitcode:
        raise SystemExit(f"a run that was not killed ended with status {child.exitcode}")
    return child.exitcode is not None


def size(path: Path) -> int:
    """Bytes of a file, 0 without one: in a single look, since a run that finishes removes its journal."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def kill_at_random(settings: RunSettings, folder: Path, seconds: float, moments: random.Random) -> bool:
    """Start the run and kill it somewhere in the next `seconds`; False if it ended before."""
    journal = folder / "journal.bin"
    before = size(journal)
    with started(settings, folder) as child:
        if moments.random() < 0.5:
            while size(journal) <= before:
                if ended(child):
                    return False
                time.sleep(0.0005)
            seconds /= 4
        until = time.monotonic() + moments.uniform(0, seconds)
        while time.monotonic() < until:
            if ended(child):
                return False
            time.sleep(0.0005)
        child.kill()
        child.join()
        return child.exitcode == -signal.SIGKILL


def complete(settings: RunSettings, folder: Path) -> float:
    """Let a run come to its end; the seconds it took."""
    begin = time.monotonic()
    with started(settings, folder) as child:
        while not ended(child):
            time.sleep(0.002)
    return time.monotonic() - begin


def differences(found: xr.Dataset, expected: xr.Dataset) -> list[str]:
    """Variables and attributes that are not the same, bit for bit."""
    names = found.variables.keys() | expected.variables.keys()
    parts = [str(name) for name in sorted(names, key=str) if not _same(found, expected, name)]
    keys = (found.attrs.keys() | expected.attrs.keys()) - VARYING
    return parts + sorted(key for key in keys if str(found.attrs.get(key)) != str(expected.attrs.get(key)))


def _same(found: xr.Dataset, expected: xr.Dataset, name: object) -> bool:
    if name not in found.variables or name not in expected.variables:
        return False
    one, other = found[name], expected[name]
    return (one.dtype, one.dims) == (other.dtype, other.dims) and one.values.tobytes() == other.values.tobytes()


def state(folder: Path) -> str:
    """What a kill left behind, in words."""
    names = {path.name for path in folder.glob("*")} if folder.exists() else set()
    if "result.json" in names:
        return "finished, drawing" if "figure.csv" not in names else "finished"
    return "samples stored" if "journal.bin" in names else "nothing stored"


def main() -> None:
    """Kill, resume, compare; prints one line per run and fails at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", default=["granularity=token", "data.limit=8", "threads=1"])
    options = parser.parse_args()
    settings, moments = compose(*options.overrides), random.Random(options.seed)
    states: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="kills") as place:
        reference = Path(place, "reference")
        seconds = complete(settings, reference)
        expected = open_result(reference)
        kills = runs = 0
        while kills < options.kills:
            runs += 1
            folder = Path(place, f"run{runs}")
            wanted = min(moments.randint(1, MOST_KILLS_OF_ONE_RUN), options.kills - kills)
            done = 0
            for _ in range(wanted):
                if kill_at_random(settings, folder, seconds, moments):
                    done += 1
                    left = state(folder)
                    states[left] = states.get(left, 0) + 1
            complete(settings, folder)
            if differing := differences(open_result(folder), expected):
                raise SystemExit(f"run {runs}, killed {done} times, differs in {', '.join(differing)}")
            kills += done
            print(f"run {runs}: killed {done} times, ended equal ({kills} kills so far)", flush=True)
    left = ", ".join(f"{name} {count}" for name, count in sorted(states.items()))
    print(
        f"{kills} kills of {runs} runs: every result equals the undisturbed one, bit for bit; found at a kill: {left}"
    )


if __name__ == "__main__":
    main()
