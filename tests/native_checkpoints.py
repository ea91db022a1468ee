"""Random tiny checkpoints of DeSTA2, DeSTA2.5-Audio and Qwen-Audio in their published layouts.

File names, tensor names and configuration fields are those of the releases; shapes are tiny, windows are 3 s, and the
tokenizers are trained here on the prompts' own words.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

WINDOW_SECONDS = 3
WIDTH, HIDDEN, HEADS = 16, 32, 2

TEXTS = (
    "What is the gender of the speaker in the speech? Possible options: male, female. The speaker's gender is",
    "Focus on the input audio. Focus on the audio clips and instructions. You are a helpful assistant.",
    " Kids are talking by the door. Dogs are sitting by the door. system user assistant audio Audio 1: 2:",
    "Cutting Knowledge Date: Today Date: \n\n start_audio end_audio>\n",
)
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_87|>",
)
_TURNS = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ DATE }}{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_TEMPLATE = _TURNS.replace("{{ DATE }}", "")
LLAMA31_TEMPLATE = _TURNS.replace(
    "{{ DATE }}", "{% if m['role'] == 'system' %}Cutting Knowledge Date: Today Date: \n\n{% endif %}"
)


class DestaFiles(NamedTuple):
    """The three repositories of a DeSTA model."""

    location: Path
    decoder: Path
    encoder: Path


def fill(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random tensors, each drawn from its own name, large enough that every one of them matters."""
    tensors = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(seed + sum(ord(letter) << (i % 16) for i, letter in enumerate(name)))
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_norm = name.endswith("weight")
            tensors[name] = is_norm + 0.1 * noise
        else:
            fan_in = 1 if "embed_tokens" in name or "wte" in name or "prompts" in name else math.prod(shape[1:])
            tensors[name] = noise / math.sqrt(fan_in)
    return tensors


def randomise(model: nn.Module, seed: int) -> None:
    """Fill a module's parameters by their names."""
    parameters = dict(model.named_parameters())
    values = fill({name: tuple(parameter.shape) for name, parameter in parameters.items()}, seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _trained(split: str, size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[],
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def save_llama(folder: Path, template: str, seed: int) -> Path:
    """A Llama repository: grouped-query attention, a tokenizer that adds a BOS of its own, a chat template."""
    tokenizer = _trained(LLAMA_SPLIT, 420)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIALS])
    bos = LLAMA_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def save_whisper(folder: Path, *, layers: int, mels: int, seed: int) -> Path:
    """A Whisper repository with a window of 3 s. No token is a timestamp."""
    tokenizer = _trained(LLAMA_SPLIT, 300)
    names = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = {name: tokenizer.token_to_id(name) for name in names}
    WhisperTokenizerFast(
        tokenizer_object=tokenizer, eos_token=names[0], bos_token=names[0], unk_token=names[0]
    ).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels, chunk_length=WINDOW_SECONDS).save_pretrained(folder)
    config = WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_mel_bins=mels,
        d_model=WIDTH,
        encoder_layers=layers,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=32,
        max_source_positions=50 * WINDOW_SECONDS,
        max_target_positions=24,
        bos_token_id=ids[names[0]],
        eos_token_id=ids[names[0]],
        pad_token_id=ids[names[0]],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    model = WhisperForConditionalGeneration(config)
    randomise(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=ids[names[0]],
        eos_token_id=ids[names[0]],
        pad_token_id=ids[names[0]],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        begin_suppress_tokens=[ids[names[0]]],
        suppress_tokens=list(ids.values())[1:],
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        return_timestamps=False,
        max_length=20,
    )
    model.save_pretrained(folder)
    return folder


