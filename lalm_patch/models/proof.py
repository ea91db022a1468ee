"""Proof at load: whether this checkpoint does what the method assumes, shown by perturbing it.

A model may run on placeholder embeddings without a word when the audio does not arrive, change the length of the
sequence inside, or carry states past the decoder layers. Each is tried once, on noise and silence of the same length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import nnsight
import numpy as np
import torch
from torch import Tensor

from lalm_patch.checks import Check
from lalm_patch.models.lalm import LALM, Encoding
from lalm_patch.models.precision import sums_in_float32
from lalm_patch.stimuli import SAMPLING_RATE, Prompt

NOISE_SECONDS = 1.5
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference in probability that rounding explains, by the decoder's floating-point type."""


@dataclass(frozen=True)
class Pair:
    """Encodings of noise and of silence of the same length, for proofs that must not depend on the data."""

    noise: Encoding
    silence: Encoding
    logits: dict[str, Tensor] = field(default_factory=dict)
    """What the proof found at the last position of `noise` and `silence`, [1, vocabulary]; nobody computes it again."""


def make_pair(lalm: LALM, prompt: Prompt, layout: str) -> Pair:
    """Encode `NOISE_SECONDS` of seeded noise and as much digital silence."""
    noise = noise_clip()
    return Pair(lalm.encode(noise, prompt, layout), lalm.encode(np.zeros_like(noise), prompt, layout))


def noise_clip() -> np.ndarray:
    """`NOISE_SECONDS` of seeded noise, float32 [samples] at 16 kHz: a clip where none is at hand."""
    return np.random.default_rng(0).normal(0, 0.1, int(NOISE_SECONDS * SAMPLING_RATE)).astype(np.float32)


SPLIT_TOLERANCE = 1e-4
"""Likewise, where products of float32 are made of two bfloat16 parts."""


def tolerance_of(lalm: LALM) -> float:
    """Largest difference in probability that rounding explains in a model."""
    split = lalm.precision == "float32" and sums_in_float32(lalm.device.type, lalm.dtype)
    if lalm.precision == "stream":
        return TOLERANCES[lalm.dtype]
    return SPLIT_TOLERANCE if split else TOLERANCES[lalm.state_dtype]


PASSES = 4
"""Forward passes of a proof."""
Told = Callable[[str], None]
"""Is told what is checked next, before each forward pass."""


def tell_nobody(check: str) -> None:
    """Report to nobody."""


def prove(lalm: LALM, pair: Pair, told: Told = tell_nobody) -> list[Check]:
    """The checks a model has to pass before anything is traced with it.

    Args:
        lalm: the model.
        pair: noise and silence; what was computed of them is left there.
        told: is told about every forward pass.
    """
    tolerance = tolerance_of(lalm)
    noise, silence = pair.noise, pair.silence
    middle = (lalm.num_layers - 1) // 2
    told("audio_reaches_model, noise")
    whole, state = _whole_run(lalm, noise, middle)
    told("decoder_from_embeddings")
    decoder_only, lengths = _decoder_logits(lalm, noise)
    told("audio_reaches_model, silence")
    other, _ = _whole_run(lalm, silence, middle)
    told("restore_all")
    restored = _restored(lalm, silence, middle, state)
    pair.logits.update(noise=whole, silence=other)
    moved = float((whole - other).abs().max() / whole.abs().max())
    return [
        Check.at_most("same_layout", float(not noise.tokens.same_layout(silence.tokens)), 0.0),
        Check.more_than("audio_reaches_model", moved, 1e-6),
        Check.at_most("layers_keep_length", float(sum(length != len(noise.tokens) for length in lengths)), 0.0),
        Check.at_most("decoder_from_embeddings", _difference(whole, decoder_only), tolerance),
        Check.at_most("restore_all", _difference(whole, restored), tolerance),
    ]


def _difference(first: Tensor, second: Tensor) -> float:
    """Largest difference in probability over the vocabulary."""
    return float((first.softmax(-1) - second.softmax(-1)).abs().max())


def _whole_run(lalm: LALM, encoding: Encoding, layer: int) -> tuple[Tensor, Tensor]:
    """Logits, and all that leaves a layer."""
    with torch.no_grad(), lalm.traced.trace(**encoding.inputs):
        state = lalm.layers[layer].output.clone().save()
        logits = lalm.traced.output.logits[:, -1].clone().save()
    return lalm.scaled(torch.as_tensor(logits)), state


def _decoder_logits(lalm: LALM, encoding: Encoding) -> tuple[Tensor, list[int]]:
    with (
        torch.no_grad(),
        lalm.decoder.trace(inputs_embeds=encoding.inputs_embeds, position_ids=encoding.position_ids, use_cache=False),
    ):
        lengths = nnsight.save([tuple(layer.output.shape) for layer in lalm.layers])
        last = lalm.norm.output[:, -1].clone().save()
    return lalm.logits(last), [shape[1] if len(shape) == 3 else -1 for shape in lengths]


def _restored(lalm: LALM, encoding: Encoding, layer: int, state: Tensor) -> Tensor:
    with torch.no_grad(), lalm.traced.trace(**encoding.inputs):
        lalm.layers[layer].output[:] = state
        logits = lalm.traced.output.logits[:, -1].clone().save()
    return lalm.scaled(torch.as_tensor(logits))
