"""What differs between versions of transformers and torch, each way of it made here, whichever are installed."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, noise

from lalm_patch.engine import DirectEngine, ReplayEngine, suffix_attention
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import token_grid
from lalm_patch.models.cache_keyword import CACHE_KEYWORDS, cache_keyword
from lalm_patch.stimuli import Prompt, silence


def renamed(forward: Any, name: str) -> Any:
    """A decoder's forward pass that takes the cache under this name and no other."""
    given = cache_keyword(forward)

    def run(self: Any, cache: Any, kwargs: dict[str, Any]) -> Any:
        assert not kwargs.keys() & set(CACHE_KEYWORDS), "the cache came under a name it does not go by"
        return forward(self, **kwargs, **{given: cache})

    def new(self: Any, cache: Any = None, **kwargs: Any) -> Any:
        return run(self, cache, kwargs)

    def old(self: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return run(self, past_key_values, kwargs)

    return {"cache": new, "past_key_values": old}[name]


@pytest.mark.parametrize("name", CACHE_KEYWORDS)
def test_replay_hands_the_cache_over_by_the_name_it_goes_by(
    name: str, checkpoints: dict[str, Path], prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    decoder = type(lalm.decoder_module)
    clip = noise(0.7)
    clean, corrupted = (lalm.encode(sound, prompt, "chat") for sound in (clip, silence(clip)))
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    slow = DirectEngine(lalm).sweep(clean, corrupted, grid, (1, 2))

    monkeypatch.setattr(decoder, "forward", renamed(decoder.forward, name))
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    assert lalm.cache_keyword == name
    fast = ReplayEngine(lalm).sweep(clean, corrupted, grid, (1, 2))
    assert np.ptp(slow.logsumexp) > 1e-2  # the cells differ, so equality says something
    np.testing.assert_allclose(fast.option_logits, slow.option_logits, atol=1e-4)
    np.testing.assert_allclose(fast.logsumexp, slow.logsumexp, atol=1e-4)


def test_the_name_is_read_off_the_signature() -> None:
    def new(inputs_embeds: Any, cache: Any = None) -> None: ...

    def old(inputs_embeds: Any, past_key_values: Any = None) -> None: ...

    def both(past_key_values: Any = None, cache: Any = None) -> None: ...

    @functools.wraps(new)
    def wrapped(*args: Any, **kwargs: Any) -> None: ...

    assert [cache_keyword(function) for function in (new, old, both, wrapped)] == [
        "cache",
        "past_key_values",
        "cache",
        "cache",
    ]


def test_a_decoder_without_a_cache_is_told_to_use_the_direct_engine() -> None:
    def forward(inputs_embeds: Any, **kwargs: Any) -> None: ...

    with pytest.raises(ModelError, match=r"forward: expected a keyword .*, got inputs_embeds, kwargs; engine=direct"):
        cache_keyword(forward)


KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


def kernel(arguments: str, returns: str) -> Any:
    """A kernel as torch would hold it, which must not be called."""
    parts = [[SimpleNamespace(name=name) for name in names.split()] for names in (arguments, returns)]
    return SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=parts[0], returns=parts[1])))


KNOWN = "query key value dropout_p is_causal attn_mask scale"


@pytest.fixture
def _kernel_asked_for_anew() -> Iterator[None]:
    suffix_attention.fused_kernel.cache_clear()
    yield
    suffix_attention.fused_kernel.cache_clear()


@pytest.mark.usefixtures("_kernel_asked_for_anew")
@pytest.mark.parametrize(
    "found",
    [None, kernel(KNOWN.replace("dropout_p ", ""), "output logsumexp"), kernel(KNOWN, "output")],
    ids=["gone", "other arguments", "other returns"],
)
def test_without_the_private_kernel_attention_is_the_plain_one(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator) for shape in ((3, 4, 7, 16), (3, 7, 16), (3, 7, 16)))
    expected = suffix_attention.attend_plainly(query, key, value, 0.3, causal=True)
    aten = SimpleNamespace() if found is None else SimpleNamespace(**{KERNEL: found})
    monkeypatch.setattr(torch, "ops", SimpleNamespace(aten=aten))
    for got, wanted in zip(suffix_attention.attend(query, key, value, 0.3, causal=True), expected, strict=True):
        assert torch.equal(got, wanted)


def test_this_torch_has_the_kernels() -> None:
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16), ("cuda", torch.float32)):
        assert suffix_attention.fused_kernel(device, dtype) is not None


def test_the_page_names_the_oldest_version_that_is_allowed() -> None:
    root = Path(__file__).parent.parent
    (oldest,) = re.findall(r'"transformers>=([\d.]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    tried = re.findall(
        r"^\| transformers \| ([\d.]+) \|", (root / "docs/versions.md").read_text(encoding="utf-8"), re.M
    )
    assert tried[0].startswith(f"{oldest}.")
    assert all(version in (root / "README.md").read_text(encoding="utf-8") for version in tried)
