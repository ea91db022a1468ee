"""The question a clip is asked, in pieces that know their role.

Format of AudioLens (arXiv 2506.05140) with the response phrases of arXiv 2603.13768:

    What is the gender of the speaker in the speech? Possible options: male, female. The speaker's gender is
    ------------------------ early ---------------------------------- -- object --- late ------------------
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from lalm_patch.errors import ConfigError

PromptRole: TypeAlias = Literal["early", "object", "late"]
OPTION_ORDERS = ("fixed", "shuffled")


class PromptPart(NamedTuple):
    """A piece of the prompt and the role of the positions its tokens take."""

    text: str
    role: PromptRole


@dataclass(frozen=True)
class Attribute:
    """What is asked about a clip: one file of conf/attr. Raises ConfigError for a text that cannot make a prompt.

    `folder` is the attribute's folder in a SAKURA copy; the set on the hub is `SLLM-multi-hop/{folder}QA`.
    """

    name: str
    question: str
    options: tuple[str, ...]
    response: str
    folder: str

    def __post_init__(self) -> None:
        where = f"attribute {self.name!r}"
        for field in ("name", "folder"):
            _check_text(getattr(self, field), field, where)
        object.__setattr__(self, "options", _checked_options(self.options, where))
        _check_text(self.question, "question", where)
        _check_text(self.response, "response", where)


@dataclass(frozen=True)
class Prompt:
    """One clip's prompt, options in the order they are listed. Raises ConfigError as `Attribute` does.

    `transcript` is what a model that reads a transcript beside the audio is given; None for nothing.
    """

    question: str
    options: tuple[str, ...]
    response: str
    transcript: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _checked_options(self.options, "prompt"))
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
        options = attribute.options
        if order == "shuffled":
            if not sample_id:
                raise ConfigError("option order 'shuffled': expected the sample's id, got none; pass sample_id")
            options = tuple(sorted(options, key=lambda option: _digest(seed, sample_id, option)))
        return cls(attribute.question, options, attribute.response)

    @property
    def user_parts(self) -> tuple[PromptPart, ...]:
        """The pieces of `text` in order. The commas belong to the object, the full stop to the late prompt."""
        return (
            PromptPart(f"{self.question} Possible options:", "early"),
            PromptPart(f" {', '.join(self.options)}", "object"),
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


def _check_text(text: object, field: str, where: str) -> None:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: expected {field} to be text, got {text!r}; put it in quotes")
    if not text or text != text.strip():
        raise ConfigError(
            f"{where}: expected {field} to be text without spaces around it, got {text!r}; "
            "a space at the end of a prompt changes the answer's tokens"
        )
    if not text.isprintable():
        raise ConfigError(f"{where}: expected {field} on one line without control characters, got {text!r}")


def _checked_options(options: object, where: str) -> tuple[str, ...]:
    if isinstance(options, str) or not hasattr(options, "__iter__"):
        raise ConfigError(f"{where}: expected options as a list, got {options!r}")
    checked = tuple(options)
    if len(checked) < 2:
        raise ConfigError(f"{where}: expected at least two options, got {list(checked)}")
    for option in checked:
        _check_text(option, "every option", where)
        if "," in option:
            raise ConfigError(f"{where}: expected options without commas (commas separate them), got {option!r}")
    folded = [option.casefold() for option in checked]
    twice = sorted({option for option in checked if folded.count(option.casefold()) > 1})
    if twice:
        raise ConfigError(f"{where}: expected options that differ in more than case, got {', '.join(twice)}")
    return checked
