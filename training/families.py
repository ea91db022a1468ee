"""Make the other demos: `python -m training.families` trains demo_voxtral and demo_desta and writes them.

Both start from the encoder of the first demo, taught to hear padding, then frozen; as in the real DeSTA only what is
behind it learns to answer.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, WhisperTokenizerFast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.models.checkpoint import BUNDLED
from lalm_patch.models.desta import Desta25
from lalm_patch.models.native.prompts import DESTA25_PLACEHOLDER
from lalm_patch.models.voxtral import Voxtral
from training.answers import Heard, Student, train_answers
from training.checkpoints import (
    DESTA_VECTORS,
    DESTA_WINDOW,
    VOXTRAL_WINDOW,
    make_connector,
    make_llama,
    make_voxtral,
    make_whisper,
    save_connector,
)
from training.corpus import Clip, clips
from training.padded import extractor, padded_encoder, taps, train_encoder
from training.train import Features, prompt_texts
from training.transcriber import spoken, train_transcriber

log = logging.getLogger("training")

DEMO_DATA = BUNDLED["demo"].parent


def features_of(material: Iterable[Clip]) -> Features:
    """Features of clips in the window of both families."""
    return Features.of(material, SimpleNamespace(feature_extractor=extractor()))


def heard_by(encoder: WhisperEncoder, features: Features) -> Heard:
    """What the encoder makes of clips."""
    return Heard(taps(encoder, features), features.frames, features.labels)


def silence_heard_by(encoder: WhisperEncoder) -> Heard:
    """What it makes of silence; as everything is padded with zeros, all silences are alike."""
    return heard_by(encoder, features_of([Clip(np.zeros(16_000, np.float32), {}, "")]))


Save = Callable[[torch.dtype], None]


def voxtral_student(folder: Path, encoder: WhisperEncoder, seed: int) -> tuple[Student, Save]:
    """A fresh demo_voxtral, and what writes it to the folder."""
    model = make_voxtral(folder, prompt_texts(), encoder, seed)
    model.config.save_pretrained(folder)  # the processor is found by the type in it
    tower, projector = model.model.audio_tower, model.model.multi_modal_projector
    stacked = model.config.audio_config.intermediate_size

    def connector(states: Tensor) -> Tensor:
        normed = tower.layer_norm(states[:, -1])
        embedded: Tensor = projector(normed.reshape(len(normed), -1, stacked))
        return embedded

    student = Student(
        Voxtral(AutoProcessor.from_pretrained(folder)),
        connector,
        (projector, model.get_decoder(), model.get_output_embeddings()),
        model.get_decoder(),
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        model.config.audio_token_id,
        VOXTRAL_WINDOW,
    )
    return student, lambda dtype: model.to(dtype).save_pretrained(folder)


def desta_student(folder: Path, encoder: WhisperEncoder, seed: int) -> tuple[Student, Save]:
    """A fresh demo_desta without its transcriber, and what writes its decoder and connector to the folder."""
    llama, tokenizer = make_llama(folder / "llama", prompt_texts(), seed)
    connector = make_connector(encoder.config.encoder_layers, seed)
    hole = tokenizer.convert_tokens_to_ids(DESTA25_PLACEHOLDER)
    shapes = SimpleNamespace(prompt_size=DESTA_VECTORS, audio_token_id=hole)
    student = Student(
        Desta25(tokenizer, extractor(), shapes),
        lambda states: connector(list(states.unbind(1))),
        (connector, llama),
        llama.model,
        llama.get_input_embeddings(),
        llama.get_output_embeddings(),
        hole,
        DESTA_WINDOW,
        spoken,
        progressive=True,
    )

    def save(dtype: torch.dtype) -> None:
        llama.to(dtype).save_pretrained(folder / "llama")
        save_connector(connector, folder / "connector", dtype)

    return student, save


def make_transcriber(folder: Path, encoder: WhisperEncoder, heard: Heard, steps: int, seed: int) -> None:
    """Train demo_desta's Whisper and save it."""
    whisper = make_whisper(folder, encoder, seed)
    tokenizer = WhisperTokenizerFast.from_pretrained(folder)
    train_transcriber(whisper, tokenizer, heard, steps=steps, seed=seed)
    whisper.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    """Synthesise, teach the encoder, train both, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEMO_DATA, help="folder for voxtral/ and desta/")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of clips")
    parser.add_argument("--clips-seed", type=int, default=5, help="of the training clips")
    parser.add_argument("--speech", type=int, default=11_000, help="training clips of speech")
    parser.add_argument("--animals", type=int, default=1_200, help="training clips of animals")
    parser.add_argument("--encoder-steps", type=int, default=1_600)
    parser.add_argument("--steps", type=int, default=2_500, help="of each decoder")
    parser.add_argument("--transcriber-steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--families", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("--work", type=Path, required=True, help="folder for what takes long: features, the encoder")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    encoder, heard, evaluation = _encoder(options)
    silent = silence_heard_by(encoder)
    log.info("encoder and its states after %.1f min", (time.monotonic() - started) / 60)
    for name in options.families:
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        log.info("%s", name)
        if name == "desta":
            make_transcriber(folder / "whisper", encoder, heard, options.transcriber_steps, options.seed)
        student, save = STUDENTS[name](folder, encoder, options.seed)
        train_answers(student, heard, silent, steps=options.steps, seed=options.seed, evaluation=evaluation)
        save(torch.bfloat16)
        log.info("%s after %.1f min", name, (time.monotonic() - started) / 60)


STUDENTS = {"voxtral": voxtral_student, "desta": desta_student}


def _encoder(options: argparse.Namespace) -> tuple[WhisperEncoder, Heard, Heard]:
    """The encoder and what it hears, from the work folder if they are there."""
    options.work.mkdir(parents=True, exist_ok=True)
    # Another seed than a measurement's: what is watched in training is not what is reported.
    parts = {
        "train": ("train", options.speech, options.animals, options.clips_seed),
        "evaluation": ("evaluation", 200, 90, options.seed + 1),
    }
    features = {}
    for name, recipe in parts.items():
        path = options.work / f"{name}.pt"
        if not path.is_file():
            made = features_of(clips(*recipe, processes=2))
            torch.save({"mel": made.mel, "frames": made.frames, "labels": made.labels}, path)
        features[name] = Features(**torch.load(path))
    demo = Qwen2AudioForConditionalGeneration.from_pretrained(BUNDLED["demo"], dtype=torch.float32)
    encoder = padded_encoder(demo, options.seed)
    path = options.work / "encoder.pt"
    if path.is_file():
        encoder.load_state_dict(torch.load(path))
    else:
        train_encoder(
            encoder,
            features["train"],
            steps=options.encoder_steps,
            seed=options.seed,
            evaluation=features["evaluation"],
        )
        torch.save(encoder.state_dict(), path)
    encoder.eval()
    return encoder, heard_by(encoder, features["train"]), heard_by(encoder, features["evaluation"])


if __name__ == "__main__":
    main()
