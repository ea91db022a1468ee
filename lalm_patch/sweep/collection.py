"""Many runs as one labelled object: `python -m lalm_patch.collect outputs`, or `collect("outputs")`.

The object is an `xarray.DataTree`, written as one netCDF file that xarray opens alone:

    /                                    which runs these are, and what they have in common
    /summary                             one Dataset over model, attribute, granularity and layer: recovery and its
                                         interval, who counts, the peak, accuracy, checks
    /runs/<model>/<attribute>/<granularity>    each run's whole dataset, as it was

A tree, since models have different layers and prompts different tokens: one big array over all runs would be padding
for the most part. What has the same axes for all runs, the curve over the layers, is one array under `/summary`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lalm_patch.analysis import Peak, about, accuracy, mean_recovery, over_layers, peak_layer
from lalm_patch.checks import from_json
from lalm_patch.errors import DataError, LalmPatchError, StoreError
from lalm_patch.storage.journal import replace_file, storage_error
from lalm_patch.storage.netcdf import sanitise
from lalm_patch.storage.provenance import readable
from lalm_patch.storage.run_store import JOURNAL, RECEIPT
from lalm_patch.storage.shards import SHARDS
from lalm_patch.sweep.runs import ERROR, RunStatus, State, read_result

FILE = "collected.nc"

NAMES = ("model.name", "attr.name", "granularity.name")
DIMS = ("model", "attribute", "granularity")
"""What runs may differ in without being asked: the identity's keys, and what the dimensions are called."""

COVERED = ("data.root", "model.id", "engine.name", "engine.spot_checks")
"""Not compared: the checksums of clips and weights say more than where they lie, and engines prove themselves equal."""


@dataclass(frozen=True)
class CollectedRun:
    """One run of a folder.

    Attributes:
        status: how it stands.
        dataset: its result; None unless finished.
        identity: what it was made with, entry by entry; empty unless finished.
        recovery: mean recovery with intervals; None unless finished.
        peak: where recovery is largest; None if no sample counts.
    """

    status: RunStatus
    dataset: xr.Dataset | None = None
    identity: Mapping[str, str] | None = None
    recovery: xr.Dataset | None = None
    peak: Peak | None = None

    def showing(self, dataset: xr.Dataset) -> CollectedRun:
        """This run with a dataset, and what follows from it."""
        recovery = mean_recovery(dataset, seed=about(dataset).seed)
        return replace(self, dataset=dataset, recovery=recovery, peak=peak_layer(dataset, recovery))

    def place(self, by: Sequence[str] = ()) -> tuple[str, ...]:
        """Model, attribute and granularity by their names, then the values of further settings as text."""
        assert self.identity is not None
        texts = (readable(self.identity[key]) for key in (*NAMES, *by))
        return tuple(text.replace("/", "_") for text in texts)  # a slash would be a level of the tree


def collect(
    *folders: Path | str, where: Sequence[str] = (), by: Sequence[str] = (), allow: Sequence[str] = ()
) -> xr.DataTree:
    """The finished runs below some folders as one tree; checksums verified. Nothing is written.

    Args:
        folders: folders of runs, or run folders.
        where: conditions `key=value` on what a run was made with, e.g. `data.limit=100`; others are left out.
        by: further settings the sweep varied, e.g. `data.seed`: each becomes a dimension of the summary and a level of
            the tree, `/runs/<model>/<attribute>/<granularity>/<value>`.
        allow: keys (or patterns, `version of *`) in which the runs may differ although that makes them hard to compare.

    Raises:
        DataError: no finished run; or runs that are not comparable, with the keys in which they differ.
        StoreError: a run is damaged.
    """
    return build_tree(_matching(read_runs(folders), where), by, allow)


def read_runs(folders: Iterable[Path | str]) -> list[CollectedRun]:
    """All runs below some folders, finished or not, in the order of their paths.

    Raises:
        DataError: a folder does not exist.
    """
    found: set[Path] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give the folder that holds the runs, for example outputs")
        found |= set(_run_folders(folder))
    return [_read(folder) for folder in sorted(found)]


