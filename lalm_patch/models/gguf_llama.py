"""A Llama in a GGUF file: its configuration, tokenizer and weights, as transformers has them from a folder.

Quantised weights are unpacked: what is computed with are the numbers that the blocks stand for, in `model.dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lalm_patch.errors import ModelError
from lalm_patch.models.files import opening, reading
from lalm_patch.models.gguf_format import GGUFFile, StoredTensor, read_gguf
from lalm_patch.models.weights import refuse_gaps

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
"""What Llama 3.1's rotary frequencies are divided by; its config.json has four numbers instead that give the same."""
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BYTES, _PIECES = "gpt2", "llama"  # tokenizer.ggml.model: pairs of bytes; SentencePiece
_CONTROL, _ADDED = 3, 4  # tokenizer.ggml.token_type
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe")
"""Vocabularies that have words which merging their parts does not give."""


def gguf_config(path: Path) -> LlamaConfig:
    """The model's shapes, from the file's metadata.

    Raises:
        ModelError: the file is damaged, of another architecture, lacks tensors or has others, or says something that is
            not computed here.
    """
    return _checked(read_gguf(path))[0]


def gguf_tokenizer(path: Path) -> Any:
    """The model's tokenizer with its chat template, from the file's metadata and nothing beside it.

    Raises:
        ModelError: the file is damaged, or has no chat template or a way to split text that is not known.
    """
    file = read_gguf(path)
    metadata, where = file.metadata, f"{path}: its tokenizer"
    if not isinstance(metadata.get("tokenizer.chat_template"), str):
        raise ModelError(f"{path}: has no chat template (tokenizer.chat_template); give a chat model's file or folder")
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind not in (_BYTES, _PIECES) or (kind == _BYTES and split not in _splits()):
        raise ModelError(
            f"{where} splits text in a way that is not known here (tokenizer.ggml.model is {kind!r}, and "
            f"tokenizer.ggml.pre {split!r}); give the checkpoint's folder instead, whose tokenizer.json says how"
        )
    with opening(where):
        if kind == _BYTES:
            tokenizer = _byte_level(metadata, _splits()[split], split in _WHOLE_WORDS_FIRST)
        else:  # not by `from_pretrained`, which would also read whatever lies beside the file
            tokenizer = PreTrainedTokenizerFast(name_or_path=str(path.parent), gguf_file=path.name)
        # llama.cpp's rule for files that do not say; versions of transformers differ.
        begins = metadata.get("tokenizer.ggml.add_bos_token", kind == _PIECES or split in _WHOLE_WORDS_FIRST)
        before = f"{tokenizer.bos_token} " if begins and tokenizer.bos_token else ""
        named = [(tokenizer.bos_token, tokenizer.bos_token_id)] if before else []
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{before}$A", special_tokens=named)
    return tokenizer