def connector_shapes(taps: int, layers: int, queries: int) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a connector."""
    shapes: dict[str, tuple[int, ...]] = {f"layer_prompts.{tap}": (1, queries, WIDTH) for tap in range(taps)}
    shapes["layer_weights"] = (queries, taps)
    linear = {"proj.1": (HIDDEN, WIDTH)}
    norms = ["proj.0"]
    for layer in range(layers):
        block = f"qformer.layer.{layer}"
        for attention in ("attention", "crossattention"):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear[f"{block}.{attention}.{part}"] = (WIDTH, WIDTH)
            norms.append(f"{block}.{attention}.output.LayerNorm")
        linear |= {f"{block}.intermediate.dense": (3072, WIDTH), f"{block}.output.dense": (WIDTH, 3072)}
        norms.append(f"{block}.output.LayerNorm")
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | {f"{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}


def save_desta2(root: Path) -> DestaFiles:
    """DeSTA2: qformer_connector.pth without a prefix; Whisper of 12 layers."""
    location = root / "DeSTA2-8B-beta"
    location.mkdir(parents=True)
    decoder = save_llama(root / "Meta-Llama-3-8B-Instruct", LLAMA3_TEMPLATE, seed=1)
    encoder = save_whisper(root / "whisper-small", layers=12, mels=80, seed=2)
    torch.save(fill(connector_shapes(4, 2, 64), seed=3), location / "qformer_connector.pth")
    config = {"model_type": "DestaModel", "llama_model_id": str(decoder), "whisper_model_id": str(encoder)}
    (location / "config.json").write_text(json.dumps({**config, "prompt_size": 64}))
    return DestaFiles(location, decoder, encoder)


def save_desta25(root: Path) -> DestaFiles:
    """DeSTA2.5: model.safetensors with a prefix; Whisper of 4 layers, so that the last tap is the last layer."""
    location = root / "DeSTA2.5-Audio-Llama-3.1-8B"
    location.mkdir(parents=True)
    decoder = save_llama(root / "Llama-3.1-8B-Instruct", LLAMA31_TEMPLATE, seed=4)
    encoder = save_whisper(root / "whisper-large-v3", layers=4, mels=128, seed=5)
    tensors = fill(connector_shapes(4, 3, 64), seed=6)
    save_file(
        {f"perception.connector.{name}": value for name, value in tensors.items()}, location / "model.safetensors"
    )
    config = {
        "model_type": "desta25",
        "llm_model_id": str(decoder),
        "encoder_model_id": str(encoder),
        "connector_mode": "qformer_1",
        "qformer_num_hidden_layers": 3,
        "prompt_size": 64,
        "use_lora": False,
        "audio_locator": "<|AUDIO|>",
        "placeholder_token": "<|reserved_special_token_87|>",
    }
    (location / "config.json").write_text(json.dumps(config))
    return DestaFiles(location, decoder, encoder)


def qwen_ranks() -> dict[bytes, int]:
    """256 bytes and then merges of the prompts' commonest neighbours, by rank, until every word is one token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for text in TEXTS for word in re.findall(r" ?\w+", text)]
    while pairs := Counter(pair for word in words for pair in itertools.pairwise(word)):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for word in words:
            for index in range(len(word) - 1, 0, -1):
                if word[index - 1 : index + 1] == [left, right]:
                    word[index - 1 : index + 1] = [left + right]
    return ranks


QWEN = {"layers": 3, "heads": 4, "intermediate": 96, "audio_layers": 2, "audio_heads": 2, "state": 16}


def qwen_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of Qwen-Audio."""
    state, branch = QWEN["state"], QWEN["intermediate"] // 2
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("transformer.wte.weight", "lm_head.weight"), (vocabulary, HIDDEN)
    )
    shapes["transformer.ln_f.weight"] = (HIDDEN,)
    for layer in range(QWEN["layers"]):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.ln_1.weight": (HIDDEN,), f"{block}.ln_2.weight": (HIDDEN,)}
        shapes |= {f"{block}.attn.c_attn.weight": (3 * HIDDEN, HIDDEN), f"{block}.attn.c_attn.bias": (3 * HIDDEN,)}
        shapes |= {f"{block}.attn.c_proj.weight": (HIDDEN, HIDDEN), f"{block}.mlp.c_proj.weight": (HIDDEN, branch)}
        shapes |= {f"{block}.mlp.w1.weight": (branch, HIDDEN), f"{block}.mlp.w2.weight": (branch, HIDDEN)}
    audio = {"conv1": (state, 80, 3), "conv2": (state, state, 3), "proj": (HIDDEN, state), "ln_post": (state,)}
    for layer in range(QWEN["audio_layers"]):
        block = f"blocks.{layer}"
        audio |= {f"{block}.attn.{name}": (state, state) for name in ("query", "value", "out")}
        audio |= {f"{block}.attn_ln": (state,), f"{block}.mlp_ln": (state,)}
        audio |= {f"{block}.mlp.0": (4 * state, state), f"{block}.mlp.2": (state, 4 * state)}
        shapes[f"transformer.audio.{block}.attn.key.weight"] = (state, state)
    for name, shape in audio.items():
        shapes |= {f"transformer.audio.{name}.weight": shape, f"transformer.audio.{name}.bias": shape[:1]}
    shapes["transformer.audio.positional_embedding"] = (50 * WINDOW_SECONDS, state)
    shapes["transformer.audio.audio_bos_eos_token.weight"] = (2, HIDDEN)
    return shapes


def save_qwen_audio(folder: Path) -> Path:
    """Qwen-Audio: one model.safetensors, config.json, qwen.tiktoken."""
    folder.mkdir(parents=True)
    ranks = qwen_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    start = len(ranks) + 230
    vocabulary = start + 16
    config = {
        "model_type": "qwen",
        "hidden_size": HIDDEN,
        "intermediate_size": QWEN["intermediate"],
        "num_hidden_layers": QWEN["layers"],
        "num_attention_heads": QWEN["heads"],
        "kv_channels": HIDDEN // QWEN["heads"],
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "seq_length": 256,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": vocabulary,
        "audio": {
            "n_mels": 80,
            "n_ctx": 50 * WINDOW_SECONDS,
            "n_state": QWEN["state"],
            "n_head": QWEN["audio_heads"],
            "n_layer": QWEN["audio_layers"],
            "output_dim": HIDDEN,
            "avg_pool": True,
            "add_audio_bos_eos_token": True,
            "audio_start_id": start,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(fill(qwen_shapes(vocabulary), seed=7), folder / "model.safetensors")
    return folder
