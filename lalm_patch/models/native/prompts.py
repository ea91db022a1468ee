"""Prompts of the native models: ids, places of the audio, and for every token the piece of the prompt it is from.

All builders are pure functions of a tokenizer and strings. A prompt is a list of pieces, tokenised in one call over the
joined text as the originals do, so that tokens may cross the pieces' borders; a token belongs to the piece its first
character is in.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lalm_patch.errors import ModelError
from lalm_patch.models.controls import refuse_control_tokens
from lalm_patch.models.native.qwen_tokenizer import AUDIO_END, AUDIO_PAD, AUDIO_START, TURN_END, TURN_START

DESTA2_SYSTEM = "Focus on the input audio."
DESTA25_SYSTEM = "Focus on the audio clips and instructions."
QWEN_AUDIO_SYSTEM = "You are a helpful assistant."
DESTA2_PLACEHOLDER = "<|reserved_special_token_0|>"  # ours: the original inserts vectors and has no id for them
DESTA25_PLACEHOLDER = "<|reserved_special_token_87|>"
DESTA2_LAYOUTS = ("upstream", "fixed")
_MARKS = "\ue000\ue001\ue002"  # private-use letters that stand for a turn's content while a template is rendered


class Piece(NamedTuple):
    """A stretch of the prompt. `kind` is system, audio, transcript, question, response or template, or a kind the
    caller gave to a part of the question."""

    text: str
    kind: str


@dataclass(frozen=True)
class NativePrompt:
    """A tokenised prompt.

    Attributes:
        ids: one per position; audio positions hold a placeholder.
        audio_mask: whether a position's embedding is overwritten by an audio vector.
        sources: index into `pieces` per position.
        pieces: the prompt in order; an audio piece's text may be empty.
        spans: characters of `text` per position; empty for what is not in the text (an added BOS, audio vectors).
    """

    ids: tuple[int, ...]
    audio_mask: tuple[bool, ...]
    sources: tuple[int, ...]
    pieces: tuple[Piece, ...]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> str:
        """The joined pieces."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of the piece per position."""
        return tuple(self.pieces[source].kind for source in self.sources)

    def tensors(self) -> dict[str, Tensor]:
        """`input_ids` and `audio_mask`, [1, positions] each."""
        return {"input_ids": torch.tensor([self.ids]), "audio_mask": torch.tensor([self.audio_mask])}


Question = str | Sequence[tuple[str, str]]
"""The user's text, whole or in pieces (text, kind)."""


