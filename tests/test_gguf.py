"""A decoder in a GGUF file: the same model as from its folder, under an identity of its own; what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, noise
from damaged_checkpoints import POINTER
from gguf_files import metadata_of, rope_factors, tensors_of, write_gguf
from native_checkpoints import DestaFiles
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.interventions.grids import layer_grid
from lalm_patch.models import LALM
from lalm_patch.models.checkpoint import find_checkpoint, find_repository
from lalm_patch.models.gguf_format import read_gguf
from lalm_patch.models.gguf_llama import gguf_config, gguf_tokenizer, load_gguf
from lalm_patch.models.offload import Offloaded
from lalm_patch.settings import ModelSettings
from lalm_patch.stimuli import Prompt, silence

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def file(desta25_files: DestaFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeSTA2.5's decoder as a GGUF file."""
    folder = desta25_files.decoder
    return write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", metadata_of(folder), tensors_of(folder))


def settings(files: DestaFiles, decoder: Path, **others: str) -> ModelSettings:
    given = {"name": "tiny", "family": "desta25", "dtype": "float32", "device": "cpu", **others}
    return ModelSettings(id=str(files.location), decoder=str(decoder), **given)


def refusal(files: DestaFiles, decoder: Path) -> str:
    """What is said of it, once, by a run and by a dry run alike."""
    said = []
    for opened in (LALM.outline, LALM.load):
        with pytest.raises(ModelError) as caught:
            opened(settings(files, decoder))
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    assert str(decoder) in said[0]
    assert len(said[0]) < 1200
    return said[0]


# --- the same model --------------------------------------------------------------------------------------------------


def test_it_is_the_model_of_its_folder(desta25_files: DestaFiles, file: Path, prompt: Prompt) -> None:
    """Prompt, states and probabilities; and cells, which the two engines agree on."""
    whole, packed = (LALM.load(settings(desta25_files, place)) for place in (desta25_files.decoder, file))
    assert packed.commit != whole.commit
    found = {}
    for lalm in (whole, packed):
        clip = noise(0.8)
        pair = [lalm.encode(sound, prompt, "chat") for sound in (clip, silence(clip))]
        ids = lalm.target_ids(prompt, "chat")
        grid = layer_grid(pair[0].tokens, range(lalm.num_layers))
        engines = ReplayEngine(lalm), DirectEngine(lalm)
        found[lalm] = (pair[0].tokens.ids, pair[0].tokens.roles, ids, *(e.sweep(*pair, grid, ids) for e in engines))
    assert found[packed][:3] == found[whole][:3]
    for fast, slow in zip(found[packed][3:], found[whole][3:], strict=True):
        np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=1e-6)
        assert np.ptp(slow.probabilities, axis=0).max() > 1e-4


def test_its_tokenizer_is_that_of_its_folder(desta25_files: DestaFiles, file: Path) -> None:
    packed, whole = gguf_tokenizer(file), AutoTokenizer.from_pretrained(desta25_files.decoder)
    for text in ("The speaker's gender is", "In 20245, two  33\n\n4", "Kids are talking <|eot_id|>", " Audio 12: ö"):
        for special in (False, True):
            assert (
                packed(text, add_special_tokens=special)["input_ids"]
                == whole(text, add_special_tokens=special)["input_ids"]
            )
    assert packed.get_vocab() == whole.get_vocab()
    assert packed.all_special_tokens == whole.all_special_tokens
    assert packed.backend_tokenizer.model.ignore_merges  # as in Llama 3's tokenizer.json


