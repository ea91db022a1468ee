"""The demo model: a small Qwen2-Audio whose decoder attends in a planted window of layers only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

Model = TypeVar("Model", bound=PreTrainedModel)

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
SECONDS = 5
MEL_BINS = 64
LAYERS = 8
WINDOW = (4, 7)


def make_processor(texts: Iterable[str]) -> Qwen2AudioProcessor:
    """Feature extractor and a byte-level BPE in which every word of `texts`, with its blank, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS)
    processor = Qwen2AudioProcessor(extractor, fast)
    processor.chat_template = processor.default_chat_template
    return processor


def make_model(
    processor: Qwen2AudioProcessor, seed: int, hidden: int = 128, layers: int = LAYERS
) -> Qwen2AudioForConditionalGeneration:
    """A fresh model with the attention window planted: `o_proj` is zero and frozen outside of it."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    first, end = WINDOW
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": hidden,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 4 * hidden,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": SECONDS * 50,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "planted_attention_layers": [first, end],
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    return plant_window(Qwen2AudioForConditionalGeneration(config))


def plant_window(model: Model, window: tuple[int, int] = WINDOW) -> Model:
    """Make the attention output of every decoder layer outside a window zero, and keep it so."""
    first, end = window
    for index, layer in enumerate(model.get_decoder().layers):
        if not first <= index < end:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            layer.self_attn.o_proj.weight.requires_grad_(False)
    return model
