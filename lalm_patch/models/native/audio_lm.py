"""What the three natively implemented models share: audio vectors overwrite embeddings, then the decoder runs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lalm_patch.errors import ModelError
from lalm_patch.models.cache_keyword import CACHE_KEYWORDS, cache_keyword


class NativeAudioLM(PreTrainedModel):  # type: ignore[misc]
    """An audio tower, a connector, and a decoder of transformers with its output head.

    Subclasses set `audio_tower`, `multi_modal_projector`, `language_model` (a decoder with `layers` and `norm`) and
    `lm_head`, and say in `audio_spans` which vectors a clip becomes.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_KEYWORDS)

    audio_tower: Any
    multi_modal_projector: Any
    language_model: Any
    lm_head: nn.Linear

    @abstractmethod
    def audio_spans(self, input_features: Tensor, feature_lengths: Tensor | None = None) -> list[Tensor]:
        """The vectors of every clip in order: one tensor [positions, hidden] per clip.

        Args:
            input_features: log-mel spectrograms [clips, mel, frames].
            feature_lengths: encoder frames that belong to each clip, [clips]; only for encoders that crop.
        """

    def get_audio_features(self, input_features: Tensor, feature_lengths: Tensor | None = None) -> Tensor:
        """The rows that overwrite the positions of `audio_mask`: [audio positions, hidden], clip after clip."""
        return torch.cat(self.audio_spans(input_features, feature_lengths))

    def get_decoder(self) -> Any:
        """The decoder: takes `inputs_embeds`, has `layers` and `norm`."""
        return self.language_model

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        embeddings: nn.Embedding = self.language_model.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The head: normed states of the last layer to logits."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def embed(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        feature_lengths: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings [batch, positions, hidden] with the audio vectors in the positions of `audio_mask`.

        Raises:
            ModelError: audio is announced but not given, given but without a place, or of another length.
        """
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        placeholder: int = self.config.audio_token_id
        if input_features is None:
            announced = int((torch.eq(input_ids, placeholder) if audio_mask is None else audio_mask).sum())
            if announced:
                raise ModelError(
                    f"the prompt has {announced} audio placeholders but no input_features: the model would answer "
                    "without hearing the clip; pass the clip's log-mel spectrogram as input_features"
                )
            return embeds
        if audio_mask is None:
            raise ModelError("input_features without audio_mask: expected bool [batch, positions], the audio's places")
        if audio_mask.shape != input_ids.shape or audio_mask.dtype != torch.bool:
            raise ModelError(
                f"audio_mask: expected bool {list(input_ids.shape)} as input_ids, got "
                f"{str(audio_mask.dtype).removeprefix('torch.')} {list(audio_mask.shape)}"
            )
        spans = self.audio_spans(input_features, feature_lengths)
        _check_places(audio_mask, [len(span) for span in spans])
        rows = torch.cat(spans).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(audio_mask.to(embeds.device)[..., None], rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        feature_lengths: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a prompt whose audio positions are already in `input_ids`.

        Args:
            input_ids: [batch, positions], with a placeholder for every audio vector.
            input_features: log-mel spectrograms [clips, mel, frames], clips in the order of their spans.
            audio_mask: bool [batch, positions], true where an audio vector overwrites the token's embedding.
            attention_mask: as in transformers' decoders.
            position_ids: as in transformers' decoders.
            past_key_values: as in transformers' decoders, which call it `cache` from 5.24 on.
            inputs_embeds: [batch, positions, hidden] instead of `input_ids` and audio.
            use_cache: as in transformers' decoders.
            logits_to_keep: only the last positions' logits, 0 for all; or the positions' indices.
            feature_lengths: encoder frames of each clip, see `audio_spans`.
            cache: the same as `past_key_values`; either name goes with every version of transformers.
            kwargs: handed to the decoder.

        Raises:
            ModelError: as `embed`.
            ValueError: neither or both of `input_ids` and `inputs_embeds`, or both of `past_key_values` and `cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, got both or neither")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, input_features, audio_mask, feature_lengths)
        elif input_features is not None:
            raise ValueError("inputs_embeds already hold the audio: pass either input_features or inputs_embeds")
        if past_key_values is not None and cache is not None:
            raise ValueError("expected one cache of keys and values, got both cache and past_key_values: pass one")
        cache = past_key_values if cache is None else cache
        past = 0 if cache is None else cache.get_seq_length()
        self.check_length(past + inputs_embeds.shape[1])
        kwargs.pop("return_dict", None)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{cache_keyword(type(self.language_model).forward): cache},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state[:, kept]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{cache_keyword(CausalLMOutputWithPast): getattr(outputs, cache_keyword(type(outputs)))},
        )

    def check_length(self, positions: int) -> None:
        """Refuse sequences the model computes differently from what is implemented here. By default none."""


def _check_places(audio_mask: Tensor, lengths: list[int]) -> None:
    """Every clip has as many places as vectors, in one piece."""
    places: list[int] = audio_mask.flatten().nonzero()[:, 0].tolist()
    if len(places) != sum(lengths):
        raise ModelError(
            f"audio_mask has {len(places)} positions but the audio has {sum(lengths)} vectors ({len(lengths)} clip(s) "
            f"of {', '.join(map(str, lengths))}): prompt and input_features are not of the same clips"
        )
    start = 0
    for index, length in enumerate(lengths):
        span = places[start : start + length]
        start += length
        if span and span[-1] - span[0] + 1 != length:
            raise ModelError(
                f"the {length} vectors of clip {index} would be torn apart over positions {span[0]} to {span[-1]}: "
                "the clips' spans in the prompt are not in the order of input_features"
            )
