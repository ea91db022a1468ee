"""Real recordings for `training.smol`: those clips of SAKURA that may be trained on, as a list names them.

    attr,file,label,part          one row a clip; part is `train` or `validation`
    <root>/data/<attr>/audio/<file>

Nothing else of the corpus is opened: every other clip stays unheard, for others to test the model on.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import soundfile

from training.corpus import Clip
from training.speech import SAMPLING_RATE


def recordings(root: Path, listing: Path, part: str, attributes: tuple[str, ...]) -> list[Clip]:
    """The clips of one part, in the list's order; a clip is labelled for the attribute it stands under only.

    Args:
        root: a copy of SAKURA, with `data/` in it.
        listing: the list.
        part: `train` or `validation`.
        attributes: which to take, by the package's names ("gender").

    Raises:
        ValueError: a file that is not mono at 16 kHz, or no clip at all.
    """
    found = []
    with listing.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] == part and row["attr"].lower() in attributes:
                path = root / "data" / row["attr"] / "audio" / row["file"]
                samples, rate = soundfile.read(path, dtype="float32")
                if rate != SAMPLING_RATE or samples.ndim != 1:
                    raise ValueError(f"{path}: expected mono at {SAMPLING_RATE} Hz, got {samples.shape} at {rate} Hz")
                found.append(Clip(np.asarray(samples), {row["attr"].lower(): row["label"]}, row["file"]))
    if not found:
        raise ValueError(f"{listing}: names no clip with part={part} and an attribute of {', '.join(attributes)}")
    return found
