"""Prompts, tokens and spectrograms of the native models."""

from __future__ import annotations

import base64
import functools
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from native_checkpoints import (
    qwen_ranks,
)
from native_reference import unpadded_log_mel

from lalm_patch.errors import ModelError
from lalm_patch.models.native import (
    NativePrompt,
    desta2_prompt,
    desta25_prompt,
    qwen_audio_base_prompt,
    qwen_audio_chat_prompt,
    qwen_audio_features,
    qwen_audio_frames,
    qwen_audio_tokens,
    whisper_features,
)
from lalm_patch.models.native.qwen_tokenizer import read_qwen_tokenizer

QUESTION = "What is the gender of the speaker in the speech? Possible options: male, female."
PIECES = (
    ("What is the gender of the speaker in the speech? Possible options:", "early"),
    (" male, female", "object"),
    (".", "late"),
)
RESPONSE = "The speaker's gender is"
TRANSCRIPT = " Kids are talking by the door."
CLOSE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def said(tokenizer: Any, prompt: NativePrompt, *kinds: str) -> str:
    """The decoded tokens of some kinds of pieces."""
    return str(tokenizer.decode([id for id, kind in zip(prompt.ids, prompt.kinds, strict=True) if kind in kinds]))


# --- prompts -----------------------------------------------------------------------------------------------------


def test_desta2_prompt_layouts(desta2: tuple[Any, Any, Any]) -> None:
    tokenizer = desta2[1]
    upstream = desta2_prompt(tokenizer, PIECES, RESPONSE, transcript=TRANSCRIPT)
    fixed = desta2_prompt(tokenizer, PIECES, RESPONSE, transcript=TRANSCRIPT, layout="fixed")
    bos = tokenizer.bos_token_id
    for prompt, bos_tokens, before, spoken in (
        (upstream, 2, "<|end_header_id|>", TRANSCRIPT),
        (fixed, 1, "\n\n", TRANSCRIPT.strip()),
    ):
        assert prompt.ids.count(bos) == bos_tokens
        first = prompt.audio_mask.index(True)
        assert prompt.audio_mask[first : first + 64] == (True,) * 64
        assert sum(prompt.audio_mask) == 64
        assert tokenizer.decode(prompt.ids[first - 1]) == before
        assert said(tokenizer, prompt, "transcript") == spoken
        assert said(tokenizer, prompt, "early") == PIECES[0][0]
        assert said(tokenizer, prompt, "object") == PIECES[1][0]
        assert said(tokenizer, prompt, "late", "response") == f".{RESPONSE}"
        assert said(tokenizer, prompt, "system") == "Focus on the input audio."
        words = [prompt.text[start:end] for start, end in prompt.spans]
        decoded = [tokenizer.decode([id]) for id in prompt.ids]
        assert [w for w, audio in zip(words, prompt.audio_mask, strict=True) if not audio][bos_tokens - 1 :] == [
            d for d, audio in zip(decoded, prompt.audio_mask, strict=True) if not audio
        ][bos_tokens - 1 :]
    with pytest.raises(ModelError, match="'late': expected upstream or fixed"):
        desta2_prompt(tokenizer, QUESTION, layout="late")


def test_desta2_prompt_without_system_and_transcript(desta2: tuple[Any, Any, Any]) -> None:
    tokenizer = desta2[1]
    prompt = desta2_prompt(tokenizer, QUESTION, RESPONSE, system=None, layout="fixed")
    text = [id for id, audio in zip(prompt.ids, prompt.audio_mask, strict=True) if not audio]
    expected = (
        "<|begin_of_text|><|start_header_id|>audio<|end_header_id|>\n\n<|eot_id|><|start_header_id|>user"
        f"<|end_header_id|>\n\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{RESPONSE}"
    )
    assert text == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert {"system", "transcript"}.isdisjoint(prompt.kinds)


def test_desta25_prompt(desta25: tuple[Any, Any, Any]) -> None:
    tokenizer = desta25[1]
    prompt = desta25_prompt(tokenizer, PIECES, RESPONSE, transcripts=[TRANSCRIPT, " "])
    hole = "<|reserved_special_token_87|>"
    spoken = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (TRANSCRIPT.strip(), " ")]
    # As the original: placeholders in one text, their embeddings overwritten by vectors and transcript.
    spans = [f"<start_audio>{hole * (64 + len(ids))}<end_audio>\n" for ids in spoken]
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: Today Date: \n\n"
        "Focus on the audio clips and instructions.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{''.join(spans)}{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{RESPONSE}"
    )
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    holes = [index for index, id in enumerate(expected) if id == tokenizer.convert_tokens_to_ids(hole)]
    first, second = holes[: 64 + len(spoken[0])], holes[64 + len(spoken[0]) :]
    for places, ids in ((first, spoken[0]), (second, spoken[1])):
        for place, id in zip(places[64:], ids, strict=True):
            expected[place] = id
    assert list(prompt.ids) == expected
    assert [i for i, audio in enumerate(prompt.audio_mask) if audio] == first[:64] + second[:64]
    assert said(tokenizer, prompt, "transcript") == TRANSCRIPT.strip() + " "
    assert said(tokenizer, prompt, "object") == PIECES[1][0]


