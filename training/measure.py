"""How well demos hear, through the package's own path: `python -m training.measure demo demo_voxtral demo_desta`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lalm_patch.config import compose
from lalm_patch.models import LALM
from lalm_patch.stimuli import Prompt, load_demo
from training.corpus import Clip, clips
from training.train import ATTRIBUTES, attributes

Shares = dict[str, tuple[float, int]]


@torch.no_grad()
def heard(lalm: LALM, material: Sequence[Clip], silent: bool = False) -> Shares:
    """Share of clips whose largest option logit is the right one, and their number, per attribute.

    Args:
        lalm: the model; if it reads a transcript, it gets its own of the clip, as in a run.
        material: labelled clips.
        silent: whether the model hears digital silence of the clip's length instead.
    """
    targets = {name: lalm.target_ids(Prompt.from_attribute(a), "chat") for name, a in attributes().items()}
    right = {name: [] for name in ATTRIBUTES}
    for clip in material:
        spoken = lalm.family.transcribe(clip.waveform, lalm.module) if lalm.family.reads_transcript else None
        waveform = np.zeros_like(clip.waveform) if silent else clip.waveform
        for name in ATTRIBUTES:
            if name not in clip.labels:
                continue
            attribute = attributes()[name]
            prompt = replace(Prompt.from_attribute(attribute), transcript=spoken)
            logits = lalm.module(**lalm.encode(waveform, prompt, "chat").inputs).logits[0, -1, list(targets[name])]
            right[name].append(attribute.options[int(logits.argmax())] == clip.labels[name])
    return {name: (float(np.mean(hits)), len(hits)) for name, hits in right.items() if hits}


def shipped() -> list[Clip]:
    """The corpus in the package; every clip is there for one attribute."""
    return [
        Clip(record.waveform(), {name: record.label}, "")
        for name, attribute in attributes().items()
        for record in load_demo(attribute)
    ]


def measure(model: str, seed: int = 0) -> str:
    """Table of a demo's accuracy on held-out clips, the shipped corpus, and silence."""
    lalm = LALM.load(compose(f"model={model}").model)
    held_out = list(clips("evaluation", speech=400, animals=180, seed=seed))
    columns = [heard(lalm, held_out), heard(lalm, shipped()), heard(lalm, held_out, silent=True)]
    lines = ["| attribute | held-out clips | shipped corpus | silence | chance |", "| --- | --- | --- | --- | --- |"]
    for name, attribute in attributes().items():
        cells = [f"{100 * share:.1f} % (n={n})" for share, n in (column[name] for column in columns)]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 / len(attribute.options):.1f} % |")
    return "\n".join(lines)


def main() -> None:
    """Print a table per demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names under conf/model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for model in options.models:
        print(f"{model}\n\n{measure(model, options.seed)}\n")


if __name__ == "__main__":
    main()
