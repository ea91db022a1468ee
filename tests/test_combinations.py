"""Every combination of the groups of settings is refused before the run, with the reason, or it runs."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lalm_patch.analysis import METRICS, about
from lalm_patch.checks import from_json
from lalm_patch.config import check_combinations, compose, config_folder, run_name
from lalm_patch.errors import ConfigError
from lalm_patch.run import run
from lalm_patch.settings import CHOICES, GranularitySettings, RunSettings

GROUPS = ("granularity", "site", "direction", "corruption", "metric", "observe", "engine", "backend")
PARTS = 4
Combination = tuple[str, ...]
BASE = compose("attr=gender")
SMALL = compose("attr=gender", "data.limit=4", "engine.spot_checks=2")


def choices(group: str) -> list[str]:
    """What a group offers: its YAML files."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


@cache
def sections() -> dict[tuple[str, str], object]:
    """Settings of every choice, as Hydra composes them; an edge is named, which single heads need."""
    found = {}
    for group in GROUPS:
        for name in choices(group):
            try:
                found[group, name] = getattr(compose(f"{group}={name}"), group)
            except ConfigError:  # refused with the other groups' defaults
                found[group, name] = getattr(compose(f"{group}={name}", *COMPANIONS[group, name]), group)
    edge = found["granularity", "edge"]
    assert isinstance(edge, GranularitySettings)
    found["granularity", "edge"] = replace(edge, edges=["audio-last"])
    return found


COMPANIONS = {
    ("granularity", "edge"): ("site=attn", "direction=noising"),
    ("granularity", "early_text_only"): ("site=attn", "direction=noising"),
    ("granularity", "ablate"): ("direction=noising",),
    ("granularity", "path"): ("site=attn",),
    ("site", "embed"): ("granularity=audio",),
    ("site", "tower"): ("granularity=audio",),
}


def settings_of(combination: Combination) -> RunSettings:
    """Settings of a combination; small, so that it runs in a second or two."""
    parts = {group: sections()[group, name] for group, name in zip(GROUPS, combination, strict=True)}
    chosen = replace(SMALL, **parts)  # type: ignore[arg-type]
    granularity, site, engine = (parts[group].name for group in ("granularity", "site", "engine"))  # type: ignore[attr-defined]
    if granularity == "audio":
        chosen.granularity = replace(chosen.granularity, seconds=0.25)
    if site != "embed" and (engine == "direct" or site == "tower"):
        chosen.granularity = replace(chosen.granularity, layers=[1])
    elif granularity == "token":
        chosen.granularity = replace(chosen.granularity, layers=[1, 5])
    return chosen


@cache
def verdicts() -> dict[Combination, str]:
    """Of every combination on this machine, and of some with a server, why it is refused; empty if it is not."""
    found = {}
    every = itertools.product(*(choices(group) for group in GROUPS if group != "backend"))
    remote = np.random.default_rng(0)
    for own in every:
        combination = (*own, "ndif" if remote.random() < 0.03 else "local")
        parts = {group: sections()[group, name] for group, name in zip(GROUPS, combination, strict=True)}
        try:
            check_combinations(replace(BASE, **parts))  # type: ignore[arg-type]
        except ConfigError as error:
            found[combination] = str(error)
        else:
            found[combination] = ""
    return found


def pairs_of(combination: Combination) -> set[tuple[str, str, str, str]]:
    named = list(zip(GROUPS, combination, strict=True))
    return {(*one, *two) for one, two in itertools.combinations(named, 2)}


@cache
def covering() -> list[Combination]:
    """Combinations that run and hold every pair that any does, chosen one after another for their new pairs."""
    # A run with metric=all is one with each of the metrics, and engine=auto is replay where that works.
    local = [c for c, reason in verdicts().items() if not reason and c[-1] == "local" and not {"all", "auto"} & {*c}]
    numbers: dict[tuple[str, str, str, str], int] = {}
    held = np.array([[numbers.setdefault(pair, len(numbers)) for pair in sorted(pairs_of(c))] for c in local])
    # A pair that few combinations hold weighs more: taken late it costs a run of its own.
    weights = np.bincount(held.ravel()) ** -0.5
    chosen = []
    while weights.any():
        best = int(weights[held].sum(axis=1).argmax())
        chosen.append(local[best])
        weights[held[best]] = 0
    assert set().union(*map(pairs_of, chosen)) == set(numbers)
    return chosen


def test_choices_are_those_the_settings_know() -> None:
    for group in GROUPS:
        known = CHOICES.get(f"{group}.name")
        if known is not None:
            assert sorted(map(str, known)) == choices(group), group
    assert set(CHOICES["metric.name"]) == {*METRICS, "all"}


def test_what_is_refused_is_refused_with_a_reason_and_an_alternative() -> None:
    reasons = {reason for reason in verdicts().values() if reason}
    assert len(reasons) > 20
    for reason in reasons:
        assert "expected" in reason or "use " in reason, reason
        assert "=" in reason, reason
    # No choice is refused with everything: each runs somewhere, on this machine or on a server.
    for group, name in sections():
        index = GROUPS.index(group)
        assert any(not reason for c, reason in verdicts().items() if c[index] == name), (group, name)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.usefixtures("without_pdfs", "demos_opened_once")
def test_every_pair_of_choices_runs(part: int, tmp_path: Path) -> None:
    for combination in covering()[part::PARTS]:
        settings = settings_of(combination)
        check_combinations(settings)
        outcome = run(settings, tmp_path / run_name(settings))
        dataset = outcome.dataset
        assert dataset is not None, combination
        assert all(check.passed for check in from_json(dataset.attrs["checks"])), combination
        assert (about(dataset).site, about(dataset).direction) == (settings.site.name, settings.direction.name)
        assert all(path.stat().st_size for path in outcome.files), combination
        drawn = {path.name for path in outcome.files}
        wanted = [settings.metric.name] if settings.metric.name != "probability" else []
        assert all(f"figure-{name}.png" in drawn for name in wanted), combination
        kept = dataset.isel(sample=np.flatnonzero(dataset["kept"]))
        assert np.isfinite(kept["recovery_rate"].values).any() or not kept.sizes["sample"], combination
