"""Advice on options whose first tokens clash: it was tried before it is given."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import GENDER

from lalm_patch.config import compose
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.models import LALM
from lalm_patch.models.registry import check_family
from lalm_patch.stimuli import Prompt


def asked(lalm: LALM, options: tuple[str, ...], target: str) -> str:
    prompt = Prompt.from_attribute(replace(GENDER, options=options))
    with pytest.raises(ModelError) as caught:
        lalm.target_ids(prompt, "chat", target)
    return str(caught.value)


def test_bare_is_advised_where_it_works(lalm: LALM) -> None:
    """Tokens of bytes: after a blank both characters begin with the blank's token; without it they differ."""
    message = asked(lalm, ("男", "女"), "leading_space")
    assert "男, 女 begin with the same token" in message
    assert re.search(r"set prompt\.target=bare", message)
    ids = lalm.target_ids(Prompt.from_attribute(replace(GENDER, options=("男", "女"))), "chat", "bare")
    assert len(set(ids)) == 2


def test_leading_space_is_advised_where_it_works(lalm: LALM) -> None:
    """`male` and `mail` share their first letters bare; with its blank `male` is a word of its own."""
    options = ("male", "mXY")
    message = asked(lalm, options, "bare")
    assert "set prompt.target=leading_space" in message
    ids = lalm.target_ids(Prompt.from_attribute(replace(GENDER, options=options)), "chat", "leading_space")
    assert len(set(ids)) == 2


def test_other_ways_are_advised_where_neither_works(lalm: LALM) -> None:
    prompt = Prompt.from_attribute(replace(GENDER, options=("speaker one", "speaker two")))
    for target in ("leading_space", "bare"):
        message = asked(lalm, prompt.options, target)
        assert "does not help either, so set prompt.answer=whole" in message
        assert "prompt.options=letters" in message
        assert "set prompt.target" not in message
        letters_with = "bare" if "letters prompt.target=bare" in message else target
        assert len(lalm.answer_ids(replace(prompt, letters=True), "chat", letters_with, whole=False)) == 2
        assert len(lalm.answer_ids(prompt, "chat", target, whole=True)) == 2


def test_other_words_are_advised_where_nothing_works(lalm: LALM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(lalm.family), "text_ids", lambda *_, continuation="": [1, 2] if continuation else [1])
    assert "does not help either, so use other words" in asked(lalm, ("one", "two"), "bare")


def test_layouts_and_transcripts_are_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lalm_patch import run

    monkeypatch.setattr(LALM, "load", lambda *_: pytest.fail("loaded"))
    for given, message in (
        (
            "prompt.layout=fixed",
            r"^prompt\.layout=fixed: expected one of chat, user, flat, which family qwen2_audio has",
        ),
        ("transcript=clean", r"^transcript=clean: demo reads no transcript"),
    ):
        settings = compose(given, "data.limit=2")
        with pytest.raises(ConfigError, match=message):
            run.run(settings, tmp_path / given)
        with pytest.raises(ConfigError, match=message):
            check_family(settings)
    check_family(compose("model=desta2", "prompt.layout=fixed"))
