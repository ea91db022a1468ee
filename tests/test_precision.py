"""What is computed with weights in half precision: float32 is the widened model's, and the run says what it was."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, noise
from test_engines import encodings, likely_tokens
from torch import Tensor, nn

import lalm_patch
from lalm_patch.config import compose
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ConfigError
from lalm_patch.interventions.grids import token_grid
from lalm_patch.models import LALM, precision
from lalm_patch.models.precision import compute_with, stored_parameters
from lalm_patch.settings import ModelSettings
from lalm_patch.stimuli import Prompt
from lalm_patch.storage.provenance import flat_settings

OUTLIER = 3e3
"""Trained models' residual streams have such numbers in a few dimensions from some layer on."""
SPREAD = {"qwen2_audio": 30, "voxtral": 3}
"""Factor on the last norm that makes probabilities differ between cells, and not only 0 and 1."""


def with_outliers(folder: Path, family: str, tmp_path: Path, dtype: torch.dtype) -> Path:
    """A copy of a checkpoint in half precision whose residual stream carries outliers after the first layer."""
    lalm = load(folder, family)
    with torch.no_grad():
        lalm.decoder_module.layers[0].mlp.down_proj.weight[:2] *= OUTLIER
        for layer in lalm.decoder_module.layers[1:]:
            layer.input_layernorm.weight *= 30
            layer.post_attention_layernorm.weight *= 30
        lalm.decoder_module.norm.weight *= SPREAD[family]
    target = tmp_path / family
    shutil.copytree(folder, target)
    lalm.module.to(dtype).save_pretrained(target)
    return target


def opened(folder: Path, family: str, mode: str, dtype: str = "bfloat16", **settings: str) -> LALM:
    given = {"name": "tiny", "dtype": dtype, "device": "cpu"} | settings
    return LALM.load(ModelSettings(family=family, id=str(folder), **given), precision=mode)


