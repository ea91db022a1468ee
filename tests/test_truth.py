"""Planted models: what is planted is there, tracing finds it, and a tracer that errs is found out."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lalm_patch.engine import DirectEngine, Progress, Readout, ReplayEngine
from lalm_patch.interventions.grids import Grid, Place, at_place, layer_grid, token_grid
from lalm_patch.interventions.patches import Intervention, Patch, Site
from lalm_patch.models import Encoding
from lalm_patch.settings import APPROXIMATE
from lalm_patch.tracing.metrics import recovery_rate, share_moved
from lalm_patch.truth import (
    KINDS,
    METHODS,
    Circuit,
    Method,
    Move,
    PlantedLALM,
    Register,
    Window,
    draw_clips,
    make_population,
    measure,
    plant_circuit,
    plant_window,
    register,
    score,
)
from lalm_patch.truth.__main__ import main
from lalm_patch.truth.benchmark import bars, run_benchmark
from lalm_patch.truth.circuit import AUDIO_POSITIONS, HIDDEN, KEY_VALUE_HEADS, SINK_POSITIONS
from lalm_patch.truth.decoder import ARCHITECTURES, HEADS, MELS, Clip
from lalm_patch.truth.methods import chosen_methods
from lalm_patch.truth.scoring import auroc, draw_run, planted_depth

pytestmark = pytest.mark.usefixtures("without_pdfs")

HEAR = (Register.AUDIO, Register.RELAY)
ANSWER = (Register.RELAY, Register.ANSWER)
SINGLE = Circuit(6, 8, (Move(1, 3, None, 2, *HEAR), Move(4, 0, 2, 7, *ANSWER)))
TWO_PATHS = Circuit(
    6,
    8,
    (
        Move(1, 0, None, 2, *HEAR),
        Move(1, 3, None, 5, *HEAR),
        Move(4, 1, 2, 7, *ANSWER, 0.5),
        Move(4, 2, 5, 7, *ANSWER, 0.5),
    ),
)
SUPPRESSED = Circuit(6, 8, (*SINGLE.moves, Move(5, 1, None, 7, Register.AUDIO, Register.ANSWER, -0.3)), answer_gain=9.0)
DISTRACTED = Circuit(6, 8, (*SINGLE.moves, Move(1, 1, None, 4, *HEAR)))
TEXT = SINK_POSITIONS + AUDIO_POSITIONS
"""Position of the first text token."""


def pair(lalm: PlantedLALM, clip: Clip) -> tuple[Encoding, Encoding]:
    """A clip and silence."""
    return lalm.encode_frames(clip.frames), lalm.encode_frames(torch.zeros(MELS, lalm.frames))


def one_row(*interventions: Intervention) -> Grid:
    return Grid(("cell",), {"cell": np.arange(len(interventions))}, interventions)


def rates(lalm: PlantedLALM, clip: Clip, *interventions: Intervention) -> np.ndarray:
    """Recovery rates of one clip, by replay."""
    clean, silence = pair(lalm, clip)
    engine = ReplayEngine(lalm)
    base = engine.base(clean, silence, lalm.option_ids).probabilities[:, clip.label]
    cells = engine.sweep(clean, silence, one_row(*interventions), lalm.option_ids).probabilities[:, clip.label]
    return recovery_rate(cells, base[0], base[1])


def test_the_planted_heads_come_first_and_a_distractor_is_not_among_them() -> None:
    lalm = plant_circuit(DISTRACTED, background=0.5, seed=2)
    measured = measure(lalm, METHODS["head"], draw_clips(8, lalm.frames, seed=7))
    mean = measured.dataset.recovery_rate.mean("sample").transpose("layer", "head").values
    first, second = (tuple(place) for place in np.argwhere(mean > 0.5))
    assert [first, second] == [(move.layer, move.head) for move in SINGLE.moves]
    unread = DISTRACTED.moves[-1]
    assert abs(mean[unread.layer, unread.head]) < 0.05
    found = score(measured.dataset, measured.expected(DISTRACTED))
    assert found is not None
    assert (found.layer, found.position, found.auroc) == (1, 1, 1)
    assert np.isnan([found.within, found.covered, found.depth]).all()
    moved = tuple(replace(move, head=(move.head + 1) % HEADS) for move in SINGLE.moves)
    wrong = score(measured.dataset, measured.expected(Circuit(6, 8, moved)))
    assert wrong is not None
    assert wrong.position == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("circuit", [DISTRACTED, TWO_PATHS, SUPPRESSED], ids=["distracted", "two paths", "suppressed"])
def test_a_planted_decoder_computes_what_arithmetic_says(circuit: Circuit, architecture: str) -> None:
    """Every cell of both grids at every site, from the real decoder and worked out by hand."""
    lalm = plant_circuit(circuit, architecture)
    (clip,) = draw_clips(3, lalm.frames, seed=1)[2:]
    clean, silence = pair(lalm, clip)
    engine = ReplayEngine(lalm)
    audio = lalm.audio_register(clean)
    base = engine.base(clean, silence, lalm.option_ids).probabilities
    np.testing.assert_allclose(base[0], circuit.clean_probabilities(audio), atol=1e-4)
    assert base[0].argmax() == clip.label
    for make, site in itertools.product((layer_grid, token_grid), (Site.HEAD, Site.ATTN, Site.MLP, Site.RESID)):
        grid = at_place(make(clean.tokens, range(circuit.layers)), Place(site, 1, circuit.layers, HEADS))
        swept = engine.sweep(clean, silence, grid, lalm.option_ids).probabilities
        np.testing.assert_allclose(swept, circuit.probabilities(audio, grid.cells), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("window", [Window(6, 8, 2, 3), Window(6, 8, 1, 4)])
def test_recovery_is_0_below_a_planted_window_and_1_from_its_last_layer(window: Window, architecture: str) -> None:
    lalm = plant_window(window, architecture, seed=1)
    for name, shape in (("layer", (6,)), ("token", (6, 8))):
        measured = measure(lalm, METHODS[name], draw_clips(6, lalm.frames, seed=2))
        kept = measured.dataset.isel(sample=measured.dataset.kept.values)
        assert kept.sizes["sample"] >= 2
        expected = measured.expected(window)
        assert expected.shape == shape
        known = ~np.isnan(expected)
        assert known.sum() == (6 - (window.end - 1 - window.first)) * (expected.size // 6)
        gap = (kept.p_clean - kept.p_corrupted).values.reshape(-1, *[1] * len(shape))
        away = (kept.recovery_rate.values - expected) * gap
        np.testing.assert_allclose(away[:, known], 0, atol=5e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replay_equals_direct_on_a_circuit_with_background(architecture: str) -> None:
    lalm = plant_circuit(DISTRACTED, architecture, background=0.7, seed=3)
    clip = draw_clips(2, lalm.frames, seed=4)[1]
    clean, silence = pair(lalm, clip)
    cells = layer_grid(clean.tokens, range(6)).cells + token_grid(clean.tokens, range(6)).cells[::3]
    fast = ReplayEngine(lalm).sweep(clean, silence, one_row(*cells), lalm.option_ids).probabilities
    slow = DirectEngine(lalm).cells(clean, silence, cells, lalm.option_ids).probabilities
    assert np.ptp(slow[:, clip.label]) > 0.1
    np.testing.assert_allclose(fast, slow, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planted_heads_look_where_they_should_and_nothing_else_carries_the_class(architecture: str) -> None:
    lalm = plant_circuit(SINGLE, architecture, background=0.5, seed=1)
    clip = draw_clips(4, lalm.frames, seed=9)[3]
    clean, silence = pair(lalm, clip)
    lalm.module.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = lalm.module(**clean.inputs, output_attentions=True).attentions
    for move in SINGLE.moves:
        looks = attentions[move.layer][0, move.head]
        source = slice(SINK_POSITIONS, TEXT) if move.source is None else TEXT + move.source
        assert looks[TEXT + move.target, source].sum() > 1 - 1e-6
        others = [position for position in range(SINK_POSITIONS, len(clean.tokens)) if position != TEXT + move.target]
        assert looks[others, :SINK_POSITIONS].sum(dim=1).min() > 1 - 1e-6
    intact = DirectEngine(lalm).base(clean, silence, lalm.option_ids).probabilities[:, clip.label]
    assert intact[0] - intact[1] > 0.3
    width = HIDDEN // HEADS
    for move in SINGLE.moves:
        output = lalm.module.get_decoder().layers[move.layer].self_attn.o_proj.weight
        kept = output.clone()
        for head in range(HEADS):
            output.copy_(kept)
            output[:, head * width : (head + 1) * width] = 0
            cut = DirectEngine(lalm).base(clean, silence, lalm.option_ids).probabilities[:, clip.label]
            share = (cut[0] - cut[1]) / (intact[0] - intact[1])
            assert share < 0.1 if head == move.head else share > 0.7
        output.copy_(kept)


def test_the_planted_position_comes_first_and_a_distractor_carries_the_class_unread() -> None:
    lalm = plant_circuit(DISTRACTED, background=0.5, seed=2)
    measured = measure(lalm, METHODS["token"], draw_clips(8, lalm.frames, seed=7))
    found = score(measured.dataset, measured.expected(DISTRACTED))
    assert found is not None
    assert (found.layer, found.position, found.within) == (1, 1, 1)
    assert found.auroc > 0.99
    clean, _ = pair(lalm, draw_clips(1, lalm.frames, seed=7)[0])
    after = DirectEngine(lalm).states(clean, [(3, Site.RESID)])[3, Site.RESID][0]
    relay = list(Register.RELAY.channels)
    np.testing.assert_allclose(after[TEXT + 4, relay], after[TEXT + 2, relay], atol=0.05)
    assert after[TEXT + 4, relay].max() > 0.3  # the class is there
    assert abs(float(measured.dataset.recovery_rate.isel(layer=3, token=4).mean())) < 0.02


@pytest.mark.parametrize("name", ["layer", "token"])
def test_a_wrong_truth_scores_badly(name: str) -> None:
    lalm = plant_circuit(SINGLE, background=0.5, seed=2)
    measured = measure(lalm, METHODS[name], draw_clips(8, lalm.frames, seed=7))
    wrong = Circuit(6, 8, (Move(4, 3, None, 5, *HEAR), Move(5, 0, 5, 7, *ANSWER)))
    other = Circuit(6, 8, (Move(0, 3, None, 5, *HEAR), Move(1, 0, 5, 7, *ANSWER)))
    right = score(measured.dataset, measured.expected(SINGLE))
    assert right is not None
    assert right.within == right.layer == 1
    found = score(measured.dataset, measured.expected(wrong if name == "layer" else other))
    assert found is not None
    assert (found.within, found.layer) == (0, 0)
    assert found.depth_error > 1.5
    assert found.auroc < right.auroc
    if name == "token":
        assert (right.position, found.position) == (1, 0)


@pytest.mark.parametrize(("gain", "low", "high"), [(6.0, 0.05, 0.45), (25.0, 0.85, 1.0)])
def test_redundant_paths_split_the_recovery_as_the_softmax_says(gain: float, low: float, high: float) -> None:
    """Alone each path gives less than half of it, or nearly all once the answer saturates; together they give 1."""
    lalm = plant_circuit(replace(TWO_PATHS, answer_gain=gain))
    clip = draw_clips(2, lalm.frames, seed=3)[1]
    first, second = TEXT + 2, TEXT + 5
    alone, other, both = rates(
        lalm,
        clip,
        Intervention([Patch(2, (first,))]),
        Intervention([Patch(2, (second,))]),
        Intervention([Patch(2, (first, second))]),
    )
    assert low < alone < high
    assert alone == pytest.approx(other, abs=1e-4)
    assert both == pytest.approx(1, abs=1e-4)


def test_recovery_exceeds_1_until_the_suppressing_head_and_is_1_from_there() -> None:
    lalm = plant_circuit(SUPPRESSED)
    clip = draw_clips(2, lalm.frames, seed=3)[1]
    clean, _ = pair(lalm, clip)
    curve = rates(lalm, clip, *layer_grid(clean.tokens, range(6)).cells)
    np.testing.assert_allclose(curve[:1], 0, atol=1e-5)
    assert curve[1:5].min() > 1.2
    np.testing.assert_allclose(curve[5], 1, atol=1e-5)


class Shifted(ReplayEngine):
    """An engine that gives every cell the result of the one three tokens before it."""

    def sweep(
        self, clean: Encoding, corrupted: Encoding, grid: Grid, option_ids: Sequence[int], progress: Progress
    ) -> Readout:
        found = super().sweep(clean, corrupted, grid, option_ids, progress)
        return Readout(*(np.roll(values, 3, axis=0) for values in vars(found).values()))


def test_the_benchmark_finds_a_wrong_engine_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in METHODS.values():
        with pytest.raises(ValueError, match="registered already"):
            register(method)
    monkeypatch.setattr("lalm_patch.truth.methods.METHODS", dict(METHODS))
    wrong = Method("wrong", token_grid, Shifted)
    plans = [plan for plan in make_population(30, seed=4) if plan.kind in ("single path", "distractor")][:4]
    rows = list(run_benchmark(plans, [METHODS["token"], wrong], clips=6, population=6))
    by_method = {name: [row for row in rows if row.method == name] for name in ("token", "wrong")}
    for row in by_method["token"]:
        assert row.score is not None
        assert row.score.position == row.score.within == 1
        assert row.spot_check < 1e-5
    assert np.mean([row.score.position for row in by_method["wrong"] if row.score]) < 0.5
    assert np.mean([row.score.auroc for row in by_method["wrong"] if row.score]) < 0.9
    assert max(row.spot_check for row in by_method["wrong"]) > 0.1


def test_scores_of_cells_written_by_hand() -> None:
    assert auroc(np.array([0.9, 0.1, 0.5, 0.2]), np.array([1.0, 0.0, np.nan, 0.0])) == 1.0
    assert auroc(np.array([0.1, 0.9, 0.5, 0.2]), np.array([-0.5, 0.0, 0.03, 0.0])) == 0.0
    assert np.isnan(auroc(np.array([0.1]), np.array([1.0])))
    assert planted_depth(np.array([0.0, 0.0, 0.4, 0.4, 1.0])) == (4, 4)
    assert planted_depth(np.array([0.0, np.nan, np.nan, 1.0, 1.0])) == (1, 3)
    assert planted_depth(np.array([1.0, 1.0])) == (0, 0)
    assert planted_depth(np.array([0.0, 1.7, 1.7, 1.0])) == (1, 1)


def test_a_population_is_the_same_every_time_and_has_every_kind() -> None:
    plans = make_population(60, seed=1)
    assert plans == make_population(60, seed=1)
    assert plans[:7] == make_population(7, seed=1)
    assert plans != make_population(60, seed=2)
    assert {(plan.kind, plan.architecture) for plan in plans} == {(k, a) for k in KINDS for a in ARCHITECTURES}


def test_runs_are_drawn_with_replacement_each_clip_a_group_of_its_own() -> None:
    lalm = plant_circuit(SINGLE)
    population = measure(lalm, METHODS["layer"], draw_clips(3, lalm.frames, seed=0)).dataset
    run = draw_run(population, 10, seed=0)
    assert len(set(run["group"].values.tolist())) == 10
    assert set(run["p_clean"].values.tolist()) == set(population["p_clean"].values.tolist())


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([Move(1, 0, None, 9, *HEAR)], "outside of 6 layers and 8 text positions"),
        ([Move(1, 0, None, 2, *HEAR), Move(1, HEADS // KEY_VALUE_HEADS - 1, None, 3, *HEAR)], "share their keys"),
    ],
)
def test_circuits_that_cannot_be_planted_are_refused(moves: list[Move], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Circuit(6, 8, tuple(moves))
    with pytest.raises(ValueError, match="causal attention"):
        Move(1, 0, 3, 2, *ANSWER)


def test_the_command_writes_its_table_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--models=2", "--clips=4", "--population=4", "--methods=layer", "--seed=1")
    out, rows = tmp_path / "table.md", tmp_path / "rows.csv"
    assert main([*size, f"--out={out}", f"--rows={rows}"]) == 0
    printed = capsys.readouterr().out
    assert printed == out.read_text()
    assert "| layer | single path | 1 | 1 |" in printed
    assert "fusion depth within one layer of the truth: 2 of 2 (100.0%); 95% met" in printed
    table = list(csv.DictReader(rows.read_text().splitlines()))
    assert [row["kind"] for row in table] == ["window", "single path"]
    assert float(table[1]["depth_error"]) <= 1
    for wrong, message in (
        ("--methods=heads", "no method heads: expected some of layer, token"),
        ("--models=0", "--models=0: expected at least 1"),
        (f"--out={tmp_path}/none/table.md", "expected a file in a folder that exists"),
    ):
        assert main([*size, wrong]) == 1
        assert message in capsys.readouterr().err


def test_the_example_of_the_page_runs_and_finds_what_it_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "truth.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, np.ndarray] = {}
    exec(example, names)
    planted = np.zeros((8, 12))
    planted[2:6, 5] = planted[6:, 11] = 1
    np.testing.assert_allclose(names["must_be"], planted, atol=1e-6)
    np.testing.assert_allclose(names["found"], planted, atol=0.05)


@pytest.mark.parametrize("rule", APPROXIMATE)
def test_approximations_find_planted_positions_and_heads_and_say_how_well_they_agree(rule: str) -> None:
    """Silence leaves channels at exactly 0, where a norm has a slope, and output and input have no quotient."""
    plans = [plan for plan in make_population(12, 0, 0.02) if plan.kind == "single path"]
    rows = list(run_benchmark(plans, chosen_methods([f"{rule}_token", f"{rule}_head"]), 4, 4))
    assert len(rows) == 4
    for row in rows:
        assert row.score is not None
        assert row.score.position == 1
        assert row.score.agreement > 0.9
        assert np.isnan(row.spot_check)
    text = "\n".join(bars(rows))
    assert f"{rule}_head: planted head first, single path: 2 of 2 (100.0%); an approximation, no bar" in text
    assert f"{rule}_head: correlation with exact cells: median 1.00" in text


@pytest.mark.parametrize("name", ["head", "token"])
def test_on_a_single_path_what_is_enough_is_what_is_needed(name: str) -> None:
    """Denoising and noising agree where there is one path; where there are two, either gives some and takes some."""
    found = {}
    for kind, circuit in (("one", SINGLE), ("two", TWO_PATHS)):
        lalm = plant_circuit(circuit, background=0.0, seed=2)
        clip = draw_clips(1, lalm.frames, seed=7)[0]
        clean, silence = pair(lalm, clip)
        grid = METHODS[name].grid(clean.tokens, range(lalm.num_layers))
        engine = ReplayEngine(lalm)
        base = engine.base(clean, silence, lalm.option_ids).probabilities[:, clip.label]
        enough, needed = (
            share_moved(
                engine.sweep(source, target, grid, lalm.option_ids).probabilities[:, clip.label], *base, direction
            ).reshape(grid.shape)
            for source, target, direction in ((clean, silence, "denoising"), (silence, clean, "noising"))
        )
        found[kind] = enough, needed
        assert (np.abs(enough) > 0.1).sum() >= 2
    np.testing.assert_allclose(*found["one"], atol=0.02)
    enough, needed = found["two"]
    assert np.abs(enough - needed).max() > 0.1
