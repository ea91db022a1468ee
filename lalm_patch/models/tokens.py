"""The token table: for every position of the decoder's sequence its id, its text and its role (`roles.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lalm_patch.errors import ModelError
from lalm_patch.models.roles import ROLES, segments_of


@dataclass(frozen=True)
class Clock:
    """When audio positions and the encoder's frames hear what they are about.

    An encoder attends to the whole clip, so this says where a state is, not all that it knows.

    Attributes:
        seconds: length of the clip.
        rate: audio positions per second; None where they are in no order of time.
        tags: audio positions before the first and after the last that have a time.
        frame_rate: frames of the encoder's layers per second; None where it is not known.
    """

    seconds: float
    rate: float | None = None
    tags: int = 0
    frame_rate: float | None = None


@dataclass(frozen=True)
class TokenTable:
    """One row per position of the decoder's input sequence.

    Attributes:
        ids: token ids, one per position; audio positions hold the placeholder's id.
        texts: what each position says, decoded on its own.
        roles: one of `ROLES` per position.
        clock: when the audio positions are; None if nobody said.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    roles: tuple[str, ...]
    clock: Clock | None = None

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.texts) == len(self.roles):
            lengths = len(self.ids), len(self.texts), len(self.roles)
            raise ValueError(f"expected one id, text and role per position, got {lengths}")
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"unknown roles {sorted(unknown)}; known: {ROLES}")
        if "audio" not in self.roles:
            raise ModelError("the prompt has no audio position: the model would answer without hearing the clip")

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, *roles: str) -> tuple[int, ...]:
        """Positions with one of these roles, ascending."""
        return tuple(i for i, role in enumerate(self.roles) if role in roles)

    @property
    def segments(self) -> tuple[str, ...]:
        """Roles that occur after the audio, in the order of `ROLES`."""
        return segments_of(self.roles[i] for i in self.text_positions)

    @property
    def audio_positions(self) -> tuple[int, ...]:
        """Positions of the audio embeddings."""
        return self.positions("audio")

    @property
    def text_positions(self) -> tuple[int, ...]:
        """Positions after the audio: what the layer-wise and token-wise sweeps patch."""
        return tuple(i for i in range(self.audio_positions[-1] + 1, len(self)) if self.roles[i] != "audio")

    def same_layout(self, other: TokenTable) -> bool:
        """Whether both tables have the same roles and ids in the same places, so that positions can be exchanged.

        Only the words of a transcript may differ.
        """
        if self.roles != other.roles:
            return False
        rows = zip(self.ids, other.ids, self.roles, strict=True)
        return all(own == others for own, others, role in rows if role != "transcript")


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Decode `ids` and say which characters each token stands for.

    Works for every tokenizer, also those without offsets (Tekken): the span of token k is what decoding k + 1
    instead of k tokens adds. A token that only completes a character begun by the one before gets an empty span.

    Returns:
        The decoded text and one (start, end) per token.
    """

    def decode(part: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(part), skip_special_tokens=False)
        return text.rstrip("�")  # the bytes of a character that the next token completes

    ends = [len(decode(ids[: k + 1])) for k in range(len(ids))]
    # An incomplete character may make a prefix shorter than the one before: spans never run backwards.
    ends = [int(end) for end in np.maximum.accumulate(np.array(ends, dtype=int))] if ends else []
    starts = [0, *ends[:-1]]
    return decode(ids), list(zip(starts, ends, strict=True))


def assign_roles(
    spans: Sequence[tuple[int, int]],
    text: str,
    user_parts: Sequence[tuple[str, str]],
    response: str,
    where: str,
) -> list[str]:
    """Roles of the tokens after the audio.

    Args:
        spans: characters of `text` per token, as from `token_spans`.
        text: the decoded text after the audio; ends with the response phrase.
        user_parts: (piece, role) of the user's turn, whose joined pieces occur in `text`.
        response: the response phrase, the end of `text`.
        where: name of the prompt, for the error message.

    Raises:
        ModelError: the question or the response phrase does not occur in `text` as it was given.
    """
    question = "".join(piece for piece, _ in user_parts)
    start = text.rfind(question, 0, len(text) - len(response))
    if start < 0 or not text.endswith(response):
        missing = "question" if start < 0 else "response phrase"
        raise ModelError(
            f"{where}: the {missing} does not occur in the tokenised prompt as written, so its tokens cannot be "
            f"named. Tokenised text after the audio: {text!r}. Choose an attribute text the tokenizer keeps unchanged."
        )
    character_roles = ["template"] * len(text)
    cursor = start
    for piece, role in user_parts:
        character_roles[cursor : cursor + len(piece)] = [role] * len(piece)
        cursor += len(piece)
    begin = len(text) - len(response)
    # In a flat prompt the phrase's first token carries the blank that separates it from the question.
    begin -= text[begin - 1] == " "
    character_roles[begin:] = ["late"] * (len(text) - begin)
    roles = [character_roles[min(first, len(text) - 1)] for first, _ in spans]
    roles[-1] = "last"
    return roles
