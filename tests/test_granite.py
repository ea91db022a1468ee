"""Granite Speech: the model is real, its front-end is not: the published one needs torchaudio, which must match torch.

Its class has two faults that the generic adapter makes good: the logits are not divided by the decoder's scaling, and
the LoRA weights for audio are switched on in generate() only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import noise
from test_engines import encodings, likely_tokens
from tiny_generic import AUDIO, PLAIN, text_config, tokenizer_with_audio
from tiny_models import randomise

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import token_grid
from lalm_patch.models import LALM
from lalm_patch.models.generic import ARCHITECTURES, Generic, _hear_with_adapter
from lalm_patch.models.proof import make_pair, prove
from lalm_patch.stimuli import Prompt

SCALING = 4.0
WINDOW, DOWNSAMPLING = 15, 5


class FrontEnd(Generic):
    """Granite's prompt, with a spectrogram of 160 bins every 20 ms in place of the published front-end."""

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        frames = torch.from_numpy(waveform[: len(waveform) // 320 * 320]).reshape(-1, 320)
        features = torch.fft.rfft(frames)[:, 1:].abs().add(1e-3).log()[None]
        positions = -(-features.shape[1] // WINDOW) * (WINDOW // DOWNSAMPLING)
        ids = self.text_ids(prompt, layout)
        place = ids.index(self.tokenizer.convert_tokens_to_ids(AUDIO))
        ids = [*ids[:place], *[ids[place]] * positions, *ids[place + 1 :]]
        return {
            "input_ids": torch.tensor([ids]),
            "input_features": features,
            "input_features_mask": torch.ones(1, positions, dtype=torch.bool),
        }


class Processor:
    """A tokenizer with its chat template."""

    audio_token = AUDIO

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template


@pytest.fixture(scope="module")
def module() -> Any:
    tokenizer = tokenizer_with_audio()
    text = text_config(tokenizer, residual_multiplier=0.7, embedding_multiplier=3.0, attention_multiplier=0.2)
    del text["head_dim"]
    encoder = {"input_dim": 160, "num_layers": 1, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "context_size": 50}
    projector = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.GraniteSpeechConfig(
        text_config={"model_type": "granite", "logits_scaling": SCALING} | text,
        encoder_config=encoder | {"output_dim": 10},
        projector_config=projector
        | {"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO),
        has_lora_adapter=False,
        window_size=WINDOW,
        downsample_rate=DOWNSAMPLING,
        tie_word_embeddings=False,
    )
    return randomise(transformers.GraniteSpeechForConditionalGeneration(config), seed=0, scale=0.2)


@pytest.fixture(scope="module")
def granite(module: Any) -> LALM:
    tokenizer = tokenizer_with_audio()
    tokenizer.chat_template = PLAIN
    return LALM(module, FrontEnd(Processor(tokenizer), ARCHITECTURES["granite_speech"]))


def test_logits_are_the_decoders_own(granite: LALM, module: Any, prompt: Prompt) -> None:
    """The oracle is the decoder's own class with the same weights."""
    encoding = granite.encode(noise(1.0), prompt, "chat")
    own = transformers.GraniteForCausalLM(module.config.text_config).eval()
    own.model.load_state_dict(module.model.language_model.state_dict())
    own.lm_head.load_state_dict(module.lm_head.state_dict())
    with torch.no_grad():
        expected = own(inputs_embeds=encoding.inputs_embeds).logits[0, -1].softmax(-1)
        unscaled = module(**encoding.inputs).logits[0, -1].softmax(-1)
    ids = tuple(range(len(expected)))
    found = DirectEngine(granite).base(encoding, encoding, ids).probabilities[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - unscaled.numpy()).max() > 1e-2  # the class alone gives others


def test_proof_passes_and_replay_is_direct(granite: LALM, prompt: Prompt) -> None:
    for check in prove(granite, make_pair(granite, prompt, "chat")):
        assert check.passed, str(check)
    clean, corrupted = encodings(granite, prompt)
    ids = likely_tokens(granite, clean, corrupted)
    grid = token_grid(clean.tokens, range(granite.num_layers))
    fast = ReplayEngine(granite).sweep(clean, corrupted, grid, ids)
    slow = DirectEngine(granite).sweep(clean, corrupted, grid, ids)
    assert np.ptp(slow.probabilities, axis=0).max() > 1e-3
    np.testing.assert_allclose(fast.probabilities, slow.probabilities, rtol=0, atol=1e-5)


def test_audio_weights_are_switched_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    class Module:
        calls: tuple[str, ...] = ()

        def enable_adapters(self) -> None:
            self.calls += ("enabled",)

    module: Any = Module()
    _hear_with_adapter(module, tmp_path, ".")
    assert module.calls == ()  # a checkpoint without such weights
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("lalm_patch.models.generic.is_peft_available", lambda: True)
    _hear_with_adapter(module, tmp_path, ".")
    assert module.calls == ("enabled",)
    monkeypatch.setattr("lalm_patch.models.generic.is_peft_available", lambda: False)
    with pytest.raises(ModelError, match=r"LoRA weights in \.: pip install peft"):
        _hear_with_adapter(module, tmp_path, ".")
