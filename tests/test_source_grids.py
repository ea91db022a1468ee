"""Back-patching, ablation and steering: grids by both engines, vectors by hand, planted truths, and runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import load
from demo_runs import runs_on_demo, sound
from test_engines import TOLERANCE, encodings, likely_tokens
from test_truth import SINGLE, pair

import lalm_patch
from lalm_patch.analysis import about
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ConfigError, DataError
from lalm_patch.interventions.grids import (
    CLASS_DIRECTION,
    SOURCED,
    Grid,
    Place,
    back_layers,
    direction_key,
    make_grid,
    mean_key,
)
from lalm_patch.interventions.patches import Intervention, Origin, Patch, Site, Source
from lalm_patch.interventions.segments import AUDIO
from lalm_patch.models import LALM, Encoding
from lalm_patch.run import dry_run
from lalm_patch.stimuli import Prompt, Record
from lalm_patch.tracing.metrics import recovery_rate
from lalm_patch.tracing.vectors import FOLDS, Directions, Vectors, folds, mean_states
from lalm_patch.truth import Circuit, Move, PlantedLALM, Register, draw_clips, plant_circuit, too_late
from lalm_patch.truth.decoder import ARCHITECTURES, MELS

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")

FAMILIES = ("qwen2_audio", "voxtral", "desta2", "desta25", "qwen_audio")


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> LALM:
    """A tiny model of each of the five families."""
    folders = checkpoints if request.param in checkpoints else request.getfixturevalue("native_folders")
    return load(folders[request.param], request.param)


def record(name: str, label: str, group: str = "") -> Record:
    return Record(name, label, b"", name, group or name)


def place_of(lalm: LALM, **more: object) -> Place:
    place = Place(num_layers=lalm.num_layers, num_heads=lalm.num_heads, sources=tuple(range(lalm.num_layers)))
    return replace(place, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", SOURCED)
def test_replay_equals_direct_on_random_cells_of_every_grid(any_family: LALM, prompt: Prompt, granularity: str) -> None:
    lalm, layers = any_family, range(any_family.num_layers)
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    clips = [(record("a", "x"), clean), (record("b", "y"), encodings(lalm, prompt, 0.9)[0])]
    directions = Directions.between(lalm, [*clips, (record("c", "x"), corrupted)], layers, 1, 0)
    for noising in (True, False):
        place = place_of(lalm, noising=noising, replacement="mean", controls=1, strength=1.5)
        arrays = mean_states(lalm, (clip for _, clip in clips), Site.RESID, layers)
        arrays |= directions.of(record("c", "x"), len(clean.tokens.text_positions))
        grid = replace(make_grid(granularity, clean.tokens, layers, place), arrays=arrays)
        few = grid.chosen(np.random.default_rng(0).choice(len(grid.cells), min(8, len(grid.cells)), replace=False))
        source, target = (corrupted, clean) if noising else (clean, corrupted)
        slow = DirectEngine(lalm).sweep(source, target, few, ids).probabilities
        fast = ReplayEngine(lalm).sweep(source, target, grid, ids).probabilities[few.coords["cell"]]
        np.testing.assert_allclose(fast, slow, atol=TOLERANCE)
        assert np.ptp(slow, axis=0).max() > 1e-3


def test_means_are_means(any_family: LALM, prompt: Prompt) -> None:
    """By position where all clips have the same tokens, over positions where they do not."""
    clips = [encodings(any_family, prompt, seconds)[0] for seconds in (0.8, 1.3, 1.9)]
    other = replace(prompt, question="What is it?")
    everything = [*clips, encodings(any_family, other, 1.0)[0]]
    for chosen, differs in ((clips, False), (everything, True)):
        states = [DirectEngine(any_family).states(clip, [(1, Site.ATTN)])[1, Site.ATTN][0] for clip in chosen]
        found = mean_states(any_family, chosen, Site.ATTN, [1])
        audio = torch.cat([each[list(clip.tokens.audio_positions)] for each, clip in zip(states, chosen, strict=True)])
        np.testing.assert_allclose(found[mean_key(AUDIO, Site.ATTN, 1)], audio.mean(0), atol=1e-5)
        parts = [each[list(clip.tokens.positions("early"))] for each, clip in zip(states, chosen, strict=True)]
        early = torch.cat(parts).mean(0) if differs else torch.stack(parts).mean(0)
        np.testing.assert_allclose(found[mean_key("early", Site.ATTN, 1)], early, atol=1e-5)
    with pytest.raises(DataError, match="expected a clip that can be read"):
        mean_states(any_family, [], Site.RESID, [0])


def test_a_clip_of_another_text_gets_means_that_fit_it(checkpoints: dict[str, Path], prompt: Prompt) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    clips = [encodings(lalm, prompt, seconds)[0] for seconds in (0.8, 1.3)]
    longer = encodings(lalm, replace(prompt, question=f"{prompt.question} Listen."), 0.8)[0]
    place = place_of(lalm, replacement="mean")
    vectors = Vectors(lalm, "ablate", place, [1], lambda count: [(record("a", "x"), clip) for clip in clips], 0)
    key = mean_key("early", Site.RESID, 1)
    own, other = (vectors.of(record("b", "x"), clip) for clip in (clips[0], longer))
    assert own[key].shape == (len(clips[0].tokens.positions("early")), 64)
    np.testing.assert_allclose(other[key], own[key].mean(0), atol=1e-6)
    np.testing.assert_array_equal(other[mean_key("object", Site.RESID, 1)], own[mean_key("object", Site.RESID, 1)])
    grid = replace(make_grid("ablate", longer.tokens, [1], place), arrays=other)
    found = DirectEngine(lalm).sweep(longer, longer, grid, (1, 2))
    assert np.isfinite(found.option_logits).all()
    roles, first = longer.tokens.roles, longer.tokens.text_positions[0]
    read = replace(longer.tokens, roles=(*roles[:first], "transcript", *roles[first + 1 :]))
    with pytest.raises(DataError, match="has the segment transcript; use replacement=zero"):
        vectors.of(record("c", "x"), replace(longer, tokens=read))


def test_a_direction_leaves_the_group_of_its_clip_out(checkpoints: dict[str, Path], prompt: Prompt) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    clips = [encodings(lalm, prompt, 0.7 + 0.2 * number)[0] for number in range(5)]
    records = [record("a", "x"), record("b", "x", "speaker"), record("c", "y"), record("d", "y", "speaker")]
    records += [record("e", "y")]
    states = [DirectEngine(lalm).states(clip, [(1, Site.RESID)])[1, Site.RESID][0] for clip in clips]
    text = len(clips[0].tokens.text_positions)
    at_text = [each[-text:].double().numpy() for each in states]
    made = Directions.between(lalm, list(zip(records, clips, strict=True)), [1], 2, 0)
    found = made.of(records[1], text)
    expected = at_text[0] - (at_text[2] + at_text[4]) / 2  # without both clips of the speaker
    np.testing.assert_allclose(found[direction_key(CLASS_DIRECTION, 1)], expected, atol=1e-5)
    lengths = np.linalg.norm(expected, axis=-1)
    for number in (1, 2):
        drawn = found[direction_key(f"random {number}", 1)]
        np.testing.assert_allclose(np.linalg.norm(drawn, axis=-1), lengths, rtol=1e-5)
        aligned = (drawn * expected).sum(-1) / lengths**2
        assert np.abs(aligned).max() < 0.6
    assert not np.array_equal(found[direction_key("random 1", 1)], found[direction_key("random 2", 1)])
    with pytest.raises(DataError, match=r"without the group of a no clip of class x is left"):
        Directions.between(lalm, [(records[0], clips[0]), (records[2], clips[2])], [1], 0, 0).of(records[0], text)
    with pytest.raises(DataError, match="have none of class z"):
        made.of(record("f", "z"), text)
    with pytest.raises(DataError, match="two classes"):
        Directions.between(lalm, [(records[0], clips[0])], [1], 0, 0)


def test_folds_hold_whole_groups_and_part_of_every_class() -> None:
    records = [record(f"{label}{number}", label, f"{label}{number // 2}") for label in "xyz" for number in range(8)]
    dealt = folds(records)
    assert set(dealt) == {each.group for each in records}
    assert max(dealt.values()) < FOLDS
    for label in "xyz":
        assert len({dealt[each.group] for each in records if each.label == label}) > 2


# --- planted truths --------------------------------------------------------------------------------------------


def back_grid_of(lalm: PlantedLALM, clean: Encoding) -> Grid:
    return make_grid("back", clean.tokens, range(lalm.num_layers), place_of(lalm, noising=True))


def back_rates(lalm: PlantedLALM, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Recovery rates [layer, source layer] of a clip back-patched into its clean run; those of the circuit by hand."""
    clip = draw_clips(4, lalm.frames, seed=seed)[seed % 4]
    clean, silence = pair(lalm, clip)
    grid, engine = back_grid_of(lalm, clean), ReplayEngine(lalm)
    base = engine.base(silence, clean, lalm.option_ids).probabilities[::-1, clip.label]
    found = engine.sweep(silence, clean, grid, lalm.option_ids).probabilities[:, clip.label]
    assert isinstance(lalm.truth, Circuit)
    audio = lalm.audio_register(clean)
    by_hand = lalm.truth.back_patched(audio, grid.cells)[:, clip.label]
    return tuple(recovery_rate(each, *base).reshape(grid.shape) for each in (found, by_hand))  # type: ignore[return-value]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_back_patching_shows_what_comes_too_late(architecture: str) -> None:
    """More of the answer is there just where states that have it are written before they are read."""
    for seed in range(4):
        circuit = too_late(np.random.default_rng(seed))
        makes, reads = circuit.moves[0].layer, circuit.moves[1].layer
        assert reads < makes
        lalm = plant_circuit(circuit, architecture)
        found, by_hand = back_rates(lalm, seed)
        np.testing.assert_allclose(found, by_hand, atol=1e-3)
        too_soon = np.zeros_like(found, bool)
        too_soon[: reads + 1, makes:] = True  # written at the start of a layer up to the reading one
        assert found[too_soon].min() > 1.1
        np.testing.assert_allclose(found[~too_soon], 1, atol=1e-3)
        behind, _ = back_rates(plant_circuit(circuit, architecture, background=0.5, seed=seed), seed)
        assert behind[too_soon].min() > np.abs(behind[~too_soon]).max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_back_patching_shows_nothing_where_the_answer_arrives_in_time(architecture: str) -> None:
    for seed in range(3):
        found, by_hand = back_rates(plant_circuit(SINGLE, architecture, background=0.2, seed=seed), seed)
        assert np.abs(found - 1).max() < 0.03
        assert np.ptp(by_hand) < 1e-9


