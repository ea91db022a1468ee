"""The generic adapter on tiny checkpoints of every architecture it takes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GENDER, load, noise
from safetensors.torch import load_file, save_file
from test_engines import encodings, likely_tokens
from tiny_generic import AUDIO, BOS, EOS, save_generic
from tokenizers.processors import TemplateProcessing

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.choose import choose_engine, replay_obstacle
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Place, token_grid
from lalm_patch.interventions.patches import Intervention, Patch, Site
from lalm_patch.models import LALM, TokenTable
from lalm_patch.models import generic as generic_module
from lalm_patch.models.generic import ARCHITECTURES, REFUSED
from lalm_patch.models.proof import make_pair, prove
from lalm_patch.settings import EngineSettings
from lalm_patch.stimuli import Prompt, silence

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=sorted(set(ARCHITECTURES) - {"granite_speech"}))  # see test_granite.py
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_generic(tmp_path_factory.mktemp("generic") / request.param, request.param)


@pytest.fixture(scope="module")
def generic(folder: Path) -> LALM:
    return load(folder, "generic")


def words(tokens: TokenTable, *roles: str) -> str:
    return "".join(tokens.texts[i] for i in tokens.positions(*roles))


def test_weights_are_the_checkpoints_own(folder: Path, generic: LALM) -> None:
    saved = load_file(folder / "model.safetensors")
    for part, tensor in (("head", generic.module.get_output_embeddings().weight), ("norm", generic.norm.weight)):
        assert any(value.shape == tensor.shape and torch.equal(value, tensor) for value in saved.values()), part
    outputs = [layer.self_attn.o_proj.weight for layer in generic.module.get_decoder().layers]
    same_shape = [value for value in saved.values() if value.shape == outputs[0].shape]
    assert all(any(torch.equal(value, output) for value in same_shape) for output in outputs)


def test_roles_spell_out_the_prompt(generic: LALM, prompt: Prompt) -> None:
    tokens, inputs = generic.inputs(noise(1.0), prompt, "chat")
    assert words(tokens, "early") == "What is the gender of the speaker in the speech? Possible options:"
    assert words(tokens, "object") == " male, female"
    assert words(tokens, "late", "last") == ".The speaker's gender is"
    assert words(tokens, "template") in (f"{tag}<|im_end|>\n<|im_start|>assistant\n" for tag in ("", EOS))
    assert words(tokens, "pre") in (f"<|im_start|>user\n{tag}" for tag in ("", BOS))
    assert {tokens.texts[i] for i in tokens.audio_positions} == {AUDIO}
    assert inputs["input_ids"].shape == (1, len(tokens))


def test_positions_follow_the_encoders_rate(folder: Path, generic: LALM, prompt: Prompt) -> None:
    """Positions per second: 25 for two poolings, 12.5 for four stacked frames or three strides."""
    expected = {"glmasr": (12, 25), "qwen3_asr": (13, 26), "qwen3_omni_moe": (13, 26), "phi4_multimodal": (13, 25)}.get(
        folder.name, (25, 50)
    )
    found = [len(generic.inputs(noise(seconds), prompt, "chat")[0].audio_positions) for seconds in (1.0, 2.0)]
    assert tuple(found) == expected


def test_silence_keeps_the_layout(generic: LALM, prompt: Prompt) -> None:
    clip = noise(1.37)
    clean, corrupted = (generic.inputs(wave, prompt, "chat")[0] for wave in (clip, silence(clip)))
    assert clean.same_layout(corrupted)


def test_targets_follow_the_phrase(generic: LALM, prompt: Prompt) -> None:
    ids = generic.target_ids(prompt, "chat")
    assert [generic.family.tokenizer.decode([number]) for number in ids] == [" male", " female"]


def test_proof_passes(generic: LALM, prompt: Prompt) -> None:
    checks = prove(generic, make_pair(generic, prompt, "chat"))
    assert [(check.name, check.value) for check in checks if not check.passed] == []


def test_replay_equals_direct_on_a_full_token_grid(folder: Path, generic: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(generic, prompt)
    # Qwen Omni rotates by three position axes, all others by one.
    assert clean.position_ids.shape == ((3,) if "omni" in folder.name else ()) + (1, len(clean.tokens))
    ids = likely_tokens(generic, clean, corrupted)
    grid = token_grid(clean.tokens, range(generic.num_layers))
    fast = ReplayEngine(generic, 100).sweep(clean, corrupted, grid, ids)
    slow = DirectEngine(generic).sweep(clean, corrupted, grid, ids)
    assert np.ptp(slow.probabilities, axis=0).max() > 1e-2  # the cells differ, so equality says something
    np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=TOLERANCE)
    np.testing.assert_array_equal(fast.top_id, slow.top_id)


def test_restoring_every_position_is_the_clean_run(generic: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(generic, prompt)
    ids = likely_tokens(generic, clean, corrupted)
    everything = [Intervention([Patch(layer, tuple(range(len(clean.tokens))))]) for layer in range(generic.num_layers)]
    engine = DirectEngine(generic)
    base = engine.base(clean, corrupted, ids).probabilities
    restored = engine.cells(clean, corrupted, everything, ids).probabilities
    assert np.abs(base[0] - base[1]).max() > 1e-3
    np.testing.assert_allclose(restored, np.repeat(base[:1], len(everything), axis=0), atol=1e-6)


def test_automatic_engine_is_replay(generic: LALM, prompt: Prompt) -> None:
    pair, ids = make_pair(generic, prompt, "chat"), generic.target_ids(prompt, "chat")
    engine, checks = choose_engine(generic, EngineSettings("auto"), pair, ids)
    assert isinstance(engine, ReplayEngine)
    assert checks[0].passed


@pytest.mark.parametrize("site", [Site.ATTN, Site.MLP, Site.HEAD])
def test_sites_inside_a_layer_prove_themselves(generic: LALM, prompt: Prompt, site: Site) -> None:
    pair, ids = make_pair(generic, prompt, "chat"), generic.target_ids(prompt, "chat")
    place = Place(site, 1, generic.num_layers, generic.num_heads)
    _, checks = choose_engine(generic, EngineSettings("replay"), pair, ids, place)
    assert {check.name: check.passed for check in checks} == dict.fromkeys(
        ("replay_at_load", "site_adds_up", "noise_floor"), True
    )


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_architecture_the_method_does_not_apply_to_is_refused(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=f"type '{model_type}' cannot be traced: its? ") as caught:
        load(tmp_path, "generic")
    assert REFUSED[model_type] in str(caught.value)


def test_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "parrot"}))
    with pytest.raises(ModelError, match=r"type 'parrot', expected .*qwen2_5_omni"):
        load(tmp_path, "generic")


def test_checkpoint_with_missing_weights_is_refused(tmp_path: Path) -> None:
    folder = save_generic(tmp_path / "omni", "qwen2_5_omni")
    weights = load_file(folder / "model.safetensors")
    del weights["thinker.lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.safetensors: .*1 missing keys: lm_head\.weight"):
        load(folder, "generic")


def test_lora_weights_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weights in that folder the model would run, and hear worse than it was trained to."""
    folder = save_generic(tmp_path / "phi4", "phi4_multimodal")
    (folder / "speech-lora").mkdir()
    (folder / "speech-lora" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(generic_module, "is_peft_available", lambda: False)
    with pytest.raises(ModelError, match="LoRA weights in speech-lora: pip install peft"):
        load(folder, "generic")


@pytest.mark.parametrize(("window", "blocked"), [(None, False), (2048, False), (2047, True)])
def test_only_a_window_shorter_than_the_longest_prompt_blocks_replay(
    tmp_path: Path, window: int | None, blocked: bool
) -> None:
    lalm = load(save_generic(tmp_path / "phi4", "phi4_multimodal"), "generic")
    lalm.decoder_module.config.sliding_window = window
    assert (replay_obstacle(lalm) is not None) == blocked


def test_prompt_begins_once(tmp_path: Path) -> None:
    """A template that writes the begin-of-text token itself does not get a second one from the tokenizer."""
    folder = save_generic(tmp_path / "flamingo", "audioflamingo3")
    lalm = load(folder, "generic")
    tokenizer, prompt = lalm.family.tokenizer, Prompt.from_attribute(GENDER)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", bos)])
    assert tokenizer("a word").input_ids[0] == bos  # it does add one by itself
    for ids in (lalm.inputs(noise(1.0), prompt, "chat")[0].ids, lalm.family.text_ids(prompt, "chat")):
        assert tuple(ids[:2]).count(bos) == 1
