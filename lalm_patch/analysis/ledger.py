"""Who counts and why not: samples by class and reason, and how often the model is right."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lalm_patch.analysis.options import chance, classes, has_own_options
from lalm_patch.analysis.run_info import about, run_settings
from lalm_patch.tracing.metrics import Exclusion

KEPT = "kept"


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers.

    Attributes:
        clean: of the clean run; NaN without a readable clip.
        corrupted: of the corrupted run; NaN without a readable clip.
        chance: of guessing, one over the number of options, in the mean.
        n: readable clips.
    """

    clean: float
    corrupted: float
    chance: float
    n: int


def exclusion_table(dataset: xr.Dataset) -> xr.DataArray:
    """How many samples of each class count, and how many do not, by reason.

    Returns:
        Counts (label, reason); labels in the options' order, reason `kept` first. Each sample is counted once. Where
        every clip has options of its own, a label is a task instead, see `analysis.options.classes`.
    """
    labels, own = classes(dataset)
    found = [str(reason) or KEPT for reason in dataset["exclusion"].values]
    reasons = [KEPT, *sorted(set(found) - {KEPT})]
    counts = np.zeros((len(labels), len(reasons)), dtype=np.int64)
    for label, reason in zip(own, found, strict=True):
        counts[labels.index(str(label)), reasons.index(reason)] += 1
    coords = {"label": np.array(labels, object), "reason": np.array(reasons, object)}
    return xr.DataArray(counts, coords, ("label", "reason"), name="samples")


def accuracy(dataset: xr.Dataset) -> Accuracy:
    """How often the clean and the corrupted run are right, over the readable clips.

    A prediction is what the run's setting `prompt.correct` says: the best option, or the best token of the vocabulary.
    """
    readable = is_readable(dataset)
    n = int(readable.sum())
    clean, corrupted = (
        float(is_right(dataset, run)[readable].mean()) if n else np.nan for run in ("clean", "corrupted")
    )
    return Accuracy(clean, corrupted, chance(dataset), n)


def is_readable(dataset: xr.Dataset) -> NDArray[np.bool_]:
    """Which samples were run at all."""
    return np.array([bool(str(text)) for text in dataset["prediction_clean"].values], bool)


def is_right(dataset: xr.Dataset, run: str) -> NDArray[np.bool_]:
    """Which samples the `clean` or `corrupted` run answers rightly; see `accuracy`."""
    labels = [str(label) for label in dataset["label"].values]
    if run_settings(dataset).get("prompt", {}).get("correct") == "vocabulary":
        top = dataset[f"top_token_id_{run}"].values
        if "answer_token_id" in dataset:
            return np.asarray(top == dataset["answer_token_id"].values)
        target = json.loads(dataset.attrs["target_token_ids"])  # of runs made before it was stored
        return np.array([target[label] == int(token) for label, token in zip(labels, top, strict=True)], bool)
    predicted = dataset[f"prediction_{run}"].values
    return np.array([label == str(text) for label, text in zip(labels, predicted, strict=True)], bool)


def lost_classes(dataset: xr.Dataset) -> list[str]:
    """Sentences on classes of which no clip counts: because the corrupted run names them, or no clip could be used.

    Where every clip has options of its own there are no classes.
    """
    if has_own_options(dataset):
        return []
    table = exclusion_table(dataset)
    counts = {
        str(label): {str(reason): int(table.sel(label=label, reason=reason)) for reason in table["reason"].values}
        for label in table["label"].values
    }
    favourite, unheard = str(Exclusion.CORRUPTED_RIGHT), (str(Exclusion.UNREADABLE), str(Exclusion.SILENT))
    lost = [label for label, of_class in counts.items() if not of_class[KEPT] and of_class.get(favourite)]
    sentences = []
    if lost:
        corruption = about(dataset).corruption
        why = f"The model's favourite answer to {corruption} removes a whole class"
        if corruption == "silence":
            why = (
                "With silence and a fixed prompt the corrupted run is the same for every clip of one length, so its "
                "answer can remove a whole class"
            )
        sentences.append(f"{why}: no clip of {', '.join(lost)} counts.")
    emptied = [
        label
        for label, of_class in counts.items()
        if sum(of_class.values()) and sum(of_class.values()) == sum(of_class.get(reason, 0) for reason in unheard)
    ]
    if emptied:
        sentences.append(
            f"No clip of {', '.join(emptied)} could be used; chance is that of guessing among all "
            f"{dataset.sizes['option']} options, as the model is asked."
        )
    return sentences


def why_none_counts(dataset: xr.Dataset) -> str:
    """The sentence that stands in for results where no sample counts: the reasons and what they mean."""
    if not dataset.sizes["sample"]:
        return "no sample counts: the run has no samples"
    table = exclusion_table(dataset)
    totals = {str(reason): int(table.sel(reason=reason).sum()) for reason in table["reason"].values}
    reasons = ", ".join(f"{reason} ({count})" for reason, count in totals.items() if count)
    text = f"no sample counts: {reasons}."
    answers = {str(option) for option in dataset["prediction_corrupted"].values if str(option)}
    if len(answers) == 1:
        text += (
            f" Without the sound the model always answers '{answers.pop()}', so clips of that class never count;"
            " the others count once the clean run names them rightly."
        )
    return text
