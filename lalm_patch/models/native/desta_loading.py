"""DeSTA2 and DeSTA2.5-Audio from their published files: a connector, and the repositories of Whisper and Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.errors import ModelError
from lalm_patch.models.checkpoint import PART_FIELDS, find_part, find_repository
from lalm_patch.models.files import opening, read_config
from lalm_patch.models.gguf_llama import gguf_config, gguf_tokenizer, load_gguf
from lalm_patch.models.native.desta import DESTA2_TAPS, DESTA25_TAPS, DestaConfig, DestaForConditionalGeneration
from lalm_patch.models.native.prompts import DESTA2_PLACEHOLDER, DESTA25_PLACEHOLDER
from lalm_patch.models.native.qformer import DestaConnector, connector_keys
from lalm_patch.models.native.repository import field, read_file
from lalm_patch.models.weights import check_keys, check_shapes, load_pretrained


@dataclass(frozen=True)
class DestaRelease:
    """What tells the published models apart.

    Attributes:
        file: the connector's weights.
        prefix: of the connector's keys in it.
        taps: encoder layers that the connector reads, by the encoder's depth.
        placeholder: the token that holds the audio vectors' places; a checkpoint's `placeholder_token` goes first.
    """

    file: str
    prefix: str
    taps: Mapping[int, tuple[int, ...]]
    placeholder: str


DESTA2 = DestaRelease("qformer_connector.pth", "", DESTA2_TAPS, DESTA2_PLACEHOLDER)
DESTA25 = DestaRelease("model.safetensors", "perception.connector.", DESTA25_TAPS, DESTA25_PLACEHOLDER)
Opened = tuple[DestaForConditionalGeneration, Any, WhisperFeatureExtractor]


def load_desta(
    release: DestaRelease,
    location: str | Path,
    *,
    decoder: str | Path | None = None,
    encoder: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    encoder_dtype: torch.dtype = torch.float32,
) -> Opened:
    """Open DeSTA2 (`DeSTA-ntu/DeSTA2-8B-beta`) or DeSTA2.5-Audio (`DeSTA-ntu/DeSTA2.5-Audio-Llama-3.1-8B`).

    Args:
        release: `DESTA2` or `DESTA25`.
        location: folder or hub id of the connector: config.json and its weights.
        decoder: folder, hub id or GGUF file of Llama, instead of the one the config names.
        encoder: folder or hub id of Whisper, or of its encoder alone, instead of the one the config names.
        revision: of `location` on the hub.
        dtype: of the decoder; `auto` is the checkpoint's own, for a GGUF file float32.
        device_map: of the decoder, not for a GGUF file; encoder and connector go where the token embeddings are.
        attn_implementation: of the decoder.
        encoder_dtype: of encoder and connector; the originals run both in float32 beside a bfloat16 decoder.

    Returns:
        The model, the decoder's tokenizer, and Whisper's feature extractor.

    Raises:
        ModelError: something is missing, gated, unreachable, or not this architecture.
    """
    folders = _folders(location, decoder, encoder, revision)
    model, tokenizer, extractor = _outline(release, folders)
    # The connector is compared before gigabytes are read.
    _load_connector(model.multi_modal_projector, folders.connector / release.file, release.prefix, encoder_dtype)
    weights = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    if folders.decoder.is_file():
        llama = load_gguf(folders.decoder, dtype=dtype, attn_implementation=attn_implementation)
    else:
        llama = load_pretrained(AutoModelForCausalLM, folders.decoder, setting="model.decoder", **weights)
    alone = is_encoder_alone(model.config.audio_config)
    whisper = load_pretrained(
        WhisperEncoder if alone else WhisperForConditionalGeneration,
        folders.encoder,
        setting="model.encoder",
        dtype=encoder_dtype,
    )
    device = llama.get_input_embeddings().weight.device
    model.config.text_config = llama.config
    model.language_model = llama.get_decoder()
    model.lm_head = llama.get_output_embeddings()
    model.audio_tower = whisper if alone else whisper.model.encoder
    if device.type != "meta":  # offloaded embeddings have no device of their own
        model.audio_tower.to(device)
        model.multi_modal_projector.to(device)
    if not alone:
        with opening(f"model.encoder={folders.encoder}: its tokenizer"):
            words = WhisperTokenizerFast.from_pretrained(folders.encoder, local_files_only=True)
        model.attach_transcriber(whisper.eval().requires_grad_(False), words)
    return model.eval(), tokenizer, extractor


def is_encoder_alone(audio_config: Any) -> bool:
    """Whether a Whisper repository is what `WhisperEncoder.save_pretrained` writes: it can hear, and writes nothing."""
    return WhisperEncoder.__name__ in (audio_config.architectures or ())


def outline_desta(
    release: DestaRelease,
    location: str | Path,
    *,
    decoder: str | Path | None = None,
    encoder: str | Path | None = None,
    revision: str | None = None,
) -> Opened:
    """As `load_desta`, on the meta device: shapes and tokenizer, no weights, which need not be there."""
    return _outline(release, _folders(location, decoder, encoder, revision, weights=False))


load_desta2 = partial(load_desta, DESTA2)
load_desta25 = partial(load_desta, DESTA25)


class _Folders(NamedTuple):
    connector: Path
    decoder: Path
    encoder: Path


def _folders(
    location: str | Path,
    decoder: str | Path | None,
    encoder: str | Path | None,
    revision: str | None,
    weights: bool = True,
) -> _Folders:
    connector = find_repository(str(location), revision, weights=weights).folder
    config = read_config(connector)
    found = [connector]
    for part, given in (("decoder", decoder), ("encoder", encoder)):
        known = [name for name in PART_FIELDS[part] if name in config] or [PART_FIELDS[part][-1]]
        named = "" if given else str(field(config, known[0], connector))
        found.append(find_part(part, named, str(given) if given else None, weights=weights).folder)
    return _Folders(*found)


def _outline(release: DestaRelease, folders: _Folders) -> Opened:
    published = read_config(folders.connector)
    mode = published.get("connector_mode", "qformer_1")
    if mode != "qformer_1" or published.get("use_lora", False):
        raise ModelError(
            f"{folders.connector}: expected connector_mode 'qformer_1' without LoRA, got {mode!r} with "
            f"use_lora={published.get('use_lora', False)}; only the released DeSTA architectures are supported"
        )
    with opening(f"model.decoder={folders.decoder}: its configuration and tokenizer"):
        if folders.decoder.is_file():
            text_config, tokenizer = gguf_config(folders.decoder), gguf_tokenizer(folders.decoder)
        else:
            text_config = AutoConfig.from_pretrained(folders.decoder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folders.decoder, local_files_only=True)
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give the text that was tokenised
    with opening(f"model.encoder={folders.encoder}: its configuration and feature extractor"):
        audio_config = AutoConfig.from_pretrained(folders.encoder, local_files_only=True)
        extractor = WhisperFeatureExtractor.from_pretrained(folders.encoder, local_files_only=True)
    taps = _taps(release.taps, audio_config, folders.encoder)
    configs = ", ".join(str(place if place.is_file() else place / "config.json") for place in folders)
    with opening(configs), torch.device("meta"):
        config = DestaConfig(
            text_config=text_config,
            audio_config=audio_config,
            taps=taps,
            prompt_size=published.get("prompt_size", 64),
            qformer_layers=published.get("qformer_num_hidden_layers", 2),  # DeSTA2's config does not say: two
            audio_token_id=tokenizer.convert_tokens_to_ids(published.get("placeholder_token", release.placeholder)),
        )
        model = DestaForConditionalGeneration(config)
    return model, tokenizer, extractor


def _taps(taps: Mapping[int, tuple[int, ...]], audio_config: Any, encoder: Path) -> tuple[int, ...]:
    depth: int = getattr(audio_config, "encoder_layers", 0)
    if depth not in taps:
        known = ", ".join(map(str, taps))
        raise ModelError(f"model.encoder={encoder}: expected a Whisper model with {known} encoder layers, got {depth}")
    return taps[depth]


def _load_connector(connector: DestaConnector, path: Path, prefix: str, dtype: torch.dtype) -> None:
    published = read_file(path)
    keys = connector_keys(len(connector.layer_prompts), len(connector.layers))
    check_keys(published, (prefix + key for key in keys), str(path))
    tensors = {native: published[prefix + key] for key, native in keys.items()}
    check_shapes(tensors, connector.state_dict(), str(path))
    connector.load_state_dict({key: tensor.to(dtype) for key, tensor in tensors.items()}, assign=True)
