"""Make the demo: `python -m training.demo` trains the model and writes it into the package."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

import lalm_patch
from lalm_patch.stimuli import load_demo
from training.corpus import Clip, clips, write_corpus
from training.model import make_model, make_processor, plant_window
from training.train import QUESTION_WEIGHTS, Features, accuracy, attributes, prompt_texts, save, silence, train

log = logging.getLogger("training")

DEMO = Path(lalm_patch.__file__).parent / "data" / "demo"


def measure(folder: Path, seed: int) -> str:
    """Table of the accuracy of the checkpoint in `folder` on held-out clips, the shipped corpus, and silence."""
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    held_out = list(clips("evaluation", speech=400, animals=180, seed=seed))
    shipped = [
        Clip(record.waveform(), {name: record.label}, "")
        for name, attribute in attributes().items()
        for record in load_demo(attribute)
    ]

    def of(chosen: Iterable[Clip]) -> dict[str, tuple[float, int]]:
        return accuracy(model, processor, Features.of(chosen, processor))

    columns = [of(held_out), of(shipped), of(replace(clip, waveform=np.zeros_like(clip.waveform)) for clip in held_out)]
    lines = ["| attribute | held-out clips | shipped corpus | silence | chance |", "| --- | --- | --- | --- | --- |"]
    for name, attribute in attributes().items():
        cells = [f"{100 * share:.1f} % (n={n})" for share, n in (column[name] for column in columns)]
        lines.append(f"| {name} | {' | '.join(cells)} | {100 / len(attribute.options):.1f} % |")
    return "\n".join(lines)


def main() -> None:
    """Synthesise, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for model/ and corpus/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speech", type=int, default=15000, help="training clips of speech")
    parser.add_argument("--animals", type=int, default=2700, help="training clips of animals")
    parser.add_argument("--encoder-steps", type=int, default=7000)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--processes", type=int, default=2, help="that synthesise clips")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument(
        "--weights", type=float, nargs=4, default=QUESTION_WEIGHTS, help="how often each attribute is asked"
    )
    parser.add_argument("--go-on-from", type=Path, help="a checkpoint to train further, instead of a fresh model")
    parser.add_argument("--corpus-only", action="store_true", help="write the corpus, train nothing")
    parser.add_argument("--measure-only", action="store_true", help="print the accuracy of the model in --out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    if options.corpus_only:
        log.info("%d clips in the corpus", write_corpus(options.out / "corpus", options.seed))
        return
    if not options.measure_only:
        make(options)
    print(measure(options.out / "model", options.seed))


def make(options: argparse.Namespace) -> None:
    """Train the model and save it."""
    started = time.monotonic()
    if options.go_on_from:
        processor = Qwen2AudioProcessor.from_pretrained(options.go_on_from)
        model = Qwen2AudioForConditionalGeneration.from_pretrained(options.go_on_from, dtype=torch.float32)
        model = plant_window(model)
    else:
        processor = make_processor(prompt_texts())
        model = make_model(processor, options.seed)
    log.info("%.2f million parameters", sum(p.numel() for p in model.parameters()) / 1e6)
    material = clips("train", options.speech, options.animals, options.seed, options.processes)
    features = Features.of(material, processor)
    log.info("%d training clips after %.1f min", len(features), (time.monotonic() - started) / 60)
    train(
        model,
        processor,
        features,
        silence(processor, 200, options.seed),
        encoder_steps=options.encoder_steps,
        steps=options.steps,
        rate=options.rate,
        seed=options.seed,
        weights=options.weights,
        # Another seed than `measure`'s: what is watched in training is not what is reported.
        evaluation=Features.of(clips("evaluation", speech=200, animals=90, seed=options.seed + 1), processor),
    )
    save(model, processor, options.out / "model")
    log.info("trained after %.1f min", (time.monotonic() - started) / 60)


if __name__ == "__main__":
    main()
