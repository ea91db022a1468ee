"""DeSTA2, DeSTA2.5-Audio and Qwen-Audio as a run uses them: opened by settings, traced by both engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, noise
from native_checkpoints import save_desta2
from safetensors.torch import load_file, save_file
from test_engines import encodings, likely_tokens

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.choose import choose_engine, replay_obstacle
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Place, token_grid
from lalm_patch.interventions.patches import Site
from lalm_patch.models import LALM, TokenTable
from lalm_patch.models.proof import make_pair, prove
from lalm_patch.settings import EngineSettings, ModelSettings
from lalm_patch.stimuli import Prompt, silence

FAMILIES = ("desta2", "desta25", "qwen_audio")
TOLERANCE = 1e-5
CELLS = 30  # that the direct engine computes, too
SPOKEN = " Kids are talking by the door."


@pytest.fixture(scope="module", params=FAMILIES)
def native(request: pytest.FixtureRequest, native_folders: dict[str, Path]) -> LALM:
    return load(native_folders[request.param], request.param)


@pytest.fixture(scope="module")
def asked(native: LALM, prompt: Prompt) -> Prompt:
    """The prompt, with a transcript where the model reads one."""
    return replace(prompt, transcript=SPOKEN) if native.family.reads_transcript else prompt


def words(tokens: TokenTable, *roles: str) -> str:
    return "".join(tokens.texts[i] for i in tokens.positions(*roles))


def logits(lalm: LALM, prompt: Prompt) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lalm.module(**lalm.encode(noise(0.5), prompt, "chat").inputs).logits
    return found


def test_roles_spell_out_the_prompt(native: LALM, asked: Prompt) -> None:
    for layout in native.family.layouts:
        tokens, inputs = native.inputs(noise(1.0), asked, layout)
        assert words(tokens, "early") == "What is the gender of the speaker in the speech? Possible options:"
        assert words(tokens, "object") == " male, female"
        blank = " " if layout in ("user", "flat") else ""
        assert words(tokens, "late", "last") == f".{blank}The speaker's gender is"
        assert tokens.roles[-1] == "last"
        assert tokens.roles.count("last") == 1
        assert len(tokens) == inputs["input_ids"].shape[1]
        assert [role == "audio" for role in tokens.roles] == inputs["audio_mask"][0].tolist()
        if native.family.reads_transcript:
            assert words(tokens, "transcript").strip() == SPOKEN.strip()
            assert len(tokens.audio_positions) == 64
        else:
            assert "transcript" not in tokens.roles
            assert len(tokens.audio_positions) == 25 + 2


def test_without_transcript_there_is_none(native_folders: dict[str, Path], prompt: Prompt) -> None:
    for family in ("desta2", "desta25"):
        tokens, _ = load(native_folders[family], family).inputs(noise(1.0), prompt, "chat")
        assert "transcript" not in tokens.roles


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_proven_at_load(native_folders: dict[str, Path], prompt: Prompt, family: str, implementation: str) -> None:
    lalm = load(native_folders[family], family, attn_implementation=implementation)
    assert replay_obstacle(lalm) is None
    for layout in lalm.family.layouts:
        for check in prove(lalm, make_pair(lalm, prompt, layout)):
            assert check.passed, f"{layout} {check}"


def test_replay_is_direct(native: LALM, asked: Prompt) -> None:
    clean, corrupted = encodings(native, asked, 0.8)
    ids = likely_tokens(native, clean, corrupted)
    grid = token_grid(clean.tokens, range(native.num_layers))
    direct, replay = DirectEngine(native), ReplayEngine(native)
    fast = replay.sweep(clean, corrupted, grid, ids)
    chosen = np.random.default_rng(0).choice(len(grid.cells), CELLS, replace=False)
    slow = direct.cells(clean, corrupted, [grid.cells[index] for index in chosen], ids)
    assert slow.probabilities.max() > 0.01
    np.testing.assert_allclose(fast.probabilities[chosen], slow.probabilities, rtol=0, atol=TOLERANCE)
    base = replay.base(clean, corrupted, ids)
    np.testing.assert_allclose(base.probabilities, direct.base(clean, corrupted, ids).probabilities, atol=TOLERANCE)
    # Last layer: the last position carries everything, the others nothing.
    by_layer = fast.probabilities.reshape(*grid.shape, len(ids))
    np.testing.assert_allclose(by_layer[-1, -1], base.probabilities[0], rtol=0, atol=TOLERANCE)
    others = np.broadcast_to(base.probabilities[1], by_layer[-1, :-1].shape)
    np.testing.assert_allclose(by_layer[-1, :-1], others, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("site", [Site.ATTN, Site.MLP, Site.HEAD])
def test_sites_inside_a_layer_prove_themselves(native: LALM, prompt: Prompt, site: Site) -> None:
    layout = native.family.layouts[0]
    pair, ids = make_pair(native, prompt, layout), native.target_ids(prompt, layout)
    place = Place(site, 1, native.num_layers, native.num_heads)
    _, checks = choose_engine(native, EngineSettings("replay"), pair, ids, place)
    assert {check.name: check.passed for check in checks} == dict.fromkeys(
        ("replay_at_load", "site_adds_up", "noise_floor"), True
    )


def test_target_tokens_follow_the_phrase(native: LALM, prompt: Prompt) -> None:
    for layout in native.family.layouts:
        ids = native.target_ids(prompt, layout)
        before = native.family.text_ids(prompt, layout)
        after = native.family.text_ids(prompt, layout, " female")
        assert after[: len(before)] == before
        assert ids[1] == after[len(before)]


def test_outline_needs_no_weights(native_folders: dict[str, Path], native: LALM, asked: Prompt) -> None:
    family = next(name for name in FAMILIES if native.id == str(native_folders[name]))
    outline = LALM.outline(ModelSettings(name="tiny", family=family, id=native.id, dtype="float32", device="cpu"))
    assert {p.device.type for p in outline.module.parameters()} == {"meta"}
    shapes = {name: tuple(p.shape) for name, p in outline.module.named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in native.module.named_parameters()}
    for layout in native.family.layouts:
        assert outline.inputs(noise(0.7), asked, layout)[0] == native.inputs(noise(0.7), asked, layout)[0]


def test_decoder_and_encoder_can_be_chosen(native_folders: dict[str, Path], tmp_path: Path, prompt: Prompt) -> None:
    other = save_desta2(tmp_path)
    own = load(native_folders["desta2"], "desta2")
    same = load(native_folders["desta2"], "desta2", decoder=str(other.decoder), encoder=str(other.encoder))
    assert same.commit == own.commit  # the same files in another place
    assert torch.equal(logits(same, prompt), logits(own, prompt))
    weights = load_file(other.decoder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(weights, other.decoder / "model.safetensors", metadata={"format": "pt"})
    changed = load(native_folders["desta2"], "desta2", decoder=str(other.decoder))
    assert changed.commit != own.commit
    assert not torch.equal(logits(changed, prompt), logits(own, prompt))
    with pytest.raises(ModelError, match=r"model\.encoder=\./nowhere: no such folder"):
        load(native_folders["desta2"], "desta2", encoder="./nowhere")


def test_transcription_is_of_the_clip(native_folders: dict[str, Path]) -> None:
    lalm = load(native_folders["desta25"], "desta25")
    clip = noise(1.0)
    assert lalm.family.transcribe(clip, lalm.module) == lalm.family.transcribe(clip, lalm.module)
    assert lalm.family.transcribe(silence(clip), lalm.module) == " "


def test_checkpoint_of_another_family_is_refused(native_folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"type 'desta25', expected DestaModel"):
        load(native_folders["desta25"], "desta2")
    with pytest.raises(ModelError, match=r"type 'DestaModel', expected qwen$"):
        load(native_folders["desta2"], "qwen_audio")
