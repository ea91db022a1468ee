"""Teach a decoder with a planted window to answer about what a frozen encoder hears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lalm_patch.models import Family
from lalm_patch.stimuli import Prompt
from training.steps import Descent, report_held_out
from training.train import (
    ATTRIBUTES,
    IGNORED,
    QUESTION_WEIGHTS,
    SHARE_OTHER_LAYOUT,
    SHARE_SHUFFLED,
    SHARE_SILENT,
    attributes,
    without_attention,
)

SHARE_HANDED_OVER = 0.5


@dataclass(frozen=True)
class Heard:
    """What the encoder makes of clips.

    Attributes:
        taps: [clips, layers, positions, width], the output of every encoder layer.
        frames: [clips] mel frames that hold the clip.
        labels: [clips, attributes] index of the right option, `IGNORED` where the question makes no sense.
    """

    taps: Tensor
    frames: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Student:
    """What is trained, and how its prompts are made.

    Attributes:
        family: the package's adapter.
        connector: from taps [clips, layers, positions, width] to audio embeddings [clips, audio positions, hidden].
        parts: the modules that are trained.
        decoder: layers, norm and rotary embedding.
        embeddings: of tokens.
        head: from states to logits.
        audio_id: the token that holds the audio's places.
        window: the layers that attend.
        transcript: what is said in a clip of some mel frames, for families that read it.
        progressive: every layer of the window has to add an equal share of the answer's probability.
    """

    family: Family
    connector: Callable[[Tensor], Tensor]
    parts: tuple[nn.Module, ...]
    decoder: nn.Module
    embeddings: nn.Module
    head: nn.Module
    audio_id: int
    window: tuple[int, int]
    transcript: Callable[[int], str] | None = None
    progressive: bool = False

    def ids(self, name: str, layout: str, order: int | None, spoken: str | None, option: str = "") -> list[int]:
        """A question; `order` seeds a shuffled list of options."""
        return question_ids(self.family, name, layout, order, spoken, option)

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.head.weight.shape[0])  # type: ignore[arg-type]

    def answers(self, name: str) -> list[int]:
        """Target tokens of an attribute's options."""
        spoken = None if self.transcript is None else self.transcript(100)
        return [self.ids(name, "chat", None, spoken, f" {option}")[-1] for option in attributes()[name].options]


@cache
def question_ids(
    family: Family, name: str, layout: str, order: int | None, spoken: str | None, option: str
) -> list[int]:
    """Ids of a question with the places of its audio, and an option after the phrase; see `Student.ids`."""
    attribute = attributes()[name]
    prompt = Prompt.from_attribute(attribute)
    if order is not None:
        prompt = Prompt.from_attribute(attribute, "shuffled", order, "training")
    return family.text_ids(replace(prompt, transcript=spoken), layout, option)


