"""Trace a population of planted models with every method and sum up how well what was planted is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import xarray as xr

from lalm_patch.interventions.patches import Site
from lalm_patch.terminal import Progress
from lalm_patch.truth.circuit import token_table
from lalm_patch.truth.decoder import draw_clips
from lalm_patch.truth.measure import measure
from lalm_patch.truth.methods import METHODS, Method
from lalm_patch.truth.population import SINGLE_PATH, Plan
from lalm_patch.truth.scoring import Score, draw_run, score

ALL = "all"
DEPTH_BAR, COVERAGE_BAR, POSITION_BAR = 0.95, 0.90, 0.95
WIDE = 0.01
"""Layers: where clips agree on the depth an interval is narrower, and holding the truth says little."""


@dataclass(frozen=True)
class Row:
    """One planted model traced by one method.

    Attributes:
        number: of the model in its population.
        plan: what was planted.
        method: name of the method.
        score: None if no clip of the run counted.
        spot_check: largest difference in probability from the direct engine.
    """

    number: int
    plan: Plan
    method: str
    score: Score | None
    spot_check: float

    def flat(self) -> dict[str, Any]:
        """For a table with a row per model and method."""
        scores = dict.fromkeys(field.name for field in fields(Score)) if self.score is None else asdict(self.score)
        scores["paths"] = " ".join(f"{value:.3f}" for value in scores["paths"] or ())
        described = {name: getattr(self.plan, name) for name in ("kind", "architecture", "background", "seed", "truth")}
        return {"model": self.number, "method": self.method, **described, **scores, "spot_check": self.spot_check}


def run_benchmark(plans: Sequence[Plan], methods: Sequence[Method], clips: int, population: int) -> Iterator[Row]:
    """Trace and score every plan with every method; each row comes as soon as it is known.

    Args:
        plans: the models.
        methods: ways of tracing.
        clips: clips of a run, drawn with replacement from the model's population.
        population: clips of that population; all of them are traced, so that the truth of an interval is known.
    """
    total = sum(_cells(plan, method) * population for plan in plans for method in methods)
    with Progress(total, f"{len(plans)} planted models") as progress:
        for number, plan in enumerate(plans):
            lalm = plan.build()
            drawn = draw_clips(population, lalm.frames, plan.seed)
            for method in methods:
                progress.note(f"model {number + 1}, {plan.kind}, {method.name}")
                measured = measure(lalm, method, drawn, progress.advance, f"planted {number}")
                # Not the clips' own seed, and the same for all methods: they see the same runs.
                run = draw_run(measured.dataset, clips, plan.seed + 1)
                found = score(run, measured.expected(plan.truth), measured.dataset) if measured.answers else None
                yield Row(number, plan, method.name, found, measured.spot_check)


def _cells(plan: Plan, method: Method) -> int:
    return len(method.grid(token_table(plan.truth.text), range(plan.truth.layers)).cells)


def summary(rows: Sequence[Row]) -> xr.Dataset:
    """Means over the models of each kind, and over all: variables along (`method`, `kind`)."""
    methods = list(dict.fromkeys(row.method for row in rows))
    kinds = [ALL, *dict.fromkeys(row.plan.kind for row in rows)]
    variables = {}
    for name, (value, reduce) in COLUMNS.items():
        cells = [[_reduced(rows, method, kind, value, reduce) for kind in kinds] for method in methods]
        variables[name] = (("method", "kind"), np.array(cells))
    return xr.Dataset(variables, {"method": np.array(methods, object), "kind": np.array(kinds, object)})


Value = Callable[[Row], float]
Reduce = Callable[[np.ndarray], float]


def _of(read: Callable[[Score], float]) -> Value:
    """A number of the score; NaN without one."""
    return lambda row: np.nan if row.score is None else read(row.score)


def _path(index: int) -> Value:
    return _of(lambda found: found.paths[index] if index < len(found.paths) else np.nan)


COLUMNS: dict[str, tuple[Value, Reduce]] = {
    "models": (lambda row: 1.0, np.sum),
    "scored": (lambda row: 1.0 if row.score is not None else np.nan, np.sum),
    "AUROC": (_of(lambda found: found.auroc), np.mean),
    "layer": (_of(lambda found: found.layer), np.mean),
    "position": (_of(lambda found: found.position), np.mean),
    "depth": (_of(lambda found: found.within), np.mean),
    "covered": (_of(lambda found: found.covered), np.mean),
    "width": (_of(lambda found: found.width), np.median),
    "largest RR": (_of(lambda found: found.largest), np.mean),
    "path 1": (_path(0), np.mean),
    "path 2": (_path(1), np.mean),
    "largest false": (_of(lambda found: found.false), np.max),
    "agreement": (_of(lambda found: found.agreement), np.mean),
    "engines differ": (lambda row: row.spot_check, np.max),
}
"""Columns of the table: what is read off a row, and how models are put together. NaN is left out."""


def _reduced(rows: Sequence[Row], method: str, kind: str, value: Value, reduce: Reduce) -> float:
    chosen = [value(row) for row in rows if row.method == method and kind in (ALL, row.plan.kind)]
    known = np.array([number for number in chosen if not np.isnan(number)])
    return float(reduce(known)) if known.size else np.nan


def markdown(table: xr.Dataset) -> str:
    """The summary as a table."""
    names = [str(name) for name in table.data_vars]
    lines = [f"| method | kind | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for method in table["method"].values:
        for kind in table["kind"].values:
            place = table.loc[{"method": method, "kind": kind}]
            lines.append(f"| {method} | {kind} | {' | '.join(_shown(n, float(place[n])) for n in names)} |")
    return "\n".join(lines)


def _shown(name: str, value: float) -> str:
    if np.isnan(value):
        return ""
    if name in ("models", "scored"):
        return f"{value:.0f}"
    if name in ("layer", "position", "depth", "covered"):
        return f"{value:.1%}"
    return f"{value:.1e}" if name in ("engines differ", "width", "largest false") else f"{value:.3f}"


def _sought(method: str) -> str:
    """What the column `position` is about."""
    if method in ("segment", "edge", "path"):
        return method
    return "head" if method in METHODS and METHODS[method].site is Site.HEAD else "position"


def _exact(method: str) -> bool:
    """Whether a method promises the direct engine's cells."""
    return method not in METHODS or METHODS[method].exact


