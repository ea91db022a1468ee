"""Published files of the native models: shards, keys, other architectures, the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import noise
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from native_checkpoints import (
    DestaFiles,
    save_whisper,
)
from safetensors.torch import load_file, save_file

from lalm_patch.errors import ModelError
from lalm_patch.models.native import (
    load_desta2,
    load_desta25,
    load_qwen_audio,
    qwen_audio_chat_prompt,
    qwen_audio_features,
)

QUESTION = "What is the gender of the speaker in the speech? Possible options: male, female."


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- files -------------------------------------------------------------------------------------------------------


def test_keys_that_differ_are_named(desta2_files: DestaFiles, qwen_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(desta2_files.location, tmp_path / "desta2")
    file = folder / "qformer_connector.pth"
    tensors = torch.load(file, weights_only=True)
    lost = tensors.pop("proj.1.bias")
    torch.save(tensors | {"proj.2.bias": lost}, file)
    with pytest.raises(ModelError, match=r"1 missing keys: proj\.1\.bias; 1 unexpected keys: proj\.2\.bias"):
        load_desta2(folder)
    torch.save(tensors | {"proj.1.bias": lost, "proj.2.bias": lost}, file)
    with pytest.raises(ModelError, match=r"size: 1 unexpected keys: proj\.2\.bias"):
        load_desta2(folder)
    torch.save(tensors | {"proj.1.bias": lost[:-1]}, file)
    with pytest.raises(ModelError, match=r"1 tensors of another shape: linear\.bias is \[31\], expected \[32\]"):
        load_desta2(folder)
    file.write_bytes(b"not a pickle")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_desta2(folder)

    other = shutil.copytree(qwen_folder, tmp_path / "qwen")
    tensors = load_file(other / "model.safetensors")
    gone = {name for name in tensors if name.startswith("transformer.h.1.")}
    assert len(gone) == 8
    extra = {f"extra.{index}": torch.zeros(1) for index in range(12)}
    save_file({n: t for n, t in tensors.items() if n not in gone} | extra, other / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_qwen_audio(other)
    message = str(caught.value)
    assert "8 missing keys: " + ", ".join(sorted(gone)) + ";" in message
    assert "12 unexpected keys: " + ", ".join(sorted(extra)[:10]) + ", ..." in message


def test_decoder_with_missing_weights_is_refused(desta2_files: DestaFiles, tmp_path: Path) -> None:
    decoder = shutil.copytree(desta2_files.decoder, tmp_path / "llama")
    tensors = load_file(decoder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, decoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.decoder=.*1 missing keys: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_desta2(desta2_files.location, decoder=decoder)


def test_other_architectures_are_refused(
    desta25_files: DestaFiles, qwen_folder: Path, desta2_files: DestaFiles, tmp_path: Path
) -> None:
    folder = shutil.copytree(desta25_files.location, tmp_path / "desta25")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_lora": True}))
    with pytest.raises(ModelError, match="without LoRA, got 'qformer_1' with use_lora=True"):
        load_desta25(folder)
    whisper = save_whisper(tmp_path / "whisper", layers=3, mels=80, seed=0)
    with pytest.raises(ModelError, match=r"expected a Whisper model with 4, 12, 24, 32 encoder layers, got 3"):
        load_desta2(desta2_files.location, encoder=whisper)
    other = shutil.copytree(qwen_folder, tmp_path / "qwen")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rotary_pct": 0.5}))
    with pytest.raises(ModelError, match=r"not the released Qwen-Audio architecture: rotary_pct=0\.5, expected 1\.0"):
        load_qwen_audio(other)
    del config["seq_length"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected a field 'seq_length', found audio, hidden_size"):
        load_qwen_audio(other)


def test_hub_failures_name_the_setting_and_say_what_to_do(
    desta2_files: DestaFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    answer = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/meta/llama"))
    failure: Exception = GatedRepoError("gated", response=answer)

    def model_info(_: HfApi, identifier: str, revision: str | None = None, **options: Any) -> Any:
        asked.append((identifier, revision))
        raise failure

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(ModelError, match=r"model\.decoder=meta/llama is gated.*/meta/llama, then run `hf auth"):
        load_desta2(desta2_files.location, decoder="meta/llama")
    failure = RepositoryNotFoundError("no", response=answer)
    with pytest.raises(ModelError, match=r"model\.encoder=no/whisper: .*/no/whisper does not exist"):
        load_desta2(desta2_files.location, encoder="no/whisper")
    failure = httpx.ConnectError("no route")
    with pytest.raises(ModelError, match=r"model\.id=Qwen/Qwen-Audio: not in the local cache.*folder with model\.id="):
        load_qwen_audio("Qwen/Qwen-Audio", revision="main")
    assert asked == [("meta/llama", None), ("no/whisper", None), ("Qwen/Qwen-Audio", "main")]
    with pytest.raises(ModelError, match=r"model\.id=\./nowhere: no such folder"):
        load_qwen_audio("./nowhere")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_qwen_audio(desta2_files.location.parent)


def test_qwen_audio_ignores_the_order_of_shards(qwen: tuple[Any, Any, Any], qwen_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(qwen_folder / "model.safetensors")
    tensors["transformer.h.0.attn.rotary_emb.inv_freq"] = torch.full((4,), 1e9)  # garbage that must not be used
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(0.0)
    names = sorted(tensors)
    prompt = qwen_audio_chat_prompt(qwen[1], QUESTION, audio_tokens=[12])
    inputs = prompt.tensors() | qwen_audio_features(qwen[2], [noise(0.5)])
    expected = qwen[0](**inputs).logits
    for suffix, single in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        for shards in (1, 2):
            folder = tmp_path / f"{suffix}{shards}"
            shutil.copytree(qwen_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            where = {}
            for shard in range(shards):
                file = single if shards == 1 else f"{single.split('.')[0]}-{shard}-of-{shards}.{suffix}"
                part = {name: tensors[name].clone() for name in names[shard::shards]}
                where |= dict.fromkeys(part, file)
                if suffix == "bin":
                    torch.save(part, folder / file)
                else:
                    save_file(part, folder / file)
            if shards > 1:
                (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": where}))
            torch.testing.assert_close(load_qwen_audio(folder)[0](**inputs).logits, expected, rtol=0, atol=0)
    (folder / "pytorch_model-1-of-2.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-1-of-2\.bin: no such file; the checkpoint is incomplete"):
        load_qwen_audio(folder)
