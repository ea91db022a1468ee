"""The identity of a checkpoint is every byte its numbers depend on, and what is loaded is what the identity says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GENDER, load, write_sakura
from huggingface_hub import constants
from native_checkpoints import DestaFiles
from safetensors.torch import save_file

from lalm_patch.config import compose
from lalm_patch.errors import ModelError, StoreError
from lalm_patch.models import fingerprint as module
from lalm_patch.models.checkpoint import Checkpoint, find_checkpoint, find_repository
from lalm_patch.run import run, run_identity, work
from lalm_patch.settings import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def flip(path: Path, place: float, bit: int = 1) -> None:
    """Change one bit at a share of the file's length."""
    with path.open("r+b") as file:
        file.seek(int(place * (path.stat().st_size - 1)))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ bit]))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with 8 MiB of weights: more than its two ends."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_audio"}')
    save_file({"x": torch.zeros(2**21)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_byte_counts(large: Path) -> None:
    """The ends of a file alone were read: other weights in the middle had the same name."""
    seen = {find_repository(str(large)).commit}
    for place in (0.5, 0.3, 0.999, 0.7):
        flip(large / "model.safetensors", place)
        seen.add(find_repository(str(large)).commit)
    assert len(seen) == 5


def test_every_file_that_is_read_counts(large: Path) -> None:
    (large / "tokenizer_config.json").write_text("{}")
    seen = {find_repository(str(large)).commit}
    for name, text in {
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "merges.txt": "a b",
        "qformer_connector.pth": "x",
        "speech-lora/adapter_config.json": "{}",
        "speech-lora/adapter_model.safetensors": "weights for audio lie one folder below (Phi-4-multimodal)",
    }.items():
        (large / name).parent.mkdir(exist_ok=True)
        (large / name).write_text(text)
        seen.add(find_repository(str(large)).commit)
    assert len(seen) == 7
    # What no library reads changes nothing: a second copy of the weights, notes.
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "optimizer.pt", "consolidated.00.pth"):
        (large / name).write_text("not read")
        assert find_repository(str(large)).commit in seen


def test_a_folder_can_be_pinned(checkpoints: dict[str, Path], desta2_files: DestaFiles, tmp_path: Path) -> None:
    """`model.revision=local:...` of a folder is what a commit is of a repository: other files are refused."""
    folder = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "copy"))
    pin = find_repository(str(folder)).commit
    assert load(folder, "qwen2_audio", revision=pin).commit == pin
    flip(folder / "model.safetensors", 0.6)
    with pytest.raises(ModelError, match=rf"model\.revision={pin}: the files of .*copy are local:\w+, so not those"):
        load(folder, "qwen2_audio", revision=pin)
    three = load(desta2_files.location, "desta2").commit
    assert three.count("local:") == 3
    assert load(desta2_files.location, "desta2", revision=three).commit == three


def test_a_branch_of_a_folder_is_refused(checkpoints: dict[str, Path]) -> None:
    """It was ignored: `model.revision=v2` traced whatever the folder held."""
    with pytest.raises(ModelError, match=r"model\.revision=v2: .* is a folder, which has no branches"):
        load(checkpoints["qwen2_audio"], "qwen2_audio", revision="v2")
    with pytest.raises(ModelError, match=r"model\.revision=v2: model\.id=demo is a folder"):
        find_repository("demo", "v2")


# --- remembered checksums --------------------------------------------------------------------------------------------


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every file counts as large and as settled, checksums are remembered in a folder of the test's own."""
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(module, "_hashed_here", {})
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "lalm_patch" / "checksums"


def test_a_remembered_checksum_saves_the_reading_and_never_the_proof(
    checkpoints: dict[str, Path], forgetful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "copy"))
    settings = ModelSettings(name="x", family="qwen2_audio", id=str(folder), dtype="float32")
    commit = find_checkpoint(settings).commit
    assert len(list(forgetful.iterdir())) == len(list(folder.iterdir()))
    # The next process does not read them to know the name ...
    module._hashed_here.clear()
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "sha256", _only_short(hashlib.sha256))
        assert find_checkpoint(settings).commit == commit
    # ... but reads every byte of what it computes with: here the disk gives other bytes than it was given.
    assert load(folder, "qwen2_audio").commit == commit
    module._hashed_here.clear()
    weights = folder / "model.safetensors"
    (forgetful / module._memo(module.stamp(weights)).name).write_text("ab" * 32)
    assert find_checkpoint(settings).commit != commit
    with pytest.raises(ModelError, match=r"its files \(.*model\.safetensors.*\) are no longer those of local:"):
        load(folder, "qwen2_audio")


def _only_short(sha256: type) -> object:
    def checked(data: bytes = b"") -> object:
        found = sha256(data)

        class Short:
            def update(self, more: bytes) -> None:
                assert len(more) < 4096, "a file was read"
                found.update(more)

            hexdigest = found.hexdigest

        return Short()

    return checked