def _run_folders(root: Path) -> Iterable[Path]:
    for name, folders, files in os.walk(root):
        if {RECEIPT, JOURNAL, ERROR} & set(files) or {".hydra", SHARDS} & set(folders):
            folders.clear()
            yield Path(name).resolve()


def _read(folder: Path) -> CollectedRun:
    found, dataset = read_result(folder)
    if dataset is None:
        return CollectedRun(found)
    return CollectedRun(found, identity=json.loads(dataset.attrs["run_identity"])).showing(dataset)


def _matching(runs: Sequence[CollectedRun], where: Sequence[str]) -> list[CollectedRun]:
    """Runs that meet all conditions; what is not finished has nothing to be asked, and stays."""
    wanted = {}
    for condition in where:
        key, equals, value = condition.partition("=")
        if not equals:
            raise DataError(f"--where {condition}: expected key=value, for example data.limit=100")
        wanted[key] = value
    known = {key for run in runs if run.identity for key in run.identity}
    if known and (unknown := sorted(wanted.keys() - known)):
        raise DataError(f"--where {unknown[0]}: no run has such a setting; there are {', '.join(sorted(known))}")
    return [
        run
        for run in runs
        if run.identity is None
        or all(value in (run.identity.get(key), readable(run.identity.get(key, ""))) for key, value in wanted.items())
    ]


def build_tree(runs: Sequence[CollectedRun], by: Sequence[str] = (), allow: Sequence[str] = ()) -> xr.DataTree:
    """The tree of the finished ones among `runs`; see `collect` for what is raised."""
    if damaged := [run.status for run in runs if run.status.state is State.DAMAGED]:
        raise StoreError("; ".join(run.note for run in damaged))
    finished = [run for run in runs if run.dataset is not None]
    if not finished:
        counts = Counter(run.status.state for run in runs)
        there = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none at all"
        raise DataError(f"no finished run to collect, but {there}; run their commands again, they go on")
    for key in by:
        if any(run.identity is None or key not in run.identity for run in finished):
            raise DataError(f"--by {key}: not every run has such a setting; name one like data.seed or prompt.order")
    if reasons := incomparable(finished, by, allow):
        raise DataError(
            "these runs are not comparable:\n  " + "\n  ".join(reasons) + "\n"
            "Choose the runs that belong together (folders, or --where key=value), make what the sweep varied a "
            "dimension (--by key), or let a difference pass (--allow key)"
        )
    nodes: dict[str, xr.Dataset] = {"/": _root(finished, runs, by), "/summary": _summary(finished, by)}
    for run in finished:
        assert run.dataset is not None
        nodes["/runs/" + "/".join(run.place(by))] = run.dataset
    return xr.DataTree.from_dict({path: sanitise(dataset) for path, dataset in nodes.items()})


OF_A_MODEL = ("weights", "engine.precision")
"""What belongs to a model beside its settings: models in float32 have no precision to choose."""


def incomparable(runs: Sequence[CollectedRun], by: Sequence[str] = (), allow: Sequence[str] = ()) -> list[str]:
    """Why finished runs must not be put side by side: one sentence per key; empty if they may.

    Runs differ in model, attribute, granularity and the settings `by`. What belongs to one of those must be the same
    wherever it is the same one (a model's weights and precision, an attribute's clips and question), and everything
    else throughout.
    """
    reasons: list[str] = []

    def compare(group: Sequence[CollectedRun], owner: str, belongs: Callable[[str], bool]) -> None:
        keys = sorted({key for run in group for key in _facts(run) if belongs(key)})
        for key in keys:
            if key in COVERED or key in by or any(fnmatch(key, pattern) for pattern in allow):
                continue
            if key == "engine.precision" and len({_facts(run).get("model.dtype") for run in group}) > 1:
                continue  # said, or let pass, of the weights' type already
            values: dict[str, list[str]] = defaultdict(list)
            for run in group:
                values[_facts(run).get(key, "nothing")].append(run.status.folder.name)
            if len(values) > 1:
                sides = "; ".join(f"{readable(value)[:80]} in {_some(names)}" for value, names in values.items())
                reasons.append(f"{key} differs{owner}: {sides}")

    def common(key: str) -> bool:
        return key.partition(".")[0] not in ("model", "attr", "granularity") and key not in ("clips", *OF_A_MODEL)

    compare(runs, "", common)
    for axis, prefix, others in ((0, "model.", OF_A_MODEL), (1, "attr.", ("clips",))):
        for _, group in _grouped(runs, lambda run, axis=axis: (run.place()[axis], *run.place(by)[3:])):  # type: ignore[misc]
            owner = f" between runs of {group[0].place()[axis]}"
            compare(group, owner, lambda key, p=prefix, o=others: key.startswith(p) or key in o)  # type: ignore[misc]
    for _, group in _grouped(runs, lambda run: (run.place()[0], *run.place(by)[2:])):
        owner = f" between runs of {group[0].place()[0]} by {group[0].place()[2]}"
        compare(group, owner, lambda key: key.startswith("granularity."))
    for place, group in _grouped(runs, lambda run: run.place(by)):
        if len(group) > 1:
            names = _some([run.status.folder.name for run in group])
            reasons.append(f"{len(group)} runs are {'/'.join(place)}: {names}")
    return reasons


