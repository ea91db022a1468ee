"""Segments of the text patched as wholes: what a cell is, where a clip's cells belong, and what is read off a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import GENDER, noise

import lalm_patch
from lalm_patch.analysis import about, fusion, mean_recovery, over_layers, peak_layer
from lalm_patch.collect import collect
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.interventions.grids import Grid, make_grid
from lalm_patch.interventions.patches import Intervention, Patch
from lalm_patch.models import LALM
from lalm_patch.models.roles import ROLES
from lalm_patch.report import make_report
from lalm_patch.results.dataset import build_dataset
from lalm_patch.stimuli import Prompt
from lalm_patch.storage.run_store import SampleRecord

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")

TOLERANCE = 1e-5


def test_segments_part_the_text(lalm: LALM, prompt: Prompt) -> None:
    tokens = lalm.encode(noise(1.0), prompt, "chat").tokens
    grid = make_grid("segment", tokens, [1])
    names = list(grid.coords["segment"])
    assert names == [name for name in ROLES if name in names]
    assert names[-1] == "last"
    positions = [cell.patches[0].positions for cell in grid.cells]
    assert sorted(p for part in positions for p in part) == list(tokens.text_positions)
    for name, part in zip(names, positions, strict=True):
        assert {tokens.roles[p] for p in part} == {name}


def test_a_segment_is_its_tokens_together(lalm: LALM, prompt: Prompt) -> None:
    """Replay is direct; the last segment is the last token; all segments at once are the layer's cell."""
    clean, silent = (lalm.encode(sound, prompt, "chat") for sound in (noise(1.0), np.zeros(16_000, np.float32)))
    ids = lalm.target_ids(prompt, "chat")
    layers = range(lalm.num_layers)
    grid = make_grid("segment", clean.tokens, layers)
    fast = ReplayEngine(lalm).sweep(clean, silent, grid, ids).probabilities
    slow = DirectEngine(lalm).sweep(clean, silent, grid, ids).probabilities
    np.testing.assert_allclose(fast, slow, atol=TOLERANCE)
    fast = fast.reshape(*grid.shape, -1)
    tokens = make_grid("token", clean.tokens, layers)
    single = ReplayEngine(lalm).sweep(clean, silent, tokens, ids).probabilities.reshape(*tokens.shape, -1)
    np.testing.assert_allclose(fast[:, -1], single[:, -1], atol=TOLERANCE)
    together = [
        Intervention(Patch(layer, cell.patches[0].positions) for cell in grid.cells if cell.patches[0].layer == layer)
        for layer in layers
    ]
    whole = ReplayEngine(lalm).sweep(clean, silent, make_grid("layer", clean.tokens, layers), ids).probabilities
    joined = Grid(("layer",), {"layer": np.asarray(layers)}, tuple(together))
    np.testing.assert_allclose(
        ReplayEngine(lalm).sweep(clean, silent, joined, ids).probabilities, whole, atol=TOLERANCE
    )


def test_a_clip_without_a_segment_leaves_its_cells_empty() -> None:
    """A transcript may be empty: the other segments stay in their columns."""
    names = np.array(["transcript", "early", "last"], object)

    def record(name: str, roles: tuple[str, ...], values: list[float]) -> SampleRecord:
        cells = len(set(roles))
        logits = np.array([[value, 0.0] for value in values], np.float32).reshape(1, cells, 2)
        arrays = {
            "base_option_logits": np.array([[2.0, 0.0], [0.0, 0.0]], np.float32),
            "base_logsumexp": np.full(2, 3.0, np.float32),
            "base_top_id": np.zeros(2, np.int64),
            "patched_option_logits": logits,
            "patched_logsumexp": np.full((1, cells), 3.0, np.float32),
        }
        count = len(roles)
        meta = {"label": "male", "group": name, "exclusion": "", "detail": "", "samples": 16_000, "positions": 9}
        meta |= {"audio_positions": 3, "first_text_position": 4, "token_ids": list(range(count))}
        return SampleRecord(name, arrays, meta | {"token_texts": ["t"] * count, "token_roles": list(roles)})

    samples = [
        record("with", ("transcript", "transcript", "early", "last"), [0.5, 1.0, 2.0]),
        record("without", ("early", "early", "last"), [1.5, 2.0]),
    ]
    coords = {"layer": np.array([3]), "segment": names}
    dataset = build_dataset(samples, GENDER.options, ("layer", "segment"), coords, {})
    expected = np.exp(np.array([[0.5, 1.0, 2.0], [np.nan, 1.5, 2.0]]) - 3.0)
    np.testing.assert_allclose(dataset.p_patched.sel(layer=3), expected, rtol=1e-6)
    assert "lacks the segment" in dataset.p_patched.attrs["missing"]
    recovery = mean_recovery(dataset)
    assert recovery["n"].sel(layer=3).values.tolist() == [1, 2, 2]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, segment-wise, at every other layer, in both directions."""
    folder = tmp_path_factory.mktemp("segments")
    for direction in ("denoising", "noising"):
        overrides = ("attr=gender", "granularity=segment", "data.limit=6", f"direction={direction}")
        lalm_patch.trace(*overrides, f"outputs={folder}")
    return folder


def test_a_run_by_segments(outputs: Path) -> None:
    for run in collect(outputs, by=["direction.name"])["runs/demo/gender/segment"].values():
        dataset = run.to_dataset()
        info = about(dataset)
        assert info.granularity == "segment"
        recovery = mean_recovery(dataset)
        last = recovery["mean"].sel(segment="last")
        np.testing.assert_allclose(last[:4], 0, atol=1e-4)  # attention is planted in layers 4 to 6
        np.testing.assert_allclose(last[6:], 1, atol=1e-4)
        others = recovery["mean"].drop_sel(segment="last")
        np.testing.assert_allclose(others.sel(layer=7), 0, atol=1e-4)
        assert 4 <= fusion(dataset).depth.value <= 6
        peak = peak_layer(dataset, recovery)
        assert peak is not None
        assert peak.over_layers.place.startswith(f"layer {peak.layer}, segment ")
        assert [cell.mean for cell in over_layers(recovery)] == recovery["mean"].max("segment").values.tolist()


def test_segments_are_on_the_page(outputs: Path) -> None:
    page = make_report(outputs, audio=False).read_text()
    assert "segment object" in page
    assert (next(outputs.glob("*segment*/figure.csv"))).read_text().startswith("layer,segment,mean,low,high,n,groups")
