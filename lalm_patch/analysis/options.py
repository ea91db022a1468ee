"""Options of a dataset, which may be another text in every sample, and what samples are told apart by."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

ALL = "all clips"
MOST_CLASSES = 24
"""More answers than these are no classes: a table of them says nothing."""


def has_own_options(dataset: xr.Dataset) -> bool:
    """Whether option k is another text in every sample."""
    return "option_text" in dataset and not _shared(dataset)


def option_texts(dataset: xr.Dataset) -> xr.DataArray:
    """What each option says (sample, option); empty past a sample's last one."""
    if "option_text" in dataset:
        return dataset["option_text"].transpose("sample", "option").astype(str)
    texts = np.broadcast_to(dataset["option"].values.astype(str), (dataset.sizes["sample"], dataset.sizes["option"]))
    return xr.DataArray(texts, {"sample": dataset["sample"], "option": dataset["option"]}, ("sample", "option"))


def right_options(dataset: xr.Dataset) -> xr.DataArray:
    """Whether an option is the right one (sample, option)."""
    if "option_text" not in dataset:
        return dataset["option"] == dataset["label"]
    return option_texts(dataset) == dataset["label"].astype(str)


def chance(dataset: xr.Dataset) -> float:
    """Share of right answers of guessing: the mean over samples of one over the number of options."""
    counts = (option_texts(dataset) != "").sum("option").values
    return float(np.mean(1 / np.maximum(counts, 1))) if len(counts) else 1 / max(dataset.sizes["option"], 1)


def classes(dataset: xr.Dataset) -> tuple[list[str], NDArray[np.object_]]:
    """What samples are counted by: the answer; where questions differ the task, or failing that nothing.

    Returns:
        The classes in order, and the class of every sample.
    """
    if not has_own_options(dataset):
        return [str(option) for option in dataset["option"].values], dataset["label"].values.astype(object)
    if "tag_task" in dataset.coords:
        tasks = np.array([str(task) or "no task" for task in dataset["tag_task"].values], object)
        if len(set(tasks)) <= MOST_CLASSES:
            return sorted(set(tasks)), tasks
    return [ALL], np.array([ALL] * dataset.sizes["sample"], object)


def _shared(dataset: xr.Dataset) -> bool:
    texts = dataset["option_text"].transpose("sample", "option").values.astype(str)
    return bool((texts == dataset["option"].values.astype(str)).all())