def _facts(run: CollectedRun) -> dict[str, str]:
    """What a run was made with, and the commit of the checkout it was made from."""
    assert run.dataset is not None
    assert run.identity is not None
    return {**run.identity, "git_revision": str(run.dataset.attrs.get("git_revision", ""))}


def _grouped(
    runs: Sequence[CollectedRun], key: Callable[[CollectedRun], tuple[str, ...]]
) -> Iterable[tuple[tuple[str, ...], list[CollectedRun]]]:
    groups: dict[tuple[str, ...], list[CollectedRun]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups.items()


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _root(finished: Sequence[CollectedRun], runs: Sequence[CollectedRun], by: Sequence[str]) -> xr.Dataset:
    facts = [_facts(run) for run in finished]
    common = {key: readable(value) for key, value in facts[0].items() if all(f.get(key) == value for f in facts)}
    left_out = {run.status.folder.name: str(run.status.state) for run in runs if run.dataset is None}
    receipts = {"/".join(run.place(by)): run.status.folder.name for run in finished}
    return xr.Dataset(
        attrs={
            "title": f"Causal tracing, {len(finished)} runs",
            "runs": json.dumps(receipts, ensure_ascii=False),
            "runs_left_out": json.dumps(left_out),
            "in_common": json.dumps(common, ensure_ascii=False),
        }
    )


def _summary(runs: Sequence[CollectedRun], by: Sequence[str]) -> xr.Dataset:
    """The numbers that all runs have, over model, attribute, granularity, `by` and layer; NaN where there is no run."""
    dims = (*DIMS, *by)
    axes = [sorted({run.place(by)[axis] for run in runs}) for axis in range(len(dims))]
    layers = sorted({int(layer) for run in runs if run.recovery is not None for layer in run.recovery["layer"].values})
    shape = tuple(len(axis) for axis in axes)
    curves = {name: np.full((*shape, len(layers)), np.nan) for name in ("mean", "low", "high")}
    per_run = ("n_samples", "n_kept", "peak_layer", "peak_recovery", "accuracy_clean", "accuracy_corrupted", "chance")
    numbers = {name: np.full(shape, np.nan) for name in (*per_run, "checks", "checks_passed")}
    for run in runs:
        assert run.dataset is not None
        assert run.recovery is not None
        at = tuple(axis.index(name) for axis, name in zip(axes, run.place(by), strict=True))
        for cell in over_layers(run.recovery):
            for name in curves:
                curves[name][(*at, layers.index(cell.layer))] = getattr(cell, name)
        right = accuracy(run.dataset)
        checks = from_json(str(run.dataset.attrs["checks"]))
        peak = (np.nan, np.nan) if run.peak is None else (run.peak.layer, run.peak.over_layers.mean)
        kept = int(run.dataset["kept"].sum())
        row = (run.dataset.sizes["sample"], kept, *peak, right.clean, right.corrupted, right.chance, len(checks))
        for name, value in zip(numbers, (*row, sum(check.passed for check in checks)), strict=True):
            numbers[name][at] = value
    note = "mean recovery over the kept samples; token-wise runs: at the last token"
    described: dict[str, Any] = {
        f"recovery_{name}": ((*dims, "layer"), values, {"long_name": f"{name}, {note}", "units": "1"})
        for name, values in curves.items()
    }
    described |= {name: (dims, values) for name, values in numbers.items()}
    coords = {dim: np.array(axis, object) for dim, axis in zip(dims, axes, strict=True)}
    return xr.Dataset(described, {**coords, "layer": layers})


def write_tree(tree: xr.DataTree, path: Path, *, overwrite: bool = False) -> str:
    """Write a tree as one netCDF file, by rename, after reading its bytes back; returns what became of the file.

    An older collection is replaced only if all its runs are in the new one too.

    Raises:
        StoreError: something else is at `path`, or the disk refuses.
    """
    buffer = io.BytesIO()
    tree.to_netcdf(buffer, engine="h5netcdf")
    data = buffer.getvalue()
    with xr.open_datatree(io.BytesIO(data), engine="h5netcdf") as found:
        if not found.identical(tree):
            raise ValueError("the collected runs would not read back as they are")
    did = "written"
    if path.exists():
        lost = [] if overwrite else _would_lose(path, tree)
        if lost:
            raise StoreError(f"{path} is there and holds {_some(lost)}, not collected now; use --output or --overwrite")
        did = "written anew"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise storage_error(error, path, f"writing the collection ({len(data)} bytes)") from error
    return did


def _would_lose(path: Path, tree: xr.DataTree) -> list[str]:
    try:
        with xr.open_dataset(path, engine="h5netcdf") as dataset:
            before: dict[str, str] = json.loads(dataset.attrs["runs"])
    except (OSError, KeyError, ValueError):
        return ["something else than a collection"]
    now = set(json.loads(tree.attrs["runs"]).values())
    return sorted(set(before.values()) - now)


def table(runs: Sequence[CollectedRun]) -> str:
    """The runs as text: state, samples that count, peak, checks."""
    rows = [("run", "state", "count", "peak", "recovery there", "checks")]
    notes = []
    for run in runs:
        name = run.status.folder.name
        if run.dataset is None:
            rows.append((name, run.status.state, f"{run.status.samples} stored", "", "", ""))
            if run.status.note:
                notes.append(f"{name}: {run.status.note}")
            continue
        checks = from_json(str(run.dataset.attrs["checks"]))
        passed = sum(check.passed for check in checks)
        count = f"{int(run.dataset['kept'].sum())} of {run.dataset.sizes['sample']}"
        peak = ("", "")
        if run.peak is not None:
            best = run.peak.over_layers
            peak = (f"layer {best.layer}", str(best))
        verdict = f"{passed} of {len(checks)}" + ("" if passed == len(checks) else " FAILED")
        rows.append((name, run.status.state, count, *peak, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *notes])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m lalm_patch.collect`."""
    parser = argparse.ArgumentParser(
        prog="python -m lalm_patch.collect", description="Collect finished runs into one netCDF file, and show a table."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder of runs (outputs), or run folders")
    parser.add_argument("--output", type=Path, help=f"the file to write; default: {FILE} in the first folder")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only runs made with this")
    parser.add_argument(
        "--by", action="append", default=[], metavar="KEY", help="what else the sweep varied; repeatable"
    )
    parser.add_argument("--allow", action="append", default=[], metavar="KEY", help="a key that may differ; repeatable")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that holds other runs")
    options = parser.parse_args(arguments)
    try:
        runs = _matching(read_runs(options.folders), options.where)
        print(table(runs))
        tree = build_tree(runs, options.by, options.allow)
        path = options.output or Path(options.folders[0]) / FILE
        did = write_tree(tree, path, overwrite=options.overwrite)
        collected = len(json.loads(tree.attrs["runs"]))
        left_out = f"; {len(runs) - collected} left out" if len(runs) > collected else ""
        print(f"\n{path} {did}: {collected} runs{left_out}. Open it with xarray.open_datatree, or as one group:")
        print(f"xarray.open_dataset({str(path)!r}, group='summary')")
    except LalmPatchError as error:
        sys.exit(f"error: {error}")
