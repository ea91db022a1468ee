"""Attention of packed suffixes over a shared prefix: what makes many patched runs one forward pass.

A pack is a batch of one whose sequence is several suffixes, one after another. Suffix r is one patched run from its
first patched position on; everything before that position is still the corrupted run's, so its keys and values come
from the corrupted run and are shared by all suffixes. Nothing is padded outside attention, and no mask of pack length
squared is ever made:

    queries            keys
    every token   x    [0, window_start)             the prefix all suffixes see: one matrix product
    suffix r      x    [window_start, end)           its own table: corrupted before its first position, its own after

Inside the window, columns are positions, so the mask is the plain causal one for every suffix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "lalm_patch_suffixes"

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer: each [key-value heads, positions, head size], positions already rotated in."""


@dataclass(frozen=True)
class SuffixLayout:
    """Where each token of a pack stands.

    Attributes:
        prefix: keys and values of the corrupted run, by layer.
        window_start: first position of the longest suffix in the pack.
        length: number of positions of a whole run.
        rows: [tokens] which suffix a token belongs to.
        columns: [tokens] the token's position, counted from `window_start`.
        num_rows: number of suffixes.
    """

    prefix: Sequence[KeyValue]
    window_start: int
    length: int
    rows: Tensor
    columns: Tensor
    num_rows: int


def suffix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    suffixes: SuffixLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for packed suffixes.

    Args:
        module: the attention module; `layer_idx` says which layer's prefix to use.
        query: [1, heads, tokens, head size].
        key: [1, key-value heads, tokens, head size].
        value: as `key`.
        attention_mask: unused, the layout says who sees whom.
        scaling: factor on the scores; 1/sqrt(head size) if None.
        dropout: must be 0, as in evaluation.
        suffixes: the pack's layout.

    Returns:
        [1, tokens, heads, head size], and None for the attention weights.
    """
    if suffixes is None or dropout:
        raise ValueError("suffix attention needs a pack's layout and no dropout")
    if unsupported := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"suffix attention has no {', '.join(unsupported)}")
    layer: Any = module.layer_idx
    prefix_keys, prefix_values = (states.to(query.device) for states in suffixes.prefix[layer])
    _, heads, tokens, size = query.shape
    groups, start, window = key.shape[1], suffixes.window_start, suffixes.length - suffixes.window_start
    share = heads // groups
    rows, columns = suffixes.rows.to(query.device), suffixes.columns.to(query.device)
    queries = query[0].reshape(groups, share, tokens, size) * (size**-0.5 if scaling is None else scaling)

    own_keys, own_values = (
        _window_table(prefix, own, suffixes, rows, columns)
        for prefix, own in ((prefix_keys, key[0]), (prefix_values, value[0]))
    )
    # Queries of suffix r meet r's own table: [groups, suffixes, window, share * size] is the padded form of `queries`.
    padded = queries.new_zeros(groups, suffixes.num_rows, window, share, size)
    padded[:, rows, columns] = queries.transpose(1, 2)
    own = padded.flatten(2, 3) @ own_keys.transpose(-1, -2)
    own = own.view(groups, suffixes.num_rows, window, share, window)[:, rows, columns]
    future = torch.arange(window, device=own.device) > columns[:, None]
    own = own.masked_fill(future[None, :, None], float("-inf")).transpose(1, 2)

    shared = queries.flatten(1, 2) @ prefix_keys[:, :start].transpose(-1, -2)
    scores = torch.cat([shared.view(groups, share, tokens, start), own], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)

    attended = weights[..., :start].reshape(groups, share * tokens, start) @ prefix_values[:, :start]
    attended = attended.view(groups, share, tokens, size)
    padded_weights = weights.new_zeros(groups, suffixes.num_rows, window, share, window)
    padded_weights[:, rows, columns] = weights[..., start:].transpose(1, 2)
    from_own = (padded_weights.flatten(2, 3) @ own_values).view(groups, suffixes.num_rows, window, share, size)
    attended = attended + from_own[:, rows, columns].transpose(1, 2)
    return attended.reshape(heads, tokens, size).transpose(0, 1)[None].contiguous(), None


def _window_table(prefix: Tensor, own: Tensor, suffixes: SuffixLayout, rows: Tensor, columns: Tensor) -> Tensor:
    """Keys (or values) inside the window for every suffix: [groups, suffixes, window, size]."""
    table = prefix[:, None, suffixes.window_start : suffixes.length].repeat(1, suffixes.num_rows, 1, 1)
    table[:, rows, columns] = own
    return table


@contextmanager
def suffix_attention_in(decoder: nn.Module) -> Iterator[None]:
    """Let the decoder's layers use suffix attention while the context is open."""
    configs = {id(config): config for config in _attention_configs(decoder)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _attention_configs(decoder: nn.Module) -> Iterator[Any]:
    yield decoder.config
    for module in decoder.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            yield module.config


AttentionInterface.register(ATTENTION_NAME, suffix_attention)
