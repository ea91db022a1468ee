"""The examples of README and docs: run as they stand where that takes seconds; every run command at least composes."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
from pathlib import Path

import commands
import numpy as np
import pytest
import soundfile
import xarray as xr
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import open_dict

import lalm_patch
from lalm_patch.config import config_folder, register, to_settings
from lalm_patch.stimuli import SAMPLING_RATE

DOCS = Path(__file__).parent.parent / "docs"
ROOT = DOCS.parent
DEMO = ROOT / "lalm_patch" / "data" / "demo" / "model"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(folder: Path, *command: str, fresh: bool = False) -> str:
    done = commands.run(folder, *command, fresh=fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, two clips, and a checkpoint."""
    folder = tmp_path_factory.mktemp("extending")
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, flags=re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "corpus/data/Room/audio").mkdir()
    for seed, name in enumerate("ab"):
        noise = np.random.default_rng(seed).normal(0, 0.1, SAMPLING_RATE).astype(np.float32)
        soundfile.write(folder / f"corpus/data/Room/audio/{name}.wav", noise, SAMPLING_RATE)
    shutil.copytree(DEMO, folder / "checkpoints" / "fine_tuned")
    return folder


def test_an_attribute_and_a_checkpoint_of_ones_own(folder: Path) -> None:
    lines = [line for block in blocks("extending.md", "sh") for line in block.splitlines()]
    assert len(lines) == 3
    looked, ran, tuned = (run(folder, *line.removeprefix("python ").split(), fresh=line is lines[0]) for line in lines)
    assert "What is the size of the room in the recording?" in looked
    assert "targets  small " in looked
    assert "of 2" in ran
    assert "fine_tuned" in tuned
    first, second = sorted(folder.glob("outputs/*-room-layer-*"))
    with xr.open_dataset(first / "result.nc") as demo, xr.open_dataset(second / "result.nc") as other:
        np.testing.assert_array_equal(demo["p_clean"], other["p_clean"])  # the same weights in another folder


def test_a_family_and_interventions_of_ones_own(folder: Path) -> None:
    script = folder / "page.py"
    script.write_text("\n".join(blocks("extending.md", "python")), encoding="utf-8")
    run(folder, str(script))
    (prefixes,) = folder.glob("outputs/demo-gender-prefix-*")
    run(folder, "-m", "lalm_patch", "attr=gender", "data.limit=4")
    (layers,) = (path for path in folder.glob("outputs/demo-gender-layer-*") if _layout(path) == "chat")
    # All text positions up to the last one are all text positions.
    with lalm_patch.open_result(prefixes) as prefix, lalm_patch.open_result(layers) as layer:
        np.testing.assert_allclose(prefix["p_patched"].isel(token=-1), layer["p_patched"], atol=1e-5)


def _layout(path: Path) -> str:
    with lalm_patch.open_result(path) as dataset:
        return "flat" if '"flat"' in str(dataset.attrs["settings"]) else "chat"


def test_other_metrics(folder: Path, tmp_path: Path) -> None:
    run(tmp_path, "-m", "lalm_patch", "attr=gender", "data.limit=4", "granularity.layers=[0,7]")
    (path,) = tmp_path.glob("outputs/*/result.nc")
    shutil.copy(path, tmp_path / "result.nc")
    (code,) = blocks("results.md", "python")
    (tmp_path / "page.py").write_text(code + "print(float(margin.isel(layer=-1).min()))", encoding="utf-8")
    assert float(run(tmp_path, "page.py")) > 0  # what counts is answered right when all comes back


def run_commands() -> list[str]:
    """The lines that start runs in code blocks of README and docs, and in the header of every experiment."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))]
    texts += [path.read_text(encoding="utf-8") for path in sorted((config_folder() / "experiment").glob("*.yaml"))]
    lines = itertools.chain.from_iterable(text.replace("\\\n", " ").splitlines() for text in texts)
    found = [line.removeprefix("# ") for line in lines if line.removeprefix("# ").startswith("python -m lalm_patch ")]
    return list(dict.fromkeys(line.partition("#")[0].partition(";")[0].strip() for line in found))


@pytest.mark.parametrize("command", run_commands())
def test_every_run_command_of_the_docs_composes(command: str) -> None:
    words = shlex.split(command)[3:]
    if "--config-dir" in words:
        return  # of docs/extending.md: run above
    overrides = [word for word in words if word != "-m"]
    swept = [word for word in overrides if "," in word and not word.startswith("hydra")]
    if "-m" not in words:  # then commas are those of lists and of texts
        assert not any("," in re.sub(r"\[.*?\]|\".*?\"", "", word) for word in swept)
        swept = []
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for values in itertools.product(*(word.partition("=")[2].split(",") for word in swept)):
            fixed = [word for word in overrides if word not in swept]
            one = [f"{word.partition('=')[0]}={value}" for word, value in zip(swept, values, strict=True)]
            config = hydra_compose("config", overrides=[*fixed, *one], return_hydra_config=True)
            with open_dict(config):
                config.pop("hydra")
            assert to_settings(config).run_name


def test_collected_runs(tmp_path: Path) -> None:
    run(tmp_path, "-m", "lalm_patch", "-m", "attr=emotion,gender", "data.limit=2", "granularity.layers=[0,7]")
    run(tmp_path, "-m", "lalm_patch.collect", "outputs")
    (code,) = blocks("clusters.md", "python")
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    assert "recovery_rate" in run(tmp_path, "page.py")
