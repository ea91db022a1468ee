"""How often the 95 % intervals hold the truth, and how often the object-token test cries wolf, over simulated runs.

    python -m benchmarks.coverage --runs 1000
    python -m benchmarks.coverage --runs 1000 --first 5000    # other data sets

Prints the shares with their binomial standard error. Needs no model; some minutes on one core.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np

from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import fusion, mean_recovery, object_effect, ratio_of_means


def measure(
    runs: int, groups: int = 40, n_draws: int = 1000, n_flips: int = 999, skewness: float = 1.0, first: int = 0
) -> dict[str, list[bool]]:
    """Per quantity, whether each simulated run's interval holds the truth, or whether the test says there is an effect.

    Args:
        runs: how many data sets.
        groups: groups in each.
        n_draws: draws of the bootstrap.
        n_flips: flips of the test.
        skewness: of the groups' deviations; 0 is symmetric, 2 exponential.
        first: number of the first data set; each number is a data set of its own.
    """
    planted = Planted()
    steep = 14
    found: dict[str, list[bool]] = defaultdict(list)
    for index in range(first, first + runs):
        seed = 1_000_000_000 + index  # of the analysis; another one than the data's
        run = simulate(planted, index, groups, skewness=skewness)
        means = mean_recovery(run, seed=seed, n_resamples=n_draws).isel(layer=steep)
        ratio = ratio_of_means(run, seed=seed, n_resamples=n_draws).isel(layer=steep)
        for name, cell in (("mean of ratios", means), ("ratio of means", ratio)):
            found[name].append(bool(cell["low"] <= planted.curve[steep] <= cell["high"]))
        shape = fusion(run.assign_attrs(settings=f'{{"seed": {seed}}}'), n_draws=n_draws)
        truth = {
            "fusion depth": (shape.depth, planted.crossing(0.5)),
            "width from 10 to 90 %": (shape.width, planted.crossing(0.9) - planted.crossing(0.1)),
        }
        for name, (number, true) in truth.items():
            found[name].append(number.low <= true <= number.high)
        silent = simulate(planted, index, groups, token_wise=True)
        found["object effect found where there is none"].append(
            object_effect(silent, seed=seed, n_flips=n_flips).p <= 0.05
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=40)
    parser.add_argument("--skewness", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    found = measure(arguments.runs, arguments.groups, skewness=arguments.skewness, first=arguments.first)
    for name, hits in found.items():
        share = float(np.mean(hits))
        error = np.sqrt(share * (1 - share) / len(hits))
        print(f"{name:<42} {share:6.1%} +- {error:.1%} of {len(hits)} data sets with {arguments.groups} groups")


if __name__ == "__main__":
    main()