def last_logits(student: Student, rows: list[list[int]], audio: Tensor, handed_over: int | None = None) -> Tensor:
    """Logits at each row's last position: [rows, vocabulary].

    Args:
        student: the model.
        rows: ids of prompts whose audio positions are at the same places.
        audio: embeddings for them [rows, audio positions, hidden].
        handed_over: from this layer on, audio positions are those of row 0, which is silence: what has not reached the
            text by then is lost, as in a layer-wise patch.
    """
    ends = torch.tensor([len(row) - 1 for row in rows])
    ids = torch.zeros(len(rows), int(ends.max()) + 1, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    # Rows end at different places: padding on the right is invisible to what comes before it.
    places = (torch.tensor(rows[0]) == student.audio_id).nonzero()[:, 0]
    first, end = student.window
    layers = student.decoder.layers
    states = student.embeddings(ids).index_copy(1, places, audio)
    states = without_attention(states, layers[:first])
    position = torch.arange(ids.shape[1])[None]
    rotary = student.decoder.rotary_emb(states, position)
    for index in range(first, end):
        if index == handed_over:
            silent = states[:1, places].expand(len(rows), -1, -1)
            states = states.index_copy(1, places, silent)
        states = layers[index](states, position_ids=position, position_embeddings=rotary)
    lasts = without_attention(states[torch.arange(len(rows)), ends], layers[end:])
    logits: Tensor = student.head(student.decoder.norm(lasts))
    return logits


def train_answers(
    student: Student,
    heard: Heard,
    silent: Heard,
    *,
    steps: int,
    batch: int = 24,
    rate: float = 1e-3,
    seed: int = 0,
    evaluation: Heard | None = None,
) -> list[float]:
    """Returns the loss of every step. `silent` is a single clip of silence.

    `evaluation` is looked at now and then for the log only.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    descent = Descent((p for part in student.parts for p in part.parameters()), rate, steps)
    for part in student.parts:
        part.train()
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch:
            order = rng.permutation(len(heard)).tolist()
        chosen, order = order[:batch], order[batch:]
        rows, taps, answers, options = _draw(student, heard, silent, chosen, rng)
        handed_over, share = None, 1.0
        first, end = student.window
        if student.progressive and rng.random() < SHARE_HANDED_OVER:
            handed_over = int(rng.integers(first, end))
            share = (handed_over - first) / (end - first)
        logits = last_logits(student, rows, student.connector(taps), handed_over)
        descent.step(functional.cross_entropy(logits, share * answers + (1 - share) * options))
        if evaluation is not None and (step + 1) % 500 == 0:
            report_held_out(accuracy(student, evaluation))
    for part in student.parts:
        part.eval()
    return descent.losses


def _draw(
    student: Student, heard: Heard, silent: Heard, chosen: list[int], rng: np.random.Generator
) -> tuple[list[list[int]], Tensor, Tensor, Tensor]:
    """Rows of ids, taps, answers and what an ignorant answer is, [rows, vocabulary] each; row 0 is silence.

    One layout per batch, so that the audio is at the same places in all rows.
    """
    layout = "user" if rng.random() < SHARE_OTHER_LAYOUT else "chat"
    answers, ignorant = (torch.zeros(len(chosen), student.vocabulary) for _ in range(2))
    rows, taps = [], []
    for row, index in enumerate(chosen):
        labels = heard.labels[index]
        shares = np.where(labels.numpy() != IGNORED, QUESTION_WEIGHTS, 0)
        column = int(rng.choice(len(ATTRIBUTES), p=shares / shares.sum()))
        name = ATTRIBUTES[column]
        targets = student.answers(name)
        ignorant[row, targets] = 1 / len(targets)
        quiet = row == 0 or rng.random() < SHARE_SILENT
        taps.append(silent.taps[0] if quiet else heard.taps[index])
        if quiet:
            answers[row] = ignorant[row]
        else:
            answers[row, targets[int(labels[column])]] = 1
        order = int(rng.integers(1000)) if rng.random() < SHARE_SHUFFLED else None
        spoken = None
        if student.transcript is not None:
            # Another clip's: a clip's length tells of its rate, and so of its emotion, also when the audio is silent.
            spoken = student.transcript(int(heard.frames[rng.integers(len(heard))]))
        rows.append(student.ids(name, layout, order, spoken))
    return rows, torch.stack(taps).float(), answers, ignorant


@torch.no_grad()
def accuracy(student: Student, heard: Heard, batch: int = 64) -> dict[str, tuple[float, int]]:
    """Share of clips whose largest option logit is the right one, and their number, per attribute."""
    result = {}
    for column, name in enumerate(ATTRIBUTES):
        which = (heard.labels[:, column] != IGNORED).nonzero()[:, 0]
        right = 0
        for part in which.split(batch):
            spoken = [None if student.transcript is None else student.transcript(int(n)) for n in heard.frames[part]]
            rows = [student.ids(name, "chat", None, text) for text in spoken]
            logits = last_logits(student, rows, student.connector(heard.taps[part].float()))
            right += int((logits[:, student.answers(name)].argmax(-1) == heard.labels[part, column]).sum())
        if len(which):
            result[name] = (right / len(which), len(which))
    return result
