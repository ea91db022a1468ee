"""Audio language models whose transformers classes follow the common pattern: one adapter, their differences as data.

The pattern: the processor replaces one placeholder in the text by as many as there are audio embeddings, the model
writes the embeddings over the placeholders, and a decoder with a causal residual stream does the rest. What an
architecture does otherwise is refused here with the reason, or found by the proof at load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import is_peft_available

from lalm_patch.errors import ModelError
from lalm_patch.models.checkpoint import Checkpoint
from lalm_patch.models.family import Family
from lalm_patch.models.files import opening, processor_files, read_config, read_json, read_text
from lalm_patch.models.weights import load_pretrained
from lalm_patch.stimuli import SAMPLING_RATE, Prompt


@dataclass(frozen=True)
class Architecture:
    """How checkpoints of one `model_type` differ from the rest.

    Attributes:
        model_class: transformers' class with the decoder and its head; of an omni model the part that writes text.
        audio_in_text: the template takes plain strings: the placeholder is put before the question by hand.
        audio_only: processor class to build from the feature extractor and the tokenizer alone, so that packages for
            images and video are not needed.
        adapter: folder inside the checkpoint with LoRA weights that belong to audio; "." for weights that transformers
            loads by itself, but switches on in generate() only.
        logit_divisor: setting of the decoder's config by which its own class divides logits, and the audio model's
            class, which has a head of its own, forgets to.
        left_out: beginnings of the names of weights of other parts in the same files (an omni model's that speak).
    """

    model_class: str
    audio_in_text: bool = False
    audio_only: str | None = None
    adapter: str | None = None
    logit_divisor: str | None = None
    left_out: tuple[str, ...] = ()


ARCHITECTURES = {
    "audioflamingo3": Architecture("AudioFlamingo3ForConditionalGeneration"),
    "musicflamingo": Architecture("MusicFlamingoForConditionalGeneration"),
    "granite_speech": Architecture(
        "GraniteSpeechForConditionalGeneration", audio_in_text=True, adapter=".", logit_divisor="logits_scaling"
    ),
    "glmasr": Architecture("GlmAsrForConditionalGeneration"),
    "qwen3_asr": Architecture("Qwen3ASRForConditionalGeneration"),
    "qwen2_5_omni": Architecture(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        audio_only="Qwen2_5OmniProcessor",
        left_out=("talker.", "token2wav."),
    ),
    "qwen3_omni_moe": Architecture(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        audio_only="Qwen3OmniMoeProcessor",
        left_out=("talker.", "code2wav."),
    ),
    "phi4_multimodal": Architecture(
        "Phi4MultimodalForCausalLM", audio_in_text=True, audio_only="Phi4MultimodalProcessor", adapter="speech-lora"
    ),
}
"""Architectures the method applies to, by the `model_type` of their config.json."""

_STREAMING = "it adds the audio to every text position, so no position holds audio alone"
_RECURRENT = "its state-space layers carry states past the residual stream, so a patched position is not restored"
_ENCODER_DECODER = "it is an encoder-decoder: sound enters every decoder layer by cross-attention, not as positions"
REFUSED = {
    "gemma3n": "its decoder layers carry four parallel streams [4, batch, positions, hidden], not one residual stream",
    "gemma4": "its upper decoder layers read the keys and values of a lower one, past the residual stream",
    "voxtral_realtime": _STREAMING,
    "kyutai_speech_to_text": _STREAMING,
    "moshi": _STREAMING,
    "nemotron_h_omni": _RECURRENT,
    "whisper": _ENCODER_DECODER,
    "cohere_asr": _ENCODER_DECODER,
    "seamless_m4t_v2": _ENCODER_DECODER,
}
"""Why token positions cannot be traced, by `model_type`."""


class Generic(Family):
    """Any architecture in `ARCHITECTURES`. The response phrase is put after the template's generation prompt."""

    model_types: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)

    def __init__(self, processor: Any, architecture: Architecture) -> None:
        super().__init__(processor)
        self.architecture = architecture

    @classmethod
    def load(cls, checkpoint: Checkpoint, **weights: Any) -> tuple[PreTrainedModel, Family]:
        """As `Family.load`.

        Raises:
            ModelError: an architecture the method does not apply to, or that is not known, or missing weights.
        """
        folder = checkpoint.folder
        family = cls._open(folder)
        architecture = family.architecture
        model_class: Any = getattr(transformers, architecture.model_class)
        module = load_pretrained(
            model_class, folder, adapter=architecture.adapter == ".", left_out=architecture.left_out, **weights
        )
        _hear_with_adapter(module, folder, architecture.adapter)
        return module, family

    @classmethod
    def outline(cls, checkpoint: Checkpoint) -> tuple[PreTrainedModel, Family]:
        """As `Family.outline`, without LoRA weights."""
        family = cls._open(checkpoint.folder)
        model_class: Any = getattr(transformers, family.architecture.model_class)
        with opening(str(checkpoint.folder / "config.json")), torch.device("meta"):
            config = model_class.config_class.from_pretrained(checkpoint.folder, local_files_only=True)
            return model_class(config), family

    @classmethod
    def check_type(cls, folder: Path) -> str:
        """As `Family.check_type`; says why an architecture cannot be traced."""
        found = read_config(folder).get("model_type")
        if isinstance(found, str) and found in REFUSED:
            raise ModelError(f"{folder}: a checkpoint of type {found!r} cannot be traced: {REFUSED[found]}")
        return super().check_type(folder)

    @classmethod
    def _open(cls, folder: Path) -> Generic:
        architecture = ARCHITECTURES[cls.check_type(folder)]
        with opening(processor_files(folder)):
            return cls(_processor(folder, architecture), architecture)

    @property
    def max_seconds(self) -> float:
        """The processor's own limit in seconds; without one, the feature extractor's window, or no limit."""
        limit = getattr(self.processor, "max_audio_len", None)
        extractor = getattr(self.processor, "feature_extractor", None)
        if limit is None and hasattr(extractor, "n_samples"):
            return super().max_seconds
        return math.inf if limit is None else float(limit)

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        """The processor's tensors; `input_ids` hold one placeholder per audio position."""
        text = self._text(prompt)
        batch = self.processor(
            text=[text],
            audio=[waveform],
            return_tensors="pt",
            text_kwargs=self._specials(text),
            audio_kwargs={"sampling_rate": SAMPLING_RATE},
        )
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def text_ids(self, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        """Ids with a single placeholder."""
        text = self._text(prompt) + continuation
        return list(self.tokenizer(text, **self._specials(text))["input_ids"])

    def audio_mask(self, inputs: dict[str, torch.Tensor], module: PreTrainedModel) -> torch.Tensor:
        """Positions of the placeholder whose id the config names, wherever it does."""
        config: Any = module.config
        places = (config, getattr(config, "audio_config", None))
        names = ("audio_token_id", "audio_token_index")
        ids = [getattr(place, name, None) for place in places for name in names]
        known = next((id for id in ids if id is not None), None)
        if known is None:
            raise ModelError(f"{type(module).__name__}: its config names no audio token id (looked for {names})")
        return inputs["input_ids"][0].eq(known)

    def logit_scale(self, module: PreTrainedModel) -> float:
        """One over the architecture's divisor."""
        name = self.architecture.logit_divisor
        return 1.0 if name is None else 1.0 / float(getattr(module.config.get_text_config(), name))

    def _text(self, prompt: Prompt) -> str:
        content: Any = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": prompt.text}]
        if self.architecture.audio_in_text:
            content = f"{self.processor.audio_token}{prompt.text}"
        turns = [{"role": "user", "content": content}]
        opened = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return f"{opened}{prompt.response}"

    def _specials(self, text: str) -> dict[str, bool]:
        """Without this a tokenizer that adds its own begin-of-text token would double the template's."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": not (bos and text.startswith(bos))}


def _hear_with_adapter(module: PreTrainedModel, folder: Path, adapter: str | None) -> None:
    """Switch on the LoRA weights that belong to audio: without them the model runs, and hears worse than trained."""
    if adapter is None or not (folder / adapter / "adapter_config.json").is_file():
        return
    if not is_peft_available():
        raise ModelError(f"{folder}: its audio needs the LoRA weights in {adapter}: pip install peft")
    if adapter == ".":
        module.enable_adapters()
    else:
        with opening(str(folder / adapter)):
            module.load_adapter(str(folder / adapter))


def _processor(folder: Path, architecture: Architecture) -> Any:
    if architecture.audio_only is None:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    processor_class: Any = getattr(transformers, architecture.audio_only)

    class AudioOnly(processor_class):  # type: ignore[misc]
        """The processor without its parts for images and video."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    parts = {"tokenizer": tokenizer, "feature_extractor": extractor, "audio_processor": extractor}
    wanted = {name: parts.get(name) for name in processor_class.get_attributes()}
    processor = AudioOnly(**wanted, chat_template=_template(folder, tokenizer))
    if hasattr(processor, "replace_multimodal_special_tokens"):
        # transformers 5.20 asks for the size of patches in here before it looks whether there is an image or a video.
        for name in {"image_processor", "video_processor"} & wanted.keys():
            setattr(processor, name, SimpleNamespace(merge_size=1))
    return processor


def _template(folder: Path, tokenizer: Any) -> str | None:
    """The chat template, from whichever file the checkpoint keeps it in."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            path = folder / name
            return str(read_json(path)["chat_template"]) if name.endswith("json") else read_text(path)
    return str(tokenizer.chat_template) if tokenizer.chat_template else None
