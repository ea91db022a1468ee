"""What an adapter has to say about its family of checkpoints: how a clip and a question become model inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel

from lalm_patch.errors import ModelError
from lalm_patch.models.checkpoint import Checkpoint
from lalm_patch.models.controls import refuse_control_tokens
from lalm_patch.models.files import opening, processor_files, read_config
from lalm_patch.models.tokens import Clock
from lalm_patch.models.weights import load_pretrained
from lalm_patch.stimuli import SAMPLING_RATE, Prompt


class Family(ABC):
    """One family of checkpoints. Subclasses hold a processor and build prompts; they never touch the decoder.

    Attributes:
        processor: the checkpoint's own processor.
        max_seconds: the longest clip the family takes.
    """

    model_types: ClassVar[tuple[str, ...]]
    """`model_type` of the checkpoints the family is for, as in their config.json."""
    layouts: ClassVar[tuple[str, ...]] = ("chat",)
    """Prompt layouts the family has: `chat` puts the response phrase into the assistant's turn, `user` at the end of
    the user's turn, `flat` uses no template at all (base models)."""
    reads_transcript: ClassVar[bool] = False
    """Whether the model is given a transcript beside the audio (`Prompt.transcript`)."""

    positions_per_second: ClassVar[float | None] = None
    """Audio positions per second of sound; None where they are in no order of time, or it is not known."""
    audio_tags: ClassVar[int] = 0
    """Audio positions before the first and after the last that have a time."""
    frames_per_second: ClassVar[float | None] = None
    """Frames of the audio encoder's layers per second of sound; None where it is not known."""

    whole_dtype: ClassVar[bool] = True
    """Whether `model.dtype` is that of the whole model, and not of the decoder alone."""

    hosted_task: ClassVar[str | None] = None
    """Pipeline task under which a server with transformers alone has the model, and which is part of its name there;
    None if it takes this package to run it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    @classmethod
    def load(cls, checkpoint: Checkpoint, **weights: Any) -> tuple[PreTrainedModel, Family]:
        """Open a checkpoint; `weights` are `from_pretrained`'s keywords (dtype, device_map, ...).

        Raises:
            ModelError: a checkpoint of another architecture, or a package its processor needs is missing.
        """
        family = cls._open(checkpoint.folder)
        return load_pretrained(AutoModelForMultimodalLM, checkpoint.folder, **weights), family

    @classmethod
    def outline(cls, checkpoint: Checkpoint) -> tuple[PreTrainedModel, Family]:
        """As `load`, the model on the meta device: shapes only, the weights need not be there."""
        family = cls._open(checkpoint.folder)
        with opening(f"{checkpoint.folder / 'config.json'}"), torch.device("meta"):
            config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
            return AutoModelForMultimodalLM.from_config(config), family

    @classmethod
    def check_type(cls, folder: Path) -> str:
        """The checkpoint's `model_type`.

        Raises:
            ModelError: it is none of the family's.
        """
        found = read_config(folder).get("model_type")
        if not isinstance(found, str) or found not in cls.model_types:
            raise ModelError(f"{folder} is a checkpoint of type {found!r}, expected {' or '.join(cls.model_types)}")
        return found

    @classmethod
    def _open(cls, folder: Path) -> Family:
        cls.check_type(folder)
        with opening(processor_files(folder)):
            return cls(AutoProcessor.from_pretrained(folder, local_files_only=True))

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def max_seconds(self) -> float:
        """Length of the longest clip the encoder takes in, in seconds."""
        extractor = self.processor.feature_extractor
        return float(extractor.n_samples / extractor.sampling_rate)

    @property
    def mel_bins(self) -> int | None:
        """Bins of the spectrogram the processor makes; None where they are not known."""
        bins = getattr(getattr(self.processor, "feature_extractor", None), "feature_size", None)
        return bins if isinstance(bins, int) else None

    @property
    def marks(self) -> tuple[str, ...]:
        """Names that mean something to the processor although the tokenizer may have no token for them."""
        named = vars(self.processor) if self.processor is not None else {}
        return tuple(value for name, value in named.items() if name.endswith("_token") and isinstance(value, str))

    def refuse_control_tokens(self, prompt: Prompt) -> None:
        """A prompt's texts are text, alone and joined.

        Raises:
            ModelError: names the text and the control token it holds.
        """
        texts = {"question": prompt.question, "response phrase": prompt.response, "transcript": prompt.transcript}
        texts |= {f"option {number}": option for number, option in enumerate(prompt.options, start=1)}
        texts["prompt"] = prompt.flat_text
        for number, option in enumerate(prompt.options, start=1):
            texts[f"response phrase with option {number}"] = prompt.response + option
        refuse_control_tokens(self.tokenizer, texts, self.marks)

    def clock(self, samples: int) -> Clock:
        """When the audio positions of a clip of so many samples at 16 kHz are."""
        seconds = samples / SAMPLING_RATE
        return Clock(seconds, self.positions_per_second, self.audio_tags, self.frames_per_second)

    @abstractmethod
    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, torch.Tensor]:
        """Inputs of the model's forward pass for one clip, batch of one; `input_ids` end with the response phrase."""

    @abstractmethod
    def text_ids(self, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        """Token ids of the prompt followed by `continuation`; the audio may be one placeholder."""

    def audio_mask(self, inputs: dict[str, torch.Tensor], module: PreTrainedModel) -> torch.Tensor:
        """Which positions hold audio embeddings: bool [positions]."""
        return inputs["input_ids"][0].eq(module.config.audio_token_id)

    def logit_scale(self, module: PreTrainedModel) -> float:
        """What the class's logits have to be multiplied with to be those of the trained model."""
        return 1.0

    def roles(self, inputs: dict[str, torch.Tensor], prompt: Prompt, layout: str) -> tuple[str, ...] | None:
        """Role of every position, where the family built the prompt from pieces; None to find them in the text."""
        return None

    def transcribes(self, module: PreTrainedModel) -> bool:
        """Whether `transcribe` can be asked once the module has its weights; it may be an outline."""
        return self.reads_transcript

    def transcribe(self, waveform: np.ndarray, module: PreTrainedModel) -> str:
        """The transcript the model's own pipeline would give it (families with `reads_transcript`)."""
        raise NotImplementedError(f"{type(self).__name__} reads no transcript")
