"""Answers of several tokens: the probability of all of an answer's tokens, each after the ones before it.

P(answer | prompt) is the product of P(token | prompt, earlier tokens of the answer): the chain rule. Every factor is
what an engine computes anyway, the logits at the last position, of the prompt continued by the earlier tokens; the
interventions stay at the prompt's positions. So this works with every exact engine, and with each of them equally.
Answers that begin alike share these factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from lalm_patch.engine.interface import Engine, Progress, SharesPasses, Sweep, ignore_progress
from lalm_patch.engine.readout import Readout
from lalm_patch.interventions import Grid
from lalm_patch.models import LALM, Encoding

Answers = Sequence[Sequence[int]]
"""Tokens of every option's answer."""

PER_POSITION = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "audio_mask")
"""Inputs of a model with one number per position."""


class AnswerReader:
    """Reads every option's answer off the runs of one clip.

    Args:
        answers: tokens of every option's answer.
        whole: whether all of them count, or the first alone.
    """

    def __init__(self, answers: Answers, whole: bool) -> None:
        self.answers = tuple(tuple(answer if whole else answer[:1]) for answer in answers)
        self.whole = whole
        self._longer: dict[tuple[int, tuple[int, ...]], tuple[Encoding, Encoding]] = {}

    @property
    def first_ids(self) -> tuple[int, ...]:
        """First token of every answer."""
        return tuple(answer[0] for answer in self.answers)

    def base(self, engine: Engine, source: Encoding, target: Encoding) -> Readout:
        """As `Engine.base`.

        Returns:
            Of whole answers, `option_logits` are log-probabilities, so `logsumexp` is 0; `top_id` and `divergence` are
            those of the first token, and ranks are not known.
        """
        if not self.whole:
            return engine.base(source, target, self.first_ids)

        def one(prefix: tuple[int, ...], ids: list[int]) -> Readout:
            first, second = (self._continued(engine.lalm, encoding, prefix) for encoding in (source, target))
            return engine.base(first, second, ids)

        return self._summed(one)

    def sweep(
        self, engine: Engine, source: Encoding, target: Encoding, grid: Grid, progress: Progress = ignore_progress
    ) -> Readout:
        """As `Engine.sweep`; see `base`. Cells count as done with the last factor."""
        if not self.whole:
            return engine.sweep(source, target, grid, self.first_ids, progress)
        *_, last = self._factors()

        def one(prefix: tuple[int, ...], ids: list[int]) -> Readout:
            first, second = (self._continued(engine.lalm, encoding, prefix) for encoding in (source, target))
            return engine.sweep(first, second, grid, ids, progress if prefix == last else ignore_progress)

        return self._summed(one)

    def _factors(self) -> dict[tuple[int, ...], list[int]]:
        """Tokens to be read after each beginning of an answer, the empty one first."""
        read: dict[tuple[int, ...], list[int]] = {}
        for answer in self.answers:
            for index, token in enumerate(answer):
                after = read.setdefault(answer[:index], [])
                if token not in after:
                    after.append(token)
        return dict(sorted(read.items(), key=lambda item: len(item[0])))

    def _summed(self, compute: Callable[[tuple[int, ...], list[int]], Readout]) -> Readout:
        log_p: dict[tuple[int, ...], np.ndarray] = {}
        first: Readout | None = None
        for prefix, ids in self._factors().items():
            found = compute(prefix, ids)
            first = found if first is None else first
            each = found.option_logits.astype(np.float64) - found.logsumexp[:, None]
            log_p |= {(*prefix, token): each[:, column] for column, token in enumerate(ids)}
        assert first is not None  # there is an answer
        sums = [np.sum([log_p[answer[: end + 1]] for end in range(len(answer))], axis=0) for answer in self.answers]
        total = np.stack(sums, axis=-1).astype(np.float32)
        return Readout(total, np.zeros(len(total), np.float32), first.top_id, None, first.divergence)

    def _continued(self, lalm: LALM, encoding: Encoding, prefix: tuple[int, ...]) -> Encoding:
        key = id(encoding), prefix
        if key not in self._longer:
            # The encoding is kept with what was made of it, so that its id stays its own.
            self._longer[key] = encoding, continued(lalm, encoding, prefix)
        return self._longer[key][1]


def read_bases(engine: Engine, clips: Sequence[tuple[AnswerReader, Encoding, Encoding]]) -> list[Readout]:
    """`AnswerReader.base` of several clips' source and target runs; in shared passes, where the engine has those."""
    if isinstance(engine, SharesPasses) and not any(read.whole for read, *_ in clips):
        return engine.bases([(source, target, read.first_ids) for read, source, target in clips])
    return [read.base(engine, source, target) for read, source, target in clips]


def read_sweeps(engine: Engine, clips: Sequence[tuple[AnswerReader, Sweep]]) -> list[Readout]:
    """`AnswerReader.sweep` of several clips; in shared passes, where the engine has those.

    What the sweeps have for option tokens is not used.
    """
    if isinstance(engine, SharesPasses) and not any(read.whole for read, _ in clips):
        return engine.sweeps([replace(sweep, option_ids=read.first_ids) for read, sweep in clips])
    return [read.sweep(engine, sweep.source, sweep.target, sweep.grid, sweep.progress) for read, sweep in clips]


def continued(lalm: LALM, encoding: Encoding, ids: Sequence[int]) -> Encoding:
    """The encoding with text tokens appended, as if the model had said them: its own positions stay as they are.

    Args:
        lalm: the model.
        encoding: of a prompt.
        ids: the tokens; none gives the encoding back.
    """
    if not ids:
        return encoding
    length, more = len(encoding.tokens), len(ids)
    inputs = {}
    for name, value in encoding.inputs.items():
        if name in PER_POSITION:
            new = value.new_tensor([list(ids)]) if name == "input_ids" else value[:, -1:].expand(-1, more)
            value = torch.cat([value, new], dim=1)
        inputs[name] = value
    tokenizer, tokens = lalm.family.tokenizer, encoding.tokens
    table = replace(
        tokens,
        ids=tokens.ids + tuple(ids),
        texts=tokens.texts + tuple(str(tokenizer.decode([id], skip_special_tokens=False)) for id in ids),
        roles=tokens.roles + ("last",) * more,
    )
    longer = lalm.embed(table, inputs)
    if not encoding.overwritten:
        return longer
    embeds = torch.cat([encoding.inputs_embeds, longer.inputs_embeds[:, length:]], dim=1)
    return replace(longer, inputs_embeds=embeds, overwritten=True)
