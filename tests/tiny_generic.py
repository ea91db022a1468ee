"""Random tiny checkpoints of the architectures the generic adapter takes, saved in their published layout.

As in `tiny_models`: random weights, all else real. The chat templates are the ChatML form of the Qwen family, written
out here; a checkpoint from the hub brings its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import prompt_tokenizer, randomise
from transformers import PreTrainedModel, PreTrainedTokenizerFast, WhisperFeatureExtractor

AUDIO, BOS, EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
OTHERS = ("<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", AUDIO, BOS, EOS, *OTHERS)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{{ AUDIO }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRAPPED = TEMPLATE.replace("{{ AUDIO }}", BOS + AUDIO + EOS)  # the template writes the tags
BARE = TEMPLATE.replace("{{ AUDIO }}", AUDIO)  # there are none, or the processor writes them

PLAIN = (  # takes strings, not parts
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_with_audio() -> PreTrainedTokenizerFast:
    """The prompts' tokenizer, which also names its multimodal tokens."""
    base = prompt_tokenizer(SPECIALS)
    names = ("image_token", "video_token", "vision_bos_token", "vision_eos_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        eos_token=SPECIALS[0],
        pad_token=SPECIALS[0],
        extra_special_tokens={
            "audio_token": AUDIO,
            "audio_bos_token": BOS,
            "audio_eos_token": EOS,
            **dict(zip(names, OTHERS, strict=True)),
        },
    )


def text_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """A decoder of three layers with grouped-query attention."""
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    } | changes


def audio_config(**changes: Any) -> dict[str, Any]:
    """A Whisper-like encoder of one layer over three seconds."""
    return {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 150,
    } | changes


WINDOWED_SCALE = 0.15
"""Weights of the encoders with three convolutions: smaller ones leave next to nothing of the sound."""


def _save(folder: Path, model: PreTrainedModel, processor: Any, scale: float = 0.08) -> Path:
    randomise(model, seed=0, scale=scale).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_flamingo(folder: Path, model_type: str) -> Path:
    """AudioFlamingo3, or MusicFlamingo, whose processor writes the tags and whose audio positions carry time."""
    tokenizer, name = tokenizer_with_audio(), {"audioflamingo3": "AudioFlamingo3", "musicflamingo": "MusicFlamingo"}
    prefix = name[model_type]
    tags = {"audio_bos_token": BOS, "audio_eos_token": EOS} if model_type == "musicflamingo" else {}
    processor = getattr(transformers, f"{prefix}Processor")(
        WhisperFeatureExtractor(feature_size=16, chunk_length=3),
        tokenizer,
        chat_template=BARE,
        audio_token=AUDIO,
        **tags,
    )
    ids = {f"{tag}_id": tokenizer.convert_tokens_to_ids(token) for tag, token in tags.items()}
    config = getattr(transformers, f"{prefix}Config")(
        audio_config={"model_type": "audioflamingo3_encoder"} | audio_config(),
        text_config={"model_type": "qwen2"} | text_config(tokenizer),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
        **ids,
    )
    return _save(folder, getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor)


def save_glmasr(folder: Path) -> Path:
    """GLM-ASR: a rotary audio encoder, four frames to one position, a Llama decoder."""
    tokenizer = tokenizer_with_audio()
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=4)  # frames in whole fours
    processor = transformers.GlmAsrProcessor(extractor, tokenizer, chat_template=WRAPPED, audio_token=AUDIO)
    config = transformers.GlmAsrConfig(
        audio_config={
            "model_type": "glmasr_encoder",
            "hidden_size": 32,
            "intermediate_size": 128,  # the projector reads four stacked frames
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_bins": 16,
            "max_position_embeddings": 200,
        },
        text_config={"model_type": "llama"} | text_config(tokenizer),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
        tie_word_embeddings=False,
    )
    return _save(folder, transformers.GlmAsrForConditionalGeneration(config), processor)