def test_layers_in_between_are_applied_twice() -> None:
    """What back-patching cannot say: a head that made something in time makes it once more, and more is there, too."""
    hears = Move(1, 0, None, None, Register.AUDIO, Register.RELAY)
    in_time = Circuit(6, 8, (hears, Move(4, 0, None, 7, Register.RELAY, Register.ANSWER)))
    found, by_hand = back_rates(plant_circuit(in_time), 0)
    np.testing.assert_allclose(found, by_hand, atol=1e-3)
    assert found[:2, 1:].min() > 1.1
    assert found[2:5, 0].max() < 0.1  # before the head, written behind it
    np.testing.assert_allclose(found[2:, 1:], 1, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steering_works_with_the_planted_direction_and_not_with_random_ones(architecture: str) -> None:
    lalm = plant_circuit(SINGLE, architecture, background=0.2, seed=1)
    clips = draw_clips(17, lalm.frames, seed=3)
    silence = lalm.encode_frames(torch.zeros(MELS, lalm.frames))
    named = [(record(str(k), str(clip.label)), lalm.encode_frames(clip.frames)) for k, clip in enumerate(clips)]
    layers = range(lalm.num_layers)
    directions = Directions.between(lalm, named, layers, 3, 0)
    clean, label = named[-1][1], clips[-1].label
    engine = ReplayEngine(lalm)
    base = engine.base(clean, silence, lalm.option_ids).probabilities[:, label]

    def steered(strength: float) -> np.ndarray:
        grid = make_grid("steer", clean.tokens, layers, place_of(lalm, controls=3, strength=strength))
        arrays = directions.of(named[-1][0], len(clean.tokens.text_positions))
        found = engine.sweep(clean, silence, replace(grid, arrays=arrays), lalm.option_ids)
        return np.asarray(recovery_rate(found.probabilities[:, label], *base).reshape(grid.shape))

    hears = SINGLE.moves[0].layer
    rates = steered(1.0)
    assert rates[hears:, 0].min() > 0.5
    assert np.abs(rates[:hears]).max() < 1e-3
    assert np.abs(rates[:, 1:]).max() < 0.25
    assert (steered(2.0)[hears:, 0] > rates[hears:, 0]).all()
    # The direction by hand: the class's channel of the answer register at the last position.
    vector = np.zeros(64, np.float32)
    vector[Register.ANSWER.channels[label]] = 1.0
    last = (len(clean.tokens) - 1,)
    by_hand = Source(Origin.VECTOR, vector="answer", added=True)
    cells = (Intervention([Patch(5, last, source=by_hand)]), Intervention([Patch(5, (last[0] - 1,), source=by_hand)]))
    grid = Grid(("cell",), {"cell": np.arange(2)}, cells, {"answer": vector})
    found = recovery_rate(engine.sweep(clean, silence, grid, lalm.option_ids).probabilities[:, label], *base)
    assert found[0] > 0.5
    assert abs(found[1]) < 1e-6


# --- runs ------------------------------------------------------------------------------------------------------

RUN = ("attr=gender", "data.limit=6", "engine.spot_checks=4")
RUNS = {
    "back": ("granularity=back", "direction=noising"),
    "back into silence": ("granularity=back", "granularity.layers=[0,4]", "granularity.sources=[3,7]"),
    "mean": ("granularity=ablate", "direction=noising"),
    "zero": ("granularity=ablate", "direction=noising", "granularity.replacement=zero", "site=attn", "site.window=2"),
    "steer": ("granularity=steer", "granularity.strength=2"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lalm_patch.RunOutcome]:
    """A run of each kind on the demo."""
    return runs_on_demo(tmp_path_factory.mktemp("runs"), RUN, RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_labelled_checked_drawn_and_summed_up(outcomes: dict[str, lalm_patch.RunOutcome], name: str) -> None:
    column = {"back": "source_layer", "zero": "ablated", "mean": "ablated", "steer": "steering"}[name.split()[0]]
    dataset, checks = sound(outcomes[name], "layer", column)
    assert dataset[column].attrs["long_name"] != column
    assert ("own_states_identity" in checks) == (name == "back")
    found = [
        line for line in outcomes[name].summary.splitlines() if line.startswith(("back ", "lost     at", "steered"))
    ]
    assert len(found) == 1


def test_what_the_runs_say_of_the_demo(outcomes: dict[str, lalm_patch.RunOutcome]) -> None:
    """Attention is planted in layers 4 and 5: text hears there, and from then on the answer is at the last token."""

    def mean(name: str) -> xr.DataArray:
        dataset = outcomes[name].dataset
        assert dataset is not None
        return dataset["recovery_rate"].where(dataset["kept"]).mean("sample")

    np.testing.assert_allclose(mean("back"), 1, atol=0.05)  # the answer arrives in time
    np.testing.assert_allclose(mean("back into silence").sel(layer=0), 1, atol=0.05)
    lost = mean("mean")
    assert float(lost.sel(ablated="audio", layer=slice(0, 3)).min()) > 0.2
    assert float(np.abs(lost.sel(ablated="audio", layer=7))) < 1e-4
    assert float(np.abs(lost.sel(ablated="last", layer=slice(0, 3))).max()) < 1e-3
    assert float(lost.sel(ablated="last", layer=7)) > 0.1
    steered = mean("steer")
    assert float(steered.sel(steering=CLASS_DIRECTION, layer=7)) > 0.9
    assert float(np.abs(steered.sel(layer=slice(0, 2))).max()) < 1e-3
    titles = [about(outcome.dataset).title for outcome in outcomes.values() if outcome.dataset is not None]
    assert titles[0].endswith("back-patched into the clean run")
    assert titles[2:] == [
        "demo, gender, mean ablation",
        "demo, gender, zero ablation, attn, windows of 2 layers",
        "demo, gender, corrupted run steered, strength 2",
    ]


def test_the_dry_run_says_what_sources_cost() -> None:
    page = dry_run(lalm_patch.compose("granularity=back", "direction=noising", "attr=gender", "dry_run=true"))
    assert "grid     back: 8 x 8 = 64 cells per clip" in page
    assert re.search(r"sources  states of \d+ positions and layers, taken on the way, or from runs that are kept", page)
    tight = dry_run(
        lalm_patch.compose("granularity=back", "attr=gender", "dry_run=true", "engine.memory_budget=0.000001")
    )
    assert "taken on the way; 8 layers of base runs are computed once more" in tight
    direct = dry_run(lalm_patch.compose("granularity=back", "attr=gender", "dry_run=true", "engine=direct"))
    assert "67 forward passes per clip" in direct
    assert "sources  states of 8 places of the two runs, in one more pass of each run they are in" in direct
    zero = ("granularity=ablate", "granularity.replacement=zero", "direction=noising", "engine=direct")
    page = dry_run(lalm_patch.compose(*zero, "granularity.layers=[0]", "attr=gender", "dry_run=true"))
    assert "8 forward passes per clip" in page  # two runs, six segments; nothing is taken from either
    assert "\nsources" not in page
    for name, text in (("ablate", "for their mean states"), ("steer", "for class means")):
        asked = (f"granularity={name}", *(["direction=noising"] if name == "ablate" else []))
        assert text in dry_run(lalm_patch.compose(*asked, "attr=gender", "dry_run=true"))


def test_layers_of_back_patching() -> None:
    assert back_layers(8, None) == tuple(range(8))
    assert back_layers(32, None) == (0, 4, 8, 12, 16, 19, 23, 27, 31)
    assert back_layers(32, [-1, 0]) == (0, 31)
    with pytest.raises(ConfigError, match=r"granularity\.sources=\[9\]: the model has decoder layers 0 to 7"):
        back_layers(8, [9], "granularity.sources")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("granularity=layer", "+granularity.sources=[1]"), r"granularity\.sources goes with granularity=back"),
        (("granularity=layer", "+granularity.replacement=zero"), "goes with granularity=ablate"),
        (("granularity=back", "+granularity.strength=2"), "goes with granularity=steer"),
        (("granularity=back", "engine=attribution"), "nothing says how far that holds: use engine=auto"),
        (("granularity=steer", "backend=ndif"), "those only: use backend=local"),
        (("granularity=back", "site=mlp"), "expected site=resid and site.window=1"),
        (("granularity=steer", "site.window=2"), "expected site=resid and site.window=1"),
        (("granularity=ablate",), "expected direction=noising, got denoising"),
        (("granularity=steer", "data=table", "data.path=a.csv", "attr=each_clip"), "use data=demo or data=sakura"),
        (("granularity=steer", "prompt.order=shuffled"), "use prompt.order=fixed"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lalm_patch.compose(*overrides)
