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
def heard(lalm: LALM, material: Sequence[Clip], silence: bool = True) -> tuple[Shares, Shares]:
    """Share of clips whose largest option logit is the right one, and their number, per attribute.

    Args:
        lalm: the model; if it reads a transcript, it gets its own of the clip, as in a run.
        material: labelled clips.
        silence: whether the model is also asked about digital silence of each clip's length.

    Returns:
        of the clips, and of silence in their place (nothing if it was not asked about that).
    """
    targets = {name: lalm.target_ids(Prompt.from_attribute(a), "chat") for name, a in attributes().items()}
    right: tuple[dict[str, list[bool]], ...] = ({}, {})
    for clip in material:
        # The transcript is the clip's in both: what silence is compared with differs in nothing else.
        spoken = lalm.family.transcribe(clip.waveform, lalm.module) if lalm.family.reads_transcript else None
        sounds = (clip.waveform, np.zeros_like(clip.waveform)) if silence else (clip.waveform,)
        for name, label in clip.labels.items():
            attribute = attributes()[name]
            prompt = replace(Prompt.from_attribute(attribute), transcript=spoken)
            for hits, sound in zip(right, sounds, strict=False):
                _, inputs = lalm.inputs(sound, prompt, "chat")
                logits = lalm.module(**inputs).logits[0, -1, list(targets[name])]
                hits.setdefault(name, []).append(attribute.options[int(logits.argmax())] == label)
    of_clips, of_silence = (
        {name: (float(np.mean(hits[name])), len(hits[name])) for name in ATTRIBUTES if name in hits} for hits in right
    )
    return of_clips, of_silence


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
    of_clips, of_silence = heard(lalm, held_out)
    columns = [of_clips, heard(lalm, shipped(), silence=False)[0], of_silence]
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