def test_a_file_just_written_is_not_remembered(large: Path, forgetful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be written again within the resolution of its times."""
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 3600.0)
    first = find_repository(str(large)).commit
    assert not forgetful.exists()
    assert not module._hashed_here
    flip(large / "model.safetensors", 0.5)
    assert find_repository(str(large)).commit != first


def test_a_cache_that_cannot_be_written_is_no_obstacle(large: Path, forgetful: Path) -> None:
    first = find_repository(str(large)).commit
    module._hashed_here.clear()
    shutil.rmtree(forgetful)
    forgetful.write_text("a file where the folder should be")
    assert find_repository(str(large)).commit == first


def test_files_written_while_a_model_is_opened_are_noticed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "copy"))
    found = find_repository(str(folder))
    with pytest.raises(ModelError, match=r"model\.safetensors: was written to while"), found.verified():
        flip(folder / "model.safetensors", 0.5)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights"), found.verified():
        pass


# --- files from the hub ----------------------------------------------------------------------------------------------


def _cached(folder: Path, cache: Path, links: bool = True) -> Path:
    """The hub's cache of a repository with a folder's files: blobs called by their checksums."""
    root = cache / "models--owner--name"
    snapshot = root / "snapshots" / COMMIT
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in folder.iterdir():
        data = path.read_bytes()
        large = path.suffix == ".safetensors"
        name = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
        blob = root / "blobs" / name.hexdigest()
        blob.write_bytes(data)
        if links:
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        else:
            blob.rename(snapshot / path.name)
    return snapshot


@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral"])
def test_a_damaged_copy_from_the_hub_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = _cached(checkpoints[family], tmp_path)
    settings = ModelSettings(name="x", family=family, id="owner/name", dtype="float32", device="cpu")
    assert load(Path("owner/name"), family).commit == COMMIT
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tekken.json", "preprocessor_config.json"):
        path = snapshot / name
        if not path.exists():
            continue
        kept = path.read_bytes()
        if name == "model.safetensors":
            flip(path, 0.7)
        else:  # still JSON, and of another content
            path.write_bytes(kept.replace(b": ", b":  ", 1))
        assert find_checkpoint(settings).commit == COMMIT
        with pytest.raises(ModelError, match=f"{name}: not the file that was downloaded"):
            load(Path("owner/name"), family)
        path.write_bytes(kept)
    assert load(Path("owner/name"), family).commit == COMMIT


def test_a_copy_without_checksums_carries_a_fingerprint(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache without symbolic links (Windows) keeps the names of commits only."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = _cached(checkpoints["qwen2_audio"], tmp_path, links=False)
    first = load(Path("owner/name"), "qwen2_audio").commit
    assert first.startswith(f"{COMMIT}:")
    flip(snapshot / "model.safetensors", 0.7)
    second = load(Path("owner/name"), "qwen2_audio").commit
    assert second.startswith(f"{COMMIT}:")
    assert second != first


def test_a_folder_that_was_downloaded_into(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """`hf download --local-dir` notes checksums: they hold for files that were not written to since."""
    folder = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "copy"))
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    weights = folder / "model.safetensors"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    (notes / "model.safetensors.metadata").write_text(f"{COMMIT}\n{checksum}\n{time.time() + 3600}\n")
    load(folder, "qwen2_audio")
    flip(weights, 0.7)
    with pytest.raises(ModelError, match=r"model\.safetensors: not the file that was downloaded"):
        load(folder, "qwen2_audio")
    # Written to after the download: the user's own weights, under another identity.
    (notes / "model.safetensors.metadata").write_text(f"{COMMIT}\n{checksum}\n{time.time() - 3600}\n")
    assert load(folder, "qwen2_audio").commit != find_repository(str(checkpoints["qwen2_audio"])).commit


# --- runs ------------------------------------------------------------------------------------------------------------


def _overrides(model: Path, root: Path) -> tuple[str, ...]:
    return ("model=qwen2_audio", f"model.id={model}", "model.dtype=float32", "attr=gender", f"data.root={root}")


def test_shards_from_other_weights_are_not_merged(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "model"))
    overrides = _overrides(model, write_sakura(tmp_path / "data", GENDER, clips=2, seconds=0.3))
    run(compose(*overrides, "shard=1/2"), tmp_path / "out")
    flip(model / "model.safetensors", 0.5)
    with pytest.raises(StoreError, match=r"made with other settings \(weights: 'local:\w+' there, 'local:\w+' now"):
        run(compose(*overrides, "shard=2/2"), tmp_path / "out")


def test_weights_that_change_before_they_are_loaded(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that saves into the folder meanwhile: the run's identity is of the files that were there."""
    model = Path(shutil.copytree(checkpoints["qwen2_audio"], tmp_path / "model"))
    overrides = _overrides(model, write_sakura(tmp_path / "data", GENDER, clips=2, seconds=0.3))
    look = work.left_out

    def late(*args: Any) -> Any:
        flip(model / "model.safetensors", 0.5)
        return look(*args)

    monkeypatch.setattr(work, "left_out", late)
    with pytest.raises(StoreError, match=r"its files were local:\w+ when this run began and are now local:\w+"):
        run(compose(*overrides), tmp_path / "out")
    assert not list(tmp_path.glob("out/**/result.nc"))


def test_a_run_that_finished_under_the_former_fingerprint_is_still_shown(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoints["qwen2_audio"], model)
    data = write_sakura(tmp_path / "data", GENDER, 2)
    settings = compose(
        *("model=qwen2_audio", f"model.id={model}", "model.dtype=float32", "attr=gender", f"data.root={data}"),
        *("granularity.layers=[0]", "threads=1"),
    )
    with monkeypatch.context() as before:
        before.setattr(Checkpoint, "revision", property(lambda self: self.former_revision))
        first = run(settings, tmp_path / "run").dataset
    assert first is not None
    assert run(settings, tmp_path / "run").dataset is not None
    assert run_identity(settings)["weights"] != json.loads(first.attrs["run_identity"])["weights"]
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(StoreError, match=r"holds a finished run made with other settings \(weights: "):
        run(settings, tmp_path / "run")
