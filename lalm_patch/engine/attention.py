"""Attention functions of our own inside transformers' decoders: what they are given, and how they are put in.

transformers hands any function that is registered under a name the heads' queries, keys and values, already rotated.
Ours share that signature, and what they refuse, here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some models' attention does besides: caps of the scores, sinks, a bias."""


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer's attention is given.

    Attributes:
        layer: index of the decoder layer.
        query: [batch, heads, positions, head size].
        key: [batch, key-value heads, positions, head size].
        value: as `key`; its head size may differ.
        scale: factor on the scores.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class AttentionFunction(Protocol):
    """Causal attention of one unpadded sequence: [batch, positions, heads, head size of the values].

    `extra` is the one keyword argument of the decoder's forward pass that the function is registered with.
    """

    def __call__(self, inputs: AttentionInputs, extra: Any, /) -> Tensor:
        """See the class."""


def register_attention(
    name: str, function: AttentionFunction, argument: str | None = None, ignores_mask: bool = False
) -> None:
    """Make an attention function known to transformers.

    Args:
        name: what `attention_in` calls it.
        function: what it computes.
        argument: keyword argument of the decoder's forward pass that is handed to it, and must be given; None for none.
        ignores_mask: whether that argument says who sees whom, whatever mask the decoder makes.
    """

    def interface(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if unsupported := [part for part in _UNSUPPORTED if kwargs.get(part) is not None]:
            raise NotImplementedError(f"{name} has no {', '.join(unsupported)}")
        extra = None if argument is None else kwargs.get(argument)
        masked = attention_mask is not None and not ignores_mask
        if masked or dropout or (argument is not None and extra is None):
            wanted = "" if argument is None else f"{argument}=..., "
            raise ValueError(f"{name} expects {wanted}one unpadded sequence without a mask, and no dropout")
        layer: Any = module.layer_idx
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return function(AttentionInputs(layer, query, key, value, scale), extra), None

    AttentionInterface.register(name, interface)


class attention_in(AbstractContextManager[None]):
    """Let a decoder's layers use an attention function, by its registered name, while the context is open.

    Can be opened again and again.
    """

    def __init__(self, decoder: nn.Module, name: str) -> None:
        self._name = name
        self._configs = list({id(config): config for config in _attention_configs(decoder)}.values())
        self._before: list[str] = []

    def __enter__(self) -> None:
        self._before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = self._name

    def __exit__(self, *_: object) -> None:
        for config, implementation in zip(self._configs, self._before, strict=True):
            config._attn_implementation = implementation


def _attention_configs(decoder: nn.Module) -> Iterator[Any]:
    yield decoder.config
    for module in decoder.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            yield module.config


def causal_weights(inputs: AttentionInputs) -> Tensor:
    """Attention weights in float32: [batch, heads, positions, positions]."""
    keys = for_each_head(inputs.key, inputs)
    scores = (inputs.query * inputs.scale @ keys.transpose(-1, -2)).float()
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def for_each_head(states: Tensor, inputs: AttentionInputs) -> Tensor:
    """Keys or values repeated for the query heads that share them: [batch, heads, positions, head size]."""
    return states.repeat_interleave(inputs.query.shape[1] // states.shape[1], dim=1)