def swept(lalm: LALM, prompt: Prompt, ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of all cells by replay, and of every seventh by the direct engine, base runs first."""
    clean, corrupted = encodings(lalm, prompt)
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    fast = ReplayEngine(lalm)
    quick = np.concatenate(
        [fast.base(clean, corrupted, ids).probabilities, fast.sweep(clean, corrupted, grid, ids).probabilities]
    )
    direct = DirectEngine(lalm)
    slow = direct.cells(clean, corrupted, grid.cells[::7], ids).probabilities
    return np.concatenate(quick), np.concatenate([direct.base(clean, corrupted, ids).probabilities, slow])


@pytest.fixture(params=list(SPREAD))
def outlying(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path: Path) -> tuple[Path, str]:
    family: str = request.param
    return with_outliers(checkpoints[family], family, tmp_path, torch.bfloat16), family


def split(states: Tensor, weight: Tensor) -> Tensor:
    """What a GPU's product of half precision with sums in float32 gives, on a CPU."""
    assert states.dtype == weight.dtype == torch.bfloat16
    return nn.functional.linear(states.float(), weight.float())


def test_float32_is_the_widened_model(
    outlying: tuple[Path, str], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, family = outlying
    widened = opened(folder, family, "as_loaded")
    widened.module.float()
    clean, corrupted = encodings(widened, prompt)
    ids = likely_tokens(widened, clean, corrupted)
    expected = swept(widened, prompt, ids)
    assert np.ptp(expected[1], axis=0).max() > 1e-2
    errors = {}
    for mode in ("as_loaded", "stream", "float32"):
        lalm = opened(folder, family, mode)
        assert lalm.decoder_module.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16  # stored as it was
        assert lalm.state_dtype == (torch.bfloat16 if mode == "as_loaded" else torch.float32)
        found = swept(lalm, prompt, ids)
        errors[mode] = [float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True)]
    monkeypatch.setattr(precision, "sums_in_float32", lambda device, dtype: True)
    monkeypatch.setattr(precision, "_product", split)
    found = swept(opened(folder, family, "float32"), prompt, ids)
    errors["split"] = [float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True)]
    assert max(errors["float32"]) < 1e-5
    assert max(errors["split"]) < 1e-4
    assert max(errors["split"]) * 20 < min(errors["as_loaded"])
    assert max(errors["float32"]) * 20 < min(errors["stream"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offloaded_weights_too(
    checkpoints: dict[str, Path], tmp_path: Path, prompt: Prompt, dtype: torch.dtype
) -> None:
    folder = with_outliers(checkpoints["qwen2_audio"], "qwen2_audio", tmp_path, dtype)
    name = str(dtype).removeprefix("torch.")
    runs = [
        swept(opened(folder, "qwen2_audio", "float32", name, offload=place), prompt, (1, 2))
        for place in ("none", "disk")
    ]
    np.testing.assert_allclose(runs[0][0], runs[1][0], atol=1e-7)


@pytest.mark.parametrize("family", ["qwen_audio", "desta2", "desta25"])
def test_native_families(family: str, native_folders: dict[str, Path], prompt: Prompt) -> None:
    def model(mode: str) -> LALM:
        settings = compose(f"model={family}", f"model.id={native_folders[family]}", "model.device=cpu", "attr=gender")
        return LALM.load(settings.model, precision=mode)

    widened = model("as_loaded")
    widened.module.float()
    clean, corrupted = encodings(widened, prompt)
    ids = likely_tokens(widened, clean, corrupted)
    expected, found = swept(widened, prompt, ids), swept(model("float32"), prompt, ids)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_nothing_changes_for_float32_weights(checkpoints: dict[str, Path]) -> None:
    lalm = opened(checkpoints["voxtral"], "voxtral", "float32", "float32")
    assert lalm.precision == "as_loaded"
    forward = vars(lalm.decoder_module.layers[0].mlp.up_proj).get("forward")
    assert not isinstance(forward, functools.partial)


def test_what_stays_in_half_precision() -> None:
    whole = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(torch.bfloat16)
    before = [parameter.float().clone() for parameter in whole.parameters()]
    assert compute_with(whole, "float32")
    assert stored_parameters(whole) == {"0.weight", "2.weight"}
    dtypes = {name: parameter.dtype for name, parameter in whole.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {"0.weight", "2.weight"}
    ids = torch.tensor([[0, 3]])
    states = nn.functional.layer_norm(before[0][ids], (8,), before[1], before[2])
    torch.testing.assert_close(whole(ids), nn.functional.linear(states, before[3], before[4]))


def test_a_hook_that_was_put_before_a_layer_stays() -> None:
    """accelerate's way: a forward pass of its own, which calls the layer's under another name."""
    linear: Any = nn.Linear(2, 2).to(torch.bfloat16)
    called: list[int] = []
    linear._old_forward = linear.forward
    linear.forward = lambda states: (called.append(1), linear._old_forward(states))[1]
    compute_with(linear, "float32")
    assert linear(torch.ones(1, 2)).dtype == torch.float32
    assert called == [1]


def test_what_a_run_computed_with_is_part_of_it() -> None:
    def identity(*overrides: str) -> str | None:
        return flat_settings(compose("model=voxtral", "attr=gender", *overrides)).get("engine.precision")

    assert identity() == identity("engine.precision=float32") == '"float32"'
    assert identity("engine.precision=stream") == '"stream"'
    assert identity("engine.precision=as_loaded") is None  # as runs before there was a choice
    assert identity("model.dtype=float32") is identity("model.dtype=float32", "engine.precision=stream") is None
    assert identity("backend=ndif") is None
    with pytest.raises(ConfigError, match=r"engine\.precision=float32: a server computes with its weights as they are"):
        compose("model=voxtral", "attr=gender", "backend=ndif", "engine.precision=float32")


def test_a_run_in_half_precision_says_so(tmp_path: Path) -> None:
    found = {}
    for mode in ("null", "as_loaded"):
        what = (
            "attr=gender",
            "model.dtype=bfloat16",
            f"engine.precision={mode}",
            "data.limit=4",
            f"outputs={tmp_path}",
        )
        found[mode] = lalm_patch.trace(*what).dataset
    assert found["null"].attrs["precision"] == "float32"
    assert found["as_loaded"].attrs["precision"] == "as_loaded"
    assert float(np.abs(found["null"].p_clean - found["as_loaded"].p_clean).max()) > 0
    bounds = {mode: {check["name"]: check["bound"] for check in checks_of(dataset)} for mode, dataset in found.items()}
    assert bounds["null"]["replay_at_load"] == 1e-5 < bounds["as_loaded"]["replay_at_load"]


def checks_of(dataset: Any) -> list[dict[str, Any]]:
    checks: list[dict[str, Any]] = json.loads(dataset.attrs["checks"])
    return checks


def test_gradients_go_through_widened_weights(checkpoints: dict[str, Path], prompt: Prompt) -> None:
    lalm = opened(checkpoints["qwen2_audio"], "qwen2_audio", "float32")
    clip = lalm.encode(noise(0.7), prompt, "chat")
    embeds = clip.inputs_embeds.clone().requires_grad_()
    lalm.decoder_module(inputs_embeds=embeds, position_ids=clip.position_ids).last_hidden_state.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().max() > 0
