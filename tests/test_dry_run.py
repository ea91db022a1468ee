"""The dry run: every family without weights, its numbers against what a run really does."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from conftest import GENDER, write_sakura
from native_checkpoints import save_desta2, save_desta25, save_qwen_audio
from safetensors import safe_open
from tiny_models import save_tiny_qwen2_audio, save_tiny_voxtral

from lalm_patch.checks import STATEMENTS
from lalm_patch.config import compose
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.models import LALM
from lalm_patch.run import dry_run, load_records
from lalm_patch.terminal import Progress
from lalm_patch.tracing.metrics import Exclusion
from lalm_patch.tracing.tracer import Tracer

pytestmark = pytest.mark.usefixtures("without_pdfs")

WEIGHTS = (".safetensors", ".pth", ".bin")
MODELS = {
    "desta2": save_desta2,
    "desta25": save_desta25,
    "qwen_audio": save_qwen_audio,
    "qwen2_audio": save_tiny_qwen2_audio,
    "voxtral": save_tiny_voxtral,
}


@pytest.fixture(params=MODELS)
def described(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, int]:
    """The dry run of a checkpoint whose weights are gone, and how many numbers they were."""
    saved = MODELS[request.param](tmp_path / "checkpoint")
    folder = saved if isinstance(saved, Path) else saved.location
    numbers = 0
    for path in (tmp_path / "checkpoint").rglob("*"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                numbers += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        if path.suffix in WEIGHTS:
            path.unlink()
    data = write_sakura(tmp_path / "data", GENDER, 3, seconds=0.5)
    overrides = [f"model={request.param}", f"model.id={folder}", f"data.root={data}", "attr=gender"]
    return dry_run(compose(*overrides, "granularity=token", "dry_run=true")), numbers


def test_says_prompt_targets_grid_and_checks(described: tuple[str, int]) -> None:
    page, numbers = described
    assert "data     3 clips" in page
    assert re.search(r"\d+  last +\d+  ' is'", page)
    assert re.search(r"\d+  object +\d+  ' male'", page)
    assert re.search(r"\d+-\d+  audio +\d+  x \d+", page)
    assert re.search(r"targets  male \d+, female \d+", page)
    layers, tokens, cells = map(int, re.findall(r"grid     token: (\d+) x (\d+) = (\d+) cells per clip", page)[0])
    assert layers * tokens == cells
    assert str(tokens) == re.findall(r"(\d+) after it", page)[0]
    assert all(f"{name}: {statement}" in page for name, statement in STATEMENTS.items())
    settings = json.loads(re.findall(r"^settings (.*)$", page, re.MULTILINE)[0])
    assert settings["attr"]["name"] == "gender"
    # bfloat16: two bytes each; Whisper's decoder and DeSTA2's connector are in other files or not traced
    assert f"{2 * numbers / 1e9:.2f} GB of weights" in page


@pytest.mark.parametrize("engine", ["replay", "direct"])
def test_passes_are_those_of_a_run(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lalm_patch.tracing.tracer.exclusion", lambda *_arguments: Exclusion.KEPT)
    settings = compose("attr=gender", "granularity=token", "granularity.layers=[0,3,5]", f"engine={engine}")
    page = dry_run(settings)
    attribute = GENDER
    record = load_records(settings, attribute)[0]
    tracer = Tracer(LALM.load(settings.model), attribute, settings)
    called: list[int] = []
    for number, layer in enumerate(tracer.lalm.decoder_module.layers):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    whole: list[int] = []
    tracer.lalm.decoder_module.register_forward_hook(lambda *_: whole.append(1))
    trace = tracer.trace(record, record.waveform(None), False, Progress(tracer.cells_per_sample, "test"))
    passes = int(re.findall(rf"{engine}: (\d+) (?:forward passes|passes up the layers) per clip", page)[0])
    if engine == "direct":
        assert len(whole) == passes
    else:  # replay calls layers: each pass goes up once
        assert 1 + sum(after < before for before, after in itertools.pairwise(called)) == passes
    assert trace.arrays["patched_logsumexp"].size == int(re.findall(r"= (\d+) cells", page)[0])


def test_what_a_run_refuses_the_dry_run_refuses(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        dry_run(compose("model=voxtral", f"model.id={tmp_path / 'nowhere'}"))
    with pytest.raises(ConfigError, match=r"prompt\.layout=fixed: expected one of chat, user, flat"):
        dry_run(compose("prompt.layout=fixed"))


def test_without_clips_the_example_is_noise(tmp_path: Path) -> None:
    page = dry_run(compose("data=sakura", f"data.root={tmp_path / 'nowhere'}"))
    assert "clips unknown here" in page
    assert "1.5 s of noise" in page
