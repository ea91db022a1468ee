"""The paper's claims on simulated sweeps that are built to fulfil them, to break them, and to leave them open."""

from __future__ import annotations

from dataclasses import replace

import pytest
import xarray as xr
from hydra import compose, initialize_config_dir

from benchmarks.simulation import Planted, simulate
from lalm_patch.analysis import CLAIMS, Verdict, check_claims
from lalm_patch.analysis.claims import MEASURES, relevant
from lalm_patch.analysis.paper import ALL_ATTRIBUTES, ALL_MODELS
from lalm_patch.config import config_folder, register

AS_REPORTED = {
    "desta2": Planted(32, 10.0, 2.6),
    "desta25": Planted(32, 9.5, 2.6),
    "qwen_audio": Planted(32, 23.0, 0.8),
    "qwen2_audio": Planted(32, 25.0, 0.9),
    "voxtral": Planted(30, 2.5, 0.7),
}


def sweep(planted: dict[str, Planted], groups: int = 40) -> list[xr.Dataset]:
    """All layer-wise runs; Voxtral is later on animal and language, though still ahead."""
    return [
        simulate(
            replace(truth, centre=truth.centre + 2 * (model == "voxtral" and attribute in ("animal", "language"))),
            seed,
            groups,
            name=(model, attribute),
        )
        for seed, attribute in enumerate(ALL_ATTRIBUTES)
        for model, truth in planted.items()
    ]


def verdicts(runs: list[xr.Dataset]) -> dict[str, Verdict]:
    return {finding.claim.name: finding.verdict for finding in check_claims(runs)}


def test_a_sweep_as_the_paper_reports_it_supports_the_layer_claims() -> None:
    found = verdicts(sweep(AS_REPORTED))
    layer_wise = [claim.name for claim in CLAIMS if claim.granularity == "layer"]
    assert {name: found[name] for name in layer_wise} == dict.fromkeys(layer_wise, Verdict.SUPPORTED)
    assert found["last_token_is_highest"] is Verdict.UNDECIDED  # no token-wise run


def test_a_sweep_that_is_otherwise_contradicts_them() -> None:
    swapped = {
        "desta2": Planted(32, 25.0, 0.5),
        "desta25": Planted(32, 25.0, 0.5),
        "qwen_audio": Planted(32, 8.0, 0.8),
        "qwen2_audio": Planted(32, 8.0, 0.9),
        "voxtral": Planted(30, 24.0, 0.8),
    }
    runs = [simulate(truth, 1, 40, name=(model, a)) for a in ALL_ATTRIBUTES for model, truth in swapped.items()]
    found = verdicts(runs)
    for name in (
        "desta_rises_gradually",
        "desta_settles_about_layer_15",
        "qwen_stays_near_zero",
        "qwen_jumps_late",
        "voxtral_is_earlier",
    ):
        assert found[name] is Verdict.CONTRADICTED, name
    assert found["voxtral_is_clearest_for_emotion_and_gender"] is not Verdict.SUPPORTED


def test_few_clips_leave_claims_open() -> None:
    close = AS_REPORTED | {"desta2": Planted(32, 12.5, 2.8), "desta25": Planted(32, 12.5, 2.8)}
    assert verdicts(sweep(close, groups=3))["desta_settles_about_layer_15"] is Verdict.UNDECIDED
    assert set(verdicts([]).values()) == {Verdict.UNDECIDED}


@pytest.mark.parametrize(("peak", "verdict"), [(0.25, Verdict.SUPPORTED), (0.0, Verdict.CONTRADICTED)])
def test_token_claims(peak: float, verdict: Verdict) -> None:
    planted = Planted(20, 6.0, 1.0, object_peak=peak)
    run = simulate(planted, 2, 200, token_wise=True, name=("voxtral", "language"))
    findings = {finding.claim.name: finding for finding in check_claims([run])}
    assert findings["object_peak_voxtral_language"].verdict is verdict
    parts = {part.about: part for part in findings["last_token_is_highest"].parts}
    assert parts["voxtral, language"].verdict is Verdict.SUPPORTED
    assert "no token-wise run of voxtral on animal" in parts["voxtral, animal"].note
    assert [finding.claim.granularity for finding in relevant(list(findings.values()))] == ["token"] * 2


def test_two_runs_of_the_same_thing_are_not_chosen_from() -> None:
    run = simulate(Planted(), 0, name=("qwen_audio", "gender"))
    (finding,) = check_claims([run, run], [claim for claim in CLAIMS if claim.name == "qwen_jumps_late"])
    assert any("2 layer-wise runs of qwen_audio on gender" in part.note for part in finding.parts)


def test_claims_are_well_formed() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.measure in MEASURES
        assert set(claim.models) <= set(ALL_MODELS)
        assert claim.low < claim.high


@pytest.mark.parametrize(
    ("name", "granularity"), [("paper_figure2", "layer"), ("paper_figure3", "token"), ("paper_all", "layer,token")]
)
def test_experiments_sweep_the_papers_models_and_attributes(name: str, granularity: str) -> None:
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
    assert str(config.hydra.mode) == "RunMode.MULTIRUN"
    params = dict(config.hydra.sweeper.params)
    assert params == {
        "model": ",".join(ALL_MODELS),
        "attr": ",".join(ALL_ATTRIBUTES),
        "granularity": granularity,
    }
