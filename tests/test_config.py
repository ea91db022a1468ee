"""Settings: composed, checked, and named so that different runs never share a folder."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import GENDER, write_sakura
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

import lalm_patch
from lalm_patch.config import compose, config_folder, register, run_name
from lalm_patch.errors import ConfigError
from lalm_patch.models import FAMILIES
from lalm_patch.run import load_records
from lalm_patch.stimuli import Attribute
from lalm_patch.storage.provenance import flat_settings

CHANGES = (
    "attr=gender",
    "site=attn",
    "site.window=2",
    "direction=noising",
    "corruption=noise",
    "granularity=token",
    "granularity.layers=[0,1]",
    "model=voxtral",
    "model.dtype=bfloat16",
    "model.attn_implementation=eager",
    "model.revision=abc",
    "engine=direct",
    "data.limit=3",
    "data.seed=1",
    "prompt.order=shuffled",
    "prompt.target=bare",
    "prompt.correct=vocabulary",
    "prompt.layout=flat",
    "seed=1",
)


def test_every_change_that_matters_changes_the_folder() -> None:
    names = [compose().run_name, *(compose(change).run_name for change in CHANGES)]
    for first, second in itertools.combinations(names, 2):
        assert first != second


@pytest.mark.parametrize(
    "change",
    [
        "outputs=elsewhere",
        "threads=1",
        "engine.pack_tokens=99",
        "engine.memory_budget=2.5",
        "shard=1/2",
        "on_failed_check=warn",
        "model.device=cpu",
    ],
)
def test_where_and_how_fast_does_not_change_the_folder(change: str) -> None:
    assert compose(change).run_name == compose().run_name


def test_relative_and_absolute_folder_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert compose("data.root=data").run_name == compose(f"data.root={tmp_path / 'data'}").run_name


def test_run_name_is_that_of_the_settings() -> None:
    settings = compose("attr=animal")
    assert settings.run_name == run_name(settings)
    assert settings.run_name.startswith("demo-animal-layer-")
    assert "run_name" not in flat_settings(settings)


@pytest.mark.parametrize("path", sorted(config_folder().glob("model/*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_composes(path: Path) -> None:
    settings = compose(f"model={path.stem}").model
    assert settings.name == path.stem
    assert settings.family in FAMILIES
    assert asdict(settings).items() >= yaml.safe_load(path.read_text()).items()
    assert settings.prompt_layout in FAMILIES[settings.family].layouts


@pytest.mark.parametrize("path", sorted(config_folder().glob("attr/*.yaml")), ids=lambda path: path.stem)
def test_every_attribute_file_makes_an_attribute(path: Path) -> None:
    if path.stem == "own":  # is completed on the command line
        given = ("data=clip", "data.audio=a.wav", "attr.question=Q", "attr.options=[a,b]", "attr.answer=a")
        assert compose(*given).attr.name == "own"
        return
    if path.stem == "each_clip":  # has no question: the clips do
        assert compose("data=table", "data.path=a.csv").attr.name == "table"
        return
    attr = compose(f"attr={path.stem}").attr
    assert Attribute(attr.name, attr.question, tuple(attr.options), attr.response, attr.folder).name == path.stem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=nothing", "demo"),
        ("nothing=1", "nothing"),
        ("data.limit=x", r"data\.limit=x: expected a whole number from 1"),
        ("engine.name=magic", r"engine\.name=magic: expected one of auto, replay, direct"),
    ],
)
def test_wrong_overrides_from_python(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(override)


def test_data_follow_the_model_unless_said_otherwise(tmp_path: Path) -> None:
    root = write_sakura(tmp_path, GENDER, clips=4)
    assert len(load_records(compose("attr=gender", f"data.root={root}"), GENDER)) == 4
    with pytest.raises(ConfigError, match=r"data=demo takes no data\.root"):
        load_records(compose("data=demo", f"data.root={root}"), GENDER)


def test_public_names() -> None:
    assert lalm_patch.__all__ == sorted(lalm_patch.__all__, key=lambda name: (name.islower(), name))
    for name in lalm_patch.__all__:
        assert getattr(lalm_patch, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lalm_patch.nonsense


@pytest.mark.parametrize("path", sorted((config_folder() / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_is_a_sweep_of_settings_there_are(path: Path) -> None:
    """Each of its runs composes; the question it answers stands above it, with the command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert f"experiment={path.stem}" in lines[2]
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra_compose("config", overrides=[f"experiment={path.stem}"], return_hydra_config=True)
    assert str(config.hydra.mode) == "RunMode.MULTIRUN"
    swept = {key: str(values).split(",") for key, values in config.hydra.sweeper.params.items()}
    assert max(len(values) for values in swept.values()) > 1
    for values in itertools.product(*swept.values()):
        settings = compose(*(f"{key}={value}" for key, value in zip(swept, values, strict=True)))
        assert settings.run_name