def desta2_prompt(
    tokenizer: Any,
    question: Question,
    response: str = "",
    *,
    transcript: str | None = None,
    system: str | None = DESTA2_SYSTEM,
    layout: str = "upstream",
    audio_vectors: int = 64,
) -> NativePrompt:
    """DeSTA2: an optional system turn, a turn of role "audio" with the vectors and the transcript, the user's turn.

    Args:
        tokenizer: the decoder's, with its chat template.
        question: the user's turn.
        response: the beginning of the assistant's turn.
        transcript: what follows the audio vectors; None for nothing.
        system: the system turn, None for none (AudioLens).
        layout: `upstream` keeps what the original does: two BOS tokens, the vectors one token too early (before the
            line break that ends the header, because their place is counted with one BOS), Whisper's leading space.
            `fixed`: one BOS, the vectors after the line break, the transcript without spaces around it.
        audio_vectors: how many; the model's `prompt_size`.

    Raises:
        ModelError: an unknown layout, a chat template that changes the text, or no placeholder in the vocabulary.
    """
    if layout not in DESTA2_LAYOUTS:
        raise ModelError(f"DeSTA2 layout {layout!r}: expected {' or '.join(DESTA2_LAYOUTS)}")
    _refuse_controls(tokenizer, question, response, system, transcript)
    spoken = transcript or ""
    if layout == "fixed":
        spoken = spoken.strip()
    audio = (Piece("", "audio"), Piece(spoken, "transcript"))
    turns = [("audio", audio), ("user", _stripped(_question(question)))]
    if system is not None:
        turns.insert(0, ("system", _stripped([Piece(system, "system")])))
    pieces = [*_rendered(tokenizer, turns), Piece(response, "response")]
    pieces = [piece for piece in pieces if piece.text or piece.kind == "audio"]
    place = next(index for index, piece in enumerate(pieces) if piece.kind == "audio")
    left = "".join(piece.text for piece in pieces[:place])
    prompt = _tokenised(tokenizer, pieces, add_special_tokens=layout == "upstream")
    if layout == "upstream":
        position = len(tokenizer(left, add_special_tokens=False)["input_ids"])
    else:
        position = next(index for index, (start, end) in enumerate(prompt.spans) if end > len(left))
    placeholder = _known_id(tokenizer, DESTA2_PLACEHOLDER)

    def inserted(values: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
        return (*values[:position], *[value] * audio_vectors, *values[position:])

    return NativePrompt(
        inserted(prompt.ids, placeholder),
        inserted(prompt.audio_mask, True),
        inserted(prompt.sources, place),
        prompt.pieces,
        inserted(prompt.spans, (len(left), len(left))),
    )


def desta25_prompt(
    tokenizer: Any,
    question: Question,
    response: str = "",
    *,
    transcripts: Sequence[str | None] = (None,),
    system: str | None = DESTA25_SYSTEM,
    audio_vectors: int = 64,
    placeholder: str = DESTA25_PLACEHOLDER,
) -> NativePrompt:
    """DeSTA2.5-Audio: one line per clip at the beginning of the user's turn, then the question.

    A clip is the plain text `<start_audio>`, its vectors, its transcript's own tokens, and `<end_audio>`. In the
    original both vectors and transcript overwrite placeholders; here the transcript's ids are in their places.

    Args:
        tokenizer: the decoder's, with its chat template.
        question: the user's turn after the clips.
        response: the beginning of the assistant's turn.
        transcripts: one per clip; spaces around a transcript are taken off, but " " stays, which the original uses
            where it hears no speech. None for nothing.
        system: the system turn, None for the template's own.
        audio_vectors: how many per clip; the model's `prompt_size`.
        placeholder: the checkpoint's `placeholder_token`.

    Raises:
        ModelError: no clip, a chat template that changes the text, or no placeholder in the vocabulary.
    """
    if not transcripts:
        raise ModelError("DeSTA2.5 prompt: expected one transcript (or None) per clip, got none")
    _refuse_controls(tokenizer, question, response, system, *transcripts)
    hole = _known_id(tokenizer, placeholder)
    spoken = [(text or "").strip() or (text or "") for text in transcripts]
    spoken_ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else [] for text in spoken]
    user: list[Piece] = []
    for clip in spoken_ids:
        user += [Piece("<start_audio>", "template"), Piece(placeholder * audio_vectors, "audio")]
        user += [
            Piece(placeholder * len(clip), "transcript"),
            Piece("<end_audio>", "template"),
            Piece("\n", "template"),
        ]
    turns = [("user", (*user, *_stripped(_question(question))))]
    if system is not None:
        turns.insert(0, ("system", _stripped([Piece(system, "system")])))
    pieces = [*_rendered(tokenizer, turns), Piece(response, "response")]
    prompt = _tokenised(tokenizer, [piece for piece in pieces if piece.text], add_special_tokens=False)
    replacements = itertools.chain.from_iterable(spoken_ids)
    ids = tuple(
        next(replacements) if kind == "transcript" else id for id, kind in zip(prompt.ids, prompt.kinds, strict=True)
    )
    if sum(prompt.audio_mask) != audio_vectors * len(transcripts) or prompt.ids.count(hole) != sum(
        kind in ("audio", "transcript") for kind in prompt.kinds
    ):
        raise ModelError(f"DeSTA2.5 prompt: {placeholder} is not a token of its own, or occurs in the prompt's text")
    return NativePrompt(ids, prompt.audio_mask, prompt.sources, prompt.pieces, prompt.spans)


def qwen_audio_chat_prompt(
    tokenizer: Any,
    question: Question,
    response: str = "",
    *,
    audio_tokens: Sequence[int],
    system: str = QWEN_AUDIO_SYSTEM,
) -> NativePrompt:
    """Qwen-Audio-Chat: ChatML, one line "Audio 1:<audio>...</audio>" per clip, then the question.

    Args:
        tokenizer: from `read_qwen_tokenizer`.
        question: the user's turn after the clips.
        response: the beginning of the assistant's turn.
        audio_tokens: vectors per clip without the tags, from `qwen_audio_tokens`; the two tags are added.
        system: the system turn.

    Raises:
        ModelError: no clip, or tags in the text.
    """
    _refuse_controls(tokenizer, question, response, system)
    pieces = [Piece(f"{TURN_START}system\n", "template"), Piece(system, "system")]
    pieces.append(Piece(f"{TURN_END}\n{TURN_START}user\n", "template"))
    for number, tokens in enumerate(audio_tokens, start=1):
        pieces += [Piece(f"Audio {number}:", "template"), _qwen_span(tokens), Piece("\n", "template")]
    pieces += _question(question)
    pieces += [Piece(f"{TURN_END}\n{TURN_START}assistant\n", "template"), Piece(response, "response")]
    return _qwen_prompt(tokenizer, pieces, audio_tokens)


