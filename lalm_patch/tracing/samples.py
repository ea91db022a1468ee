"""One clip on its way through a tracer, and what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lalm_patch.engine import Engine, Readout
from lalm_patch.engine.whole_answers import AnswerReader
from lalm_patch.interventions.grids import Grid
from lalm_patch.models import Encoding, TokenTable
from lalm_patch.stimuli import Record
from lalm_patch.tracing.metrics import Exclusion, own_question
from lalm_patch.tracing.questions import Asked


@dataclass
class SampleTrace:
    """What tracing one sample gave.

    Attributes:
        arrays: `base_*` with [clean, corrupted] first, `patched_*` with the grid's shape first (kept samples only).
        meta: what a JSON record can hold: label, exclusion, tokens and roles after the audio, checks, ...
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenedClip:
    """One clip on its way: what it is asked, and what the decoder gets for it and for what replaces it.

    Attributes:
        record: the clip.
        samples: its length at 16 kHz.
        asked: question and answers.
        read: reads the answers.
        spoken: transcript of the clip, and of what replaces it.
        clean: the clip.
        corrupted: what replaces it.
        grid: the cells.
        noising: whether corrupted states go into the clean run.
    """

    record: Record
    samples: int
    asked: Asked
    read: AnswerReader
    spoken: tuple[str | None, str | None]
    clean: Encoding
    corrupted: Encoding
    grid: Grid
    noising: bool

    @property
    def source(self) -> Encoding:
        """The run that states are taken from."""
        return self.corrupted if self.noising else self.clean

    @property
    def target(self) -> Encoding:
        """The run into which they are put."""
        return self.clean if self.noising else self.corrupted

    @property
    def same_layout(self) -> bool:
        """Whether states can be exchanged between the two."""
        return self.clean.tokens.same_layout(self.corrupted.tokens)


def exact_cells(
    engine: Engine,
    source: Encoding,
    target: Encoding,
    grid: Grid,
    chosen: np.ndarray,
    read: AnswerReader,
) -> tuple[list[int], Readout]:
    """Some cells of a grid by an exact engine: their indices, ascending, and one row for each."""
    indices: list[int] = np.sort(chosen).tolist()
    return indices, read.sweep(engine, source, target, grid.chosen(indices))


def sample_meta(label: str, group: str, samples: int, tokens: TokenTable, reason: Exclusion) -> dict[str, Any]:
    """What a sample's record says besides numbers.

    Args:
        label: the right answer.
        group: what the clip shares with others that are not independent of it.
        samples: length of the clip at 16 kHz.
        tokens: its prompt.
        reason: why it does not count, or that it does.
    """
    text = tokens.text_positions
    return {
        "label": label,
        "group": group,
        "exclusion": str(reason),
        "detail": "",
        "samples": samples,
        "positions": len(tokens),
        "audio_positions": len(tokens.audio_positions),
        "first_text_position": text[0],
        "token_ids": [tokens.ids[i] for i in text],
        "token_texts": [tokens.texts[i] for i in text],
        "token_roles": [tokens.roles[i] for i in text],
    }


def asked_meta(record: Record, asked: Asked) -> dict[str, Any]:
    """What a sample's record says of its question."""
    order = {"option_order": list(asked.prompt.options), "answer_id": asked.answers[asked.right][0]}
    return order | own_question(record)


def readout_arrays(prefix: str, readout: Readout, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A readout as a sample's arrays: rows in row-major order of `shape`, options last."""
    arrays: dict[str, np.ndarray] = {
        f"{prefix}_option_logits": readout.option_logits.reshape(*shape, -1).astype(np.float32),
        f"{prefix}_logsumexp": readout.logsumexp.reshape(shape).astype(np.float32),
        f"{prefix}_top_id": readout.top_id.reshape(shape).astype(np.int64),
    }
    if readout.option_rank is not None:
        arrays[f"{prefix}_option_rank"] = readout.option_rank.reshape(*shape, -1).astype(np.int32)
    if readout.divergence is not None:
        arrays[f"{prefix}_divergence"] = readout.divergence.reshape(*shape, 2).astype(np.float32)
    return arrays
