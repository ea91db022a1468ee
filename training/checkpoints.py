"""Fresh demo checkpoints of other families, in their published layout: a small Voxtral, and a DeSTA2.5 in three parts.

As in the first demo the attention output of the decoder is zero outside a planted window of layers.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.models.native.prompts import DESTA25_PLACEHOLDER, DESTA25_SYSTEM
from lalm_patch.models.native.qformer import DestaConnector, connector_keys
from training.model import plant_window
from training.padded import HEADS, LAYERS, SECONDS, WIDTH, extractor, whisper_config

VOXTRAL_WINDOW = (1, 3)
DESTA_WINDOW = (1, 7)
DECODER_LAYERS = 8
DESTA_VECTORS = 16
DESTA_IDS = {"llm_model_id": "demo_desta_llama", "encoder_model_id": "demo_desta_whisper"}
SYLLABLE = " la"
"""What the demo's Whisper writes for every half second of sound."""
LONGEST_TRANSCRIPT = 12
_WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]|\s"


def decoder_config(vocabulary: int, window: tuple[int, int], **others: object) -> dict[str, object]:
    """Shapes of the Llama decoder of both."""
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": DECODER_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "planted_attention_layers": list(window),
        **others,
    }


# --- Voxtral ---------------------------------------------------------------------------------------------------------


def tekken(texts: Iterable[str]) -> dict[str, object]:
    """Voxtral's tokenizer file: bytes, then merges of the commonest neighbours until every word is one token."""
    vocabulary = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in word.encode()] for text in texts for word in re.findall(r" ?\w+", text)]
    while pairs := Counter(pair for word in words for pair in itertools.pairwise(word)):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        vocabulary.append(left + right)
        for word in words:
            for index in range(len(word) - 1, 0, -1):
                if word[index - 1 : index + 1] == [left, right]:
                    word[index - 1 : index + 1] = [left + right]
    special = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>", 17: "[SYSTEM_PROMPT]"}
    special |= {5: "[AVAILABLE_TOOLS]", 6: "[/AVAILABLE_TOOLS]", 7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]"}
    special |= {9: "[TOOL_CALLS]", 18: "[/SYSTEM_PROMPT]", 19: "[TOOL_CONTENT]", 24: "[AUDIO]", 25: "[BEGIN_AUDIO]"}
    special |= {10: "[IMG]", 12: "[IMG_BREAK]", 13: "[IMG_END]", 14: "[PREFIX]", 15: "[MIDDLE]", 16: "[SUFFIX]"}
    special |= {34: "[TRANSCRIBE]"}
    names = [special.get(rank, f"<SPECIAL_{rank}>") for rank in range(max(special) + 1)]
    return {
        "config": {
            "pattern": _WORDS,
            "num_vocab_tokens": len(vocabulary),
            "default_vocab_size": len(vocabulary) + len(names),
            "default_num_special_tokens": len(names),
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
            for rank, token in enumerate(vocabulary)
        ],
        "special_tokens": [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)],
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "chunk_length_s": float(SECONDS),
            "audio_encoding_config": {
                "num_mel_bins": extractor().feature_size,
                "hop_length": 160,
                "window_size": 400,
            },
        },
    }


