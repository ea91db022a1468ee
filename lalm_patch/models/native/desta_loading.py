"""DeSTA2 and DeSTA2.5-Audio from their published files: a connector, and the repositories of Whisper and Llama."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

from lalm_patch.errors import ModelError
from lalm_patch.models.native.desta import DESTA2_TAPS, DESTA25_TAPS, DestaConfig, DestaForConditionalGeneration
from lalm_patch.models.native.prompts import DESTA2_PLACEHOLDER, DESTA25_PLACEHOLDER
from lalm_patch.models.native.qformer import DestaConnector, connector_keys
from lalm_patch.models.native.repository import check_keys, check_shapes, field, find_folder, read_config, read_file

DESTA2_FILE = "qformer_connector.pth"
DESTA25_FILE = "model.safetensors"
DESTA25_PREFIX = "perception.connector."
DESTA2_QFORMER_LAYERS = 2  # a constant of the original, not in its config.json
IGNORABLE_KEYS = ("rotary_emb.inv_freq",)
WANTED_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")
OTHER_COPIES = ("original/*", "*fp32*", "consolidated*")  # the same weights once more


class _Source(NamedTuple):
    """What tells the two releases apart once their files are found."""

    connector: dict[str, Tensor]
    where: str
    prefix: str
    taps: Mapping[int, tuple[int, ...]]
    prompt_size: int
    qformer_layers: int
    placeholder: str


def load_desta2(
    location: str | Path,
    *,
    decoder: str | Path | None = None,
    encoder: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    encoder_dtype: torch.dtype = torch.float32,
) -> tuple[DestaForConditionalGeneration, Any, WhisperFeatureExtractor]:
    """Open DeSTA2 (`DeSTA-ntu/DeSTA2-8B-beta`).

    Args:
        location: folder or hub id of the connector (config.json and qformer_connector.pth).
        decoder: folder or hub id of Llama, instead of the config's `llama_model_id`.
        encoder: folder or hub id of Whisper, instead of the config's `whisper_model_id`.
        revision: of `location` on the hub.
        dtype: of the decoder; `auto` is the checkpoint's own.
        device_map: of the decoder; encoder and connector go where the token embeddings are.
        attn_implementation: of the decoder.
        encoder_dtype: of encoder and connector; the originals run both in float32 beside a bfloat16 decoder.

    Returns:
        The model, the decoder's tokenizer, and Whisper's feature extractor.

    Raises:
        ModelError: something is missing, gated, unreachable, or not this architecture.
    """
    folder = find_folder(location, setting="location", allow=("config.json", DESTA2_FILE), revision=revision)
    config = read_config(folder)
    path = folder / DESTA2_FILE
    source = _Source(
        read_file(path), str(path), "", DESTA2_TAPS, config.get("prompt_size", 64), DESTA2_QFORMER_LAYERS,
        DESTA2_PLACEHOLDER,
    )  # fmt: skip
    return _assemble(
        source,
        decoder=decoder or field(config, "llama_model_id", folder),
        encoder=encoder or field(config, "whisper_model_id", folder),
        weights={"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation},
        encoder_dtype=encoder_dtype,
    )


def load_desta25(
    location: str | Path,
    *,
    decoder: str | Path | None = None,
    encoder: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    encoder_dtype: torch.dtype = torch.float32,
) -> tuple[DestaForConditionalGeneration, Any, WhisperFeatureExtractor]:
    """Open DeSTA2.5-Audio (`DeSTA-ntu/DeSTA2.5-Audio-Llama-3.1-8B`); arguments as `load_desta2`.

    Without `decoder` and `encoder` the config's `llm_model_id` and `encoder_model_id` are used.

    Raises:
        ModelError: as `load_desta2`; or a variant with LoRA adapters or another connector.
    """
    folder = find_folder(location, setting="location", allow=("config.json", DESTA25_FILE), revision=revision)
    config = read_config(folder)
    mode = config.get("connector_mode", "qformer_1")
    if mode != "qformer_1" or config.get("use_lora", False):
        raise ModelError(
            f"{folder}: expected connector_mode 'qformer_1' without LoRA, got {mode!r} with "
            f"use_lora={config.get('use_lora', False)}; only the released DeSTA2.5-Audio architecture is supported"
        )
    path = folder / DESTA25_FILE
    source = _Source(
        read_file(path), str(path), DESTA25_PREFIX, DESTA25_TAPS, config.get("prompt_size", 64),
        config.get("qformer_num_hidden_layers", 2), config.get("placeholder_token", DESTA25_PLACEHOLDER),
    )  # fmt: skip
    return _assemble(
        source,
        decoder=decoder or field(config, "llm_model_id", folder),
        encoder=encoder or field(config, "encoder_model_id", folder),
        weights={"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation},
        encoder_dtype=encoder_dtype,
    )


def _assemble(
    source: _Source, *, decoder: str | Path, encoder: str | Path, weights: dict[str, Any], encoder_dtype: torch.dtype
) -> tuple[DestaForConditionalGeneration, Any, WhisperFeatureExtractor]:
    decoder_folder = find_folder(decoder, setting="decoder", allow=WANTED_FILES, ignore=OTHER_COPIES)
    encoder_folder = find_folder(encoder, setting="encoder", allow=WANTED_FILES, ignore=OTHER_COPIES)
    text_config = AutoConfig.from_pretrained(decoder_folder, local_files_only=True)
    audio_config = AutoConfig.from_pretrained(encoder_folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(decoder_folder, local_files_only=True)
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give the text that was tokenised
    config = DestaConfig(
        text_config=text_config,
        audio_config=audio_config,
        taps=_taps(source, audio_config, encoder),
        prompt_size=source.prompt_size,
        qformer_layers=source.qformer_layers,
        audio_token_id=tokenizer.convert_tokens_to_ids(source.placeholder),
    )
    with torch.device("meta"):  # the connector is compared before gigabytes are read
        model = DestaForConditionalGeneration(config)
    _load_connector(model.multi_modal_projector, source, encoder_dtype)
    llama = _from_pretrained(AutoModelForCausalLM, decoder_folder, "decoder", **weights)
    whisper = _from_pretrained(WhisperForConditionalGeneration, encoder_folder, "encoder", dtype=encoder_dtype)
    device = llama.get_input_embeddings().weight.device
    config.text_config = llama.config
    model.language_model = llama.get_decoder()
    model.lm_head = llama.get_output_embeddings()
    model.audio_tower = whisper.model.encoder
    if device.type != "meta":  # offloaded embeddings have no device of their own
        model.audio_tower.to(device)
        model.multi_modal_projector.to(device)
    model.attach_transcriber(
        whisper.eval().requires_grad_(False),
        WhisperTokenizerFast.from_pretrained(encoder_folder, local_files_only=True),
    )
    extractor = WhisperFeatureExtractor.from_pretrained(encoder_folder, local_files_only=True)
    return model.eval(), tokenizer, extractor


def _taps(source: _Source, audio_config: Any, encoder: str | Path) -> tuple[int, ...]:
    depth: int = getattr(audio_config, "encoder_layers", 0)
    if depth not in source.taps:
        known = ", ".join(map(str, source.taps))
        raise ModelError(f"encoder={encoder}: expected a Whisper model with {known} encoder layers, got {depth}")
    return source.taps[depth]


def _load_connector(connector: DestaConnector, source: _Source, dtype: torch.dtype) -> None:
    keys = connector_keys(len(connector.layer_prompts), len(connector.layers))
    check_keys(source.connector, (source.prefix + key for key in keys), source.where)
    tensors = {native: source.connector[source.prefix + published] for published, native in keys.items()}
    check_shapes(tensors, connector.state_dict(), source.where)
    connector.load_state_dict({key: tensor.to(dtype) for key, tensor in tensors.items()}, assign=True)


def _from_pretrained(auto: Any, folder: Path, setting: str, **weights: Any) -> Any:
    given = {name: value for name, value in weights.items() if value is not None}
    try:
        model, info = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True, **given)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{setting}={folder}: cannot be opened ({type(error).__name__}: {error})") from error
    expected = set(model.state_dict())
    found = expected.difference(info["missing_keys"]).union(info["unexpected_keys"])
    check_keys(found, expected, f"{setting}={folder}", IGNORABLE_KEYS)
    return model
