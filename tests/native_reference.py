"""DeSTA's connector and Qwen-Audio written out with tensor operations, on tensors under their published names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

Tensors = dict[str, Tensor]


def _linear(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _norm(tensors: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """One head after the other: [length, width] each; `mask` true where a query may look."""
    size = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[:, part] @ key[:, part].T / math.sqrt(size)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        outputs.append(scores.softmax(-1) @ value[:, part])
    return torch.cat(outputs, -1)


def connector_vectors(tensors: Tensors, tapped: Sequence[Tensor], heads: int) -> Tensor:
    """[clips, queries, hidden] from the tapped states [clips, frames, width], one clip and tap at a time."""
    layers = len({name.split(".")[2] for name in tensors if name.startswith("qformer.layer.")})

    def block(name: str, queries: Tensor, memory: Tensor) -> Tensor:
        query = _linear(tensors, f"{name}.self.query", queries)
        key, value = (_linear(tensors, f"{name}.self.{part}", memory) for part in ("key", "value"))
        attended = _linear(tensors, f"{name}.output.dense", _attend(query, key, value, heads))
        return _norm(tensors, f"{name}.output.LayerNorm", attended + queries, 1e-12)

    clips = []
    for clip in range(len(tapped[0])):
        read = []
        for tap, states in enumerate(tapped):
            queries = tensors[f"layer_prompts.{tap}"][0]
            for index in range(layers):
                name = f"qformer.layer.{index}"
                queries = block(f"{name}.attention", queries, queries)
                queries = block(f"{name}.crossattention", queries, states[clip])
                wide = F.gelu(_linear(tensors, f"{name}.intermediate.dense", queries))
                narrow = _linear(tensors, f"{name}.output.dense", wide)
                queries = _norm(tensors, f"{name}.output.LayerNorm", narrow + queries, 1e-12)
            read.append(queries)
        weights = tensors["layer_weights"].softmax(-1)
        mixed = sum(weights[:, tap, None] * queries for tap, queries in enumerate(read))
        assert isinstance(mixed, Tensor)
        clips.append(_linear(tensors, "proj.1", _norm(tensors, "proj.0", mixed, 1e-5)))
    return torch.stack(clips)


def unpadded_log_mel(clip: np.ndarray, mels: int, seconds: int = 3) -> Tensor:
    """Whisper's log-mel spectrogram [mels, frames] of the clip padded to its window."""
    padded = torch.zeros(seconds * 16000)
    padded[: len(clip)] = torch.from_numpy(clip)
    spectrum = torch.stft(padded, 400, 160, window=torch.hann_window(400), return_complex=True)[:, :-1].abs() ** 2
    filters = mel_filter_bank(201, mels, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    log = (torch.from_numpy(filters.T).float() @ spectrum).clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4


def qwen_embeds(
    tensors: Tensors, ids: Tensor, audio: Tensor, clips: Sequence[np.ndarray], shape: dict[str, int]
) -> Tensor:
    """[positions, hidden]: token embeddings, overwritten by tag, pooled frames, tag of every clip."""
    prefix = "transformer.audio"
    frames = [(len(clip) // 160 - 1) // 2 + 1 for clip in clips]
    longest = max(frames)
    rows = []
    for clip, length in zip(clips, frames, strict=True):
        mel = unpadded_log_mel(clip, 80)[:, : 2 * longest]
        x = F.gelu(F.conv1d(mel, tensors[f"{prefix}.conv1.weight"], tensors[f"{prefix}.conv1.bias"], padding=1))
        x = F.gelu(F.conv1d(x, tensors[f"{prefix}.conv2.weight"], tensors[f"{prefix}.conv2.bias"], 2, 1)).T
        # Attention is masked to the clip's own frames, so the others can be left away once the convolutions ran.
        x = (x + tensors[f"{prefix}.positional_embedding"][:longest])[:length]
        for index in range(shape["audio_layers"]):
            name = f"{prefix}.blocks.{index}"
            h = _norm(tensors, f"{name}.attn_ln", x, 1e-5)
            query, key, value = (_linear(tensors, f"{name}.attn.{part}", h) for part in ("query", "key", "value"))
            x = x + _linear(tensors, f"{name}.attn.out", _attend(query, key, value, shape["audio_heads"]))
            h = F.gelu(_linear(tensors, f"{name}.mlp.0", _norm(tensors, f"{name}.mlp_ln", x, 1e-5)))
            x = x + _linear(tensors, f"{name}.mlp.2", h)
        pairs = x[: length // 2 * 2].reshape(length // 2, 2, -1).mean(1)
        pooled = _linear(tensors, f"{prefix}.proj", _norm(tensors, f"{prefix}.ln_post", pairs, 1e-5))
        begin, end = tensors[f"{prefix}.audio_bos_eos_token.weight"]
        rows += [begin, *pooled, end]
    embeds = tensors["transformer.wte.weight"][ids].clone()
    embeds[audio.nonzero()[:, 0]] = torch.stack(rows)
    return embeds


def _rotated(x: Tensor, heads: int) -> Tensor:
    """Rotary positions, base 1e4: component i and i + half of every head are one complex number."""
    positions, width = x.shape
    size = width // heads
    split = x.view(positions, heads, 2, size // 2)
    speed = 1e4 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones(positions, 1, size // 2), torch.arange(positions)[:, None, None] * speed)
    turned = torch.complex(split[:, :, 0], split[:, :, 1]) * turn
    return torch.stack((turned.real, turned.imag), 2).reshape(positions, width)


def qwen_logits(tensors: Tensors, embeds: Tensor, shape: dict[str, int], eps: float) -> Tensor:
    """[positions, vocabulary] of embeddings [positions, hidden]."""

    def rms(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * tensors[f"{name}.weight"]

    x = embeds
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    for index in range(shape["layers"]):
        name = f"transformer.h.{index}"
        query, key, value = _linear(tensors, f"{name}.attn.c_attn", rms(f"{name}.ln_1", x)).chunk(3, -1)
        heads = shape["heads"]
        attended = _attend(_rotated(query, heads), _rotated(key, heads), value, heads, causal)
        x = x + _linear(tensors, f"{name}.attn.c_proj", attended)
        h = rms(f"{name}.ln_2", x)
        gated = _linear(tensors, f"{name}.mlp.w1", h) * F.silu(_linear(tensors, f"{name}.mlp.w2", h))
        x = x + _linear(tensors, f"{name}.mlp.c_proj", gated)
    return _linear(tensors, "lm_head", rms("transformer.ln_f", x))
