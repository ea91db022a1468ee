"""What can be seen in a run without changing it: the logit lens, and how much attention the text pays to the audio."""

from __future__ import annotations

from dataclasses import dataclass, field

import nnsight
import numpy as np
import torch
from torch import Tensor

from lalm_patch.engine.attention import (
    AttentionInputs,
    attention_in,
    causal_weights,
    for_each_head,
    register_attention,
)
from lalm_patch.engine.base_runs import read_logits
from lalm_patch.engine.choose import replay_obstacle
from lalm_patch.errors import ModelError
from lalm_patch.models import LALM, Encoding

ATTENTION_NAME = "lalm_patch_observed"
LENS_ROWS = 256
"""Positions whose logits over the whole vocabulary are in memory at once."""


def lens(lalm: LALM, encoding: Encoding, token: int) -> tuple[np.ndarray, np.ndarray]:
    """The logit lens (nostalgebraist 2020): what the final norm and the head make of every layer's residual stream.

    Args:
        lalm: the model.
        encoding: of the run to look at.
        token: id of the answer's token.

    Returns:
        Probability of the token over the whole vocabulary, float32: at the text positions [layers, text positions], and
        the largest of the audio positions [layers].
    """
    with (
        torch.no_grad(),
        lalm.decoder.trace(inputs_embeds=encoding.inputs_embeds, position_ids=encoding.position_ids, use_cache=False),
    ):
        states = nnsight.save([layer.output[0].clone() for layer in lalm.layers])
    text, audio = (
        [_probabilities(lalm, state[list(where)], token) for state in states]
        for where in (encoding.tokens.text_positions, encoding.tokens.audio_positions)
    )
    return np.stack(text), np.array([found.max() for found in audio], np.float32)


def _probabilities(lalm: LALM, states: Tensor, token: int) -> np.ndarray:
    """Probability of a token, read off residual streams [positions, hidden]: float32 [positions]."""
    found = []
    with torch.no_grad():
        for rows in torch.split(states, LENS_ROWS):
            logits = read_logits(lalm, rows)
            found.append((logits[:, token] - logits.logsumexp(-1)).exp())
    return torch.cat(found).cpu().numpy()


@dataclass
class _Listening:
    """Collects attention weights that fall on the audio: [heads, positions from `first` on], by layer."""

    first: int
    audio: Tensor
    found: dict[int, Tensor] = field(default_factory=dict)


def check_attention(lalm: LALM) -> None:
    """Raises ModelError for a decoder whose attention weights cannot be read through transformers' interface."""
    if (obstacle := replay_obstacle(lalm)) is not None:
        raise ModelError(f"observe.attention: {type(lalm.module).__name__}: {obstacle}; use observe=lens or nothing")


def audio_attention(lalm: LALM, encoding: Encoding) -> np.ndarray:
    """How much each segment of the text listens: the share of its attention that falls on audio positions.

    Returns:
        Mean over a segment's positions, float32 [layers, segments, heads], segments as in `TokenTable.segments`.
    """
    tokens = encoding.tokens
    first = tokens.text_positions[0]
    listening = _Listening(first, torch.tensor(tokens.audio_positions, device=encoding.inputs_embeds.device))
    with (
        attention_in(lalm.decoder_module, ATTENTION_NAME),
        torch.no_grad(),
        lalm.decoder.trace(
            inputs_embeds=encoding.inputs_embeds,
            position_ids=encoding.position_ids,
            use_cache=False,
            listening=listening,
        ),
    ):
        lalm.norm.output[:, -1].clone().save()
    text = set(tokens.text_positions)
    of_segments = [[p - first for p in tokens.positions(name) if p in text] for name in tokens.segments]
    layers = [listening.found[index].cpu() for index in range(lalm.num_layers)]
    each = [torch.stack([mass[:, where].mean(-1) for where in of_segments]) for mass in layers]
    return torch.stack(each).float().numpy()


def observed_attention(inputs: AttentionInputs, listening: _Listening) -> Tensor:
    """Causal attention that tells `listening` the weights that fall on the audio; see `AttentionFunction`."""
    weights = causal_weights(inputs)
    audio = listening.audio.to(weights.device)
    listening.found[inputs.layer] = weights[0, :, listening.first :].index_select(-1, audio).sum(-1)
    return (weights.to(inputs.value.dtype) @ for_each_head(inputs.value, inputs)).transpose(1, 2)


register_attention(ATTENTION_NAME, observed_attention, argument="listening")
