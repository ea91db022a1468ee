"""Random tiny checkpoints of real architectures, saved in their published layout.

The weights are random, everything else is real: the configuration class, the processor, the chat template, the file
names. Each builder writes a folder that the package loads through the same path as a checkpoint from the hub.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import mistral_common
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)

QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")

PROMPT_TEXTS = (
    "What animal makes the sound? Possible options: dog, cat, pig, cow, frog, hen, rooster, sheep, crow.",
    "What is the emotion of the speaker in the speech? Possible options: angry, disgust, fear, happy, sad.",
    "What is the gender of the speaker in the speech? Possible options: male, female.",
    "What is the language spoken in the speech? Possible options: English, German, Spanish, French, Italian, Chinese,"
    " Japanese, Korean.",
    "The sound file's animal is The speaker's emotion is The speaker's gender is The speech's spoken language is",
    "You are a helpful assistant. system user assistant Audio 1: Focus on the audio.",
)


def prompt_tokenizer(specials: tuple[str, ...] = QWEN_SPECIALS, merges_for: int = 3) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the prompts, with its leading blank, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPT_TEXTS * merges_for, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=specials[0],
        pad_token=specials[0],
        clean_up_tokenization_spaces=False,
    )


def randomise(model: PreTrainedModel, seed: int, scale: float = 0.08) -> PreTrainedModel:
    """Weights large enough that every layer matters, and a head that makes probabilities far from uniform.

    The default initialisation leaves tiny models nearly linear and every token equally likely, so that a difference of
    1e-5 in probability would prove nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.get_output_embeddings().weight.mul_(6)
    return model.eval()


def plant_attention_window(model: PreTrainedModel, first: int, end: int) -> None:
    """Remove the attention output of every decoder layer outside [first, end)."""
    with torch.no_grad():
        for index, layer in enumerate(model.get_decoder().layers):
            if not first <= index < end:
                layer.self_attn.o_proj.weight.zero_()


def save_tiny_qwen2_audio(
    folder: Path,
    *,
    layers: int = 4,
    seed: int = 0,
    window: tuple[int, int] | None = None,
    seconds: int = 3,
    cut_audio: bool = False,
) -> Path:
    """A random Qwen2-Audio checkpoint with grouped-query attention and an audio window of `seconds`."""
    tokenizer = prompt_tokenizer()
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)
    processor = Qwen2AudioProcessor(extractor, tokenizer)
    processor.chat_template = processor.default_chat_template
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": seconds * 50,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    model = randomise(Qwen2AudioForConditionalGeneration(config), seed)
    if window is not None:
        plant_attention_window(model, *window)
    if cut_audio:
        with torch.no_grad():
            model.model.multi_modal_projector.linear.weight.zero_()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tiny_tekken(folder: Path, ranks: int = 2000) -> Path:
    """A Tekken vocabulary with Voxtral's audio section, cut from the text vocabulary mistral-common ships."""
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tekken = json.loads(source.read_text())
    del tekken["image"]
    # Merges are implied by ranks: keep the first ones, and add the prompts' own words whole.
    tekken["vocab"] = tekken["vocab"][:ranks]
    known = {entry["token_bytes"] for entry in tekken["vocab"]}
    plain = " ".join(PROMPT_TEXTS).replace(",", "").replace(".", "")
    for word in sorted({f" {word}" for word in plain.split()}):
        for end in range(3, len(word) + 1):  # every prefix, so that the merge path to the whole word exists
            piece = base64.b64encode(word[:end].encode()).decode()
            if piece not in known:
                known.add(piece)
                tekken["vocab"].append({"rank": len(tekken["vocab"]), "token_bytes": piece, "token_str": word[:end]})
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    names += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
    names += ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
    names += [f"<SPECIAL_{rank}>" for rank in range(len(names), 24)] + ["[AUDIO]", "[BEGIN_AUDIO]"]
    names += [f"<SPECIAL_{rank}>" for rank in range(len(names), 34)] + ["[TRANSCRIBE]"]
    tekken["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    tekken["config"] |= {
        "version": "v7",
        "num_vocab_tokens": len(tekken["vocab"]),
        "default_num_special_tokens": 100,
        "default_vocab_size": 100 + len(tekken["vocab"]),
    }
    tekken["audio"] = {
        "sampling_rate": 16000,
        "frame_rate": 12.5,
        "chunk_length_s": 30.0,
        "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
    }
    path = folder / "tekken.json"
    path.write_text(json.dumps(tekken))
    return path


def save_tiny_voxtral(folder: Path, *, layers: int = 3, seed: int = 0, window: tuple[int, int] | None = None) -> Path:
    """A random Voxtral checkpoint: 128 mel bins and 375 audio positions per 30 s, as published, all else tiny."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads(tiny_tekken(folder).read_text())["config"]["default_vocab_size"]
    WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    config = VoxtralConfig(
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 64,  # four encoder frames are stacked into one audio embedding
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
            "rope_theta": 1e4,
        },
        audio_token_id=24,
    )
    model = randomise(VoxtralForConditionalGeneration(config), seed)
    if window is not None:
        plant_attention_window(model, *window)
    model.save_pretrained(folder)
    return folder
