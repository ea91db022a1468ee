"""Proof at load: whether this checkpoint does what the method assumes, shown by perturbing it.

A model may run on placeholder embeddings without a word when the audio does not arrive, change the length of the
sequence inside, or carry states past the decoder layers. Each is tried once, on noise and silence of the same length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import nnsight
import numpy as np
import torch
from torch import Tensor

from lalm_patch.checks import Check
from lalm_patch.models.lalm import LALM, Encoding
from lalm_patch.stimuli import SAMPLING_RATE, Prompt

NOISE_SECONDS = 1.5
TOLERANCE = 1e-5
"""Largest difference in probability that rounding explains in float32."""
UNMEASURED = {torch.float32: TOLERANCE, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Likewise by type, where the error cannot be measured: on a server."""
ROUNDINGS = 3
"""Two ways to compute the same differ by both ways' errors, each as large as the largest of few that were measured."""


@dataclass
class Pair:
    """Encodings of noise and of silence of the same length, for proofs that must not depend on the data.

    Attributes:
        noise: the one.
        silence: the other.
        logits: what the proof found at the last position of `noise` and `silence`, [1, vocabulary]; nobody computes it
            again.
        exact: likewise in float32, of a model that computes in less.
        rounding: largest error of a probability that was found, against float32; 0 for a model that computes so.
        given: a bound to be used instead of what is measured.
    """

    noise: Encoding
    silence: Encoding
    logits: dict[str, Tensor] = field(default_factory=dict)
    exact: dict[str, Tensor] = field(default_factory=dict)
    rounding: float = 0.0
    given: float | None = None

    @property
    def tolerance(self) -> float:
        """Largest difference in probability between two ways to compute the same that rounding explains."""
        return self.given or max(TOLERANCE, ROUNDINGS * self.rounding)

    def measured(self, found: np.ndarray, exact: np.ndarray) -> None:
        """Take probabilities into account, as the model computes them and in float32."""
        self.rounding = max(self.rounding, float(np.abs(found - exact).max()))


def make_pair(lalm: LALM, prompt: Prompt, layout: str, tolerance: float | None = None) -> Pair:
    """Encode `NOISE_SECONDS` of seeded noise and as much digital silence; with a bound, if one is given."""
    noise = noise_clip()
    noisy, silent = (lalm.encode(sound, prompt, layout) for sound in (noise, np.zeros_like(noise)))
    return Pair(noisy, silent, given=tolerance)


def noise_clip() -> np.ndarray:
    """`NOISE_SECONDS` of seeded noise, float32 [samples] at 16 kHz: a clip where none is at hand."""
    return np.random.default_rng(0).normal(0, 0.1, int(NOISE_SECONDS * SAMPLING_RATE)).astype(np.float32)


def in_float32(lalm: LALM, encoding: Encoding) -> Encoding:
    """The same prompt and sound, encoded while the model computes `exactly`.

    Embeddings that are put in place of the audio's are taken as they are.
    """
    made = lalm.embed(encoding.tokens, encoding.inputs)
    if not encoding.overwritten:
        return made
    return replace(made, inputs_embeds=encoding.inputs_embeds.to(made.inputs_embeds), overwritten=True)


def passes(exact: bool) -> int:
    """Forward passes of a proof."""
    return 4 if exact else 6


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
    if not lalm.exact:
        _measure(lalm, pair, told)
    tolerance = pair.tolerance
    moved = float((whole - other).abs().max() / whole.abs().max())
    return [
        Check.at_most("same_layout", float(not noise.tokens.same_layout(silence.tokens)), 0.0),
        Check.more_than("audio_reaches_model", moved, 1e-6),
        Check.at_most("layers_keep_length", float(sum(length != len(noise.tokens) for length in lengths)), 0.0),
        Check.at_most("decoder_from_embeddings", _difference(whole, decoder_only), tolerance),
        Check.at_most("restore_all", _difference(whole, restored), tolerance),
    ]


def _measure(lalm: LALM, pair: Pair, told: Told) -> None:
    """How far the two runs are from float32, over the whole vocabulary."""
    with lalm.exactly():
        for name, encoding in (("noise", pair.noise), ("silence", pair.silence)):
            told(f"rounding, {name} in float32")
            logits, _ = _whole_run(lalm, in_float32(lalm, encoding), 0)
            pair.exact[name] = logits
            pair.measured(*(found.float().softmax(-1).cpu().numpy() for found in (pair.logits[name], logits)))


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