def test_qwen_audio_prompts(qwen: tuple[Any, Any, Any]) -> None:
    tokenizer = qwen[1]
    chat = qwen_audio_chat_prompt(tokenizer, PIECES, RESPONSE, audio_tokens=[3, 1])
    pad = "[[[AUDIO:modality]]]"
    assert tokenizer.decode(chat.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"Audio 1:<audio>{pad * 3}</audio>\nAudio 2:<audio>{pad}</audio>\n"
        f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n{RESPONSE}"
    )
    assert said(tokenizer, chat, "audio") == f"<audio>{pad * 3}</audio><audio>{pad}</audio>"
    assert chat.kinds.count("audio") == sum(chat.audio_mask) == 8
    assert said(tokenizer, chat, "object") == PIECES[1][0]
    base = qwen_audio_base_prompt(tokenizer, PIECES, RESPONSE, audio_tokens=[2])
    assert tokenizer.decode(base.ids) == f"<audio>{pad * 2}</audio>{QUESTION} {RESPONSE}"
    assert said(tokenizer, base, "response") == f" {RESPONSE}"
    with pytest.raises(ModelError, match=r"question .* holds '<audio>', the name of a control token"):
        qwen_audio_base_prompt(tokenizer, "What is <audio>?", audio_tokens=[2])
    with pytest.raises(ModelError, match="every clip needs one vector"):
        qwen_audio_base_prompt(tokenizer, QUESTION, audio_tokens=[])


QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


WORDS = ("gender", " the", "aa", " ", "\n", "speech", "12", "é", "'s", ".", "are")


@functools.cache
def qwen_encoding() -> tiktoken.Encoding:
    return tiktoken.Encoding("qwen", pat_str=QWEN_SPLIT, mergeable_ranks=qwen_ranks(), special_tokens={})


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=30).map("".join))
def test_qwen_tokenizer_is_tiktoken(qwen: tuple[Any, Any, Any], text: str) -> None:
    tokenizer = qwen[1]
    encoding = qwen_encoding()
    text = text.replace("<", "")
    composed = unicodedata.normalize("NFC", text)
    ids = tokenizer(text)["input_ids"]
    assert ids == encoding.encode(composed, disallowed_special=())
    assert tokenizer.decode(ids) == composed


def test_qwen_tokenizer_merges_by_rank(tmp_path: Path) -> None:
    # abc can be put together in two ways; qrs in none, but is taken where it is a word of its own.
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258, b"qrs": 259}
    file = tmp_path / "qwen.tiktoken"
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    tokenizer = read_qwen_tokenizer(file)
    encoding = tiktoken.Encoding("qwen", pat_str=QWEN_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in ("abc", "xabc", "bcabc", "qrs", "aqrs", "e\u0301"):
        assert tokenizer(text)["input_ids"] == encoding.encode(unicodedata.normalize("NFC", text)), text
    assert tokenizer("qrs")["input_ids"] == [259]
    file.write_text("YQ== 0\n\nnot base64\n")
    with pytest.raises(ModelError, match=r"qwen\.tiktoken, line 3: expected base64, a blank and a rank"):
        read_qwen_tokenizer(file)
    file.write_text("YQ== 0\n")
    with pytest.raises(ModelError, match="ranks 0 to 0 once each and every single byte"):
        read_qwen_tokenizer(file)
    with pytest.raises(ModelError, match="none: no such file; the checkpoint is incomplete"):
        read_qwen_tokenizer(tmp_path / "none")


def test_qwen_special_ids(qwen: tuple[Any, Any, Any]) -> None:
    count = len(qwen_ranks())
    ids = qwen[1].convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[[[AUDIO:modality]]]"])
    assert ids == [count, count + 1, count + 2, count + 208]
    start = qwen[0].config.audio_token_id
    assert qwen[1].convert_tokens_to_ids(["<audio>", "</audio>"]) == [start, start + 1]


# --- features ----------------------------------------------------------------------------------------------------


def test_spectrogram_is_whispers_cut_at_the_clips_end(qwen: tuple[Any, Any, Any]) -> None:
    clips = [noise(0.517), 0.1 * noise(1.0, seed=1), np.zeros(8000, np.float32)]
    features = qwen_audio_features(qwen[2], clips)
    assert features["feature_lengths"].tolist() == [26, 50, 25]
    for got, clip in zip(features["input_features"], clips, strict=True):
        torch.testing.assert_close(got, unpadded_log_mel(clip, 80)[:, :100], rtol=0, atol=1e-4)
    assert features["input_features"][2].unique().tolist() == [-1.5]


@pytest.mark.parametrize(
    ("samples", "frames", "tokens"), [(32000, 100, 50), (480000, 1500, 750), (5123, 16, 8), (480, 2, 1)]
)
def test_qwen_audio_counts(samples: int, frames: int, tokens: int) -> None:
    assert (qwen_audio_frames(samples), qwen_audio_tokens(samples)) == (frames, tokens)


def test_clips_that_do_not_fit_are_refused(qwen: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ModelError, match="expected at least one clip"):
        whisper_features(qwen[2], [])
    with pytest.raises(ModelError, match=r"clip 1: expected one channel of 1 to 48000 samples \(3 s\), got \[2, 9\]"):
        whisper_features(qwen[2], [noise(1.0), np.zeros((2, 9), np.float32)])
    with pytest.raises(ModelError, match="clip 0: expected at least 480 samples, got 479"):
        qwen_audio_features(qwen[2], [np.zeros(479, np.float32)])
