"""The question a clip is asked, in pieces that know their role.

Format of AudioLens (arXiv 2506.05140) with the response phrases of arXiv 2603.13768:

    What is the gender of the speaker in the speech? Possible options: male, female. The speaker's gender is
    ------------------------ early ---------------------------------- -- object --- late ------------------
"""

from __future__ import annotations

import hashlib
import string
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from lalm_patch.errors import ConfigError

PromptRole: TypeAlias = Literal["early", "object", "late"]
OPTION_ORDERS = ("fixed", "shuffled")
JOINERS = dict.fromkeys((0x200C, 0x200D, 0x200E, 0x200F))
"""Signs that are not printed and belong to a text: of Persian and Hindi words, of emoji, of writing direction."""


class PromptPart(NamedTuple):
    """A piece of the prompt and the role of the positions its tokens take."""

    text: str
    role: PromptRole


@dataclass(frozen=True)
class Attribute:
    """What is asked about a clip: one file of conf/attr. Raises ConfigError for a text that cannot make a prompt.

    `folder` is the attribute's folder in a SAKURA copy; the set on the hub is `SLLM-multi-hop/{folder}QA`. `answer` is
    the right one of a single recording's options, which the prompt does not tell.
    Options are listed with commas between them, so none may hold one: a model could not tell where it ends.
    """

    name: str
    question: str
    options: tuple[str, ...]
    response: str
    folder: str
    answer: str | None = None

    def __post_init__(self) -> None:
        where = f"attribute {self.name!r}"
        for field in ("name", "folder"):
            _check_text(getattr(self, field), field, where)
        object.__setattr__(self, "options", _checked_options(self.options, where))
        _check_text(self.question, "question", where)
        _check_text(self.response, "response", where)
        if with_comma := [option for option in self.options if "," in option]:
            raise ConfigError(
                f"{where}: expected options without commas (commas separate them), got {with_comma[0]!r}; use other "
                "words, or ask each clip a question of its own (data=table) with prompt.options=letters"
            )


@dataclass(frozen=True)
class Prompt:
    """One clip's prompt, options in the order they are listed. Raises ConfigError as `Attribute` does.

    Attributes:
        question: what is asked.
        options: the answers to choose from; sentences, with commas or quotes in them, if need be.
        response: how the answer begins.
        transcript: what a model that reads a transcript beside the audio is given; None for nothing.
        letters: whether options are listed as `(a) dog (b) cat` and answered with their letter.
    """

    question: str
    options: tuple[str, ...]
    response: str
    transcript: str | None = None
    letters: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _checked_options(self.options, "prompt"))
        if self.letters and len(self.options) > len(string.ascii_lowercase):
            raise ConfigError(
                f"prompt.options=letters: expected at most {len(string.ascii_lowercase)} options, one per letter, got "
                f"{len(self.options)}; use prompt.options=words"
            )
        _check_text(self.question, "question", "prompt")
        _check_text(self.response, "response", "prompt")

    @classmethod
    def from_attribute(
        cls,
        attribute: Attribute,
        order: Literal["fixed", "shuffled"] = "fixed",
        seed: int = 0,
        sample_id: str = "",
    ) -> Prompt:
        """The attribute's prompt for one sample.

        `shuffled` lists the options by SHA-256 of seed, sample and option: another order for every sample, the same
        one on every machine and in every run. Raises ConfigError for another `order`, or if it lacks a `sample_id`.
        """
        if order not in OPTION_ORDERS:
            raise ConfigError(f"option order: expected one of {', '.join(OPTION_ORDERS)}, got {order!r}")
        prompt = cls(attribute.question, attribute.options, attribute.response)
        return prompt if order == "fixed" else prompt.shuffled(seed, sample_id)

    def shuffled(self, seed: int, sample_id: str) -> Prompt:
        """The same prompt with its options in one sample's order, see `from_attribute`."""
        if not sample_id:
            raise ConfigError("option order 'shuffled': expected the sample's id, got none; pass sample_id")
        return replace(self, options=tuple(sorted(self.options, key=lambda option: _digest(seed, sample_id, option))))

    @property
    def answers(self) -> tuple[str, ...]:
        """What the model says when it chooses an option, in the order of `options`."""
        return tuple(string.ascii_lowercase[: len(self.options)]) if self.letters else self.options

    @property
    def user_parts(self) -> tuple[PromptPart, ...]:
        """The pieces of `text` in order. The commas belong to the object, the full stop to the late prompt."""
        if self.letters:
            listed = " ".join(f"({letter}) {option}" for letter, option in zip(self.answers, self.options, strict=True))
        else:
            listed = ", ".join(self.options)
        return (
            PromptPart(f"{self.question} Possible options:", "early"),
            PromptPart(f" {listed}", "object"),
            PromptPart(".", "late"),
        )

    @property
    def text(self) -> str:
        """The user turn: question and options, without the response phrase."""
        return "".join(part.text for part in self.user_parts)

    @property
    def flat_text(self) -> str:
        """Question, options and response phrase in one string, no trailing space."""
        return f"{self.text} {self.response}"


def _digest(seed: int, sample_id: str, option: str) -> bytes:
    return hashlib.sha256("\0".join((str(seed), sample_id, option)).encode()).digest()


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text.translate(JOINERS)).casefold()


def _check_text(text: object, field: str, where: str) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected {field} to be text, got {text!r}; put it in quotes")
    if not text or text != text.strip():
        raise ConfigError(
            f"{where}: expected {field} to be text without spaces around it, got {text!r}; "
            "a space at the end of a prompt changes the answer's tokens"
        )
    if not text.translate(JOINERS).isprintable():
        raise ConfigError(f"{where}: expected {field} on one line without control characters, got {text!r}")


def _checked_options(options: object, where: str) -> tuple[str, ...]:
    if isinstance(options, str) or not hasattr(options, "__iter__"):
        raise ConfigError(f"{where}: expected options as a list, got {options!r}")
    checked = tuple(options)
    if len(checked) < 2:
        raise ConfigError(f"{where}: expected at least two options, got {list(checked)}")
    for option in checked:
        _check_text(option, "every option", where)
    folded = [_folded(option) for option in checked]
    twice = sorted({option for option in checked if folded.count(_folded(option)) > 1})
    if twice:
        raise ConfigError(f"{where}: expected options that differ in more than case, got {', '.join(twice)}")
    return checked
