"""granularity=path: its grid by both engines, planted truths, and runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import load
from demo_runs import runs_on_demo, sound
from test_engines import TOLERANCE, encodings, likely_tokens
from test_paths import FAMILIES
from test_truth import DISTRACTED, SINGLE, SUPPRESSED, TEXT, TWO_PATHS, one_row, pair, rates

import lalm_patch
from lalm_patch.analysis import about, planted_window
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ConfigError
from lalm_patch.interventions import Input, Intervention, PathPatch, Receiver, Sender
from lalm_patch.interventions.grids import Place, make_grid, window_starts
from lalm_patch.interventions.patches import Site
from lalm_patch.models import LALM
from lalm_patch.run import dry_run
from lalm_patch.stimuli import Prompt
from lalm_patch.truth import METHODS, Circuit, Window, draw_clips, measure, plant_circuit, plant_window, score
from lalm_patch.truth.decoder import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> LALM:
    """A tiny model of each of the five families."""
    folders = checkpoints if request.param in checkpoints else request.getfixturevalue("native_folders")
    return load(folders[request.param], request.param)


def place_of(lalm: LALM, way: str, window: int = 1) -> Place:
    layers = lalm.num_layers
    return Place(Site.ATTN, window, layers, lalm.num_heads, way=way, receivers=tuple(range(0, layers, window)))


@pytest.mark.parametrize("way", ["audio-object-last", "audio-last", "early-object", "resid"])
def test_replay_equals_direct_on_random_cells(any_family: LALM, prompt: Prompt, way: str) -> None:
    clean, corrupted = encodings(any_family, prompt)
    ids = likely_tokens(any_family, clean, corrupted)
    window = 2 if way == "audio-last" else 1
    place = place_of(any_family, "audio-last" if way == "resid" else way, window)
    if way == "resid":
        place = replace(place, site=Site.RESID)
    grid = make_grid("path", clean.tokens, range(0, any_family.num_layers, window), place)
    leading = np.flatnonzero([not cell.idle for cell in grid.cells])
    few = grid.chosen(np.random.default_rng(0).choice(leading, min(3, len(leading)), replace=False))
    source, target = (corrupted, clean) if way == "early-object" else (clean, corrupted)
    engine = ReplayEngine(any_family)
    slow = DirectEngine(any_family).sweep(source, target, few, ids)
    fast = engine.sweep(source, target, grid, ids)
    np.testing.assert_allclose(fast.probabilities[few.coords["cell"]], slow.probabilities, atol=TOLERANCE)
    unpatched = engine.base(source, target, ids)
    assert np.abs(slow.option_logits - unpatched.option_logits[1]).max() > 1e-5
    idle = np.flatnonzero([cell.idle for cell in grid.cells])
    if window == 1:
        assert len(idle) == grid.shape[0] * (grid.shape[0] + 1) // 2
    expected = np.tile(unpatched.option_logits[1], (len(idle), 1))
    np.testing.assert_array_equal(fast.option_logits[idle], expected)


def test_windows_begin_side_by_side() -> None:
    place = Place(Site.ATTN, 3, 8)
    assert window_starts(place, None) == (0, 3, 6)
    assert window_starts(place, [-1, 0]) == (0, 7)
    with pytest.raises(ConfigError, match=r"granularity\.receivers=\[9\]: the model has decoder layers 0 to 7"):
        window_starts(place, [9], "granularity.receivers")


RUN = ("attr=gender", "data.limit=6", "engine.spot_checks=4", "granularity=path", "site=attn")
RUNS = {
    "passed on": ("granularity.path=audio-object-last",),
    "straight": ("granularity.path=audio-last", "site=resid", "direction=noising"),
    "written": ("granularity.path=object-last", "site.window=2"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lalm_patch.RunOutcome]:
    """A run of each kind on the demo."""
    return runs_on_demo(tmp_path_factory.mktemp("runs"), RUN, RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_labelled_checked_drawn_and_summed_up(outcomes: dict[str, lalm_patch.RunOutcome], name: str) -> None:
    dataset, checks = sound(outcomes[name], "layer", "receiver_layer")
    assert dataset["layer"].attrs["long_name"].startswith("written in layer")
    assert {"replay_at_load", "noise_floor"} <= set(checks)
    assert ("site_adds_up" in checks) == (about(dataset).site == "attn")
    kept = dataset["recovery_rate"].where(dataset["kept"], drop=True)
    written, read = np.meshgrid(dataset["layer"], dataset["receiver_layer"] + about(dataset).window - 1, indexing="ij")
    assert (kept.values[:, read <= written] == 0).all()
    assert "\npath     path " in outcomes[name].summary


def test_what_the_runs_say_of_the_demo(outcomes: dict[str, lalm_patch.RunOutcome]) -> None:
    """Attention is planted in some layers alone: nothing is written or read elsewhere."""
    dataset = outcomes["passed on"].dataset
    assert dataset is not None
    window = planted_window(dataset)
    assert window is not None
    mean = dataset["recovery_rate"].where(dataset["kept"]).mean("sample")
    inside = (mean["layer"] >= window[0]) & (mean["receiver_layer"] < window[1])
    assert float(np.abs(mean.where(inside)).max()) > 1e-3
    assert float(np.abs(mean.where(~inside)).max()) < 1e-5
    straight = outcomes["straight"].dataset
    assert straight is not None
    lost = straight["recovery_rate"].where(straight["kept"]).mean("sample")
    assert float(lost.max()) > 0.1
    assert float(np.abs(lost.where(~lost["receiver_layer"].isin(range(*window)))).max()) < 1e-5
    titles = [about(outcome.dataset).title for outcome in outcomes.values() if outcome.dataset is not None]
    assert titles == [
        "demo, gender, path audio-object-last of the corrupted run",
        "demo, gender, path audio-last of the clean run, resid",
        "demo, gender, path object-last of the corrupted run, windows of 2 layers",
    ]


def test_the_dry_run_says_what_paths_cost() -> None:
    asked = ("granularity=path", "site=attn", "attr=gender", "dry_run=true")
    page = dry_run(lalm_patch.compose(*asked))
    assert "grid     path: 8 x 8 = 64 cells per clip" in page
    assert "paths    28 of 64 cells lead somewhere, the others are 0 by definition; 7 senders" in page
    direct = dry_run(lalm_patch.compose(*asked, "engine=direct"))
    assert "259 forward passes per clip" in direct  # 2 + 1 + 64 cells of 4
    wide = dry_run(lalm_patch.compose(*asked, "site.window=4"))
    assert "grid     path: 2 x 2 = 4 cells per clip" in wide


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("granularity=layer", "+granularity.path=object-last"), r"granularity\.path goes with granularity=path"),
        (("granularity=path",), "expected site=attn, got site=resid"),
        (
            ("granularity=path", "granularity.path=audio-last", "site.window=2"),
            "expected site=attn or mlp, or site=resid",
        ),
        (("granularity=path", "site=attn", "engine=attribution"), "use engine=auto"),
        (("granularity=path", "site=attn", "backend=ndif"), "use backend=local"),
        (("granularity=path", "site=attn", "prompt.answer=whole"), "use prompt.answer=first_token"),
        (
            ("granularity=path", "site=attn", "granularity.path=last-object"),
            r"path: 'last-object': causal",
        ),
        (("granularity=path", "site=attn", "granularity.path=audio-object-moon"), "is no edge"),
        (("granularity=path", "site=attn", "granularity.path=audio"), "expected two or three segments"),
        (("granularity=path", "site=attn", "granularity.path=audio-text"), "expected two or three segments"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lalm_patch.compose(*overrides)


def test_a_way_needs_its_segments() -> None:
    with pytest.raises(ConfigError, match=r"granularity\.path: this prompt has no edge"):
        dry_run(
            lalm_patch.compose("granularity=path", "site=attn", "attr=gender", "granularity.path=audio-transcript-last")
        )


def test_some_cell_leads_somewhere() -> None:
    asked = ("granularity=path", "site=attn", "attr=gender", "granularity.layers=[4]", "granularity.receivers=[2]")
    with pytest.raises(ConfigError, match="expected receivers in a layer above one of the senders"):
        dry_run(lalm_patch.compose(*asked))


# --- planted truths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("circuit", [SINGLE, TWO_PATHS, SUPPRESSED], ids=["single", "two paths", "suppressed"])
def test_planted_paths_are_what_arithmetic_says(circuit: Circuit, architecture: str) -> None:
    """The planted paths carry what they must; every other one carries nothing, exactly."""
    lalm = plant_circuit(circuit, architecture)
    measured = measure(lalm, METHODS["path"], draw_clips(2, lalm.frames, seed=0))
    expected = measured.expected(circuit)
    mean = measured.dataset["recovery_rate"].where(measured.dataset["kept"]).mean("sample").values
    np.testing.assert_allclose(mean, expected, atol=1e-3)
    hears, answers = circuit.moves[0].layer, circuit.moves[1 if circuit is not TWO_PATHS else 2].layer
    relays = {move.source for move in circuit.moves if move.source is not None}
    assert {tuple(cell) for cell in np.argwhere(np.abs(expected) > 0.05)} == {(hears, answers, p) for p in relays}
    assert np.abs(mean[np.abs(expected) < 1e-9]).max() <= 1e-6


def test_a_distractor_is_no_path_beside_random_weights() -> None:
    lalm = plant_circuit(DISTRACTED, "voxtral", background=0.5, seed=2)
    measured = measure(lalm, METHODS["path"], draw_clips(4, lalm.frames, seed=7))
    found = score(measured.dataset, measured.expected(DISTRACTED))
    assert found is not None
    assert (found.layer, found.position, found.auroc) == (1, 1, 1)
    assert found.false < 1e-3  # random heads read what random heads have written
    assert measured.spot_check < TOLERANCE
    moved = Circuit(6, 8, tuple(replace(move, layer=move.layer + 1) for move in DISTRACTED.moves))
    wrong = score(measured.dataset, measured.expected(moved))
    assert wrong is not None
    assert wrong.position == 0


def test_heads_and_keys_by_arithmetic() -> None:
    """Single heads as senders and receivers, keys and values apart, and attention as a whole."""
    lalm = plant_circuit(SINGLE)
    hears, answers = SINGLE.moves
    (clip,) = draw_clips(1, lalm.frames, seed=3)
    clean, silence = pair(lalm, clip)
    relay, last, audio = (TEXT + 2,), (TEXT + 7,), clean.tokens.audio_positions
    key, value = (Receiver(answers.layer, relay, kind, answers.head, last) for kind in (Input.KEY, Input.VALUE))
    head, attention = Sender(hears.layer, relay, Site.HEAD, hears.head, audio), Sender(hears.layer, relay)
    other = replace(value, head=answers.head + 1)
    cases = [(head, (key, value)), (attention, (value,)), (head, (key,)), (head, (other,))]
    cells = [Intervention(path=PathPatch((sender,), receivers)) for sender, receivers in cases]
    found = ReplayEngine(lalm).sweep(clean, silence, one_row(*cells), lalm.option_ids).probabilities
    np.testing.assert_allclose(found, SINGLE.probabilities(lalm.audio_register(clean), cells), atol=1e-4)
    rate = rates(lalm, clip, *cells)
    np.testing.assert_allclose(rate, [1, 1, 0, 0], atol=0.02)


def test_outside_a_planted_window_there_are_no_paths() -> None:
    window = Window(6, 8, 1, 4)
    lalm = plant_window(window, "voxtral", seed=1)
    measured = measure(lalm, METHODS["path"], draw_clips(3, lalm.frames, seed=2))
    expected = measured.expected(window)
    mean = measured.dataset["recovery_rate"].where(measured.dataset["kept"]).mean("sample").values
    outside = ~np.isnan(expected)
    assert outside.any()
    assert (expected[outside] == 0).all()
    assert np.abs(mean[outside]).max() < 1e-5
    assert np.abs(mean[~outside]).max() > 1e-3