@cache
def _splits() -> dict[Any, pre_tokenizers.PreTokenizer]:
    """How text is split before pairs are merged, by `tokenizer.ggml.pre`.

    transformers knows most by a pattern. The others it would split as GPT-2, which is wrong where each digit is by
    itself (SmolLM2).
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digit_by_digit = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    patterns = {name: pre_tokenizers.Split(Regex(text), "isolated") for name, text in GGUF_PRE_TOKENIZER_SPLITS.items()}
    return {
        **{name: pre_tokenizers.Sequence([pattern, bytewise]) for name, pattern in patterns.items()},
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), digit_by_digit),
        **dict.fromkeys(("gpt-2", "mpt", "olmo"), as_gpt2),
    }


def _byte_level(metadata: Mapping[str, Any], split: pre_tokenizers.PreTokenizer, whole_words_first: bool) -> Any:
    """Byte-level pairs, as in GPT-2 and since.

    transformers' own reading goes through GPT-2's class, which brings that model's token into every vocabulary.
    """
    words = metadata["tokenizer.ggml.tokens"]
    pairs = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    vocabulary = {word: id for id, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words_first))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    backend.add_tokens(
        [
            AddedToken(word, normalized=False, special=kind == _CONTROL)
            for word, kind in zip(words, kinds, strict=False)
            if kind in (_CONTROL, _ADDED)
        ]
    )
    named = {f"{name}_token": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata["tokenizer.chat_template"],
        **{name: words[id] for name, id in named.items() if id is not None},
    )


def load_gguf(
    path: Path, *, dtype: torch.dtype | str = torch.float32, attn_implementation: str | None = None
) -> LlamaForCausalLM:
    """The model with its weights unpacked.

    Args:
        path: the file.
        dtype: what the weights are unpacked into; `auto` is float32.
        attn_implementation: as in `from_pretrained`; None for its default.

    Raises:
        ModelError: as `gguf_config`; or the package `gguf` is missing.
    """
    file = read_gguf(path)
    config, names = _checked(file)
    unpack = _unpacker(path)
    wanted = torch.float32 if isinstance(dtype, str) else dtype
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    with reading(path):
        numbers = np.memmap(path, np.uint8, "r")
        weights = {}
        for name, known in names.items():
            found = _unpacked(unpack, numbers, file.tensors[name])
            part = name.split(".")[-2]
            weights[known] = (_in_halves(found, heads[part]) if part in heads else found).to(wanted)
        factors = _unpacked(unpack, numbers, file.tensors[ROPE_FACTORS]) if ROPE_FACTORS in file.tensors else None
    given = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with opening(str(path)):
        model, report = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=weights, dtype=wanted, output_loading_info=True, **given
        )
    refuse_gaps(str(path), missing=report["missing_keys"], unexpected=report["unexpected_keys"])
    if factors is not None:
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / factors
    return model


def _checked(file: GGUFFile) -> tuple[LlamaConfig, dict[str, str]]:
    """The configuration, and transformers' name of every tensor by its name in the file.

    The file has exactly these tensors, in the shapes that the configuration gives: known before any is read.
    """
    config = _config(file)
    with opening(f"{file.path}: its sizes"), torch.device("meta"):
        outline = LlamaForCausalLM(config).state_dict()
    names = {old: new for old, new in _OUTSIDE.items() if old != "output.weight" or not config.tie_word_embeddings}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{old}.weight": f"model.layers.{layer}.{new}.weight" for old, new in _IN_LAYER.items()}
    expected = {old: tuple(outline[new].shape) for old, new in names.items()}
    if ROPE_FACTORS in file.tensors:
        expected[ROPE_FACTORS] = (config.head_dim // 2,)
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    both = found.keys() & expected.keys()
    refuse_gaps(
        str(file.path),
        missing=expected.keys() - found.keys(),
        unexpected=found.keys() - expected.keys(),
        misshapen={name: (found[name], expected[name]) for name in both if found[name] != expected[name]},
    )
    return config, names


def _config(file: GGUFFile) -> LlamaConfig:
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise ModelError(
            f"{file.path}: a GGUF file of architecture {found!r}, expected {ARCHITECTURE!r}; give the checkpoint's "
            "folder instead"
        )
    heads, width = _size(file, "attention.head_count"), _size(file, "embedding_length")
    head = _size(file, "attention.key_length", width // heads)
    turned = {_size(file, name, head) for name in ("rope.dimension_count", "attention.value_length")}
    scaling = file.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
    if turned != {head} or scaling != "none":
        raise ModelError(
            f"{file.path}: expected heads that are rotated as a whole and without scaling, got {head} dimensions of "
            f"which {sorted(turned)} and rope.scaling.type={scaling!r}; give the checkpoint's folder"
        )
    layers = _size(file, "block_count")
    if layers > len(file.tensors):  # a model of so many layers is not even outlined
        raise ModelError(
            f"{file.path}: {layers} layers and {len(file.tensors)} tensors; it was changed, download it again"
        )
    words = file.metadata.get("tokenizer.ggml.tokens")
    named = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    with opening(f"{file.path}: its sizes"):
        return LlamaConfig(
            vocab_size=_size(file, "vocab_size", len(words) if isinstance(words, list) else None),
            hidden_size=width,
            intermediate_size=_size(file, "feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_size(file, "attention.head_count_kv", heads),
            head_dim=head,
            max_position_embeddings=_size(file, "context_length"),
            rms_norm_eps=_positive(file, "attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": _positive(file, "rope.freq_base", 10_000.0)},
            tie_word_embeddings="output.weight" not in file.tensors,
            bos_token_id=named["bos"],
            eos_token_id=named["eos"],
        )


def _size(file: GGUFFile, name: str, default: int | None = None) -> int:
    found = file.metadata.get(f"{ARCHITECTURE}.{name}", default)
    if not isinstance(found, int) or found < 1:
        raise ModelError(f"{file.path}: its metadata give {found!r} for {ARCHITECTURE}.{name}, expected a size")
    return found


def _positive(file: GGUFFile, name: str, default: float | None = None) -> float:
    found = file.metadata.get(f"{ARCHITECTURE}.{name}", default)
    if not isinstance(found, float) or not found > 0:
        raise ModelError(f"{file.path}: its metadata give {found!r} for {ARCHITECTURE}.{name}, expected a number")
    return found


def _unpacked(unpack: Callable[[np.ndarray, int], np.ndarray], numbers: np.ndarray, tensor: StoredTensor) -> Tensor:
    """The tensor in float32, in memory of its own."""
    stored = numbers[tensor.offset : tensor.offset + tensor.bytes].reshape(*tensor.shape[:-1], tensor.row_bytes)
    return torch.from_numpy(np.array(unpack(stored, tensor.type), np.float32))


def _unpacker(path: Path) -> Callable[[np.ndarray, int], np.ndarray]:
    """What makes numbers of bytes [..., bytes of a row] that are stored as one of ggml's types."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise ModelError(
            f"{path}: a GGUF file, which the package gguf unpacks, and it is missing: pip install 'lalm_patch[gguf]'"
        ) from None
    return lambda stored, kind: dequantize(stored, GGMLQuantizationType(kind))


def _in_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in transformers' order: of each head the first of all rotated pairs, then the second.

    llama.cpp rotates neighbours, so its files have the two of each pair beside each other.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
