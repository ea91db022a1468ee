"""Whisper's encoder as Voxtral and DeSTA use it: it hears the padding of the whole window, and nothing masks it.

It starts from the encoder of the first demo, which never saw padding, and learns what padding is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2AudioForConditionalGeneration, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from training.model import MEL_BINS
from training.steps import Descent, report_held_out
from training.train import EncoderClassifier, Features, batches

SECONDS = 6  # Voxtral stacks four encoder frames: 6 s are 300 of them and 75 audio positions
WIDTH, LAYERS, HEADS = 128, 4, 4


def extractor() -> WhisperFeatureExtractor:
    """The feature extractor of both families."""
    return WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS)


def whisper_config(vocabulary: int = 1, **others: int) -> WhisperConfig:
    """Shapes of the encoder; a decoder is described by the rest."""
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=MEL_BINS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH,
        max_source_positions=50 * SECONDS,
        **others,
    )


def padded_encoder(demo: Qwen2AudioForConditionalGeneration, seed: int) -> WhisperEncoder:
    """A Whisper encoder with the weights of the first demo's; its positions go on where those end."""
    torch.manual_seed(seed)
    encoder = WhisperEncoder(whisper_config())
    weights = {name: value.float() for name, value in demo.model.audio_tower.state_dict().items()}
    known = weights["embed_positions.weight"]
    more = torch.randn(50 * SECONDS - len(known), WIDTH) * known.std()
    weights["embed_positions.weight"] = torch.cat([known, more])
    encoder.load_state_dict(weights)
    encoder.embed_positions.requires_grad_(False)
    return encoder


def taught(encoder: WhisperEncoder, mel: Tensor) -> Tensor:
    """What the classifiers see, [clips, positions, width]: the encoder's states at the first demo's rate."""
    states = encoder(mel.float()).last_hidden_state
    return functional.avg_pool1d(states.transpose(1, 2), 2).transpose(1, 2)


def train_encoder(
    encoder: WhisperEncoder,
    features: Features,
    *,
    steps: int,
    batch: int = 16,
    rate: float = 5e-4,
    seed: int = 0,
    evaluation: Features | None = None,
) -> list[float]:
    """Teach the encoder what its states have to tell, with padding; returns the loss of every step."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    classifier = EncoderClassifier(WIDTH)
    descent = Descent([*encoder.parameters(), *classifier.parameters()], rate, steps)
    order = batches(features.frames, batch, rng)
    encoder.train()
    for step in range(steps):
        chosen = next(order)
        states = taught(encoder, features.mel[chosen])
        descent.step(classifier.loss(states, features.frames[chosen], features.labels[chosen]))
        if evaluation is not None and (step + 1) % 500 == 0:
            report_held_out(classifier.accuracy(lambda mel, frames: taught(encoder, mel), evaluation))
    encoder.eval()
    return descent.losses


@torch.no_grad()
def taps(encoder: WhisperEncoder, features: Features, batch: int = 64) -> Tensor:
    """The output of every layer, before the final norm: [clips, layers, positions, width] float16."""
    kept: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _m, _a, out: kept.append(_states(out))) for layer in encoder.layers]
    result = torch.empty(len(features), LAYERS, 50 * SECONDS, WIDTH, dtype=torch.float16)
    try:
        for part in torch.arange(len(features)).split(batch):
            kept.clear()
            encoder(features.mel[part].float())
            result[part] = torch.stack(kept, dim=1).half()
    finally:
        for handle in handles:
            handle.remove()
    return result


def _states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
