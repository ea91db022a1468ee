"""Weights that are missing, too many or of another shape are refused by name in every family, by one mechanism."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, noise
from native_checkpoints import DestaFiles
from safetensors.torch import load_file, save_file
from tiny_generic import save_generic
from torch import Tensor
from transformers import AutoModelForMultimodalLM, LlamaConfig, LlamaForCausalLM

from lalm_patch.errors import ModelError
from lalm_patch.models import LALM
from lalm_patch.models.checkpoint import BUNDLED
from lalm_patch.models.weights import refuse_gaps
from lalm_patch.stimuli import Prompt

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FAMILIES = ("qwen2_audio", "voxtral", "generic", "omni", "qwen_audio", "desta2", "desta25", "llama", "whisper")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(
    checkpoints: dict[str, Path],
    native_folders: dict[str, Path],
    desta2_files: DestaFiles,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("generic")
    others = {
        "generic": save_generic(root / "flamingo", "audioflamingo3"),
        "omni": save_generic(root / "omni", "qwen2_5_omni"),
        "llama": desta2_files.decoder,
        "whisper": desta2_files.encoder,
    }
    return checkpoints | native_folders | others


def _changed(folders: dict[str, Path], kind: str, change: Change, root: Path) -> tuple[Callable[[], LALM], str]:
    """Opens the family's checkpoint with one file of weights rewritten; and that file's name."""
    folder = Path(shutil.copytree(folders[kind], root / kind))
    own = folder / "qformer_connector.pth"
    if own.is_file():
        torch.save(change(torch.load(own, weights_only=True)), own)
    else:
        own = folder / "model.safetensors"
        save_file(change(load_file(own)), own, metadata={"format": "pt"})
    parts = {"llama": {"decoder": str(folder)}, "whisper": {"encoder": str(folder)}}.get(kind, {})
    family = {"generic": "generic", "omni": "generic", "llama": "desta2", "whisper": "desta2"}.get(kind, kind)
    where = folders["desta2"] if parts else folder
    return lambda: load(where, family, **parts), str(own)


def _matrix(tensors: dict[str, Tensor]) -> str:
    """One that every part of the model's numbers depends on."""
    return sorted(name for name, tensor in tensors.items() if tensor.ndim == 2 and "talker" not in name)[-1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_missing_surplus_and_misshapen_weights_are_named(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    names = []

    def lacking(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names.append(_matrix(tensors))
        return {name: tensor for name, tensor in tensors.items() if name != names[0]}

    def surplus(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = "perception.connector." if kind == "desta25" else ""
        return tensors | {f"{prefix}layers.99.extra": torch.zeros(2)}

    def misshapen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = _matrix(tensors)
        return tensors | {name: torch.cat([tensors[name], tensors[name][:1]])}

    expected: list[tuple[Change, str]] = [
        (lacking, "1 missing keys: "),
        (surplus, "1 unexpected keys: "),
        (misshapen, "1 tensors of another shape: "),
    ]
    for index, (change, message) in enumerate(expected):
        opens, file = _changed(folders, kind, change, tmp_path / str(index))
        with pytest.raises(ModelError) as caught:
            opens()
        assert message in str(caught.value)
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
        # The last part of a name is the same in the file and in the model.
        assert ("layers.99.extra" if change is surplus else names[0].rpartition(".")[2]) in str(caught.value)


@pytest.mark.parametrize("kind", ["qwen2_audio", "voxtral", "generic", "qwen_audio", "llama"])
@pytest.mark.parametrize(
    ("prefix", "advice"),
    [
        ("base_model.model.", r"a PEFT \(LoRA\) save: merge the adapter"),
        ("module.", "a save of a wrapped"),
        ("_orig_mod.", "a save of a compiled model"),
        ("my_wrapper.", "save the model itself, without what is around it"),
    ],
)
def test_a_save_of_something_around_the_model_says_so(
    folders: dict[str, Path], kind: str, prefix: str, advice: str, tmp_path: Path
) -> None:
    opens, _ = _changed(folders, kind, lambda found: {prefix + name: value for name, value in found.items()}, tmp_path)
    with pytest.raises(ModelError, match=advice):
        opens()


def test_lora_weights_among_the_models_own(folders: dict[str, Path], tmp_path: Path) -> None:
    def adapted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {f"{_matrix(tensors).removesuffix('.weight')}.lora_A.weight": torch.zeros(2, 2)}

    with pytest.raises(ModelError, match=r"holds LoRA weights: .*merge_and_unload"):
        _changed(folders, "qwen2_audio", adapted, tmp_path)[0]()


def test_an_adapter_beside_the_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["qwen2_audio"], tmp_path / "folder"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"LoRA weights \(adapter_config\.json\) lie beside the model's own"):
        load(folder, "qwen2_audio")


def test_the_demo_with_the_prefix_of_a_peft_save(tmp_path: Path) -> None:
    """The smallest input that traced random weights: 9 of 9 checks passed."""
    folder = Path(shutil.copytree(BUNDLED["demo"], tmp_path / "demo"))
    tensors = load_file(folder / "model.safetensors")
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"their names begin with 'base_model\.model\.': a PEFT"):
        load(folder, "qwen2_audio")


def test_the_shard_that_lacks_a_weight_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _resaved(folders["qwen2_audio"], tmp_path / "shards", max_shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    key = next(name for name in index if name.endswith("layers.3.self_attn.o_proj.weight"))
    tensors = load_file(folder / index[key])
    del tensors[key]
    save_file(tensors, folder / index[key], metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"\({index[key]}\).*1 missing keys: .*layers\.3\.self_attn\.o_proj\.weight"):
        load(folder, "qwen2_audio")


# --- what is legitimately absent, or there ---------------------------------------------------------------------------


def _resaved(folder: Path, target: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """As transformers saves it."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(target, **options)
    return target


def _answers(folder: Path, family: str, prompt: Prompt, dtype: str = "float32") -> Tensor:
    lalm = load(folder, family, dtype=dtype)
    logits: Tensor = lalm.module(**lalm.inputs(noise(0.5), prompt, "chat")[1]).logits
    return logits


@pytest.mark.parametrize("kind", ["qwen2_audio", "voxtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_layout_transformers_saves_is_taken(
    folders: dict[str, Path], kind: str, dtype: str, prompt: Prompt, tmp_path: Path
) -> None:
    whole = _resaved(folders[kind], tmp_path / "whole", getattr(torch, dtype))
    shards = _resaved(folders[kind], tmp_path / "shards", getattr(torch, dtype), max_shard_size="100KB")
    old = Path(shutil.copytree(whole, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors")))
    torch.save(load_file(whole / "model.safetensors"), old / "pytorch_model.bin")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    expected = _answers(whole, kind, prompt, dtype)
    assert torch.isfinite(expected).all()
    for folder in (shards, old):
        torch.testing.assert_close(_answers(folder, kind, prompt, dtype), expected, rtol=0, atol=0)


def test_tied_weights_are_not_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    """Llama's head with `tie_word_embeddings`; Whisper's is always tied. Untied, the same file lacks a weight."""
    assert not any("proj_out" in name for name in load_file(folders["whisper"] / "model.safetensors"))
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "tied"))
    config = LlamaConfig.from_pretrained(folder)
    for tied in (True, False):
        config.tie_word_embeddings = tied
        config.save_pretrained(folder)
        if tied:
            LlamaForCausalLM(config).save_pretrained(folder)
            assert "lm_head.weight" not in load_file(folder / "model.safetensors")
            lalm = load(folders["desta2"], "desta2", decoder=str(folder))
            assert lalm.module.lm_head.weight is lalm.module.get_input_embeddings().weight
        else:
            with pytest.raises(ModelError, match=r"model\.decoder=.*1 missing keys: lm_head\.weight"):
                load(folders["desta2"], "desta2", decoder=str(folder))


def test_buffers_of_old_checkpoints_are_no_surplus(folders: dict[str, Path], prompt: Prompt, tmp_path: Path) -> None:
    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        stem = next(name for name in tensors if "layers.0.self_attn.q_proj" in name).partition("self_attn")[0]
        garbage = {"self_attn.rotary_emb.inv_freq": torch.full((8,), 1e9), "attn.masked_bias": torch.tensor(-1e4)}
        return tensors | {stem + name: tensor for name, tensor in garbage.items()}

    for kind in ("qwen2_audio", "voxtral"):
        opens, _ = _changed(folders, kind, old, tmp_path)
        expected = _answers(folders[kind], kind, prompt)
        lalm = opens()
        found = lalm.module(**lalm.inputs(noise(0.5), prompt, "chat")[1]).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_parts_a_class_knows_and_leaves_out_stay_fine(folders: dict[str, Path]) -> None:
    """An omni model's file holds the part that speaks, which the thinker's class lists as ignored."""
    assert any("talker" in name for name in load_file(folders["omni"] / "model.safetensors"))
    assert load(folders["omni"], "generic").num_layers == 3


@pytest.mark.parametrize("kind", ["qwen2_audio", "qwen_audio", "llama", "desta2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    folders: dict[str, Path], kind: str, value: float, tmp_path: Path
) -> None:
    def spoilt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[_matrix(tensors)][0, 0] = value
        return tensors

    opens, file = _changed(folders, kind, spoilt, tmp_path)
    with pytest.raises(ModelError, match="1 weights hold infinite numbers or none at all: ") as caught:
        opens()
    assert str(Path(file).parent) in str(caught.value)


def test_long_lists_are_cut() -> None:
    with pytest.raises(ModelError, match=r"^x: .*12 missing keys: k00, .*, k09, \.\.\.; 1 tensors .*: a is \[1\], exp"):
        refuse_gaps("x", missing=[f"k{index:02}" for index in range(12)], misshapen={"a": ((1,), (2,))})
    refuse_gaps("x")
