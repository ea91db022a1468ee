"""Attention in which single queries, keys and values are others than the run's own: what edges of paths change.

Keys and values that differ for one query head or one query position only cannot be put into a table that others read.
So such queries are computed once more, from the run's own keys and values and from what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lalm_patch.engine.attention import AttentionInputs, register_attention
from lalm_patch.engine.base_runs import KeyValue
from lalm_patch.interventions.paths import Input, Receiver

ATTENTION_NAME = "lalm_patch_senders"

Reached = Sequence[tuple[Receiver, tuple[int, ...]]]
"""Receivers, each with the positions at which something reaches it."""


@dataclass(frozen=True)
class EditedQueries:
    """Queries of one run in one layer that see something else than the run has, or ask with something else.

    Attributes:
        tokens: [queries] int64, where they are among the tokens that a layer is called with.
        positions: [queries] int64, their positions.
        row: which suffix of the pack they belong to.
        changed: [changed] int64, positions with another residual stream.
        query: [heads, changed, head size], what these positions ask with there.
        key: [key-value heads, changed, head size], by which they are found.
        value: likewise, what is got from them.
        asks: bool [heads, queries], which queries are the changed ones; each of them is at a changed position.
        finds: bool [heads, queries, changed], which of the changed keys they see.
        gets: likewise, of the values.
    """

    tokens: Tensor
    positions: Tensor
    row: int
    changed: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    asks: Tensor
    finds: Tensor
    gets: Tensor

    def of_last(self, last: int) -> EditedQueries | None:
        """The same for a pack of the last position of each suffix alone; None where that is not edited."""
        chosen = torch.nonzero(self.positions == last)[:, 0]
        if not len(chosen):
            return None
        return replace(
            self,
            tokens=torch.full_like(chosen, self.row),
            positions=self.positions[chosen],
            asks=self.asks[:, chosen],
            finds=self.finds[:, chosen],
            gets=self.gets[:, chosen],
        )


def edited_queries(reached: Reached, heads: int, length: int) -> tuple[list[int], list[int], Tensor, Tensor, Tensor]:
    """What receivers of one layer make differ.

    Args:
        reached: the receivers, and where they are reached.
        heads: attention heads.
        length: positions of the run.

    Returns:
        Positions of the queries that are edited and of the residual stream that is changed, both ascending, and `asks`,
        `finds` and `gets` of `EditedQueries`.
    """
    changed = sorted({position for _, positions in reached for position in positions})
    queries = sorted({query for receiver, positions in reached for query in receiver.readers(positions, length)})
    asks = torch.zeros(heads, len(queries), dtype=torch.bool)
    finds, gets = (torch.zeros(heads, len(queries), len(changed), dtype=torch.bool) for _ in range(2))
    for receiver, positions in reached:
        head = slice(None) if receiver.head is None else slice(receiver.head, receiver.head + 1)
        readers = set(receiver.readers(positions, length))
        rows = torch.tensor([query in readers for query in queries])
        columns = torch.tensor([position in positions for position in changed])
        if receiver.input is Input.QUERY:
            asks[head] |= rows
        else:
            table = finds if receiver.input is Input.KEY else gets
            table[head] |= rows[:, None] & columns
    return queries, changed, asks, finds, gets


def edited_attention(query: Tensor, key: Tensor, value: Tensor, edited: EditedQueries, scale: float) -> Tensor:
    """Attention of edited queries, softmax in float32: [queries, heads, head size of the values].

    Args:
        query: the run's own, [heads, queries, head size].
        key: the run's own, [key-value heads, positions, head size].
        value: as `key`; its head size may differ.
        edited: what is not the run's own.
        scale: factor on the scores.
    """
    device, heads = query.device, query.shape[0]
    share = heads // key.shape[0]
    changed, positions = edited.changed.to(device), edited.positions.to(device)
    asks, finds, gets = (table.to(device) for table in (edited.asks, edited.finds, edited.gets))
    if asks.any():
        at = torch.searchsorted(changed, positions).clamp_max(len(changed) - 1)
        query = torch.where(asks[..., None], edited.query.to(query)[:, at], query)
    keys, values = (states.to(query).repeat_interleave(share, dim=0) for states in (edited.key, edited.value))
    grouped = query.view(key.shape[0], -1, query.shape[-1])
    scores = (grouped * scale @ key.transpose(1, 2)).float().view(heads, len(positions), -1)
    other = (query * scale @ keys.transpose(1, 2)).float()
    scores[..., changed] = torch.where(finds, other, scores[..., changed])
    future = torch.arange(scores.shape[-1], device=device) > positions[:, None]
    weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(value.dtype)
    out = (weights.view(key.shape[0], -1, scores.shape[-1]) @ value).view(heads, len(positions), -1)
    own = value[:, changed].repeat_interleave(share, dim=0)
    out = out + (weights[..., changed] * gets) @ (values - own)
    return out.transpose(0, 1)


@dataclass(frozen=True)
class SendersLayout:
    """What tokens that are called for what a run's attention writes at their positions see.

    Attributes:
        prefix: the run's keys and values of all positions.
        edited: all the tokens, in parts.
    """

    prefix: KeyValue
    edited: Sequence[EditedQueries]


def senders_attention(inputs: AttentionInputs, senders: SendersLayout) -> Tensor:
    """Attention of single positions of a run, see `AttentionFunction`."""
    key, value = (states.to(inputs.query.device) for states in senders.prefix)
    parts = [
        edited_attention(inputs.query[0].index_select(1, part.tokens.to(key.device)), key, value, part, inputs.scale)
        for part in senders.edited
    ]
    order = torch.cat([part.tokens for part in senders.edited]).argsort().to(key.device)
    return torch.cat(parts)[order][None]


register_attention(ATTENTION_NAME, senders_attention, argument="senders", ignores_mask=True)
