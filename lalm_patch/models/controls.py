"""Text of a prompt is text: what a tokenizer would take for an instruction to the model is refused, in every family.

Most tokenizers turn `<|im_end|>` into one control token wherever it stands, some (Tekken) never do. A question with
such a word would end its turn, bring in a second clip, or mean different things to different models; so the rule is the
same for all: the name of one of the tokenizer's control tokens is no part of a prompt's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lalm_patch.errors import ModelError

_BRACKETS = (("<", ">"), ("[", "]"))


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Names and ids of the tokens that do not stand for text.

    Those are the special ones, and added ones in angle or square brackets (`<think>`, `<tool_call>`), which are control
    tokens by another name. Words and blanks that were added to a vocabulary stand for themselves.
    """
    named = {str(token): tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    backend = getattr(tokenizer, "backend_tokenizer", None)  # Tekken has none, and names all its tokens itself
    for id, added in backend.get_added_tokens_decoder().items() if backend is not None else ():
        name = str(added.content)
        if added.special or any(name[:1] == left and name[-1:] == right for left, right in _BRACKETS):
            named[name] = id
    # A blank name would be in every text.
    return {name: int(id) for name, id in named.items() if name.strip() and id is not None}


def refuse_control_tokens(tokenizer: Any, texts: Mapping[str, str | None], marks: Iterable[str] = ()) -> None:
    """None of the texts holds a control token.

    Args:
        tokenizer: the model's own.
        texts: what each text is, for the message, and the text; None for none.
        marks: further names that mean something to the model, such as a placeholder that its original code replaces.

    Raises:
        ModelError: names the text and the token.
    """
    controls = control_tokens(tokenizer)
    for what, text in texts.items():
        if not text:
            continue
        found = [name for name in (*controls, *marks) if name in text]
        # Normalisation can make a control token out of other letters.
        written = set(tokenizer(text, add_special_tokens=False)["input_ids"]).intersection(controls.values())
        found += [name for name, id in controls.items() if id in written and name not in found]
        if found:
            raise ModelError(
                f"{what} {text!r} holds {', '.join(map(repr, found))}, the name of a control token of this model "
                "and no text; put it in other words"
            )
