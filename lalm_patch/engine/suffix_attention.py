"""Attention of packed suffixes over a shared prefix: what makes many patched runs one forward pass.

A pack is a batch of one whose sequence is several suffixes, one after another. Suffix r is one patched run from its
first patched position on; everything before that position is still the corrupted run's, so its keys and values come
from the corrupted run and are shared by all suffixes. No mask is ever made, and no work grows with the square of the
pack's length:

    queries            keys
    every token   x    [0, window_start)             the prefix all suffixes see: one attention, keys read in place
    suffix r      x    [window_start, end)           its own table: corrupted before its first position, its own after

Inside the window, columns are positions, so every suffix attends causally; suffixes are rows of a batch there. Both
parts are ordinary attentions with a softmax of their own; their log-sum-exps say how much each counts in the whole
(Dao et al., arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lalm_patch.engine.attention import AttentionInputs, attention_in, register_attention
from lalm_patch.engine.base_runs import KeyValue
from lalm_patch.engine.path_attention import EditedQueries, edited_attention

ATTENTION_NAME = "lalm_patch_suffixes"


@dataclass(frozen=True)
class Blocked:
    """Edges that a layer's attention lacks (attention knockout), True where a query must not see a key.

    Attributes:
        prefix: [heads or 1, tokens, window_start], each token of a pack and the shared prefix.
        window: [heads or 1, suffixes, window, window], queries and keys inside the window.
    """

    prefix: Tensor
    window: Tensor


@dataclass(frozen=True)
class SuffixLayout:
    """Where each token of a pack stands, in one layer.

    Attributes:
        prefix: keys and values of the run that the suffixes continue, in this layer.
        window_start: first position of the longest suffix in the pack.
        length: number of positions of a whole run.
        slots: [tokens] int64, where a token stands in the table of windows: its suffix times the window's length, plus
            its position counted from `window_start`.
        num_rows: number of suffixes.
        blocked: edges that are cut in this layer.
        edited: queries that ask or see something else than their suffix has (paths).
        collect: the layer is called for its keys and values alone, see `KeysAndValues`.
        own: keys and values of all the pack's tokens, where the queries are the suffixes' last positions alone.
    """

    prefix: KeyValue
    window_start: int
    length: int
    slots: Tensor
    num_rows: int
    blocked: Blocked | None = None
    collect: bool = False
    own: KeyValue | None = None
    edited: tuple[EditedQueries, ...] = ()

    @classmethod
    def to_collect(cls, states: Tensor) -> SuffixLayout:
        """A layout under which a layer gives its queries, keys and values of states and computes no attention."""
        return cls((states, states), 0, 0, states.new_zeros(0, dtype=torch.long), 0, collect=True)

    @property
    def window(self) -> int:
        """Positions in the window."""
        return self.length - self.window_start

    def last_positions(self, own: KeyValue, lasts: Tensor) -> SuffixLayout:
        """The layout of the suffixes' last positions alone.

        Args:
            own: keys and values of all tokens.
            lasts: which tokens they are.
        """
        cut = self.blocked
        if cut is not None:
            cut = Blocked(cut.prefix.index_select(1, lasts), cut.window[:, :, -1:])
        edited = [found for each in self.edited if (found := each.of_last(self.length - 1)) is not None]
        return replace(self, own=own, blocked=cut, edited=tuple(edited))


class KeysAndValues(Exception):
    """Ends a layer's forward pass when its keys and values are known: nobody reads what would come after them.

    Attributes:
        found: keys and values of all tokens.
        query: their queries, [heads, tokens, head size].
    """

    def __init__(self, found: KeyValue, query: Tensor) -> None:
        super().__init__("keys and values are known")
        self.found = found
        self.query = query


def suffix_attention(inputs: AttentionInputs, suffixes: SuffixLayout) -> Tensor:
    """Attention of packed suffixes, see `AttentionFunction`: [1, tokens, heads, head size].

    Args:
        inputs: of the pack, a batch of one.
        suffixes: the pack's layout: it says who sees whom.

    Raises:
        KeysAndValues: they were all that was asked for.
    """
    if suffixes.collect:
        raise KeysAndValues((inputs.key[0], inputs.value[0]), inputs.query[0])
    query, scale = inputs.query, inputs.scale
    _, heads, tokens, size = query.shape
    key, value = (inputs.key[0], inputs.value[0]) if suffixes.own is None else suffixes.own
    groups, rows, window = key.shape[0], suffixes.num_rows, suffixes.window
    share = heads // groups
    slots = suffixes.slots
    prefix_keys, prefix_values = (states.to(query.device) for states in suffixes.prefix)
    value_size = value.shape[-1]
    # Key-value heads are the batch, the query heads that share one are the heads: keys are never repeated.
    queries = query.view(groups, share, tokens, size)

    cut = suffixes.blocked
    keys, values = _window_table(prefix_keys, key, suffixes), _window_table(prefix_values, value, suffixes)
    hidden = None if cut is None else _for_groups(cut.window, groups, share).flatten(0, 1)
    if suffixes.own is None:
        own_queries = query.new_zeros(groups, rows * window, share, size)
        own_queries.index_copy_(1, slots, queries.transpose(1, 2))
        own_queries = own_queries.view(groups * rows, window, share, size).transpose(1, 2)
        own_out, own_total = attend(own_queries, keys, values, scale, causal=True, blocked=hidden)
        own_out = own_out.transpose(1, 2).reshape(groups, rows * window, share, value_size).index_select(1, slots)
        own_total = own_total.transpose(1, 2).reshape(groups, rows * window, share).index_select(1, slots)
    else:  # one query a row, the last position: it sees the whole window
        own_queries = queries.transpose(1, 2).reshape(groups * rows, 1, share, size).transpose(1, 2)
        own_out, own_total = attend(own_queries, keys, values, scale, blocked=hidden)
        own_out = own_out.reshape(groups, rows, share, value_size)
        own_total = own_total.reshape(groups, rows, share)
    if suffixes.window_start:
        out, total = attend(
            queries,
            prefix_keys[:, : suffixes.window_start],
            prefix_values[:, : suffixes.window_start],
            scale,
            blocked=None if cut is None else _for_groups(cut.prefix[:, None], groups, share)[:, 0],
        )
        # The share of the whole softmax that falls on the window.
        weight = torch.sigmoid(own_total - total.transpose(1, 2)).unsqueeze(-1)
        own_out = torch.lerp(out.transpose(1, 2).float(), own_out.float(), weight).to(query.dtype)
    out = own_out.transpose(0, 1).reshape(1, tokens, heads, value_size)
    for edited in suffixes.edited:
        # The run's own keys and values of all positions: before the window those that all suffixes share.
        whole_keys, whole_values = (
            torch.cat([prefix[:, : suffixes.window_start], table.view(groups, rows, window, -1)[:, edited.row]], dim=1)
            for prefix, table in ((prefix_keys, keys), (prefix_values, values))
        )
        tokens_of = edited.tokens.to(query.device)
        out[0, tokens_of] = edited_attention(
            query[0].index_select(1, tokens_of), whole_keys, whole_values, edited, scale
        )
    return out


def _for_groups(blocked: Tensor, groups: int, share: int) -> Tensor:
    """Edges [heads or 1, rows, queries, keys] as [groups, rows, heads of a group or 1, queries, keys]."""
    heads, *others = blocked.shape
    if heads == 1:
        return blocked[:, :, None].expand(groups, others[0], 1, *others[1:])
    return blocked.view(groups, share, *others).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False, blocked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of its softmax's denominator.

    Args:
        query: [batch, heads, queries, head size].
        key: [batch, keys, head size], the same for all heads.
        value: as `key`; its head size may differ.
        scale: factor on the scores.
        causal: query i sees keys up to i.
        blocked: [batch, heads or 1, queries, keys], True where a query does not see a key; a query that sees none
            gets zeros and a logarithm of minus infinity.

    Returns:
        [batch, heads, queries, head size] in the query's type, and [batch, heads, queries] in float32.
    """
    size = query.shape[-1]
    # Kernels of a GPU want heads of a multiple of eight.
    if blocked is None and size == value.shape[-1] and (query.device.type == "cpu" or size % 8 == 0):
        kernel = fused_kernel(query.device.type, query.dtype)
        if kernel is not None:
            shape = (-1, query.shape[1], -1, -1)
            return kernel(query, key[:, None].expand(shape), value[:, None].expand(shape), causal, scale)
    return attend_plainly(query, key, value, scale, causal, blocked)


