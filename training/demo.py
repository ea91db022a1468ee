"""Make the demo: `python -m training.demo` trains the model and writes it into the package."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

import lalm_patch
from training.corpus import clips, write_corpus
from training.model import make_model, make_processor, plant_window
from training.train import QUESTION_WEIGHTS, Features, prompt_texts, save, silence, train

log = logging.getLogger("training")

DEMO = Path(lalm_patch.__file__).parent / "data" / "demo"


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
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    if options.corpus_only:
        log.info("%d clips in the corpus", write_corpus(options.out / "corpus", options.seed))
        return
    make(options)


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
