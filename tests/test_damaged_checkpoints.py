"""Damaged and foreign checkpoints: one sentence each, with the file, what it is, and what to do."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load
from damaged_checkpoints import POINTER, Tiny, save_tinies
from huggingface_hub import HfApi, ModelInfo
from safetensors.torch import load_file, save_file
from test_cli import refused

from lalm_patch.errors import ModelError
from lalm_patch.models import LALM
from lalm_patch.models.checkpoint import find_repository
from lalm_patch.settings import ModelSettings

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tiny]:
    return save_tinies(tmp_path_factory.mktemp("tinies"))


def refusal(tiny: Tiny) -> str:
    with pytest.raises(ModelError) as caught:
        tiny.answer()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    return message


# --- one file, one damage --------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def _header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(f"../blobs/{path.name}")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


WEIGHTS: dict[str, tuple[Damage, str]] = {
    "pointer": (lambda path: path.write_bytes(POINTER), "a git-LFS pointer instead of the file itself; run `git lfs"),
    "empty": (lambda path: os.truncate(path, 0), "an empty file; download it again"),
    "cut": (_cut, "cannot be read as weights .* cut or changed, download it again"),
    "header": (_header, "cannot be read as weights .* cut or changed, download it again"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><p>404"), "a web page instead of the file"),
    "dangling": (_dangling, r"a symbolic link to \.\./blobs/.*, where there is nothing; download"),
    "folder": (_folder, "a folder, expected a file"),
    "text": (lambda path: path.write_text("hello" * 99), "cannot be read as weights"),
}
FILES = [
    ("shards", 0, "model-00002-of-*.safetensors"),
    ("old", 0, "pytorch_model.bin"),
    ("voxtral", 0, "model.safetensors"),
    ("generic", 0, "model.safetensors"),
    ("qwen_audio", 0, "model.safetensors"),
    ("desta25", 0, "model.safetensors"),
    ("desta25", 1, "model.safetensors"),
    ("desta25", 2, "model.safetensors"),
]


@pytest.mark.parametrize("damage", WEIGHTS)
def test_damaged_weights(tinies: dict[str, Tiny], tmp_path: Path, damage: str) -> None:
    for kind, which, pattern in FILES:
        tiny = tinies[kind].copy(tmp_path / f"{kind}{which}")
        (path,) = tiny.folders[which].glob(pattern)
        apply, message = WEIGHTS[damage]
        apply(path)
        said = refusal(tiny)
        assert str(path) in said
        assert re.search(message, said), said


# --- configuration, tokenizer, templates -----------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Damage, str]] = {
    "empty": (lambda path: os.truncate(path, 0), "an empty file"),
    "blank": (lambda path: path.write_text(" \n"), "not valid JSON .*; download it again"),
    "mark": (lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()), "byte-order mark.*UTF-8 without BOM"),
    "utf16": (lambda path: path.write_text(path.read_text(), encoding="utf-16"), "not text in UTF-8"),
    "list": (lambda path: path.write_text("[1, 2]"), "expected a JSON object, got a list"),
    "null": (lambda path: path.write_text("null"), "expected a JSON object, got a NoneType"),
    "deep": (lambda path: path.write_text("[" * 10**5), "not valid JSON"),
    "pointer": (lambda path: path.write_bytes(POINTER), "a git-LFS pointer"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), "not valid JSON"),
    "dangling": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "a symbolic link to nowhere"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "a folder, expected a file"),
    "loop": (lambda path: (path.unlink(), path.symlink_to(path.name)), "a symbolic link to config.json"),
}
ALL = ("shards", "voxtral", "generic", "qwen_audio", "desta25")


@pytest.mark.parametrize("damage", CONFIGS)
def test_damaged_configuration(tinies: dict[str, Tiny], tmp_path: Path, damage: str) -> None:
    for kind in ALL:
        for which in range(len(tinies[kind].folders)):
            tiny = tinies[kind].copy(tmp_path / f"{kind}{which}")
            apply, message = CONFIGS[damage]
            apply(tiny.folders[which] / "config.json")
            said = refusal(tiny)
            assert str(tiny.folders[which] / "config.json") in said
            assert re.search(message, said), said


@pytest.mark.parametrize("content", [{}, {"model_type": None}, {"model_type": ["qwen"]}])
def test_a_configuration_of_nothing(tinies: dict[str, Tiny], tmp_path: Path, content: dict[str, object]) -> None:
    for kind in ALL:
        tiny = tinies[kind].copy(tmp_path / kind)
        (tiny.folders[0] / "config.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=r"is a checkpoint of type .*, expected "):
            load(tiny.folders[0], tiny.family)


def test_sizes_that_are_no_sizes(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    for kind in ALL:
        for which in range(len(tinies[kind].folders)):
            for value in ("many", -1, None, [], 0):
                tiny = tinies[kind].copy(tmp_path / f"{kind}{which}{value}")
                path = tiny.folders[which] / "config.json"
                config = json.loads(path.read_text())
                place = next((config[name] for name in ("text_config", "audio_config") if name in config), config)
                name = next(n for n in ("hidden_size", "d_model", "prompt_size") if n in place)
                place[name] = value
                path.write_text(json.dumps(config))
                assert str(tiny.folders[which]) in refusal(tiny)


SMALL = {
    "shards": ("tokenizer.json", "processor_config.json", "chat_template.jinja", "tokenizer_config.json"),
    "voxtral": ("tekken.json", "preprocessor_config.json"),
    "generic": ("tokenizer.json", "processor_config.json", "chat_template.jinja"),
    "qwen_audio": ("qwen.tiktoken",),
    "desta25": ("tokenizer.json",),
}


def test_damaged_tokenizers_and_templates(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    damages: dict[str, Damage] = {
        "empty": lambda path: os.truncate(path, 0),
        "pointer": lambda path: path.write_bytes(POINTER),
        "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00" * 40),
        "object": lambda path: path.write_text("{}") if path.suffix == ".json" else path.write_text("{{ x"),
        "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    }
    for kind, names in SMALL.items():
        for name in names:
            for damage, apply in damages.items():
                if damage == "object" and name == "tokenizer_config.json":
                    continue  # nothing in it has to be there
                tiny = tinies[kind].copy(tmp_path / f"{kind}-{name}-{damage}")
                path = tiny.folders[1 if kind == "desta25" else 0] / name
                apply(path)
                said = refusal(tiny)
                assert name in said, (kind, damage, said)
                assert str(path.parent) in said, (kind, damage, said)


def test_missing_tokenizers(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    for kind, name in (
        ("shards", "tokenizer.json"),
        ("shards", "tokenizer_config.json"),
        ("shards", "processor_config.json"),
        ("voxtral", "tekken.json"),
        ("generic", "tokenizer.json"),
        ("qwen_audio", "qwen.tiktoken"),
        ("desta25", "tokenizer.json"),
        ("desta25", "tokenizer_config.json"),
    ):
        tiny = tinies[kind].copy(tmp_path / f"{kind}-{name}")
        folder = tiny.folders[1 if kind == "desta25" else 0]
        (folder / name).unlink()
        assert str(folder) in refusal(tiny)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_indices_of_shards(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    index = "model.safetensors.index.json"

    def mapped(change: Callable[[dict[str, object]], object]) -> Damage:
        def apply(path: Path) -> None:
            found = json.loads(path.read_text())
            path.write_text(json.dumps(found | {"weight_map": change(found["weight_map"])}))

        return apply

    no_map = rf"{index}: expected a `weight_map`"
    cases: list[tuple[Damage, str]] = [
        (mapped(lambda found: {}), no_map),
        (mapped(lambda found: list(found)), no_map),
        (mapped(lambda found: dict.fromkeys(found, 3)), no_map),
        (mapped(lambda found: dict.fromkeys(found, "../x.safetensors")), no_map),
        (
            mapped(lambda found: dict.fromkeys(found, "gone.safetensors")),
            r"gone\.safetensors: no such file; the checkpoint",
        ),
        (lambda path: path.write_text("{"), rf"{index}: not valid JSON"),
        (lambda path: path.write_bytes(POINTER), rf"{index}: a git-LFS pointer"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), rf"{index}: a symbolic link"),
        (lambda path: path.unlink(), "no weights; expected model.safetensors or pytorch_model.bin"),
        (
            lambda path: sorted(path.parent.glob("model-*"))[1].unlink(),
            r"model-00002-of-\d+\.safetensors: no such file",
        ),
    ]
    for number, (apply, message) in enumerate(cases):
        tiny = tinies["shards"].copy(tmp_path / str(number))
        apply(tiny.folders[0] / index)
        said = refusal(tiny)
        assert re.search(message, said), said


# --- foreign folders and repositories --------------------------------------------------------------------------------


def test_a_place_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("x")
    with pytest.raises(ModelError, match=r"model\.safetensors: a file, expected a checkpoint's folder"):
        find_repository(str(file))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"link: a symbolic link to .*gone, where there is no folder"):
        find_repository(str(tmp_path / "link"))
    # Root reads everything, so the system's answer is made up.
    monkeypatch.setattr(Path, "iterdir", _denied)
    with pytest.raises(ModelError, match=r"the folder cannot be read \(Permission denied\); check its permissions"):
        find_repository(str(tmp_path))


def test_a_file_that_may_not_be_read(tinies: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", _denied)
    with pytest.raises(ModelError, match=r"config\.json: cannot be read \(Permission denied\); check its permissions"):
        find_repository(str(tinies["voxtral"].folders[0]))


def _denied(*_args: object, **_options: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_folder_of_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("x")
    with pytest.raises(ModelError, match=r"a LoRA adapter \(adapter_config\.json without .*merge_and_unload"):
        find_repository(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter .* merge it into its base model"),
        (["README.md", "ggml-model.gguf"], r"has no config\.json, so it is not a checkpoint"),
    ],
)
def test_a_repository_without_configuration(monkeypatch: pytest.MonkeyPatch, files: list[str], message: str) -> None:
    """Refused before anything is downloaded."""
    info = ModelInfo(id="owner/name", sha="0" * 40, siblings=[{"rfilename": file} for file in files])
    monkeypatch.setattr(HfApi, "model_info", lambda *_args, **_kwargs: info)
    with pytest.raises(ModelError, match=rf"model\.id=owner/name: https://huggingface.co/owner/name {message}"):
        find_repository("owner/name")


def test_a_quantised_checkpoint_without_its_library(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    methods = {
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "gptq": {"quant_method": "gptq", "bits": 4},
        "awq": {"quant_method": "awq", "bits": 4},
        "compressed-tensors": {"quant_method": "compressed-tensors"},
        "unheard-of": {"quant_method": "unheard-of"},
    }
    for kind in ("shards", "voxtral", "generic"):
        for name, method in methods.items():
            tiny = tinies[kind].copy(tmp_path / f"{kind}{name}")
            path = tiny.folders[0] / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
            said = refusal(tiny)
            assert str(tiny.folders[0]) in said
            assert "quantised" in said, said
            assert name in said, said


def test_embeddings_a_few_rows_short(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    """Of another size than the configuration says; or with it, and then smaller than the tokenizer's ids."""
    tiny = tinies["voxtral"].copy(tmp_path)
    path, config = tiny.folders[0] / "model.safetensors", tiny.folders[0] / "config.json"
    tensors = load_file(path)
    for name in [name for name in tensors if "embed_tokens" in name or "lm_head" in name]:
        tensors[name] = tensors[name][:1200].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    said = refusal(tiny)
    assert "2 tensors of another shape: lm_head.weight is [1200, 64], expected [" in said
    sizes = json.loads(config.read_text())
    sizes["text_config"]["vocab_size"] = 1200
    config.write_text(json.dumps(sizes))
    assert re.search(r"gives token \d+, but its input embeddings have 1200 rows; tokenizer and weights", refusal(tiny))


def test_a_dry_run_needs_no_weights_and_names_what_it_reads(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    tiny = tinies["shards"].copy(tmp_path)
    settings = ModelSettings(name="x", family="qwen2_audio", id=str(tiny.folders[0]), dtype="float32")
    for path in tiny.folders[0].glob("model-*"):
        path.unlink()
    assert LALM.outline(settings).num_layers == 4
    (tiny.folders[0] / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match=r"chat_template\.jinja.*cannot be opened"):
        LALM.outline(settings)


def test_the_command_line_says_it_in_one_sentence(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    tiny = tinies["voxtral"].copy(tmp_path / "copy")
    _cut(tiny.folders[0] / "model.safetensors")
    said = refused(tmp_path, "model=voxtral", f"model.id={tiny.folders[0]}", "model.dtype=float32", "data=demo")
    last = said.strip().splitlines()[-1]
    assert "model.safetensors: cannot be read as weights" in last
    assert last.endswith("it was cut or changed, download it again")