def save_qwen3_asr(folder: Path) -> Path:
    """Qwen3-ASR: convolutions over windows of one second, 13 positions each, a Qwen3 decoder."""
    tokenizer = tokenizer_with_audio()
    extractor = transformers.Qwen3ASRFeatureExtractor(feature_size=16)
    processor = transformers.Qwen3ASRProcessor(extractor, tokenizer, chat_template=WRAPPED)
    config = transformers.Qwen3ASRConfig(
        audio_config={"model_type": "qwen3_asr_encoder"} | audio_config(output_dim=64, downsample_hidden_size=8),
        text_config={"model_type": "qwen3"} | text_config(tokenizer),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return _save(folder, transformers.Qwen3ASRForConditionalGeneration(config), processor, WINDOWED_SCALE)


def save_omni(folder: Path, model_type: str) -> Path:
    """A Qwen Omni thinker inside the config of the whole model; rotary positions have three axes."""
    tokenizer = tokenizer_with_audio()
    mrope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    token_id = tokenizer.convert_tokens_to_ids
    if model_type == "qwen2_5_omni":
        text, key = text_config(tokenizer, rope_parameters=mrope), "audio_token_index"
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
        audio = audio_config(output_dim=64, n_window=50)
        prefix = "Qwen2_5Omni"
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text = text_config(tokenizer, rope_parameters=mrope | {"mrope_interleaved": True}, **experts)
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        audio = audio_config(output_dim=64, downsample_hidden_size=8)
        prefix, key = "Qwen3OmniMoe", "audio_token_id"
    config = getattr(transformers, f"{prefix}ThinkerConfig")(
        audio_config=audio,
        vision_config=vision,
        text_config=text,
        **{key: token_id(AUDIO), key.replace("audio", "image"): token_id(OTHERS[0])},
        **{key.replace("audio", "video"): token_id(OTHERS[1]), "audio_start_token_id": token_id(BOS)},
        vision_start_token_id=token_id(OTHERS[2]),
    )
    model = getattr(transformers, f"{prefix}ThinkerForConditionalGeneration")(config)
    # The published checkpoint holds thinker, talker and vocoder; its weights carry the part's name as a prefix.
    randomise(model, seed=0, scale=0.08 if prefix == "Qwen2_5Omni" else WINDOWED_SCALE)
    weights = {f"thinker.{name}": value for name, value in model.state_dict().items()}
    weights["talker.codec_head.weight"] = torch.zeros(2, 2)
    model.save_pretrained(folder, state_dict=weights)
    whole = {"model_type": model_type, "architectures": [f"{prefix}Model"], "thinker_config": config.to_dict()}
    (folder / "config.json").write_text(json.dumps(whole))
    WhisperFeatureExtractor(feature_size=16, chunk_length=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(WRAPPED)
    return folder


def save_phi4(folder: Path) -> Path:
    """Phi-4-multimodal: plain strings in the template, a decoder that puts the audio in by itself."""
    tokenizer = tokenizer_with_audio()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"crop_size": 28, "image_size": 28, "patch_size": 14}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "input_size": 16}
    audio |= {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8}
    text = text_config(tokenizer, max_position_embeddings=2048, original_max_position_embeddings=2048)
    del text["head_dim"]
    config = transformers.Phi4MultimodalConfig(
        audio_config=audio | {"audio_token_id": tokenizer.convert_tokens_to_ids(AUDIO), "feature_layer": 0},
        vision_config=vision | {"image_token_id": tokenizer.convert_tokens_to_ids(OTHERS[0])},
        sliding_window=4096,  # as published, longer than any prompt
        **text,
    )
    model = randomise(transformers.Phi4MultimodalForCausalLM(config), seed=0, scale=WINDOWED_SCALE)
    model.save_pretrained(folder)
    transformers.Phi4MultimodalFeatureExtractor(feature_size=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    return folder


def save_generic(folder: Path, model_type: str) -> Path:
    """The tiny checkpoint of one architecture."""
    if model_type in ("audioflamingo3", "musicflamingo"):
        return save_flamingo(folder, model_type)
    if model_type in ("qwen2_5_omni", "qwen3_omni_moe"):
        return save_omni(folder, model_type)
    others = {
        "glmasr": save_glmasr,
        "qwen3_asr": save_qwen3_asr,
        "phi4_multimodal": save_phi4,
    }
    return others[model_type](folder)
