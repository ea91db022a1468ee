"""Questions that differ from clip to clip, as variables of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lalm_patch.storage.netcdf import clean_text
from lalm_patch.storage.run_store import SampleRecord


def numbers(count: int) -> list[str]:
    """Labels of options that are another text in every sample: 1, 2, ..."""
    return [str(number) for number in range(1, count + 1)]


def own_questions(samples: Sequence[SampleRecord], options: Sequence[str]) -> dict[str, Any]:
    """Variables that say what each sample was asked and what its answer is.

    Args:
        samples: as `Tracer.trace` made them.
        options: labels of the dataset's options.

    Returns:
        `answer_token_id` (sample; the first token of the right answer, -1 if the sample was not run), `top_token_clean`
        and `top_token_corrupted` (sample; what the model would have said, one token), and of samples
        with a question of their own `question` (sample) and `option_text` (sample, option; empty past the last one).
    """
    found: dict[str, Any] = {}
    if any("answer_id" in sample.meta for sample in samples):
        ids = np.array([sample.meta.get("answer_id", -1) for sample in samples], np.int64)
        described = {"long_name": "first token of the right answer; -1 if not run"}
        found["answer_token_id"] = ("sample", ids, described)
    if any("top_texts" in sample.meta for sample in samples):
        for index, run in enumerate(("clean", "corrupted")):
            said = [clean_text(sample.meta.get("top_texts", ["", ""])[index]) for sample in samples]
            described = {"long_name": f"most probable token of the whole vocabulary, {run} run; empty if not run"}
            found[f"top_token_{run}"] = ("sample", np.array(said, object), described)
    if not any("question" in sample.meta for sample in samples):
        return found
    texts = np.full((len(samples), len(options)), "", object)
    for row, sample in enumerate(samples):
        own = [clean_text(text) for text in sample.meta["options"]]
        texts[row, : len(own)] = own
    asked = np.array([clean_text(sample.meta["question"]) for sample in samples], object)
    return {
        **found,
        "question": ("sample", asked, {"long_name": "what the clip is asked"}),
        "option_text": (("sample", "option"), texts, {"long_name": "the clip's own options; empty past the last"}),
    }


def tags(samples: Sequence[SampleRecord]) -> dict[str, Any]:
    """Coordinates along `sample` from what the data says of clips (task, difficulty); empty where it says nothing."""
    names = dict.fromkeys(name for sample in samples for name in sample.meta.get("tags", {}))
    return {
        f"tag_{name}": (
            "sample",
            np.array([clean_text(sample.meta.get("tags", {}).get(name, "")) for sample in samples], object),
            {"long_name": f"{name}, as the data says"},
        )
        for name in names
    }