def bars(rows: Sequence[Row]) -> list[str]:
    """The claims made for tracing, each with the share that was found."""
    within, position = _of(lambda found: found.within), _of(lambda found: found.position)
    covered = _of(lambda found: found.covered)
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        single = [row for row in own if row.plan.kind in SINGLE_PATH]
        wide = [row for row in own if row.score is not None and row.score.width > WIDE]
        for what, bar, chosen, value in (
            ("fusion depth within one layer of the truth", DEPTH_BAR, own, within),
            ("interval holds the population's fusion depth", COVERAGE_BAR, own, covered),
            (f"the same, intervals wider than {WIDE} layers", COVERAGE_BAR, wide, covered),
            (f"planted {_sought(method)} first, single path", POSITION_BAR, single, position),
        ):
            known = [number for number in map(value, chosen) if not np.isnan(number)]
            if known:
                share = np.mean(known)
                met = (
                    f"{bar:.0%} {'met' if share >= bar else 'MISSED'}" if _exact(method) else "an approximation, no bar"
                )
                lines.append(f"{method}: {what}: {sum(known):.0f} of {len(known)} ({share:.1%}); {met}")
        agreement = [row.score.agreement for row in own if row.score and not np.isnan(row.score.agreement)]
        if agreement:
            middle, low = np.median(agreement), np.quantile(agreement, 0.1)
            text = f"correlation with exact cells: median {middle:.2f}, a tenth of the models below {low:.2f}"
            lines.append(f"{method}: {text}; {len(agreement)} models")
    if unscored := sum(row.score is None for row in rows):
        lines.append(f"{unscored} of {len(rows)} runs had no clip that counts, and are in no share")
    return lines
