"""Fixtures shared by the test modules: tiny checkpoints are made once per test session.

The process that only hands tests out to the workers imports this, too: torch and transformers are imported where used.
"""

from __future__ import annotations

# isort: off
import offline  # noqa: F401  (before the libraries that read it)

# isort: on
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from lalm_patch.settings import ModelSettings
from lalm_patch.stimuli import Attribute, Prompt

if TYPE_CHECKING:
    import xarray as xr
    from native_checkpoints import DestaFiles
    from ndif_runs import Server

    from lalm_patch.models import LALM

GENDER = Attribute(
    "gender",
    "What is the gender of the speaker in the speech?",
    ("male", "female"),
    "The speaker's gender is",
    "Gender",
)
ANIMAL = Attribute(
    "animal",
    "What animal makes the sound?",
    ("dog", "cat", "pig", "cow", "frog", "hen", "rooster", "sheep", "crow"),
    "The sound file's animal is",
    "Animal",
)


def pytest_runtest_teardown() -> None:
    """Once the libraries are imported, collections of garbage leave them out: looking at all of their objects again and
    again is a twentieth of a run's time."""
    if not gc.get_freeze_count() and "nnsight" in sys.modules and "torch" in sys.modules:
        gc.collect()
        gc.freeze()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """White noise, float32 [samples] at 16 kHz."""
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


def load(folder: Path, family: str, **settings: str) -> LALM:
    """Open a tiny checkpoint the way a run does."""
    from lalm_patch.models import LALM

    defaults = {"name": "tiny", "dtype": "float32", "device": "cpu"}
    return LALM.load(ModelSettings(family=family, id=str(folder), **(defaults | settings)))


def write_sakura(root: Path, attribute: Attribute, clips: int, seconds: float = 1.0) -> Path:
    """A data set of noise in SAKURA's layout, classes in turn, lengths slightly different."""
    folder = root / "data" / attribute.folder
    (folder / "audio").mkdir(parents=True)
    lines = ["file,attribute_label,single_instruction,single_answer,multi_instruction,multi_answer"]
    for index in range(clips):
        label = attribute.options[index % len(attribute.options)]
        name = f"{label}_{index:02d}.wav"
        soundfile.write(
            folder / "audio" / name, noise(seconds + 0.05 * (index % 3), seed=index), 16000, subtype="PCM_16"
        )
        lines.append(f"{name},{label},,,,")
    (folder / "metadata.csv").write_text("\r\n".join(lines) + "\r\n")
    return root


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random tiny checkpoints, by family."""
    from tiny_models import save_tiny_qwen2_audio, save_tiny_voxtral

    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen2_audio": save_tiny_qwen2_audio(root / "qwen2_audio"),
        "voxtral": save_tiny_voxtral(root / "voxtral"),
    }


@pytest.fixture(scope="session", params=["qwen2_audio", "voxtral"])
def lalm(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> LALM:
    """A random tiny model of each architecture."""
    return load(checkpoints[request.param], request.param)


@pytest.fixture(scope="session")
def desta2_files(tmp_path_factory: pytest.TempPathFactory) -> DestaFiles:
    """DeSTA2's three repositories; copy what you change."""
    from native_checkpoints import save_desta2

    return save_desta2(tmp_path_factory.mktemp("desta2") / "files")


@pytest.fixture(scope="session")
def desta25_files(tmp_path_factory: pytest.TempPathFactory) -> DestaFiles:
    """DeSTA2.5's three repositories; copy what you change."""
    from native_checkpoints import save_desta25

    return save_desta25(tmp_path_factory.mktemp("desta25") / "files")


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen-Audio's repository; copy what you change."""
    from native_checkpoints import save_qwen_audio

    return save_qwen_audio(tmp_path_factory.mktemp("qwen_audio") / "files")


@pytest.fixture(scope="session")
def native_folders(desta2_files: DestaFiles, desta25_files: DestaFiles, qwen_folder: Path) -> dict[str, Path]:
    """Folders of the families that this package carries the code of, by family."""
    return {"desta2": desta2_files.location, "desta25": desta25_files.location, "qwen_audio": qwen_folder}


@pytest.fixture(scope="module")
def desta2(desta2_files: DestaFiles) -> tuple[Any, Any, Any]:
    """Model, tokenizer and feature extractor."""
    from lalm_patch.models.native import load_desta2

    return load_desta2(desta2_files.location)


@pytest.fixture(scope="module")
def desta25(desta25_files: DestaFiles) -> tuple[Any, Any, Any]:
    """Model, tokenizer and feature extractor."""
    from lalm_patch.models.native import load_desta25

    return load_desta25(desta25_files.location)


@pytest.fixture(scope="module")
def qwen(qwen_folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and feature extractor."""
    from lalm_patch.models.native import load_qwen_audio

    return load_qwen_audio(qwen_folder)


@pytest.fixture(scope="module")
def without_pdfs() -> Iterator[None]:
    """For modules of many runs that look at other things than pictures."""
    import pictures

    from lalm_patch.figures import style

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "rendered", pictures.coarse)
        yield


@pytest.fixture(scope="module")
def demos_opened_once() -> Iterator[None]:
    """For modules of many runs that are not about loading: a demo, which stays as it is, is opened once in all of them;
    what a run proves of it and of its engine is proven each time."""
    from lalm_patch.models import LALM
    from lalm_patch.models.checkpoint import BUNDLED

    def once(opened: Callable[..., LALM]) -> Callable[..., LALM]:
        def lalm(settings: ModelSettings, *told: Callable[[str], None]) -> LALM:
            if settings.id not in BUNDLED:
                return opened(settings, *told)
            key = (opened.__name__, repr(settings))
            if key not in _demos:
                _demos[key] = opened(settings, *told)
            return _demos[key]

        return lalm

    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "outline"):
            patch.setattr(LALM, name, once(getattr(LALM, name)))
        yield


_demos: dict[tuple[str, str], LALM] = {}


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    from ndif_runs import Server

    server = Server()
    yield server
    server.kill()


@pytest.fixture
def server(one_server: Server) -> Server:
    """The small NDIF as it starts, whatever the test before did with it."""
    one_server.control()
    return one_server


@pytest.fixture(scope="module")
def tiny(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ...]:
    """Overrides: a random tiny Qwen2-Audio on the module's `CLIPS` clips of noise; half of them or more count."""
    root = write_sakura(tmp_path_factory.mktemp("data"), GENDER, clips=request.module.CLIPS)
    identifier = f"model.id={checkpoints['qwen2_audio']}"
    return ("model=qwen2_audio", identifier, "model.dtype=float32", "attr=gender", f"data.root={root}")


@pytest.fixture(scope="module")
def computed_here(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """The run of `tiny` without any server."""
    from ndif_runs import result

    return result(*tiny, f"outputs={tmp_path_factory.mktemp('here')}")


@pytest.fixture(scope="session")
def prompt() -> Prompt:
    """The gender prompt."""
    return Prompt.from_attribute(GENDER)
