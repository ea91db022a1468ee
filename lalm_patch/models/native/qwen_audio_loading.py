"""Qwen-Audio(-Chat) from its published files, by an exact map of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, WhisperConfig, WhisperFeatureExtractor

from lalm_patch.errors import ModelError
from lalm_patch.models.checkpoint import find_repository
from lalm_patch.models.files import opening, read_config, weight_files
from lalm_patch.models.native.qwen_audio import QwenAudioConfig, QwenAudioForConditionalGeneration
from lalm_patch.models.native.qwen_tokenizer import TOKENIZER_FILE, read_qwen_tokenizer
from lalm_patch.models.native.repository import field, read_tensors
from lalm_patch.models.weights import check_keys, check_shapes

_AROUND = {
    "transformer.wte.weight": "language_model.embed_tokens.weight",
    "transformer.ln_f.weight": "language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "transformer.audio.conv1.weight": "audio_tower.conv1.weight",
    "transformer.audio.conv1.bias": "audio_tower.conv1.bias",
    "transformer.audio.conv2.weight": "audio_tower.conv2.weight",
    "transformer.audio.conv2.bias": "audio_tower.conv2.bias",
    "transformer.audio.positional_embedding": "audio_tower.embed_positions.weight",
    "transformer.audio.ln_post.weight": "multi_modal_projector.layer_norm.weight",
    "transformer.audio.ln_post.bias": "multi_modal_projector.layer_norm.bias",
    "transformer.audio.proj.weight": "multi_modal_projector.linear.weight",
    "transformer.audio.proj.bias": "multi_modal_projector.linear.bias",
    "transformer.audio.audio_bos_eos_token.weight": "multi_modal_projector.audio_bos_eos_token.weight",
}
_DECODER_LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    # w1(x) * silu(w2(x)): the published w2 is the gate.
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}
_ENCODER_LAYER = {
    "attn.query.weight": "self_attn.q_proj.weight",
    "attn.query.bias": "self_attn.q_proj.bias",
    "attn.key.weight": "self_attn.k_proj.weight",
    "attn.value.weight": "self_attn.v_proj.weight",
    "attn.value.bias": "self_attn.v_proj.bias",
    "attn.out.weight": "self_attn.out_proj.weight",
    "attn.out.bias": "self_attn.out_proj.bias",
    "attn_ln.weight": "self_attn_layer_norm.weight",
    "attn_ln.bias": "self_attn_layer_norm.bias",
    "mlp.0.weight": "fc1.weight",
    "mlp.0.bias": "fc1.bias",
    "mlp.2.weight": "fc2.weight",
    "mlp.2.bias": "fc2.bias",
    "mlp_ln.weight": "final_layer_norm.weight",
    "mlp_ln.bias": "final_layer_norm.bias",
}

Opened = tuple[QwenAudioForConditionalGeneration, Any, WhisperFeatureExtractor]


def load_qwen_audio(
    location: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> Opened:
    """Open Qwen-Audio or Qwen-Audio-Chat (`Qwen/Qwen-Audio`, `Qwen/Qwen-Audio-Chat`).

    Args:
        location: folder or hub id: config.json, qwen.tiktoken, and weights as safetensors or .bin, in shards or not.
        revision: branch, tag or commit on the hub.
        dtype: of the whole model; `auto` is the checkpoint's own.
        device_map: as in transformers' `from_pretrained`.
        attn_implementation: of the decoder.

    Returns:
        The model, its tokenizer, and a feature extractor for `qwen_audio_features`.

    Raises:
        ModelError: something is missing, gated, unreachable, or not this architecture.
    """
    folder = find_repository(str(location), revision).folder
    outline, tokenizer, extractor = _outline(folder)
    config = outline.config
    where = ", ".join(map(str, weight_files(folder)))
    tensors = convert(read_tensors(folder), key_map(config), where)
    check_shapes(tensors, outline.state_dict(), where)
    given = {"device_map": device_map, "attn_implementation": attn_implementation}
    with opening(where):
        model = QwenAudioForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            **{name: value for name, value in given.items() if value is not None},
        )
    return model.eval(), tokenizer, extractor


def outline_qwen_audio(location: str | Path, *, revision: str | None = None) -> Opened:
    """As `load_qwen_audio`, on the meta device: shapes and tokenizer, no weights, which need not be there."""
    return _outline(find_repository(str(location), revision, weights=False).folder)


def _outline(folder: Path) -> Opened:
    with opening(f"{folder / 'config.json'}"):
        config = read_qwen_audio_config(folder)
    tokenizer = read_qwen_tokenizer(folder / TOKENIZER_FILE, audio_start_id=config.audio_token_id)
    audio: Any = config.audio_config
    with opening(f"{folder / 'config.json'}"), torch.device("meta"):
        extractor = WhisperFeatureExtractor(
            feature_size=audio.num_mel_bins, chunk_length=audio.max_source_positions // 50
        )
        return QwenAudioForConditionalGeneration(config), tokenizer, extractor


def read_qwen_audio_config(folder: Path) -> QwenAudioConfig:
    """The published config.json as configurations of transformers.

    Raises:
        ModelError: a field is missing, or a variant that is not implemented.
    """
    published = read_config(folder)
    audio = field(published, "audio", folder)
    width = field(published, "hidden_size", folder)
    heads = field(published, "num_attention_heads", folder)
    implemented = {
        "kv_channels": (published.get("kv_channels", width // heads), width // heads),
        "rotary_pct": (published.get("rotary_pct", 1.0), 1.0),
        "no_bias": (published.get("no_bias", True), True),
        "audio.avg_pool": (audio.get("avg_pool", True), True),
        "audio.add_audio_bos_eos_token": (audio.get("add_audio_bos_eos_token", True), True),
        "audio.output_dim": (field(audio, "output_dim", folder), width),
    }
    other = [f"{name}={got}, expected {want}" for name, (got, want) in implemented.items() if got != want]
    if other:
        raise ModelError(f"{folder / 'config.json'}: not the released Qwen-Audio architecture: {'; '.join(other)}")
    longest = field(published, "seq_length", folder)
    text_config = Qwen2Config(
        vocab_size=field(published, "vocab_size", folder),
        hidden_size=width,
        intermediate_size=field(published, "intermediate_size", folder) // 2,  # published for both branches together
        num_hidden_layers=field(published, "num_hidden_layers", folder),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        hidden_act="silu",
        max_position_embeddings=longest,
        rms_norm_eps=field(published, "layer_norm_epsilon", folder),
        rope_parameters={"rope_type": "default", "rope_theta": float(field(published, "rotary_emb_base", folder))},
        tie_word_embeddings=published.get("tie_word_embeddings", False),
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    state = field(audio, "n_state", folder)
    audio_config = WhisperConfig(
        num_mel_bins=field(audio, "n_mels", folder),
        d_model=state,
        encoder_layers=field(audio, "n_layer", folder),
        encoder_attention_heads=field(audio, "n_head", folder),
        encoder_ffn_dim=4 * state,
        max_source_positions=field(audio, "n_ctx", folder),
    )
    return QwenAudioConfig(
        text_config=text_config,
        audio_config=audio_config,
        audio_token_id=field(audio, "audio_start_id", folder),
        max_positions=longest,
    )


def key_map(config: QwenAudioConfig) -> dict[str, tuple[str, ...]]:
    """Every published key and the parameters it becomes; several share a packed one, split along its first axis."""
    text: Any = config.text_config
    audio: Any = config.audio_config
    mapped: dict[str, tuple[str, ...]] = {published: (native,) for published, native in _AROUND.items()}
    for index in range(text.num_hidden_layers):
        source, target = f"transformer.h.{index}", f"language_model.layers.{index}"
        mapped |= {f"{source}.{old}": (f"{target}.{new}",) for old, new in _DECODER_LAYER.items()}
        for kind in ("weight", "bias"):
            packed = tuple(f"{target}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            mapped[f"{source}.attn.c_attn.{kind}"] = packed
    for index in range(audio.encoder_layers):
        source, target = f"transformer.audio.blocks.{index}", f"audio_tower.layers.{index}"
        mapped |= {f"{source}.{old}": (f"{target}.{new}",) for old, new in _ENCODER_LAYER.items()}
    return mapped


def convert(tensors: dict[str, Tensor], keys: dict[str, tuple[str, ...]], where: str) -> dict[str, Tensor]:
    """Published tensors under the model's names; views, nothing is copied.

    Raises:
        ModelError: missing or unexpected keys, by their published names.
    """
    check_keys(tensors, keys, where)
    native: dict[str, Tensor] = {}
    for published, targets in keys.items():
        parts = tensors[published].chunk(len(targets))
        if len(parts) != len(targets):
            shape = list(tensors[published].shape)
            raise ModelError(f"{where}: {published} is {shape}, expected {len(targets)} equal parts; download it again")
        native |= zip(targets, parts, strict=True)
    return native
