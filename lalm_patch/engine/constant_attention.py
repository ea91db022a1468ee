"""Attention whose weights are constants: gradients go through the values alone, as in relevance propagation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lalm_patch.engine.attention import (
    AttentionInputs,
    attention_in,
    causal_weights,
    for_each_head,
    register_attention,
)

ATTENTION_NAME = "lalm_patch_constant"


def constant_attention(inputs: AttentionInputs, extra: None = None) -> Tensor:
    """Causal attention, softmax in float32, no gradient of the weights; see `AttentionFunction`."""
    with torch.no_grad():
        weights = causal_weights(inputs).to(inputs.value.dtype)
    return (weights @ for_each_head(inputs.value, inputs)).transpose(1, 2)


def constant_attention_in(decoder: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Let the decoder's layers use it while the context is open; a context that does nothing if it is not wanted."""
    return attention_in(decoder, ATTENTION_NAME) if wanted else nullcontext()


register_attention(ATTENTION_NAME, constant_attention)
