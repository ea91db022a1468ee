"""What the benchmarks share: random models of real architectures, clocks, tables."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

from lalm_patch.models import LALM, Encoding, Family, TokenTable
from lalm_patch.stimuli import Prompt

AUDIO_TOKEN, PRE, VOCABULARY = 24, 3, 32000
IDS = (11, 12, 13)
"""Target tokens: any will do, the weights are random."""


@dataclass
class Table:
    """Results of one benchmark: printed as markdown, and as JSON for the figure."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table with its title and notes."""
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.columns)} |", f"|{'---|' * len(self.columns)}"]
        lines += [f"| {' | '.join(_shown(value) for value in row)} |" for row in self.rows]
        return "\n".join([*lines, "", *self.notes])


def _shown(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return str(value)


class IdsOnly(Family):
    """No processor: the benchmarks' prompts are ids from the start."""

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        """Not used."""
        raise NotImplementedError

    def text_ids(self, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        """Not used."""
        raise NotImplementedError


def from_embeddings(encoding: Encoding) -> Encoding:
    """The same with the audio tower left out."""
    inputs = {"inputs_embeds": encoding.inputs_embeds}
    return Encoding(encoding.tokens, inputs, encoding.inputs_embeds, encoding.position_ids)


class RandomLALM(LALM):
    """A random model whose prompts are ids; no tokenizer is involved."""

    frames_per_position: int
    mels = 128

    def random_encoding(self, text: int, audio: int, seed: int) -> Encoding:
        """A random clip of `audio` positions and a prompt of `text` tokens after it."""
        ids = [5] * PRE + [AUDIO_TOKEN] * audio + list(range(100, 100 + text))
        roles = ["pre"] * PRE + ["audio"] * audio + ["late"] * (text - 1) + ["last"]
        tokens = TokenTable(tuple(ids), tuple(map(str, ids)), tuple(roles))
        inputs = {"input_ids": torch.tensor([ids]), **self.features(audio, seed)}
        return self.embed(tokens, {name: value.to(self.device) for name, value in inputs.items()})

    def features(self, audio: int, seed: int) -> dict[str, torch.Tensor]:
        """Log-mel inputs of the audio encoder."""
        raise NotImplementedError


class RandomVoxtral(RandomLALM):
    """Voxtral-shaped: 375 audio positions per 30 s window; encoder of half the decoder's width, as many layers."""

    def __init__(self, layers: int, hidden: int, dtype: torch.dtype = torch.float32) -> None:
        config = VoxtralConfig(
            audio_config={"hidden_size": hidden // 2, "intermediate_size": hidden * 2, "num_hidden_layers": layers}
            | {"num_attention_heads": 8},
            text_config=_decoder("llama", layers, hidden, 2),
            audio_token_id=AUDIO_TOKEN,
        )
        torch.manual_seed(0)
        super().__init__(VoxtralForConditionalGeneration(config).to(dtype), IdsOnly(None))

    def features(self, audio: int, seed: int) -> dict[str, torch.Tensor]:
        """[windows, 128, 3000]."""
        generator = torch.Generator().manual_seed(seed)
        return {"input_features": torch.randn(audio // 375, 128, 3000, generator=generator).to(self.dtype)}


class RandomQwen2Audio(RandomLALM):
    """Qwen2-Audio-shaped: 25 audio positions per second, an encoder that pads every clip to 30 s, no shared keys."""

    def __init__(self, layers: int, hidden: int, dtype: torch.dtype = torch.float32) -> None:
        config = Qwen2AudioConfig(
            audio_config={"d_model": hidden // 2, "encoder_ffn_dim": hidden * 2, "encoder_layers": layers}
            | {"encoder_attention_heads": 8},
            text_config=_decoder("qwen2", layers, hidden, 8),
            audio_token_index=AUDIO_TOKEN,
        )
        torch.manual_seed(0)
        super().__init__(Qwen2AudioForConditionalGeneration(config).to(dtype), IdsOnly(None))

    def features(self, audio: int, seed: int) -> dict[str, torch.Tensor]:
        """[1, 128, 3000] and its mask, true for the frames of a clip of `audio` positions."""
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(1, 3000, dtype=torch.long)
        mask[:, : audio * 4] = 1
        features = torch.randn(1, 128, 3000, generator=generator).to(self.dtype)
        return {"input_features": features, "feature_attention_mask": mask}


class PublishedVoxtral(RandomVoxtral):
    """The shape of Voxtral-Mini-3B-2507, made on a device."""

    def __init__(self, dtype: torch.dtype, device: str, small: bool = False) -> None:
        decoder = published_decoder("llama", layers=30, hidden=3072, inside=8192, key_value_heads=8, words=131072)
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        config = published(VoxtralConfig, decoder, names, small, audio_token_id=AUDIO_TOKEN)
        RandomLALM.__init__(self, made_on(device, dtype, VoxtralForConditionalGeneration, config), IdsOnly(None))


class PublishedQwen2Audio(RandomQwen2Audio):
    """The shape of Qwen2-Audio-7B-Instruct, made on a device."""

    def __init__(self, dtype: torch.dtype, device: str, small: bool = False) -> None:
        decoder = published_decoder("qwen2", layers=32, hidden=4096, inside=11008, key_value_heads=32, words=156032)
        names = ("d_model", "encoder_ffn_dim", "encoder_attention_heads", "encoder_layers")
        config = published(Qwen2AudioConfig, decoder, names, small, audio_token_index=AUDIO_TOKEN)
        RandomLALM.__init__(self, made_on(device, dtype, Qwen2AudioForConditionalGeneration, config), IdsOnly(None))


def published(
    config_class: Any, decoder: dict[str, object], names: tuple[str, str, str, str], small: bool, **token: int
) -> Any:
    """A configuration of published sizes: Whisper large's encoder, by a class's own names for them, and a decoder."""
    return config_class(
        audio_config=published_encoder(*names, small), text_config=decoder | (SMALL if small else {}), **token
    )


SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "head_dim": 8, "vocab_size": 1000}
"""What is smaller where a published shape is only tried."""


def published_decoder(
    kind: str, *, layers: int, hidden: int, inside: int, key_value_heads: int, words: int
) -> dict[str, object]:
    """Sizes of a decoder with heads of 128 columns, 32 of them."""
    return _decoder(kind, layers, hidden, key_value_heads) | {
        "intermediate_size": inside,
        "num_attention_heads": 32,
        "head_dim": 128,
        "vocab_size": words,
    }


def published_encoder(hidden: str, inside: str, heads: str, layers: str, small: bool) -> dict[str, object]:
    """Sizes of Whisper large's encoder, by the names a model's configuration has for them."""
    return dict(zip((hidden, inside, heads, layers), (64, 256, 4, 2) if small else (1280, 5120, 20, 32), strict=True))


def made_on(device: str, dtype: torch.dtype, model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model with random weights that are made where they stay."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


def _decoder(kind: str, layers: int, hidden: int, key_value_heads: int) -> dict[str, object]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": key_value_heads,
        "head_dim": hidden // 8,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layers", type=int, default=30)
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--text", type=int, default=40, help="text positions after the audio")
    made.add_argument("--audio", type=int, default=375, help="audio positions (Voxtral: a multiple of 375)")
    made.add_argument("--pack-tokens", type=int, default=1024)
    made.add_argument("--repeats", type=int, default=3, help="times each measurement is repeated (median)")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a busy machine")
    made.add_argument("--json", type=Path, help="also write the tables to this file")
    return made


def seconds(work: Callable[[], object], repeats: int, clock: str) -> float:
    """Median time of a call."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    times = []
    for _ in range(repeats):
        started = now()
        work()
        times.append(now() - started)
    return statistics.median(times)


def machine(options: argparse.Namespace) -> str:
    """What the numbers were measured on."""
    packages = ("torch", "transformers", "nnsight", "pyvene", "transformer-lens")
    versions = ", ".join(f"{name} {found}" for name in packages if (found := _version(name)))
    dtype = "" if hasattr(options, "dtype") else "; float32"
    kind = platform.processor() or platform.machine()
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            kind = line.split(":")[1].strip()
            break
    return f"{time.strftime('%Y-%m-%d')}; {kind}, {options.threads} threads, {options.clock} time; {versions}{dtype}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def emit(tables: Sequence[Table], options: argparse.Namespace, device: str = "") -> None:
    """Print the tables, and write them where asked; on another device than the CPU with its name."""
    described = "; ".join(part for part in (device, machine(options)) if part)
    print(f"{described}\n")
    for table in tables:
        print(f"{table.markdown()}\n", flush=True)
    if options.json:
        content = {"machine": described, "tables": [asdict(table) for table in tables]}
        Path(options.json).write_text(json.dumps(content, indent=1))
