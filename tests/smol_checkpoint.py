"""`model=smol`: what ships with the package, or as long as nothing does, the same layout filled with random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from native_checkpoints import fill, randomise
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.models.checkpoint import BUNDLED
from lalm_patch.models.native.qformer import DestaConnector, connector_keys

DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLACEHOLDER = "<empty_output>"
WINDOW_SECONDS, MELS, WIDTH, HEADS, LAYERS = 10, 80, 128, 4, 4
VECTORS, HIDDEN = 16, 576


def save_encoder(folder: Path, seed: int = 0) -> Path:
    """An encoder alone, with its feature extractor."""
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * WIDTH,
        num_mel_bins=MELS,
        max_source_positions=50 * WINDOW_SECONDS,
        decoder_layers=0,
    )
    encoder = WhisperEncoder(config)
    randomise(encoder, seed)
    encoder.half().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=MELS, chunk_length=WINDOW_SECONDS).save_pretrained(folder)
    return folder


def save_connector(folder: Path, encoder: str, decoder: str = DECODER, seed: int = 1) -> Path:
    """A connector between them."""
    folder.mkdir(parents=True, exist_ok=True)
    connector = DestaConnector(taps=LAYERS, queries=VECTORS, width=WIDTH, heads=HEADS, layers=1, hidden=HIDDEN)
    weights = fill({name: tuple(value.shape) for name, value in connector.state_dict().items()}, seed)
    tensors = {
        f"perception.connector.{published}": weights[name].half().contiguous()
        for published, name in connector_keys(LAYERS, 1).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "desta25",
        "llm_model_id": decoder,
        "encoder_model_id": encoder,
        "connector_mode": "qformer_1",
        "qformer_num_hidden_layers": 1,
        "prompt_size": VECTORS,
        "use_lora": False,
        "audio_locator": "<|AUDIO|>",
        "placeholder_token": PLACEHOLDER,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def smol(folder: Path) -> tuple[str, ...]:
    """The overrides that mean the model."""
    torch.manual_seed(0)
    if (BUNDLED["smol"] / "config.json").is_file():
        return ("model=smol",)
    encoder = save_encoder(folder / "whisper")
    return ("model=smol", f"model.id={save_connector(folder / 'connector', str(encoder))}")