def test_a_tokenizer_of_sentencepiece(desta25_files: DestaFiles, tmp_path: Path) -> None:
    """Llama 2's kind: blanks belong to words, bytes stand in for what has no piece, BOS unless the file says no."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "a", "b", "ab"]
    own = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(place) for place in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    metadata = {name: value for name, value in metadata_of(desta25_files.decoder).items() if "merges" not in name}
    for says, begins in ({}, True), ({"tokenizer.ggml.add_bos_token": False}, False):
        path = write_gguf(tmp_path / f"{begins}.gguf", metadata | own | says, tensors_of(desta25_files.decoder))
        tokenizer = gguf_tokenizer(path)
        assert tokenizer("ab b\u00f6").tokens() == ["<s>"] * begins + [
            "\u2581a",
            "b",
            "\u2581",
            "b",
            "<0xC3>",
            "<0xB6>",
        ]
        assert len(tokenizer) == len(pieces)


def test_what_lies_beside_it_is_not_read(file: Path, tmp_path: Path) -> None:
    """A tokenizer's settings in the same folder are no part of its identity, so they must not change it."""
    copy = Path(shutil.copy(file, tmp_path / "renamed.gguf"))
    before = find_repository(str(copy), setting="model.decoder").commit
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|eot_id|>", "chat_template": "nothing"}')
    (tmp_path / "chat_template.jinja").write_text("nothing")
    assert find_repository(str(copy), setting="model.decoder").commit == before
    assert before == find_repository(str(file), setting="model.decoder").commit
    beside, alone = gguf_tokenizer(copy), gguf_tokenizer(file)
    assert (beside.bos_token, beside.chat_template) == (alone.bos_token, alone.chat_template)


def test_quantised_weights_are_unpacked(desta25_files: DestaFiles, tmp_path: Path) -> None:
    tensors = tensors_of(desta25_files.decoder)
    blocks = {name for name, values in tensors.items() if values.ndim == 2 and values.shape[1] % 32 == 0}
    path = write_gguf(
        tmp_path / "q.gguf", metadata_of(desta25_files.decoder), tensors, quantised=lambda name: name in blocks
    )
    exact = AutoModelForCausalLM.from_pretrained(desta25_files.decoder).state_dict()
    found = load_gguf(path).state_dict()
    assert found.keys() == exact.keys()
    errors = {name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in exact.items()}
    assert max(errors.values()) < 1 / 127  # half a step of 8 bits in each block
    assert errors["model.layers.0.self_attn.k_proj.weight"] > 0
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=load_gguf(path))["tensors"]
    assert read.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in read.items())  # as transformers reads it
    assert load_gguf(path, dtype=torch.bfloat16).model.norm.weight.dtype is torch.bfloat16


def test_llama_3_1_scales_its_rotary_frequencies(desta25_files: DestaFiles, tmp_path: Path) -> None:
    """The file has the factors, the folder the rule that gives them; transformers drops the factors."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = Path(shutil.copytree(desta25_files.decoder, tmp_path / "scaled"))
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    factors = {"rope_freqs.weight": rope_factors(scaling, 5e5, config["hidden_size"] // config["num_attention_heads"])}
    assert np.ptp(factors["rope_freqs.weight"]) > 1
    tensors = tensors_of(folder)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        scaled, plain = (
            load_gguf(write_gguf(tmp_path / f"{len(own)}.gguf", metadata_of(folder), own))(ids).logits
            for own in (tensors | factors, tensors)
        )
    torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=0)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["as_loaded", "stream", "float32"])
def test_precisions(desta25_files: DestaFiles, file: Path, prompt: Prompt, precision: str) -> None:
    """In bfloat16 it computes what the folder's weights in bfloat16 do, and exactly the same float32 of them."""
    half = [
        LALM.load(settings(desta25_files, place, dtype="bfloat16"), precision=precision)
        for place in (desta25_files.decoder, file)
    ]
    logits = []
    for lalm in half:
        assert lalm.dtype is torch.bfloat16
        inputs = lalm.inputs(noise(0.8), prompt, "chat")[1]
        with torch.no_grad(), lalm.exactly():
            exact = lalm.module(**inputs).logits
        with torch.no_grad():
            logits.append((lalm.module(**inputs).logits.float(), exact))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)


