"""Compare prompts and target tokens with recorded ids, using the published vocabularies.

    python benchmarks/real_vocabularies.py --llama tokenizer.model --qwen qwen.tiktoken --reference prompts.json

Vocabularies cannot be shipped here. Llama 3's `tokenizer.model` is in every Llama 3 repository and in the PyPI package
llama-models; `qwen.tiktoken` in Qwen-Audio's repositories and in the PyPI package dashscope; Voxtral's text vocabulary
comes with mistral-common. Needs tiktoken. Exits with 1 if an id differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mistral_common
from tokenizers import processors
from transformers import AutoProcessor, PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor
from transformers.convert_slow_tokenizer import TikTokenConverter

from lalm_patch.models import native
from lalm_patch.models.native.qwen_tokenizer import read_qwen_tokenizer
from lalm_patch.models.qwen2_audio import Qwen2Audio
from lalm_patch.models.voxtral import Voxtral
from lalm_patch.stimuli import Prompt

PROMPT = Prompt("What is the gender of the speaker in the speech?", ("male", "female"), "The speaker's gender is")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
_TURNS = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ DATE }}{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_DATE = "{% if m['role'] == 'system' %}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{% endif %}"


def llama(vocabulary: Path, release: str) -> PreTrainedTokenizerFast:
    """Llama 3's or 3.1's tokenizer: the same ranks, other names for the special tokens."""
    fixed = {128000: "begin_of_text", 128001: "end_of_text", 128006: "start_header_id", 128007: "end_header_id"}
    fixed[128009] = "eot_id"
    if release == "3.1":
        fixed |= {128004: "finetune_right_pad_id", 128008: "eom_id", 128010: "python_tag"}
    names, reserved = [], 0
    for id in range(128000, 128256):
        if id in fixed:
            names.append(f"<|{fixed[id]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    converted = TikTokenConverter(str(vocabulary), extra_special_tokens=names).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, bos_token=names[0], eos_token="<|eot_id|>")
    tokenizer.chat_template = _TURNS.replace("{{ DATE }}", _DATE if release == "3.1" else "")
    return tokenizer


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Llama's own post-processor, which begins every text with a BOS."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def qwen2_audio(vocabulary: Path) -> Qwen2Audio:
    """Qwen2-Audio's processor on Qwen's ranks."""
    converted = TikTokenConverter(str(vocabulary), QWEN_SPLIT, extra_special_tokens=list(QWEN2_SPECIALS)).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer)
    processor.chat_template = processor.default_chat_template
    return Qwen2Audio(processor)


def voxtral(folder: Path) -> Voxtral:
    """Voxtral's processor on mistral-common's text vocabulary, with the audio tokens at their ranks."""
    tekken = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    tekken.pop("image", None)
    fixed = "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
    fixed += " [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT]"
    fixed += " [/SYSTEM_PROMPT] [TOOL_CONTENT]"
    names = dict(enumerate(fixed.split())) | {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
    tekken["special_tokens"] = [
        {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True} for rank in range(35)
    ]
    tekken["config"]["version"] = "v7"
    tekken["audio"] = {
        "sampling_rate": 16000,
        "frame_rate": 12.5,
        "chunk_length_s": 30.0,
        "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    (folder / "config.json").write_text(json.dumps({"model_type": "voxtral"}))
    WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
    return Voxtral(AutoProcessor.from_pretrained(folder, local_files_only=True))


def without_audio(prompt: native.NativePrompt) -> list[int]:
    """Ids of the text positions."""
    return [id for id, audio in zip(prompt.ids, prompt.audio_mask, strict=True) if not audio]


def compare(options: argparse.Namespace) -> list[tuple[str, bool, str]]:
    """(what, whether the ids agree, how many) of every prompt and label of the reference."""
    reference: dict[str, Any] = json.loads(options.reference.read_text())
    results = []

    def check(name: str, got: list[int], expected: list[int]) -> None:
        results.append((name, got == expected, f"{len(got)} ids, expected {len(expected)}"))

    llama3, llama31 = with_bos(llama(options.llama, "3")), llama(options.llama, "3.1")
    spoken = reference["desta2_chat"]["transcription"]
    for case, response, system in (
        ("desta2_chat", "", native.prompts.DESTA2_SYSTEM),
        ("desta2_audiolens_prefix", PROMPT.response, None),
    ):
        built = native.desta2_prompt(llama3, PROMPT.text, response, transcript=spoken, system=system)
        check(case, without_audio(built), reference[case]["input_ids"])
        place = list(built.audio_mask).index(True)
        results.append((f"{case}: place", place == reference[case]["audio_position"], str(place)))
    for case, response in (("desta25_chat", ""), ("desta25_prefix", PROMPT.response)):
        built = native.desta25_prompt(llama31, PROMPT.text, response, transcripts=(spoken,))
        expected = list(reference[case]["input_ids"])
        start = reference[case]["audio_start"] + sum(built.audio_mask)
        ids = reference[case]["transcription_ids"]  # the original overwrites placeholders, here the ids are in place
        expected[start : start + len(ids)] = ids
        check(case, list(built.ids), expected)
    with tempfile.TemporaryDirectory() as folder:
        place_of_tags = reference["qwen_audio_chat_prefix"]["special"]["audio_start"]
        qwen = read_qwen_tokenizer(options.qwen, audio_start_id=place_of_tags)
        tokens = reference["qwen_audio_chat_prefix"]["audio_span_tokens"][0] - 2
        built = native.qwen_audio_chat_prompt(qwen, PROMPT.text, PROMPT.response, audio_tokens=[tokens])
        check("qwen_audio_chat_prefix", list(built.ids), reference["qwen_audio_chat_prefix"]["input_ids"])
        second = qwen2_audio(options.qwen)
        expected = reference["qwen2_audio_instruct_prefix"]["input_ids"]
        audio = reference["qwen2_audio_instruct_prefix"]["audio_token_id"]
        first = expected.index(audio)
        once = expected[: first + 1] + expected[first + expected.count(audio) :]
        check("qwen2_audio_instruct_prefix", second.text_ids(PROMPT, "chat"), once)
        third = voxtral(Path(folder))
        check("voxtral_prefix", third.text_ids(PROMPT, "chat"), reference["voxtral_prefix"]["input_ids"])
    for key, tokenizer in (("_llama3_labels", llama31), ("_qwen_labels", qwen)):
        for label, ids in reference[key].items():
            check(f"{key} {label!r}", tokenizer(label, add_special_tokens=False)["input_ids"], ids["no_space"])
            check(f"{key} ' {label}'", tokenizer(f" {label}", add_special_tokens=False)["input_ids"], ids["space"])
    return results


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("llama", "qwen", "reference"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    results = compare(parser.parse_args())
    for name, agrees, detail in results:
        if not agrees or not name.startswith("_"):
            print(f"{'agrees ' if agrees else 'DIFFERS'}  {name}: {detail}")
    print(f"{sum(agrees for _, agrees, _ in results)} of {len(results)} agree")
    sys.exit(not all(agrees for _, agrees, _ in results))


if __name__ == "__main__":
    main()
