"""Text of a prompt is text in every family: names of control tokens are refused, everything else is tokenised whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import load, noise
from tiny_generic import save_generic

from lalm_patch.errors import ModelError
from lalm_patch.models import LALM
from lalm_patch.models.controls import control_tokens
from lalm_patch.models.native import desta2_prompt, desta25_prompt, qwen_audio_chat_prompt
from lalm_patch.stimuli import Prompt

TOKENS = {
    "qwen2_audio": ("<|AUDIO|>", "<|audio_bos|>", "<|im_end|>", "<|endoftext|>"),
    "voxtral": ("[AUDIO]", "[BEGIN_AUDIO]", "[INST]", "[/INST]", "</s>", "<SPECIAL_22>", "[TRANSCRIBE]"),
    "generic": ("<|AUDIO|>", "<|im_end|>", "<|IMAGE|>"),
    "desta2": ("<|eot_id|>", "<|reserved_special_token_0|>", "<|start_header_id|>"),
    "desta25": ("<|AUDIO|>", "<|eot_id|>", "<|reserved_special_token_87|>", "<start_audio>"),
    "qwen_audio": ("<audio>", "</audio>", "<|im_end|>", "[[[AUDIO:modality]]]", "<|extra_12|>"),
}
FAMILIES = list(TOKENS)
PROMPT = Prompt("What is the gender of the speaker?", ("male", "female"), "The speaker is")


@pytest.fixture(scope="module", params=FAMILIES)
def opened(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Path],
    native_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, LALM]:
    family = request.param
    folders = checkpoints | native_folders
    if family == "generic":
        folders["generic"] = save_generic(tmp_path_factory.mktemp("generic") / "files", "audioflamingo3")
    return family, load(folders[family], family)


def _refused(lalm: LALM, prompt: Prompt, layout: str, what: str, token: str) -> None:
    for ask in (lambda: lalm.inputs(noise(0.5), prompt, layout), lambda: lalm.target_ids(prompt, layout)):
        with pytest.raises(ModelError) as caught:
            ask()
        assert str(caught.value).startswith(what), caught.value
        assert repr(token) in str(caught.value)


def test_a_control_token_in_any_text_is_refused_by_name(opened: tuple[str, LALM]) -> None:
    family, lalm = opened
    for token in TOKENS[family]:
        for layout in lalm.family.layouts:
            _refused(lalm, replace(PROMPT, question=f"What is {token} here?"), layout, "question", token)
            _refused(lalm, replace(PROMPT, question=f"{token}here?"), layout, "question", token)
            _refused(lalm, replace(PROMPT, response=f"The {token} is"), layout, "response phrase", token)
            _refused(lalm, replace(PROMPT, options=("male", token)), layout, "option 2", token)
            _refused(lalm, replace(PROMPT, transcript=f"Hello {token}"), layout, "transcript", token)


def test_a_token_that_forms_where_texts_meet_is_refused(opened: tuple[str, LALM]) -> None:
    """`The speaker is <|im_` and `end|>`: with prompt.target=bare nothing stands between phrase and option."""
    family, lalm = opened
    token = TOKENS[family][0]
    prompt = replace(PROMPT, response=f"The speaker is {token[:4]}", options=(token[4:], "female"))
    _refused(lalm, prompt, lalm.family.layouts[0], "response phrase with option 1", token)


def test_every_token_of_the_texts_is_text(opened: tuple[str, LALM]) -> None:
    """What only looks like markup is tokenised as text: no id of a control token, and decoding gives the words back."""
    _, lalm = opened
    layout = lalm.family.layouts[0]
    prompt = replace(PROMPT, question="Is a <b or > [INST or im_end| <|AUDIO in | it?", transcript="a <| b")
    table, _ = lalm.inputs(noise(0.5), prompt, layout)
    controls = set(control_tokens(lalm.family.tokenizer).values())
    roles = ("early", "object", "late", "last", "transcript")
    words = [(id, text) for id, text, role in zip(table.ids, table.texts, table.roles, strict=True) if role in roles]
    assert not controls.intersection(id for id, _ in words)
    said = "".join(text for _, text in words)
    assert "Is a <b or > [INST or im_end| <|AUDIO in | it?" in said


def test_the_system_text_is_text(desta2: Any, desta25: Any, qwen: Any) -> None:
    with pytest.raises(ModelError, match=r"system text .* holds '<\|eot_id\|>'"):
        desta2_prompt(desta2[1], "Who?", system="Be <|eot_id|> good.")
    with pytest.raises(ModelError, match=r"system text .* holds '<\|eot_id\|>'"):
        desta25_prompt(desta25[1], "Who?", system="Be <|eot_id|> good.")
    with pytest.raises(ModelError, match=r"transcript 2 .* holds '<\|eot_id\|>'"):
        desta25_prompt(desta25[1], "Who?", transcripts=("fine", "<|eot_id|>"))
    with pytest.raises(ModelError, match=r"system text .* holds '<\|im_end\|>'"):
        qwen_audio_chat_prompt(qwen[1], "Who?", audio_tokens=[2], system="<|im_end|>")


def test_added_words_are_text_and_added_brackets_are_not(checkpoints: dict[str, Path]) -> None:
    """Fine-tuned tokenizers add words (`add_tokens`), and control tokens that are not marked as special."""
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio")
    tokenizer = lalm.family.tokenizer
    before = control_tokens(tokenizer)
    tokenizer.add_tokens(["wombat", "\n\n", "<think>"])
    assert set(control_tokens(tokenizer)) == {*before, "<think>"}
    # Words without an embedding of their own: the tokenizer is of another checkpoint than the weights.
    with pytest.raises(ModelError, match=r"gives token 448, but its input embeddings have 448 rows"):
        lalm.inputs(noise(0.5), replace(PROMPT, question="What does the wombat say?"), "chat")
    with pytest.raises(ModelError, match=r"gives token 448, but its output embeddings have 448 rows"):
        lalm.target_ids(replace(PROMPT, options=("wombat", "female")), "chat", "bare")