Kernel = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""Query, key, value (all [batch, heads, positions, size]), causal, scale: output and log-sum-exp."""


@cache
def fused_kernel(device: str, dtype: torch.dtype) -> Kernel | None:
    """The kernel behind `scaled_dot_product_attention`, which keeps the log-sum-exp to itself.

    Private to torch, so it may change from one version to the next: None where it is not as it is used here, and on
    devices without one.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device == "cpu":
        return _known(
            "_scaled_dot_product_flash_attention_for_cpu",
            ("query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"),
            ("output", "logsumexp"),
            lambda kernel, q, k, v, causal, scale: kernel(q, k, v, 0.0, causal, scale=scale),
        )
    if device == "cuda" and half:
        return _known(
            "_scaled_dot_product_flash_attention",
            ("query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale"),
            ("output", "logsumexp"),
            lambda kernel, q, k, v, causal, scale: kernel(q, k, v, 0.0, causal, False, scale=scale),
        )
    if device == "cuda" and dtype == torch.float32:
        return _known(
            "_scaled_dot_product_efficient_attention",
            ("query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal", "scale"),
            ("output", "log_sumexp"),
            lambda kernel, q, k, v, causal, scale: kernel(q, k, v, None, True, 0.0, causal, scale=scale),
        )
    return None


