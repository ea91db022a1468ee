"""What is said of few groups: no interval, one that does not collapse, or a p-value with its floor; never more."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom, binomtest

from benchmarks.false_positives import (
    DATA_SETS,
    SEED,
    Seen,
    allowed,
    any_mean,
    differences_tested,
    intervals_of_a_run,
    measure,
    shown,
    token_wise,
)
from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import Estimate, Verdict, check_claims, fusion, mean_recovery, peak_interval, ratio_of_means
from lalm_patch.analysis.claims import MEASURES
from lalm_patch.analysis.early_text import accuracy_without_early_audio
from lalm_patch.analysis.paper import CLAIMS, Claim
from lalm_patch.analysis.recovery import over_layers
from lalm_patch.analysis.resampling import ClusterSums, Resampled, fewest_groups, resample, too_few, unanimous
from lalm_patch.truth.scoring import score


@pytest.mark.parametrize(
    ("confidence", "fewest"), [(0.5, 2), (0.75, 3), (0.9, 5), (0.9375, 5), (0.95, 6), (0.99, 8), (1 - 2 / 2**12, 12)]
)
def test_fewest_groups_are_those_with_which_a_sign_flip_test_can_reject(confidence: float, fewest: int) -> None:
    assert fewest_groups(confidence) == fewest
    assert 2 / 2**fewest <= 1 - confidence + 1e-12
    assert fewest == 2 or 2 / 2 ** (fewest - 1) > 1 - confidence
    assert too_few(fewest, confidence) == ""
    assert too_few(fewest - 1, confidence) == f"too few groups: {fewest - 1}, expected at least {fewest}"


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"expected a share between 0 and 1, such as 0\.95"):
        fewest_groups(confidence)


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_intervals_are_withheld_of_few_groups(groups: int) -> None:
    run = simulate(Planted(), 0, groups)
    said = f"(no interval, too few groups: {groups}, expected at least 6)"
    found = fusion(run)
    for number in (found.depth, found.share, found.width, found.settled):
        assert np.isfinite(number.value)
        assert np.isnan([number.low, number.high]).all()
        assert str(number).endswith(said)
    for table in (mean_recovery(run), ratio_of_means(run)):
        assert np.isfinite(table["mean"]).all()
        assert np.isnan(table["low"]).all()
        assert (table["groups"] == groups).all()
    assert mean_recovery(run).attrs["no_interval"] in said
    assert all(str(cell).endswith(said) for cell in over_layers(mean_recovery(run)))
    assert np.isnan(peak_interval(run)).all()


def test_lower_levels_need_fewer_groups_and_higher_ones_more() -> None:
    run = simulate(Planted(), 0, 6)
    assert np.isfinite(fusion(run).depth.low)
    assert np.isfinite(fusion(simulate(Planted(), 0, 4), 0.8).depth.low)
    assert "6, expected at least 8" in str(fusion(run, 0.99).depth)


def test_where_all_agree_the_interval_is_that_value_if_groups_are_enough() -> None:
    for groups in (3, 6):
        clusters = ClusterSums.of(np.ones((groups, 1)), np.arange(groups).astype(str))
        low, high = resample(clusters, 0).interval()
        np.testing.assert_array_equal([low[0], high[0]], [1.0, 1.0] if groups == 6 else [np.nan, np.nan])


def test_a_number_that_hinges_on_one_group_has_no_interval() -> None:
    """Without one of the groups it does not exist, so nothing is known of its spread."""
    values = np.concatenate([[0.5, np.nan], np.full(6, 0.5), np.linspace(0, 1, 200)])
    found = Resampled(values, 7, 7, 7).estimate()
    assert np.isnan(found.low)
    assert str(found) == "0.50 (no interval, the number does not exist without some of the groups)"
    assert str(Estimate(np.nan, np.nan, np.nan, 0, 0)) == "undefined"


def test_cells_that_fewer_groups_have_are_withheld_one_by_one() -> None:
    run = simulate(Planted(), 0, 8)
    rates = run["recovery_rate"].copy()
    few = np.isin(run["group"].values, [f"speaker{k}" for k in range(3)])
    rates[few, 4] = np.nan
    found = mean_recovery(run.assign(recovery_rate=rates))
    assert np.isnan(found["low"].values).tolist() == [layer == 4 for layer in range(24)]
    cells = over_layers(found)
    assert cells[4].reason == "too few groups: 5, expected at least 6"
    assert cells[5].reason == ""


# --- shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3, 8, 40])
def test_the_bound_of_a_unanimous_share_is_clopper_and_pearsons(groups: int) -> None:
    expected = binomtest(groups, groups).proportion_ci(0.95, "exact").low
    assert float(unanimous(np.array(groups))) == pytest.approx(expected)
    assert float(unanimous(np.array(0))) == 0.0


def answered(right: list[int], groups: list[str]) -> xr.Dataset:
    n = len(right)
    numbers = {name: ("sample", np.full(n, 9.0)) for name in ("positions", "first_text_position", "audio_positions")}
    logits = np.stack([np.array(right, float), np.full(n, 0.5)], axis=1)[:, None]
    return xr.Dataset(
        {
            "recovery_rate": (("sample", "layer"), np.zeros((n, 1))),
            "option_logit_patched": (("sample", "layer", "option"), logits),
            "kept": ("sample", np.ones(n, bool)),
            **numbers,
        },
        {
            "sample": [f"s{k}" for k in range(n)],
            "layer": [0],
            "option": np.array(["yes", "no"], object),
            "label": ("sample", np.array(["yes"] * n, object)),
            "group": ("sample", groups),
        },
        {"settings": json.dumps({"granularity": {"name": "early_text_only"}})},
    )


def test_a_share_on_which_all_agree_keeps_an_interval() -> None:
    groups = list("aabbcc")
    right, wrong = (accuracy_without_early_audio(answered([k] * 6, groups)) for k in (1, 0))
    bound = 0.025 ** (1 / 3)
    assert (float(right["accuracy"][0]), float(wrong["accuracy"][0])) == (1.0, 0.0)
    np.testing.assert_allclose([right["low"][0], right["high"][0]], [bound, 1.0])
    np.testing.assert_allclose([wrong["low"][0], wrong["high"][0]], [0.0, 1 - bound])
    mixed = accuracy_without_early_audio(answered([1, 1, 1, 1, 0, 1], groups))
    assert np.isnan([mixed["low"][0], mixed["high"][0]]).all()
    enough = accuracy_without_early_audio(answered([1] * 7 + [0], list("abcdefgh")))
    assert 0.0 <= float(enough["low"][0]) < 0.875 < float(enough["high"][0]) <= 1.0


# --- claims --------------------------------------------------------------------------------------------------------


def test_claims_on_few_groups_are_undecided_with_the_reason() -> None:
    run = simulate(Planted(32, 23.0, 0.8), 0, 4, name=("qwen_audio", "gender"))
    (finding,) = check_claims([run], [claim for claim in CLAIMS if claim.name == "qwen_jumps_late"])
    part = next(part for part in finding.parts if part.number is not None)
    assert part.verdict is Verdict.UNDECIDED
    assert part.note == "no interval, too few groups: 4, expected at least 9"  # eight parts at 95 % together


def test_the_interval_of_a_largest_mean_is_that_of_single_means() -> None:
    """Its upper end is the largest one of any mean, its lower end the largest one at Bonferroni's level."""
    run = simulate(Planted(), 0, 30, name=("a", "b"))
    claim = Claim("", "", "", "", "largest_in_window", ("a",), ("b",), window=(2, 6))
    number = MEASURES["largest_in_window"]({("a", "b", "layer"): [run]}, claim, "a", "b", "")[0].estimate(0.95)
    at = {level: mean_recovery(run, level, n_resamples=4000).sel(layer=slice(2, 6)) for level in (0.95, 0.99)}
    assert number.high == pytest.approx(float(at[0.95]["high"].max()))
    assert number.low == pytest.approx(float(at[0.99]["low"].max()))
    assert number.value == pytest.approx(float(at[0.95]["mean"].max()))


