"""What each clip is asked, and in which tokens it is answered."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lalm_patch.errors import DataError
from lalm_patch.models import LALM
from lalm_patch.settings import RunSettings
from lalm_patch.stimuli import Attribute, Prompt, Record


@dataclass(frozen=True)
class Asked:
    """One clip's question.

    Attributes:
        prompt: as the model gets it, options in the order they are listed, without a transcript.
        options: in the order of the data, which results keep.
        answers: tokens of every option's answer, in the order of `options`.
        right: which option is right.
    """

    prompt: Prompt
    options: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    right: int


class Questions:
    """The questions of a run.

    Args:
        lalm: the model, or its outline.
        attribute: what clips are asked that have no question of their own; None if all have.
        settings: the run's settings.

    Attributes:
        layout: of the prompts.
        whole: whether all of an answer's tokens are read.
    """

    def __init__(self, lalm: LALM, attribute: Attribute | None, settings: RunSettings) -> None:
        self._lalm, self._attribute, self._settings = lalm, attribute, settings.prompt
        self.layout = settings.prompt.layout or settings.model.prompt_layout
        self.whole = settings.prompt.answer == "whole"
        self._known: dict[Prompt, tuple[tuple[int, ...], ...]] = {}

    def example(self, records: tuple[Record, ...] = ()) -> Prompt:
        """A prompt as clips get it, options in the order of the data; the first clip's, where each has its own.

        Raises:
            DataError: clips have questions of their own, and there are none.
        """
        own = next((record.prompt for record in records if record.prompt is not None), None)
        if own is not None:
            return self._formed(replace(own, transcript=None))
        if self._attribute is None:
            raise DataError("each clip has a question of its own, and there is no clip: expected at least one")
        return self._formed(Prompt.from_attribute(self._attribute))

    def answers(self, prompt: Prompt) -> tuple[tuple[int, ...], ...]:
        """Tokens of every option's answer, in the prompt's order.

        Raises:
            ModelError: see `models.answers.answer_ids`.
        """
        prompt = replace(prompt, transcript=None)
        if prompt not in self._known:
            found = self._lalm.answer_ids(prompt, self.layout, self._settings.target, whole=self.whole)
            self._known[prompt] = found
        return self._known[prompt]

    def ask(self, record: Record) -> Asked:
        """One clip's question.

        Raises:
            ModelError: its options cannot be told apart by this model.
        """
        fixed = self.example((record,))
        listed = fixed
        if self._settings.order == "shuffled":
            listed = fixed.shuffled(self._settings.seed, record.id)
        by_option = dict(zip(listed.options, self.answers(listed), strict=True))
        answers = tuple(by_option[option] for option in fixed.options)
        return Asked(listed, fixed.options, answers, fixed.options.index(record.label))

    def _formed(self, prompt: Prompt) -> Prompt:
        return replace(prompt, letters=self._settings.options == "letters")
