"""Loading, prompts, token roles, target tokens, and the proof at load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import ANIMAL, GENDER, load, noise
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tiny_models import save_tiny_qwen2_audio

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.base_runs import BaseRun, LayerView
from lalm_patch.engine.choose import choose_engine, replay_obstacle
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.models import LALM, TokenTable, checkpoint
from lalm_patch.models import family as family_module
from lalm_patch.models.checkpoint import find_repository
from lalm_patch.models.proof import make_pair, prove
from lalm_patch.settings import EngineSettings, ModelSettings
from lalm_patch.stimuli import Attribute, Prompt, silence


def words(tokens: TokenTable, role: str) -> str:
    return "".join(tokens.texts[i] for i in tokens.positions(role))


def test_roles_spell_out_the_prompt(lalm: LALM, prompt: Prompt) -> None:
    tokens, _ = lalm.inputs(noise(1.0), prompt, "chat")
    assert words(tokens, "early") == "What is the gender of the speaker in the speech? Possible options:"
    assert words(tokens, "object") == " male, female"
    assert words(tokens, "late") + words(tokens, "last") == ".The speaker's gender is"
    assert tokens.roles[-1] == "last"
    assert tokens.roles.count("last") == 1
    assert set(tokens.text_positions) == set(range(tokens.audio_positions[-1] + 1, len(tokens)))


def test_qwen2_audio_prompt_is_its_chat_template(checkpoints: dict[str, Path], prompt: Prompt) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    tokens, _ = lalm.inputs(noise(1.0), prompt, "chat")
    assert words(tokens, "pre") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1: <|audio_bos|>"
    )
    assert words(tokens, "template") == "<|audio_eos|>\n<|im_end|>\n<|im_start|>assistant\n"


def test_voxtral_prompt_is_its_instruct_format(checkpoints: dict[str, Path], prompt: Prompt) -> None:
    lalm = load(checkpoints["voxtral"], "voxtral")
    tokens, _ = lalm.inputs(noise(1.0), prompt, "chat")
    assert words(tokens, "pre") == "<s>[INST][BEGIN_AUDIO]"
    assert words(tokens, "template") == "[/INST]"
    assert len(tokens.audio_positions) == 375


@pytest.mark.parametrize(("seconds", "expected"), [(2.0, 50), (1.0, 25), (0.7, 17)])
def test_qwen2_audio_has_25_positions_a_second(
    checkpoints: dict[str, Path], prompt: Prompt, seconds: float, expected: int
) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    tokens, _ = lalm.inputs(noise(seconds), prompt, "chat")
    assert len(tokens.audio_positions) == expected


def test_silence_keeps_the_layout(lalm: LALM, prompt: Prompt) -> None:
    clip = noise(1.37)
    clean, _ = lalm.inputs(clip, prompt, "chat")
    corrupted, _ = lalm.inputs(silence(clip), prompt, "chat")
    assert clean.same_layout(corrupted)


@pytest.mark.parametrize("layout", ["user", "flat"])
def test_layouts_without_an_assistant_turn(checkpoints: dict[str, Path], prompt: Prompt, layout: str) -> None:
    for family, folder in checkpoints.items():
        lalm = load(folder, family)
        if layout not in lalm.family.layouts:
            with pytest.raises(ModelError, match=r"this model has chat, user"):
                lalm.inputs(noise(1.0), prompt, layout)
            continue
        tokens, _ = lalm.inputs(noise(1.0), prompt, layout)
        text = "".join(tokens.texts[i] for i in tokens.text_positions)
        assert text.endswith("Possible options: male, female. The speaker's gender is")
        assert words(tokens, "late") + words(tokens, "last") == ". The speaker's gender is"


@pytest.mark.parametrize("attribute", [GENDER, ANIMAL])
def test_target_is_the_token_that_follows_the_phrase(lalm: LALM, attribute: Attribute) -> None:
    prompt = Prompt.from_attribute(attribute)
    ids = lalm.target_ids(prompt, "chat")
    decoded = [lalm.family.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    assert len(set(ids)) == len(attribute.options)
    for token, option in zip(decoded, attribute.options, strict=True):
        assert f" {option}".startswith(token)
        assert token.strip()


def test_options_that_begin_alike_are_refused(lalm: LALM) -> None:
    prompt = Prompt("Which?", ("speaker one", "speaker two"), "It is")
    with pytest.raises(ModelError, match="speaker one, speaker two begin with the same token"):
        lalm.target_ids(prompt, "chat")


def test_bare_target_leaves_the_blank_out(checkpoints: dict[str, Path]) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    prompt = Prompt("Which?", ("x", "y"), "It is:")
    bare = lalm.target_ids(prompt, "chat", target="bare")
    assert [lalm.family.tokenizer.decode([i]) for i in bare] == ["x", "y"]


def test_embeddings_give_the_whole_models_logits(lalm: LALM, prompt: Prompt) -> None:
    encoding = lalm.encode(noise(1.2), prompt, "chat")
    with torch.no_grad():
        whole = lalm.module(**encoding.inputs).logits
        states = lalm.decoder_module(
            inputs_embeds=encoding.inputs_embeds, position_ids=encoding.position_ids
        ).last_hidden_state
    torch.testing.assert_close(lalm.logits(states[0]), whole[0].float(), atol=1e-4, rtol=1e-4)


def test_proof_passes_on_real_architectures(lalm: LALM, prompt: Prompt) -> None:
    checks = prove(lalm, make_pair(lalm, prompt, "chat"))
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 5


def test_proof_notices_audio_that_never_arrives(tmp_path: Path, prompt: Prompt) -> None:
    lalm = load(save_tiny_qwen2_audio(tmp_path, cut_audio=True), "qwen2_audio")
    checks = {check.name: check for check in prove(lalm, make_pair(lalm, prompt, "chat"))}
    assert not checks["audio_reaches_model"].passed
    assert checks["audio_reaches_model"].value == 0


def test_replay_is_refused_where_the_decoder_does_something_else(
    checkpoints: dict[str, Path], prompt: Prompt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    assert replay_obstacle(lalm) is None
    pair, ids = make_pair(lalm, prompt, "chat"), lalm.target_ids(prompt, "chat")
    engine, checks = choose_engine(lalm, EngineSettings("auto"), pair, ids)
    assert isinstance(engine, ReplayEngine)
    assert checks[0].passed
    windowed = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "windowed"))
    config = json.loads((windowed / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 16}
    config["text_config"]["layer_types"] = ["sliding_attention"] * config["text_config"]["num_hidden_layers"]
    (windowed / "config.json").write_text(json.dumps(config))
    lalm = load(windowed, "qwen2_audio")
    pair = make_pair(lalm, prompt, "chat")
    engine, checks = choose_engine(lalm, EngineSettings("auto"), pair, ids)
    assert isinstance(engine, DirectEngine)
    assert "sliding_attention" in caplog.text
    with pytest.raises(ModelError, match="engine=replay does not work"):
        choose_engine(lalm, EngineSettings("replay"), pair, ids)


def test_replay_that_gives_other_numbers_is_not_used(
    checkpoints: dict[str, Path], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    pair, ids = make_pair(lalm, prompt, "chat", 1e-9), lalm.target_ids(prompt, "chat")
    view = BaseRun.view

    def disturbed(self: BaseRun, layer: int, mark: bool = False) -> LayerView:
        seen = view(self, layer, mark)
        return seen if self.keys else replace(seen, entering=seen.entering * 1.5)

    monkeypatch.setattr(BaseRun, "view", disturbed)
    engine, _ = choose_engine(lalm, EngineSettings("auto"), pair, ids)
    assert isinstance(engine, DirectEngine)


# --- finding checkpoints -------------------------------------------------------------------------------------------


def test_missing_folder_and_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        find_repository(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_repository(str(tmp_path))


def test_local_fingerprint_follows_the_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "copy"))
    before = find_repository(str(copy)).commit
    assert before == find_repository(str(checkpoints["qwen2_audio"])).commit
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert find_repository(str(copy)).commit != before


def _response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/a/b"))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ConnectionError("no route"), "hub cannot be reached.*model.id=/path/to/checkpoint"),
        (RepositoryNotFoundError("404", response=_response(404)), "does not exist, or is private.*hf auth login"),
    ],
)
def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(ModelError, match=message):
        find_repository("owner/never-existing-model")


_CONFIGURED: dict[str, Any] = {"id": "owner/name", "sha": "0" * 40, "siblings": [{"rfilename": "config.json"}]}


def test_gated_checkpoint_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_args: object, **_kwargs: object) -> None:
        raise GatedRepoError("403", response=_response(403))

    monkeypatch.setattr(HfApi, "model_info", lambda *_args, **_kwargs: ModelInfo(**_CONFIGURED))
    monkeypatch.setattr(checkpoint, "snapshot_download", gated)
    with pytest.raises(ModelError, match=r"gated: accept its licence at https://huggingface.co/owner/name.*HF_TOKEN"):
        find_repository("owner/name")


@pytest.mark.parametrize(
    ("files", "weights", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin"], True, {"*.safetensors", "*.pth"}),
        (["pytorch_model-1-of-2.bin", "qwen.tiktoken"], True, {"*.safetensors", "*.pth", "*.bin"}),
        (["model.safetensors"], False, set()),
    ],
)
def test_weights_are_fetched_once_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], weights: bool, fetched: set[str]
) -> None:
    asked: dict[str, list[str]] = {}
    info = ModelInfo(id="owner/name", sha="0" * 40, siblings=[{"rfilename": file} for file in [*files, "config.json"]])
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(HfApi, "model_info", lambda *_args, **_kwargs: info)
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda _id, **options: asked.update(options) or str(tmp_path))
    assert find_repository("owner/name", weights=weights).commit.startswith("0" * 40)
    assert set(asked["allow_patterns"]) - set(checkpoint.SMALL_FILES) == fetched


def test_parts_of_a_whole_checkpoint_are_refused(checkpoints: dict[str, Path]) -> None:
    settings = ModelSettings(name="x", family="qwen2_audio", id=str(checkpoints["qwen2_audio"]), decoder="a/b")
    with pytest.raises(ModelError, match=r"model\.decoder=a/b: .* is one whole checkpoint"):
        LALM.load(settings)


def test_nonsense_id() -> None:
    with pytest.raises(ModelError, match="neither an existing folder nor a hub id"):
        find_repository("a/b/c d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"family": "parrot"},
            "model.family='parrot': expected one of desta2, .*, voxtral",
        ),
        ({"device": "cuda"}, "no usable GPU"),
        ({"device": "toaster"}, "expected auto, cpu, cuda"),
    ],
)
def test_settings_that_cannot_load(checkpoints: dict[str, Path], change: dict[str, str], message: str) -> None:
    base = {"name": "x", "family": "qwen2_audio", "id": str(checkpoints["qwen2_audio"]), "dtype": "float32"}
    with pytest.raises(ConfigError, match=message):
        LALM.load(ModelSettings(**(base | change)))


def test_a_processors_missing_package_is_named(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: object, **_kwargs: object) -> None:
        raise ImportError("torchaudio is not installed")

    monkeypatch.setattr(family_module.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(ModelError, match=r"torchaudio is not installed.*install it with pip"):
        load(checkpoints["voxtral"], "voxtral")


def test_checkpoint_of_another_family_is_refused(checkpoints: dict[str, Path]) -> None:
    broken = ModelSettings(name="x", family="qwen2_audio", id=str(checkpoints["voxtral"]), dtype="float32")
    with pytest.raises(ModelError, match="type 'voxtral', expected qwen2_audio"):
        LALM.load(broken)


def test_weights_are_the_checkpoints_own(checkpoints: dict[str, Path]) -> None:
    first, second = (load(checkpoints["qwen2_audio"], "qwen2_audio") for _ in range(2))
    for left, right in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(left, right)
    assert np.isfinite(first.module.lm_head.weight.numpy()).all()