def _known(
    name: str, arguments: tuple[str, ...], returns: tuple[str, ...], call: Callable[..., Sequence[Tensor]]
) -> Kernel | None:
    """A kernel of torch, if its arguments and the first of what it returns are called as they were."""
    kernel: Any = getattr(torch.ops.aten, name, None)
    if kernel is None:
        return None
    schema = kernel.default._schema
    if tuple(part.name for part in schema.arguments) != arguments:
        return None
    if tuple(part.name for part in schema.returns)[: len(returns)] != returns:
        return None

    def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, total, *_ = call(kernel, query, key, value, causal, scale)
        return out, total[..., : query.shape[2]]  # some kernels pad it

    return attention


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False, blocked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `attend`, by its definition and on any device; softmax in float32."""
    batch, heads, queries, size = query.shape
    keys = key.shape[1]
    # Heads are stacked along the queries, so that the keys they share are read once and not repeated.
    scores = torch.bmm((query * scale).reshape(batch, heads * queries, size), key.transpose(1, 2)).float()
    scores = scores.view(batch, heads, queries, keys)
    if causal:
        future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    if blocked is not None:
        scores = scores.masked_fill(blocked, float("-inf"))
    total = scores.logsumexp(-1)
    # Where nothing is seen the scores stay minus infinity, and their exponentials 0.
    weights = scores.sub_(total.clamp_min(torch.finfo(total.dtype).min).unsqueeze(-1)).exp_().to(value.dtype)
    return torch.bmm(weights.view(batch, heads * queries, keys), value).view(batch, heads, queries, -1), total


def _window_table(prefix: Tensor, own: Tensor, suffixes: SuffixLayout) -> Tensor:
    """Keys (or values) inside the window for every suffix: [groups * suffixes, window, size]."""
    groups, _, size = prefix.shape
    corrupted = prefix[:, None, suffixes.window_start : suffixes.length]
    table = corrupted.expand(-1, suffixes.num_rows, -1, -1).reshape(groups, -1, size).contiguous()
    if suffixes.num_rows == 1:
        table = table.clone()  # one row is a view of the prefix, which must stay
    table.index_copy_(1, suffixes.slots, own)
    return table.view(groups * suffixes.num_rows, suffixes.window, size)


def suffix_attention_in(decoder: nn.Module) -> AbstractContextManager[None]:
    """Let the decoder's layers use suffix attention while the context is open."""
    return attention_in(decoder, ATTENTION_NAME)


register_attention(ATTENTION_NAME, suffix_attention, argument="suffixes", ignores_mask=True)