def qwen_audio_base_prompt(
    tokenizer: Any, question: Question, response: str = "", *, audio_tokens: Sequence[int]
) -> NativePrompt:
    """Qwen-Audio without a template: the clips, the question, a blank, the response phrase; arguments as above.

    Raises:
        ModelError: no clip, or tags in the text.
    """
    _refuse_controls(tokenizer, question, response)
    pieces = [_qwen_span(tokens) for tokens in audio_tokens]
    asked = _question(question)
    pieces += [*asked, Piece(f" {response}" if asked and response else response, "response")]
    return _qwen_prompt(tokenizer, pieces, audio_tokens)


def _qwen_span(tokens: int) -> Piece:
    return Piece(AUDIO_START + AUDIO_PAD * tokens + AUDIO_END, "audio")


def _qwen_prompt(tokenizer: Any, pieces: Sequence[Piece], audio_tokens: Sequence[int]) -> NativePrompt:
    prompt = _tokenised(tokenizer, [piece for piece in pieces if piece.text], add_special_tokens=False)
    tags = {_known_id(tokenizer, token) for token in (AUDIO_START, AUDIO_PAD, AUDIO_END)}
    expected = sum(tokens + 2 for tokens in audio_tokens)
    found = sum(id in tags for id in prompt.ids)
    if not audio_tokens or min(audio_tokens) < 1 or found != expected or sum(prompt.audio_mask) != expected:
        raise ModelError(
            f"Qwen-Audio prompt: expected {expected} audio positions for clips of {list(audio_tokens)} vectors, found "
            f"{found} audio tokens; every clip needs one vector or more, and the text must not contain audio tags"
        )
    return prompt


def _refuse_controls(
    tokenizer: Any, question: Question, response: str, system: str | None = None, *transcripts: str | None
) -> None:
    asked = question if isinstance(question, str) else "".join(text for text, _ in question)
    texts = {"question": asked, "response phrase": response, "system text": system}
    texts |= {f"transcript {number}": text for number, text in enumerate(transcripts, start=1)}
    refuse_control_tokens(tokenizer, texts)


def _question(question: Question) -> tuple[Piece, ...]:
    given = [(question, "question")] if isinstance(question, str) else question
    return tuple(Piece(text, kind) for text, kind in given if text)


def _stripped(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Without blanks at the outer ends, which Llama's chat templates take off; SmolLM2's leaves them."""
    kept = [piece for piece in pieces if piece.text]
    if kept:
        kept[0] = Piece(kept[0].text.lstrip(), kept[0].kind)
        kept[-1] = Piece(kept[-1].text.rstrip(), kept[-1].kind)
    return tuple(kept)


def _rendered(tokenizer: Any, turns: Sequence[tuple[str, Iterable[Piece]]]) -> list[Piece]:
    """The tokenizer's chat template around the turns' pieces, ready for the assistant's answer."""
    contents = [list(pieces) for _, pieces in turns]
    marked = [{"role": role, "content": mark} for (role, _), mark in zip(turns, _MARKS, strict=False)]
    rendered: str = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    pieces: list[Piece] = []
    for mark, content in zip(_MARKS, contents, strict=False):
        around, found, rendered = rendered.partition(mark)
        if not found or mark in rendered:
            raise ModelError(
                f"the tokenizer's chat template does not print the turns {', '.join(role for role, _ in turns)} once "
                "each; give a decoder with a template that does (as Llama 3's and SmolLM2's do)"
            )
        pieces += [Piece(around, "template"), *content]
    return [*pieces, Piece(rendered, "template")]


def _tokenised(tokenizer: Any, pieces: Sequence[Piece], add_special_tokens: bool) -> NativePrompt:
    text = "".join(piece.text for piece in pieces)
    batch = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    spans = tuple((int(start), int(end)) for start, end in batch["offset_mapping"])
    ends = list(itertools.accumulate(len(piece.text) for piece in pieces))
    sources = tuple(min(bisect.bisect_right(ends, start), len(pieces) - 1) for start, _ in spans)
    audio = tuple(pieces[source].kind == "audio" for source in sources)
    return NativePrompt(tuple(batch["input_ids"]), audio, sources, tuple(pieces), spans)


def _known_id(tokenizer: Any, token: str) -> int:
    id = tokenizer.convert_tokens_to_ids(token)
    if id is None or id == tokenizer.unk_token_id:
        raise ModelError(f"the tokenizer has no token {token!r}, which holds the audio's places in a prompt")
    return int(id)
