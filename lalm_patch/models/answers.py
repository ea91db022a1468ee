"""Answers as tokens: what a model would say after the response phrase, and whether that tells the options apart."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace

from lalm_patch.errors import ModelError
from lalm_patch.models.family import Family
from lalm_patch.stimuli import Prompt


def answer_ids(
    family: Family,
    check_range: Callable[[list[int]], None],
    prompt: Prompt,
    layout: str,
    target: str,
    *,
    whole: bool,
) -> tuple[tuple[int, ...], ...]:
    """Tokens of each answer where it follows the response phrase, in the prompt's order of options.

    Args:
        family: the model's adapter.
        check_range: raises ModelError for ids that the model cannot say.
        prompt: the question.
        layout: of the prompt.
        target: `leading_space` or `bare`, see `PromptSettings`.
        whole: all tokens of an answer, or its first one alone.

    Raises:
        ModelError: a control token in the prompt, an answer that merges with the phrase before it, or two that are one
            and the same in these tokens; says which setting tells them apart.
    """
    family.refuse_control_tokens(prompt)
    ids = _ids(family, prompt, layout, target, whole)
    check_range([id for found in ids if found for id in found])
    if _distinct(ids):
        return tuple(found for found in ids if found is not None)
    merged = [answer for answer, found in zip(prompt.answers, ids, strict=True) if found is None]
    clashing = [answer for answer, found in zip(prompt.answers, ids, strict=True) if ids.count(found) > 1]
    if merged:
        problem = (
            f"{', '.join(merged)} merge with the response phrase {prompt.response!r} when tokenised and have no "
            "first token of their own"
        )
    elif whole:
        problem = f"{', '.join(clashing)} are the same tokens"
    else:
        problem = f"{', '.join(clashing)} begin with the same token, so the next token cannot tell them apart"
    advice = _advice(family, prompt, layout, target, whole)
    raise ModelError(f"attr.options: with prompt.target={target}, {problem}; {advice}")


def _advice(family: Family, prompt: Prompt, layout: str, target: str, whole: bool) -> str:
    """What to set so that the answers can be told apart: tried before it is said."""
    other = "bare" if target == "leading_space" else "leading_space"
    if _distinct(_ids(family, prompt, layout, other, whole)):
        return f"set prompt.target={other}, with which they have different ones"
    found = []
    if not whole and _distinct(_ids(family, prompt, layout, target, True)):
        found.append("prompt.answer=whole, which reads all of their tokens")
    if not prompt.letters and len(prompt.options) <= len(string.ascii_lowercase):
        for own, more in ((target, ""), (other, f" prompt.target={other}")):
            if _distinct(_ids(family, replace(prompt, letters=True), layout, own, whole)):
                found.append(f"prompt.options=letters{more}, which lists them as (a), (b) and so on to choose from")
                break
    also = f"prompt.target={other} does not help either, so "
    return also + (f"set {', or '.join(found)}" if found else "use other words for them")


def _distinct(ids: list[tuple[int, ...] | None]) -> bool:
    return None not in ids and len(set(ids)) == len(ids)


def _ids(family: Family, prompt: Prompt, layout: str, target: str, whole: bool) -> list[tuple[int, ...] | None]:
    """Tokens of each answer after the response phrase; None for one that merges with it."""
    before = family.text_ids(prompt, layout)
    blank = " " if target == "leading_space" else ""
    ids: list[tuple[int, ...] | None] = []
    for answer in prompt.answers:
        after = family.text_ids(prompt, layout, continuation=blank + answer)
        own = after[len(before) :] if after[: len(before)] == before else []
        ids.append(tuple(own if whole else own[:1]) or None)
    return ids
