"""DeSTA2 (arXiv 2409.20007) and DeSTA2.5-Audio (arXiv 2507.02768): Whisper, a Q-Former connector, and Llama."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.errors import ModelError
from lalm_patch.models.native.audio_lm import NativeAudioLM
from lalm_patch.models.native.qformer import DestaConnector

# Tapped layers by the encoder's depth; the originals choose by Whisper's name (tiny, small, medium, large-v3).
# A tap is the raw output of that layer, -1 the embeddings before the first. DeSTA2 counts the embeddings as state 0,
# so its taps are one layer earlier than the numbers in its code; DeSTA2.5 counts layers.
DESTA2_TAPS = {
    4: (-1, 0, 1, 2),
    12: (1, 4, 7, 10),
    24: (4, 10, 16, 22),
    32: (2, 6, 10, 14, 18, 22, 26, 30),
}
DESTA25_TAPS = {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)}


class DestaConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shapes of both DeSTA models.

    Attributes:
        text_config: the decoder's configuration.
        audio_config: Whisper's configuration.
        taps: encoder layers whose outputs the connector reads, ascending; -1 are the embeddings.
        prompt_size: audio vectors per clip.
        qformer_layers: layers of the Q-Former.
        audio_token_id: the id that holds the audio vectors' places in a prompt.
    """

    model_type = "lalm_patch_desta"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    audio_config: dict[str, Any] | PreTrainedConfig | None = None
    taps: list[int] | tuple[int, ...] = ()
    prompt_size: int = 64
    qformer_layers: int = 2
    audio_token_id: int | None = None


class DestaForConditionalGeneration(NativeAudioLM):
    """Whisper's encoder is shared with the transcriber, if the loader attached one (see `attach_transcriber`)."""

    config_class = DestaConfig
    _no_split_modules: ClassVar[list[str]] = ["WhisperEncoder", "DestaConnector"]

    def __init__(self, config: DestaConfig) -> None:
        super().__init__(config)
        audio, text = config.audio_config, config.text_config
        self.audio_tower = WhisperEncoder(audio)
        self.multi_modal_projector = DestaConnector(
            taps=len(config.taps),
            queries=config.prompt_size,
            width=audio.d_model,  # type: ignore[union-attr]
            heads=audio.encoder_attention_heads,  # type: ignore[union-attr]
            layers=config.qformer_layers,
            hidden=text.hidden_size,  # type: ignore[union-attr]
        )
        self.language_model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)  # type: ignore[union-attr]
        self._transcriber: tuple[Any, ...] = ()
        self.post_init()

    def attach_transcriber(self, whisper: Any, tokenizer: Any) -> None:
        """Keep the Whisper model whose encoder is `audio_tower`, and its tokenizer.

        In a tuple, so that it is not a submodule: the encoder would have two names, and `to` would move a decoder
        that only transcription needs.
        """
        self._transcriber = (whisper, tokenizer)

    @property
    def transcriber(self) -> tuple[Any, Any]:
        """The whole Whisper model and its tokenizer.

        Raises:
            ModelError: none was attached.
        """
        if not self._transcriber:
            raise ModelError(
                "this model has no transcriber: its Whisper is an encoder alone, or it was not opened with load_desta2 "
                "or load_desta25; give the transcript as a text, or none"
            )
        whisper, tokenizer = self._transcriber
        return whisper, tokenizer

    def tapped_states(self, input_features: Tensor) -> list[Tensor]:
        """Encoder states [clips, frames, width] of every tap, in order."""
        states: dict[int, Tensor] = {}
        layers = self.audio_tower.layers

        def keep(index: int, state: Any) -> None:
            states[index] = state[0] if isinstance(state, tuple) else state

        handles = []
        for tap in self.config.taps:
            if tap < 0:
                handles.append(layers[0].register_forward_pre_hook(lambda _module, args, tap=tap: keep(tap, args)))
            else:
                handles.append(
                    layers[tap].register_forward_hook(lambda _module, _args, output, tap=tap: keep(tap, output))
                )
        try:
            self.audio_tower(input_features.to(self.audio_tower.conv1.weight))
        finally:
            for handle in handles:
                handle.remove()
        return [states[tap] for tap in self.config.taps]

    def audio_spans(self, input_features: Tensor, feature_lengths: Tensor | None = None) -> list[Tensor]:
        """`prompt_size` vectors [prompt_size, hidden] per clip, whatever its length; padding is heard as silence.

        Raises:
            ModelError: `feature_lengths`: this encoder always hears the whole window.
        """
        if feature_lengths is not None:
            raise ModelError("feature_lengths: DeSTA's encoder hears the whole padded window, expected None")
        return list(self.multi_modal_projector(self.tapped_states(input_features)))
