"""Qwen-Audio and Qwen-Audio-Chat (arXiv 2311.07919): a Whisper-like encoder with pooling, and Qwen-7B.

The decoder is transformers' Qwen2: Qwen-7B differs only in the names and the packing of its parameters.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from lalm_patch.errors import ModelError
from lalm_patch.models.native.audio_lm import NativeAudioLM


class QwenAudioConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shapes of Qwen-Audio.

    Attributes:
        text_config: the decoder's configuration, a Qwen2Config.
        audio_config: the encoder's shapes, a WhisperConfig.
        audio_token_id: id of the tag `<audio>`, the first position of every span.
        max_positions: the longest sequence the model computes without logn attention and dynamic NTK scaling.
    """

    model_type = "lalm_patch_qwen_audio"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    audio_config: dict[str, Any] | PreTrainedConfig | None = None
    audio_token_id: int | None = None
    max_positions: int = 2048


class QwenAudioTower(nn.Module):
    """Whisper's encoder without its last norm, on spectrograms that end where the clip ends.

    Of several clips the shorter ones are padded to the longest: the last frame of a shorter clip hears the padding's
    spectrogram through the convolutions, as in the original, but attention is masked to each clip's own frames.
    """

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        # Masks of clips are additive, which flash attention does not take: the decoder's choice does not apply here.
        config._attn_implementation = "sdpa"
        width = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, width)
        self.layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, input_features: Tensor, feature_lengths: Tensor) -> Tensor:
        """Spectrograms [clips, mel, 2 * frames] and frames per clip [clips] to states [clips, frames, width]."""
        states = functional.gelu(self.conv1(input_features))
        states = functional.gelu(self.conv2(states)).transpose(1, 2)
        frames = states.shape[1]
        states = states + self.embed_positions(torch.arange(frames, device=states.device))
        padding = torch.arange(frames, device=states.device) >= feature_lengths.to(states.device)[:, None]
        mask = None
        if bool(padding.any()):
            states = states.masked_fill(padding[..., None], 0)
            mask = states.new_zeros(len(states), 1, 1, frames).masked_fill(padding[:, None, None], -torch.inf)
            mask = mask.expand(-1, -1, frames, -1)
        for layer in self.layers:
            states = layer(states, mask)
        hidden: Tensor = states
        return hidden


class QwenAudioProjector(nn.Module):
    """Pairs of frames are averaged, normed and projected; learned vectors take the places of both tags."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, hidden)
        self.audio_bos_eos_token = nn.Embedding(2, hidden)

    def forward(self, states: Tensor, feature_lengths: list[int]) -> list[Tensor]:
        """States [clips, frames, width] to one [frames // 2 + 2, hidden] per clip."""
        pooled = functional.avg_pool1d(states.transpose(1, 2), 2).transpose(1, 2)
        vectors = self.linear(self.layer_norm(pooled))
        tags = self.audio_bos_eos_token(torch.arange(2, device=states.device))
        return [
            torch.cat((tags[:1], clip[: frames // 2], tags[1:]))
            for clip, frames in zip(vectors, feature_lengths, strict=True)
        ]


class QwenAudioForConditionalGeneration(NativeAudioLM):
    """Audio spans include both tags: their embeddings are overwritten too."""

    config_class = QwenAudioConfig
    _no_split_modules: ClassVar[list[str]] = ["QwenAudioTower", "QwenAudioProjector"]

    def __init__(self, config: QwenAudioConfig) -> None:
        super().__init__(config)
        audio: Any = config.audio_config
        text: Any = config.text_config
        self.audio_tower = QwenAudioTower(audio)
        self.multi_modal_projector = QwenAudioProjector(audio.d_model, text.hidden_size)
        self.language_model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def audio_spans(self, input_features: Tensor, feature_lengths: Tensor | None = None) -> list[Tensor]:
        """`frames // 2 + 2` vectors per clip; without `feature_lengths` every clip fills its spectrogram.

        Raises:
            ModelError: a length that is not one per clip, below 2, or longer than the spectrogram or the window.
        """
        frames = input_features.shape[-1] // 2
        clips = len(input_features)
        lengths = [frames] * clips if feature_lengths is None else [int(length) for length in feature_lengths]
        window = self.config.audio_config.max_source_positions
        if len(lengths) != clips or min(lengths) < 2 or max(lengths) > min(frames, window):
            raise ModelError(
                f"feature_lengths {lengths}: expected {clips} numbers from 2 to {min(frames, window)} for "
                f"input_features {list(input_features.shape)}; crop the spectrogram to 2 * frames (qwen_audio_features)"
            )
        cropped = input_features[..., : 2 * max(lengths)].to(self.audio_tower.conv1.weight)
        states = self.audio_tower(cropped, torch.tensor(lengths))
        spans: list[Tensor] = self.multi_modal_projector(states, lengths)
        return spans

    def check_length(self, positions: int) -> None:
        """Refuse what the original computes with logn attention and dynamic NTK scaling.

        Raises:
            ModelError: more than `max_positions` positions.
        """
        if positions > self.config.max_positions:
            raise ModelError(
                f"the prompt has {positions} positions, Qwen-Audio is implemented up to {self.config.max_positions}; "
                "use a shorter clip or prompt"
            )
