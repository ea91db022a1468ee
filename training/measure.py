"""How well models hear, through the package's own path: `python -m training.measure demo demo_voxtral demo_desta`, or
`python -m training.measure smol --recordings SAKURA --list LIST.csv`."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lalm_patch.config import compose
from lalm_patch.models import LALM
from lalm_patch.stimuli import Prompt, load_demo
from training.corpus import Clip, clips
from training.recordings import recordings
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
    with _remembered(lalm.module, "forward"), _remembered(*_listening(lalm.module)):
        return _heard(lalm, material, silence)


def _heard(lalm: LALM, material: Sequence[Clip], silence: bool) -> tuple[Shares, Shares]:
    targets = {name: lalm.target_ids(Prompt.from_attribute(a), "chat") for name, a in attributes().items()}
    right: tuple[dict[str, list[bool]], ...] = ({}, {})
    for clip in material:
        # The transcript is the clip's in both: what silence is compared with differs in nothing else.
        writes = lalm.family.transcribes(lalm.module)
        spoken = lalm.family.transcribe(clip.waveform, lalm.module) if writes else None
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


@contextmanager
def _remembered(owner: nn.Module, name: str) -> Iterator[None]:
    """Inputs that a module's method met before get what it returned then: a clip is asked about several times, and
    the silence of many clips is the same."""
    returned: dict[bytes, Any] = {}
    compute = getattr(owner, name)

    def method(*inputs: Any, **named: Any) -> Any:
        digest = hashlib.sha256()
        for key, value in (*enumerate(inputs), *sorted(named.items())):
            values = value.numpy(force=True) if isinstance(value, Tensor) else None
            digest.update(f"{key} {value if values is None else (values.dtype, values.shape)} ".encode())
            digest.update(b"" if values is None else values.tobytes())
        seen = digest.digest()
        if seen not in returned:
            returned[seen] = compute(*inputs, **named)
        return returned[seen]

    own = name in vars(owner)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, compute)
        else:
            delattr(owner, name)


def _listening(module: nn.Module) -> tuple[nn.Module, str]:
    """Where the encoder's work is done: DeSTA reads states inside of it as it goes on."""
    if hasattr(module, "tapped_states"):
        return module, "tapped_states"
    (tower,) = (part for name, part in module.named_modules() if name.rpartition(".")[2] == "audio_tower")
    return tower, "forward"


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


def of_recordings(model: str, clips_of_attributes: Sequence[Clip]) -> str:
    """Table of a model's accuracy on labelled recordings by attribute and class, with what silence is answered with."""
    lalm = LALM.load(compose(f"model={model}").model)
    lines = [
        "| attribute | right | of | by class | chance | silence is answered |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, attribute in attributes().items():
        by_class = {}
        for option in attribute.options:
            chosen = [clip for clip in clips_of_attributes if clip.labels.get(name) == option]
            if chosen:
                by_class[option] = heard(lalm, chosen, silence=False)[0][name]
        total = sum(number for _, number in by_class.values())
        right = sum(share * number for share, number in by_class.values())
        classes = ", ".join(f"{option} {share * number:.0f}/{number}" for option, (share, number) in by_class.items())
        said = ", ".join(f"{option} {share:.2f}" for option, share in silence_answers(lalm, name).items())
        chance = 100 / len(attribute.options)
        lines.append(f"| {name} | {100 * right / total:.1f} % | {total} | {classes} | {chance:.1f} % | {said} |")
    return "\n".join(lines)


@torch.no_grad()
def silence_answers(lalm: LALM, name: str) -> dict[str, float]:
    """How probable each option's first token is, over the whole vocabulary, when two seconds of silence are played."""
    prompt = Prompt.from_attribute(attributes()[name])
    _, inputs = lalm.inputs(np.zeros(32_000, np.float32), prompt, "chat")
    likely = lalm.module(**inputs).logits[0, -1].softmax(-1)
    targets = lalm.target_ids(prompt, "chat")
    return {option: float(likely[token]) for option, token in zip(attributes()[name].options, targets, strict=True)}


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names under conf/model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recordings", type=Path, help="a copy of SAKURA: measure on its clips, not on synthetic ones")
    parser.add_argument("--list", type=Path, help="which of its clips: attr,file,label,part")
    parser.add_argument("--part", default="validation", help="of the list")
    options = parser.parse_args()
    for model in options.models:
        if options.recordings is None:
            table = measure(model, options.seed)
        else:
            table = of_recordings(model, recordings(options.recordings, options.list, options.part, ATTRIBUTES))
        print(f"{model}\n\n{table}\n")


if __name__ == "__main__":
    main()