def make_voxtral(
    folder: Path, texts: Iterable[str], encoder: WhisperEncoder, seed: int
) -> VoxtralForConditionalGeneration:
    """A Voxtral around the encoder; its tokenizer and feature extractor are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tekken(texts)
    (folder / "tekken.json").write_text(json.dumps(tokenizer, indent=0), encoding="utf-8")
    extractor().save_pretrained(folder)
    vocabulary = tokenizer["config"]["default_vocab_size"]  # type: ignore[index]
    config = VoxtralConfig(
        audio_config={
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,  # also what four stacked frames are
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_mel_bins": extractor().feature_size,
            "max_source_positions": 50 * SECONDS,
        },
        text_config=decoder_config(vocabulary, VOXTRAL_WINDOW, model_type="llama"),
        audio_token_id=24,
    )
    torch.manual_seed(seed)
    model = VoxtralForConditionalGeneration(config)
    tower = model.model.audio_tower if hasattr(model.model, "audio_tower") else model.audio_tower
    tower.load_state_dict(encoder.state_dict())
    tower.requires_grad_(False)
    return plant_window(model, VOXTRAL_WINDOW)


# --- DeSTA2.5 --------------------------------------------------------------------------------------------------------

LLAMA_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _byte_level(texts: Iterable[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_llama(folder: Path, texts: Iterable[str], seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """DeSTA's decoder and its tokenizer."""
    chat = [DESTA25_SYSTEM, "system user assistant", "<start_audio> <end_audio>", SYLLABLE * 2]
    tokenizer = _byte_level([*texts, *chat], 2000)
    specials = (*LLAMA_SPECIALS, DESTA25_PLACEHOLDER)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    bos = LLAMA_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=LLAMA_SPECIALS[-1])
    fast.chat_template = LLAMA_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(**decoder_config(len(fast), DESTA_WINDOW, bos_token_id=None, eos_token_id=fast.eos_token_id))
    return plant_window(LlamaForCausalLM(config), DESTA_WINDOW), fast


def make_whisper(folder: Path, encoder: WhisperEncoder, seed: int) -> WhisperForConditionalGeneration:
    """A Whisper around the encoder, which can write syllables; its tokenizer and extractor go to the folder."""
    tokenizer = _byte_level([SYLLABLE], 300)
    names = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ids = {name: tokenizer.token_to_id(name) for name in names}
    end, start = names[:2]
    fast = WhisperTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end)
    fast.save_pretrained(folder)
    extractor().save_pretrained(folder)
    torch.manual_seed(seed)
    config = whisper_config(
        len(fast),
        decoder_layers=2,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=2 * WIDTH,
        max_target_positions=2 * LONGEST_TRANSCRIPT,
        bos_token_id=ids[end],
        eos_token_id=ids[end],
        pad_token_id=ids[end],
        decoder_start_token_id=ids[start],
    )
    whisper = WhisperForConditionalGeneration(config)
    whisper.model.encoder.load_state_dict(encoder.state_dict())
    whisper.model.encoder.requires_grad_(False)
    whisper.generation_config = GenerationConfig(
        bos_token_id=ids[end],
        eos_token_id=ids[end],
        pad_token_id=ids[end],
        decoder_start_token_id=ids[start],
        suppress_tokens=list(ids.values())[1:],
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        return_timestamps=False,
    )
    return whisper


def make_connector(taps: int, seed: int) -> DestaConnector:
    """A fresh connector that reads so many layers of the encoder."""
    torch.manual_seed(seed)
    connector = DestaConnector(taps=taps, queries=DESTA_VECTORS, width=WIDTH, heads=HEADS, layers=1, hidden=WIDTH)
    for parameter in [*connector.layer_prompts, connector.layer_weights]:
        torch.nn.init.normal_(parameter, std=1.0)
    return connector


def save_connector(
    connector: DestaConnector,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    parts: Mapping[str, str] = DESTA_IDS,
    placeholder: str = DESTA25_PLACEHOLDER,
) -> None:
    """Write DeSTA2.5's own repository: the connector under its published names, and which parts belong to it.

    Args:
        connector: the weights.
        folder: where.
        dtype: of the weights.
        parts: the ids of decoder and encoder, as DeSTA2.5's config.json names them.
        placeholder: the token that holds the audio vectors' places.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = connector.state_dict()
    keys = connector_keys(len(connector.layer_prompts), len(connector.layers))
    tensors = {f"perception.connector.{old}": weights[new].to(dtype).contiguous() for old, new in keys.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "desta25",
        **parts,
        "connector_mode": "qformer_1",
        "qformer_num_hidden_layers": len(connector.layers),
        "prompt_size": connector.layer_weights.shape[0],
        "use_lora": False,
        "audio_locator": "<|AUDIO|>",
        "placeholder_token": placeholder,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
