"""Attention whose weights are constants: gradients go through the values alone, as in relevance propagation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lalm_patch.engine.suffix_attention import attention_in

ATTENTION_NAME = "lalm_patch_constant"


def constant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: causal, softmax in float32, no gradient of the weights.

    Args:
        module: the attention module.
        query: [batch, heads, positions, head size].
        key: [batch, key-value heads, positions, head size].
        value: as `key`.
        attention_mask: None, for one unpadded sequence.
        scaling: factor on the scores; 1/sqrt(head size) if None.
        dropout: must be 0, as in evaluation.

    Returns:
        [batch, positions, heads, head size], and None for the weights.

    Raises:
        NotImplementedError: the model asks for a mask, soft caps, sinks or a position bias.
    """
    others = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or others:
        raise NotImplementedError(f"constant attention is causal and plain; got a mask, dropout or {others}")
    values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    with torch.no_grad():
        weights = causal_weights(query, key, scaling).to(value.dtype)
    return (weights @ values).transpose(1, 2), None


def causal_weights(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """Attention weights in float32, [batch, heads, positions, positions], of an interface's queries and keys."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale @ keys.transpose(-1, -2)).float()
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


@contextmanager
def constant_attention_in(decoder: nn.Module, wanted: bool) -> Iterator[None]:
    """Let the decoder's layers use it while the context is open; a context that does nothing if it is not wanted."""
    if not wanted:
        yield
        return
    with attention_in(decoder, ATTENTION_NAME):
        yield


AttentionInterface.register(ATTENTION_NAME, constant_attention)
