"""Composing beside other users of Hydra: inside an application of somebody else's, and in threads."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir, version
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import lalm_patch
from lalm_patch.config import config_folder

APPLICATION = """
import sys
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import lalm_patch


@dataclass
class Config:
    seed: int = 5
    outputs: str = "theirs"


ConfigStore.instance().store(name="config", node=Config)
ConfigStore.instance().store(name="demo", group="model", node=Config)


@hydra.main(config_name="config", config_path=None, version_base=VERSION)
def main(config: DictConfig) -> None:
    before = GlobalHydra.instance().hydra
    settings = lalm_patch.compose("attr=gender", "seed=3")
    assert settings.seed == 3 and settings.attr.name == "gender" and settings.model.name == "demo"
    try:
        lalm_patch.compose("data.limits=1")
    except lalm_patch.ConfigError as error:
        assert "data.limit" in str(error)
    else:
        raise SystemExit("not refused")
    assert GlobalHydra.instance().hydra is before
    assert HydraConfig.get().job.name == "application"
    assert hydra.version.getbase() == hydra.version.Version(VERSION)
    assert config.seed == 5 and config.outputs == "theirs"
    assert hydra.compose("config", overrides=["seed=6"]).seed == 6
    print("composed", settings.run_name)


main()
"""


@pytest.mark.parametrize("base", ["1.2", "1.3"])
def test_inside_a_hydra_application(tmp_path: Path, base: str) -> None:
    """Whose store has other schemas under our names, and which goes on as it was."""
    (tmp_path / "application.py").write_text(APPLICATION.replace("VERSION", repr(base)))
    done = subprocess.run([sys.executable, "application.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"composed {lalm_patch.compose('attr=gender', 'seed=3').run_name}\n"


def test_a_run_inside_a_hydra_application(tmp_path: Path) -> None:
    script = (
        "import hydra, lalm_patch\n"
        "@hydra.main(config_path=None, version_base='1.3')\n"
        "def main(config):\n"
        "    outcome = lalm_patch.trace('data.limit=2', 'granularity.layers=[0]', 'engine=direct')\n"
        "    print(sorted(path.name for path in outcome.files))\n"
        "main()\n"
    )
    (tmp_path / "application.py").write_text(script)
    done = subprocess.run([sys.executable, "application.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "result.nc" in done.stdout


def test_eight_threads_compose_at_once() -> None:
    def composed(number: int) -> tuple[int, str, int | None]:
        settings = lalm_patch.compose(f"seed={number}", f"data.limit={number + 1}", "attr=animal")
        return settings.seed, settings.attr.name, settings.data.limit

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(composed, range(24)))
    assert found == [(number, "animal", number + 1) for number in range(24)]


def test_what_hydra_keeps_of_the_process_stays() -> None:
    """Between `initialize` and its end, with another version base, and with a schema of a name that is ours."""
    store = ConfigStore.instance()
    store.store(name="config", node=OmegaConf.create({"theirs": 1}))
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.2"):
            before = GlobalHydra.instance().hydra, version.getbase()
            assert lalm_patch.compose("seed=4").seed == 4
            assert (GlobalHydra.instance().hydra, version.getbase()) == before
        assert not GlobalHydra.instance().is_initialized()
    finally:
        del store.repo["config.yaml"]
    assert hydra.__version__.startswith("1.3")


def test_an_error_that_is_being_handled_is_no_explanation() -> None:
    """A fallback composed while another refusal is handled is answered for itself."""

    def fall_back() -> None:
        try:
            lalm_patch.compose("data.limits=2")
        except lalm_patch.ConfigError:
            lalm_patch.compose("engine.step=2")

    with pytest.raises(lalm_patch.ConfigError, match=r"^engine.step: there is no such setting"):
        fall_back()