def test_places(desta25_files: DestaFiles, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers can wait in memory; they cannot stay in the file, or be dealt to several devices."""
    for given, said in ({"offload": "disk"}, "model.offload=disk"), ({"device_map": "auto"}, "model.device_map=auto"):
        monkeypatch.setitem(sys.modules, "accelerate", sys)  # installed or not
        with pytest.raises(
            ConfigError, match=rf"{said}: the weights of .*llama\.gguf are unpacked .* leave it out, or"
        ):
            LALM.load(settings(desta25_files, file, **given))
    eager = LALM.load(settings(desta25_files, file, attn_implementation="eager"))
    assert eager.decoder_module.config._attn_implementation == "eager"
    model, ids = load_gguf(file), torch.arange(9)[None]
    with torch.no_grad():
        expected = model(ids).logits
        waiting = Offloaded(model, torch.device("cpu"), {}, on_disk=False)
        torch.testing.assert_close(model(ids).logits, expected)
    assert waiting.reads == [1, 1, 1]


# --- identity --------------------------------------------------------------------------------------------------------


def test_every_byte_is_its_identity(desta25_files: DestaFiles, file: Path, tmp_path: Path) -> None:
    seen = {find_checkpoint(settings(desta25_files, file)).revision}
    for place in (0.3, 0.6, 0.999):
        copy = Path(shutil.copy(file, tmp_path / f"{place}.gguf"))
        data = bytearray(copy.read_bytes())
        data[int(place * len(data))] ^= 1
        copy.write_bytes(data)
        seen.add(find_checkpoint(settings(desta25_files, copy)).revision)
    assert len(seen) == 4
    assert len({revision.split("+")[1] for revision in seen}) == 4
    assert len({revision.split("+")[0] for revision in seen}) == 1
    checkpoint = find_checkpoint(settings(desta25_files, file))
    assert checkpoint.former_revision.split("+")[1] == checkpoint.parts["decoder"].commit  # it never had another one
    pinned = settings(desta25_files, file, revision=checkpoint.revision)
    assert find_checkpoint(pinned).revision == checkpoint.revision
    with pytest.raises(ModelError, match=r"model\.revision=local:.* so not those that were asked for"):
        find_checkpoint(settings(desta25_files, copy, revision=checkpoint.revision))


def test_a_file_that_changes_is_not_opened(desta25_files: DestaFiles, file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(file, tmp_path / "copy.gguf"))
    checkpoint = find_checkpoint(settings(desta25_files, copy))
    with (
        pytest.raises(ModelError, match=r"copy\.gguf: was written to while the model was opened"),
        checkpoint.verified(),
    ):
        copy.touch()
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    changed = rf"copy\.gguf: its files \(copy\.gguf\) are no longer those of {checkpoint.parts['decoder'].commit}, now"
    with pytest.raises(ModelError, match=changed), checkpoint.verified():
        pass


# --- what is refused -------------------------------------------------------------------------------------------------


def _cut(share: float) -> Damage:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def _bytes(place: int, new: bytes) -> Damage:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:place] + new + data[place + len(new) :])

    return damage


HUGE = (2**50).to_bytes(8, "little")
DAMAGED: dict[str, tuple[Damage, str]] = {
    "pointer": (lambda path: path.write_bytes(POINTER), "a git-LFS pointer instead of the file itself; run `git lfs"),
    "empty": (lambda path: os.truncate(path, 0), "an empty file; download it again"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><p>404"), "a web page instead of the file"),
    "text": (lambda path: path.write_text("hello" * 99), "no GGUF file .* give one, or a checkpoint's folder"),
    "weights": (
        _cut(0.9),
        r"cannot be read as GGUF \(it ends at byte \d+, and .* would end at .*; it was cut or changed",
    ),
    "metadata": (_cut(0.05), r"cannot be read as GGUF \(\d+ bytes are expected at byte .*; it was cut or changed"),
    "magic alone": (lambda path: os.truncate(path, 4), "cannot be read as GGUF"),
    "version": (_bytes(4, b"\0\0\0\3"), r"its version is 50331648, expected 2 or 3 in little-endian"),
    "tensors": (_bytes(8, HUGE), r"it says that it has \d+ tensors, and has \d+ bytes"),
    "keys": (_bytes(16, HUGE), r"it says that it has \d+ metadata, and has \d+ bytes"),
    "length": (_bytes(24, HUGE), r"\d+ bytes are expected at byte 32"),
    "letters": (_bytes(32, b"\xff\xfe"), "cannot be read as GGUF .*utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(desta25_files: DestaFiles, file: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copy(file, tmp_path / "copy.gguf"))
    apply, message = DAMAGED[damage]
    apply(copy)
    said = refusal(desta25_files, copy)
    assert re.search(message, said), said


def test_files_of_other_models(desta25_files: DestaFiles, tmp_path: Path) -> None:
    folder = desta25_files.decoder
    metadata, tensors = metadata_of(folder), tensors_of(folder)

    def without(key: str) -> dict[str, object]:
        return {name: value for name, value in metadata.items() if name != key}

    lacking = {name: value for name, value in tensors.items() if name != "blk.1.attn_k.weight"}
    misshapen = tensors | {"blk.1.attn_k.weight": tensors["blk.1.attn_q.weight"]}
    scaled = metadata | {"llama.rope.scaling.type": "yarn"}
    cases = [
        (without("llama.block_count"), tensors, r"its metadata give None for llama\.block_count, expected a size"),
        (metadata | {"llama.block_count": "3"}, tensors, r"give '3' for llama\.block_count, expected a size"),
        (metadata | {"llama.block_count": 2**31}, tensors, r"2147483648 layers and \d+ tensors; it was changed"),
        (metadata | {"llama.rope.freq_base": -1.0}, tensors, r"give -1\.0 for llama\.rope\.freq_base, expected a num"),
        (scaled, tensors, r"rotated as a whole and without scaling, got .*rope\.scaling\.type='yarn'"),
        (
            without("tokenizer.chat_template"),
            tensors,
            r"has no chat template \(tokenizer\.chat_template\); give a chat",
        ),
        (
            metadata | {"tokenizer.ggml.pre": "new"},
            tensors,
            r"splits text in a way .* is 'gpt2', and tokenizer\.ggml\.pre 'new'\)",
        ),
        (without("tokenizer.ggml.tokens"), tensors, r"its tokenizer: cannot be opened"),
        (metadata, lacking, r"1 missing keys: blk\.1\.attn_k\.weight"),
        (metadata, tensors | {"blk.0.attn_q.bias": np.ones(8, np.float32)}, r"1 unexpected keys: blk\.0\.attn_q\.bias"),
        (metadata, misshapen, r"1 tensors of another shape: blk\.1\.attn_k\.weight is \[32, 32\], expected \[16, 32\]"),
    ]
    for number, (own, weights, message) in enumerate(cases):
        said = refusal(desta25_files, write_gguf(tmp_path / f"{number}.gguf", own, weights))
        assert re.search(message, said), said
    other = write_gguf(tmp_path / "other.gguf", metadata, tensors, architecture="mamba")
    said = refusal(desta25_files, other)
    assert "a GGUF file of architecture 'mamba', expected 'llama'; give the checkpoint's folder" in said


def test_random_damages_to_the_table(file: Path, tmp_path: Path) -> None:
    """A byte of metadata or table changed at random: refused in a sentence, or a model of other words."""
    data = file.read_bytes()
    first = min(tensor.offset for tensor in read_gguf(file).tensors.values())
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        copy = bytearray(data)
        # Places of counts and lengths are rare: a third of the damages is in the table of tensors, at its end.
        low = 0 if generator.random() < 0.67 else first - 2000
        copy[generator.integers(low, first)] = generator.integers(256)
        path = tmp_path / "copy.gguf"
        path.write_bytes(copy)
        said = None
        try:
            gguf_config(path)
            gguf_tokenizer(path)
        except ModelError as error:
            said = str(error)
        if said is not None:
            assert str(path) in said
            assert "\n" not in said
            refused += 1
    assert 5 < refused < 60


def test_without_the_package(desta25_files: DestaFiles, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run does not need it; a run says what to install."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert LALM.outline(settings(desta25_files, file)).num_layers == 3
    with pytest.raises(ModelError, match=r"llama\.gguf: .* is missing: pip install 'lalm_patch\[gguf\]'$"):
        LALM.load(settings(desta25_files, file))


def test_only_a_decoder_can_be_one(desta25_files: DestaFiles, file: Path) -> None:
    for setting in ("model.id", "model.encoder"):
        with pytest.raises(ModelError, match=rf"{setting}=.*llama\.gguf: a file, expected a checkpoint's folder"):
            find_repository(str(file), setting=setting)
    with pytest.raises(ModelError, match=r"model\.decoder=gone\.gguf: no such file; give an existing file or folder"):
        find_repository("gone.gguf", setting="model.decoder")
    with pytest.raises(ModelError, match=r"is one whole checkpoint, leave model\.decoder out"):
        load(Path("demo"), "qwen2_audio", decoder=str(file))
