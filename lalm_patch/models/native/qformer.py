"""The connector of DeSTA2 and DeSTA2.5: queries read tapped Whisper layers through a small BERT-like stack.

Attention is written out here: transformers' BertEncoder, configured as the originals configure it (a decoder with
cross-attention, no mask), attends causally under sdpa, while in the originals every query sees all the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

INTERMEDIATE_SIZE = 3072  # BertConfig's default, which the originals keep for every width
LAYER_NORM_EPS = 1e-12

_LAYER_MODULES = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "crossattention.self.query": "cross_attn.q_proj",
    "crossattention.self.key": "cross_attn.k_proj",
    "crossattention.self.value": "cross_attn.v_proj",
    "crossattention.output.dense": "cross_attn.out_proj",
    "crossattention.output.LayerNorm": "cross_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}


class QFormerAttention(nn.Module):
    """Multi-head attention without a mask: every query attends to all of the memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """Queries [batch, queries, width] and memory [batch, length, width] to [batch, queries, width]."""
        query = self.q_proj(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.k_proj(memory).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = self.v_proj(memory).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
        attended: Tensor = self.out_proj((weights @ value).transpose(1, 2).flatten(2))
        return attended


class QFormerLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the encoder's states, feed-forward; norms after each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = QFormerAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.cross_attn = QFormerAttention(width, heads)
        self.cross_attn_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(width, INTERMEDIATE_SIZE)
        self.fc2 = nn.Linear(INTERMEDIATE_SIZE, width)
        self.final_layer_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        """Queries [batch, queries, width] and encoder states [batch, frames, width] to queries."""
        queries = self.self_attn_layer_norm(queries + self.self_attn(queries, queries))
        queries = self.cross_attn_layer_norm(queries + self.cross_attn(queries, states))
        normed: Tensor = self.final_layer_norm(queries + self.fc2(functional.gelu(self.fc1(queries))))
        return normed


class DestaConnector(nn.Module):
    """One set of queries per tapped encoder layer through one Q-Former, summed with learned weights, projected."""

    def __init__(self, *, taps: int, queries: int, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.layer_prompts = nn.ParameterList(torch.empty(1, queries, width) for _ in range(taps))
        self.layer_weights = nn.Parameter(torch.empty(queries, taps))
        self.layers = nn.ModuleList(QFormerLayer(width, heads) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, hidden)

    def forward(self, tapped: list[Tensor]) -> Tensor:
        """States [clips, frames, width] of every tap, shallow to deep, to audio vectors [clips, queries, hidden]."""
        read = []
        for prompt, states in zip(self.layer_prompts, tapped, strict=True):
            queries = prompt.expand(len(states), -1, -1)
            for layer in self.layers:
                queries = layer(queries, states)
            read.append(queries)
        weights = self.layer_weights.softmax(-1)[:, :, None]  # [queries, taps, 1]
        vectors: Tensor = self.linear(self.layer_norm((torch.stack(read, dim=2) * weights).sum(2)))
        return vectors


def connector_keys(taps: int, layers: int) -> dict[str, str]:
    """Every published key of a connector and the parameter it becomes."""
    modules = {"proj.0": "layer_norm", "proj.1": "linear"}
    for index in range(layers):
        modules |= {f"qformer.layer.{index}.{old}": f"layers.{index}.{new}" for old, new in _LAYER_MODULES.items()}
    keys = {f"{old}.{kind}": f"{new}.{kind}" for old, new in modules.items() for kind in ("weight", "bias")}
    keys |= {f"layer_prompts.{index}": f"layer_prompts.{index}" for index in range(taps)}
    return keys | {"layer_weights": "layer_weights"}
