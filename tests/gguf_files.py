"""Small GGUF files, written from a Llama's folder as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.torch import load_file

Q8_0 = gguf.GGMLQuantizationType.Q8_0
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """A folder's weights under llama.cpp's names, rows of queries and keys as neighbours are rotated there."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        inner, prefix = name.removesuffix(".weight"), ""
        if inner.startswith("model.layers."):
            _, _, layer, inner = inner.split(".", 3)
            prefix = f"blk.{layer}."
        new, values = NAMES[inner], weight.float().numpy()
        if new in heads:
            values = values.reshape(heads[new], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        found[f"{prefix}{new}.weight"] = np.ascontiguousarray(values)
    return found


def metadata_of(folder: Path) -> dict[str, Any]:
    """A folder's configuration and tokenizer under GGUF's keys."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | special
    words = sorted(ids, key=lambda word: ids[word])
    merges = tokenizer["model"]["merges"]
    return {
        "general.name": "tiny",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "llama.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if word in special else 1 for word in words],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": special[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": special[settings["eos_token"]],
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }


def rope_factors(scaling: Mapping[str, float], base: float, width: int) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling of rotary frequencies: float32 [width / 2]."""
    factors = []
    for pair in range(width // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / width)
        turns = scaling["original_max_position_embeddings"] / wavelength
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    architecture: str = "llama",
    quantised: Callable[[str], bool] = lambda name: False,
) -> Path:
    """A GGUF file in float32, chosen tensors in Q8_0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        if quantised(name):
            writer.add_tensor(name, quantize(values, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
