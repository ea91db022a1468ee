"""How often the analysis sees something where nothing is: every p-value and every interval, at few groups.

    python -m benchmarks.false_positives
    python -m benchmarks.false_positives --skewness 2      # groups far more skewed than the analysis promises to bear

Simulated runs whose truth is known (1 to 4 clips a group, skewed), 2,000 data sets for each number of groups. A test
sees something if p <= 0.05, a 95 % interval if it does not hold the truth; one that is withheld sees nothing. The share
may be 5 % and what chance adds to so many data sets. The seed was fixed beforehand. Needs no model; about 40 minutes
on one core.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import xarray as xr
from scipy.stats import binom

from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import fusion, grounding, mean_recovery, object_effect, peak_interval, ratio_of_means
from lalm_patch.analysis.claims import MEASURES, Index
from lalm_patch.analysis.comparison import depth_difference, depth_test
from lalm_patch.analysis.early_text import accuracy_without_early_audio
from lalm_patch.analysis.paper import Claim
from lalm_patch.analysis.recovery import mean_over_samples
from lalm_patch.analysis.resampling import Estimate

SEED = 20261127
GROUPS = (3, 5, 8, 20)
DATA_SETS = 2000
LEVEL = 0.05
DRAWN = 999
"""Random arrangements and draws; the analysis takes more."""

ENOUGH_SILENCE = 20
"""Data sets after which a part that withholds everything is not asked again: that depends on numbers of groups only."""

PLANTED = Planted()
STEEP = Planted(scale=0.7)
STEEP = replace(STEEP, centre=STEEP.centre + PLANTED.crossing(0.5) - STEEP.crossing(0.5))
"""As deep as the other and more abrupt: what a difference in depth must not be confused with."""

Seen = Iterator[tuple[str, float | None]]
"""What was asked, and whether something was seen where nothing is (1 or 0); None: nothing was said."""


def allowed(data_sets: int) -> float:
    """Largest share that a test at its level exceeds in one of 100 simulations only."""
    return float(binom.ppf(0.99, data_sets, LEVEL) / data_sets)


def _missed(number: Estimate, truth: float) -> float | None:
    return _outside(number.low, number.high, truth)


def _outside(low: float, high: float, truth: float) -> float | None:
    """Rounding is no miss."""
    return None if np.isnan([low, high]).any() else float(not low - 1e-9 <= truth <= high + 1e-9)


def _renamed(run: xr.Dataset, prefix: str, first: int = 0) -> xr.Dataset:
    """Other speakers, but for the first ones."""
    numbers = [int(str(name).removeprefix("speaker")) for name in run["group"].values]
    names = [f"{'' if number < first else prefix}speaker{number}" for number in numbers]
    return run.assign_coords(group=("sample", np.array(names, object)))


def _twice(run: xr.Dataset, rng: np.random.Generator) -> list[xr.Dataset]:
    """Two models that do not differ, on the same clips: half of the deviations are the clips', half the models'."""
    room = 4 * PLANTED.curve * (1 - PLANTED.curve)
    room[-1] = 0.0
    noise = [0.1 * room * (rng.gamma(1, 1, run["recovery_rate"].shape) - 1) for _ in range(2)]
    return [run.assign(recovery_rate=run["recovery_rate"] + more) for more in noise]


def differences_tested(seeds: Sequence[int], groups: int, skewness: float) -> Seen:
    """P-values of differences in depth between two runs that are equally deep."""

    def run(which: int, count: int = groups, planted: Planted = PLANTED) -> xr.Dataset:
        return simulate(planted, seeds[which], count, name=("abc"[which], "pet"), skewness=skewness)

    rng = np.random.default_rng(seeds[3])
    a, b, c = run(0), run(1), run(2)
    other = _renamed(b, "other ")
    for name, pair in (
        ("paired: two models on the same clips", _twice(a, rng)),
        ("paired: other clips of the same speakers", [a, b]),
        ("unpaired", [a, other]),
        ("unpaired, twice as many groups in one", [a, _renamed(run(1, 2 * groups), "other ")]),
        ("half of the groups shared", [a, _renamed(b, "other ", groups // 2)]),
        ("paired, one curve more abrupt", [a, run(1, planted=STEEP)]),
        ("unpaired, one curve more abrupt", [a, _renamed(run(1, planted=STEEP), "other ")]),
        (
            "unpaired, one more abrupt with twice the groups",
            [a, _renamed(run(1, 2 * groups, STEEP), "other ")],
        ),
    ):
        yield f"p: {name}", float(depth_test(*pair, seed=seeds[4], drawn=DRAWN).p <= LEVEL)
    family = [depth_test(*pair, seed=seeds[4], drawn=DRAWN).p for pair in combinations((a, b, c), 2)]
    yield "p: any of three models, by Holm", float(min(family) * len(family) <= LEVEL)
    yield "interval: difference in depth, paired", _missed(depth_difference(a, b, seeds[4]).estimate(), 0.0)
    yield "interval: difference in depth, unpaired", _missed(depth_difference(a, other, seeds[4]).estimate(), 0.0)


def intervals_of_a_run(seeds: Sequence[int], groups: int, skewness: float) -> Seen:
    """Intervals of the numbers of one layer-wise run."""
    run = simulate(PLANTED, seeds[0], groups, skewness=skewness)
    half = int(np.abs(PLANTED.curve - 0.5).argmin())
    for layer in (half, half - 4):
        for name, found in (("mean of ratios", mean_recovery), ("ratio of means", ratio_of_means)):
            cell = found(run, seed=seeds[4], n_resamples=DRAWN).isel(layer=layer)
            where = f"recovery {PLANTED.curve[layer]:.2f}"
            yield f"interval: {name}, {where}", _outside(float(cell["low"]), float(cell["high"]), PLANTED.curve[layer])
    shape = fusion(run.assign_attrs(settings=json.dumps({"seed": seeds[4]})), n_draws=DRAWN)
    yield "interval: fusion depth", _missed(shape.depth, PLANTED.crossing(0.5))
    yield "interval: width", _missed(shape.width, PLANTED.crossing(0.9) - PLANTED.crossing(0.1))
    yield "interval: settled", _missed(shape.settled, PLANTED.crossing(0.9))
    bump = np.zeros(PLANTED.layers)
    bump[9:12] = 0.25, 0.35, 0.25
    low, high = peak_interval(run.assign(recovery_rate=run["recovery_rate"] - PLANTED.curve + bump))
    yield "interval: peak layer", _outside(low, high, 10)


def token_wise(seeds: Sequence[int], groups: int, skewness: float) -> Seen:
    """What is said of option tokens that are like the text around them, and of a last token like any other."""
    run = simulate(PLANTED, seeds[0], groups, token_wise=True, name=("voxtral", "pet"), skewness=skewness)
    yield "p: option tokens, any layer", float(object_effect(run, seed=seeds[4], n_flips=DRAWN).p <= LEVEL)
    index: Index = {("voxtral", "pet", "token"): [run]}
    yield "claim: largest option effect in a window", _claimed(index, "object_peak", "token", 0.0, (0.25, 0.75))
    rates = run["recovery_rate"].copy()
    rates[:, :, -1] = rates[:, :, 1].values  # a last token without an advantage: the claim's edge
    level = {("voxtral", "pet", "token"): [run.assign(recovery_rate=rates + 0.0)]}
    yield "claim: last token above others, all alike", _claimed(level, "last_above_others", "token", 0.0)


def layer_claims(seeds: Sequence[int], groups: int, skewness: float) -> Seen:
    """Intervals that claims are checked by, at the edge of what is claimed."""
    names = (("voxtral", "pet"), ("qwen_audio", "pet"), ("voxtral", "tool"), ("qwen_audio", "tool"))
    runs = [simulate(PLANTED, seeds[k], groups, name=name, skewness=skewness) for k, name in enumerate(names)]
    index: Index = {(*name, "layer"): [run] for name, run in zip(names, runs, strict=True)}
    largest = float(PLANTED.curve[:11].max())
    yield "claim: largest mean in a window", _claimed(index, "largest_in_window", "layer", largest, (0, 10))
    flat = {key: [run.assign(recovery_rate=run["recovery_rate"] - PLANTED.curve)] for key, (run,) in index.items()}
    yield "claim: largest mean, all alike", _claimed(flat, "largest_in_window", "layer", 0.0, (0, 22))
    yield "claim: lead of one model, against a contrast", _claimed(index, "lead_contrast", "layer", 0.0)


def _claimed(
    index: Index, measure: str, granularity: str, truth: float, window: tuple[float, float] = (0.0, 1.0)
) -> float | None:
    claim = Claim("", "", "", "", measure, ("voxtral",), ("pet",), granularity, window=window)
    if measure == "lead_contrast":
        claim = replace(claim, against=("qwen_audio",), contrast=("tool",))
    return _missed(MEASURES[measure](index, claim, "voxtral", "pet", "")[0].estimate(1 - LEVEL), truth)


def answers(seeds: Sequence[int], groups: int, skewness: float) -> Seen:
    """Shares of right answers, and scores that know nothing of wrong ones."""
    rng = np.random.default_rng(seeds[0])
    group = np.repeat(np.arange(groups), rng.integers(1, 5, groups))
    n, options = len(group), np.array(["a", "b", "c"], object)
    easy = rng.beta(3, 2, groups)[group]
    wrong = rng.random(n) > easy
    mass = rng.normal(0, 1, (n, 6, 1, 1)) + rng.gamma(1, 1, (groups, 6))[group][:, :, None, None]
    logits, said = rng.normal(0, 1, (n, 3)), rng.integers(3, size=n)
    logits[np.arange(n), said] = logits.max(axis=1) + rng.exponential(1, groups)[group]
    run = xr.Dataset(
        {
            "audio_attention": (("sample", "observed_layer", "listener", "attention_head"), mass),
            "option_logit_clean": (("sample", "option"), logits),
            "prediction_clean": ("sample", options[said]),
            "recovery_rate": (("sample", "layer"), np.zeros((n, 1))),
            "kept": ("sample", ~wrong),
        },
        {
            "option": options,
            "listener": np.array(["object"], object),
            "label": ("sample", options[np.where(wrong, (said + 1) % 3, said)]),
            "group": ("sample", group.astype(str).astype(object)),
            "layer": [0],
        },
    )
    found = grounding(run.assign_attrs(settings=json.dumps({"seed": seeds[4] % 2**31})))
    for name, number in found.auroc.items():
        yield f"interval: AUROC of {name}", _missed(number, 0.5)
    yield "interval: gain in AUROC", _missed(found.gain, 0.0)
    for share in (0.6, 0.95):
        right = (rng.random(n) < rng.beta(8 * share, 8 * (1 - share), groups)[group]).astype(float)
        low, high = _share(right, group)
        yield f"interval: share of {share} right", _outside(low, high, share)


def _share(right: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """The interval of a share of right answers, as of a run with granularity=early_text_only."""
    n = len(right)
    logits = np.stack([right, np.full(n, 0.5)], axis=1)[:, None]
    numbers = {name: ("sample", np.full(n, 9.0)) for name in ("positions", "first_text_position", "audio_positions")}
    run = xr.Dataset(
        {
            "recovery_rate": (("sample", "layer"), np.zeros((n, 1))),
            "option_logit_patched": (("sample", "layer", "option"), logits),
            "kept": ("sample", np.ones(n, bool)),
            **numbers,
        },
        {
            "sample": np.arange(n).astype(str),
            "layer": [0],
            "option": np.array(["yes", "no"], object),
            "label": ("sample", np.array(["yes"] * n, object)),
            "group": ("sample", group.astype(str)),
        },
        {"settings": json.dumps({"granularity": {"name": "early_text_only"}})},
    )
    table = accuracy_without_early_audio(run).isel(layer=0)
    return float(table["low"]), float(table["high"])


def any_mean(seeds: Sequence[int], groups: int, skewness: float) -> Seen:
    """Means of a cell that half of the groups lack, as of tokens of longer texts or the last windows of the audio."""
    rng = np.random.default_rng(seeds[0])
    group = np.repeat(np.arange(2 * groups), rng.integers(1, 5, 2 * groups))
    shape = 4 / skewness**2
    values = (rng.gamma(shape, 1, 2 * groups)[group] - shape) / np.sqrt(shape) + rng.normal(0, 1, len(group))
    values[group >= groups] = np.nan
    found = mean_over_samples(xr.DataArray(values, dims="sample"), group.astype(str), seed=seeds[4], n_resamples=DRAWN)
    yield "interval: mean of a cell that others lack", _outside(float(found["low"]), float(found["high"]), 0.0)


PARTS: tuple[Callable[[Sequence[int], int, float], Seen], ...] = (
    differences_tested,
    intervals_of_a_run,
    token_wise,
    layer_claims,
    answers,
    any_mean,
)


def measure(
    data_sets: int, groups: int, skewness: float = 1.0, parts: Sequence[Callable[..., Seen]] = PARTS
) -> dict[str, list[float | None]]:
    """By what was asked, what each data set said.

    Args:
        data_sets: how many.
        groups: in each run.
        skewness: of the groups' deviations; 0 is symmetric, 2 exponential.
        parts: what to ask.
    """
    found: dict[str, list[float | None]] = defaultdict(list)
    speaking = list(parts)
    for index in range(data_sets):
        seeds = np.random.SeedSequence([SEED, groups, index]).generate_state(5).tolist()
        for part in tuple(speaking):
            said = dict(part(seeds, groups, skewness))
            for name, seen in said.items():
                found[name].append(seen)
            if index >= ENOUGH_SILENCE and all(seen is None for name in said for seen in found[name]):
                speaking.remove(part)
    return found


def shown(seen: Sequence[float | None], bar: float) -> str:
    """Share of data sets in which something was seen, and of those in which nothing was said; `!` above the bar."""
    said = [value for value in seen if value is not None]
    if not said:
        return "withheld"
    share = sum(said) / len(seen)
    silent = 1 - len(said) / len(seen)
    return f"{share:.1%}{' !' if share > bar else ''}" + (f" ({silent:.0%} withheld)" if silent >= 0.005 else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-sets", type=int, default=DATA_SETS)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--skewness", type=float, default=1.0)
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    arguments = parser.parse_args()
    bar = allowed(arguments.data_sets)
    parts = [part for part in PARTS if part.__name__ in arguments.parts]
    columns = {groups: measure(arguments.data_sets, groups, arguments.skewness, parts) for groups in arguments.groups}
    print(f"{arguments.data_sets} data sets, skewness {arguments.skewness:g}, seed {SEED}; the bar is {bar:.2%}\n")
    print(f"| what nothing is true of | {' | '.join(f'{groups} groups' for groups in columns)} |")
    print(f"|{' --- |' * (1 + len(columns))}")
    for name in dict.fromkeys(name for found in columns.values() for name in found):
        print(f"| {name} | {' | '.join(shown(found.get(name, []), bar) for found in columns.values())} |")


if __name__ == "__main__":
    main()