# --- coverage in the truth benchmark -------------------------------------------------------------------------------


def test_a_missing_interval_is_not_one_that_missed() -> None:
    population = simulate(Planted(), 0, 40)
    expected = np.where(np.arange(24) >= 14, 1.0, 0.0)
    few = score(simulate(Planted(), 1, 4), expected, population)
    many = score(simulate(Planted(), 1, 12), expected, population)
    assert few is not None
    assert many is not None
    assert np.isnan([few.covered, few.width]).all()
    assert many.covered in (0.0, 1.0)
    assert many.width > 0


# --- simulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "part", "sets"),
    [(3, differences_tested, 8), (3, intervals_of_a_run, 8), (8, any_mean, 200), (8, token_wise, 12)],
)
def test_what_is_seen_where_nothing_is_stays_at_its_level(groups: int, part: Callable[..., Seen], sets: int) -> None:
    """benchmarks/false_positives.py in small: fewer data sets, with the room that chance needs there."""
    for name, seen in measure(sets, groups, parts=(part,)).items():
        share = shown(seen, binom.ppf(0.999, sets, 0.05) / sets)
        assert "!" not in share, (name, share)
        if groups == 3 and "twice" not in name:  # 2 / 8 and 2 / 20 are above the level, and intervals are withheld
            assert share in ("0.0%", "withheld"), (name, share)


def test_the_simulation_is_fixed_beforehand() -> None:
    assert (SEED, DATA_SETS) == (20261127, 2000)
    assert allowed(DATA_SETS) == pytest.approx(0.0615)
    first, again = (measure(2, 8, parts=(any_mean,)) for _ in range(2))
    assert first == again
    assert shown([None, None], 0.06) == "withheld"
    assert shown([1.0, 0.0, None, None], 0.06) == "25.0% ! (50% withheld)"
