"""Real audio language models with planted weights: Qwen2-Audio (Qwen2 decoder) and Voxtral (Llama decoder).

Every module is transformers' own and runs as usual; only the weights are written. See `lalm_patch.truth.circuit` for
what the channels of the residual stream hold.

A planted head, and what makes it exact:

- *Addressing.* Queries and keys use the pair of channels that rotary embedding turns slowest. At the base used here
  (as in Qwen2) it turns by 6e-6 rad per position, so over a prompt the scores depend on content only, to 1e-4.
- *Resting.* In one channel of that pair every query meets the key of the sink before the audio, whose value is zero
  (as attention sinks in trained models). In the other, the target's query meets the source's key with twice the score.
  With `SHARPNESS` between the two, the head moves nothing anywhere but from source to target, up to exp(-SHARPNESS).
- *Moving.* Values copy the register that is read, the output projection adds it to the register that is written.

The audio tower is planted too: its first mel bands are the classes, the others noise; convolutions pass bands on, the
encoder layers add nothing, and the last LayerNorm sets the strength of the class against the noise, clip by clip.

Background weights (all other heads, all MLPs) are random, read everything and write to the free channels, which the
output head reads a little. Planted heads never read them; they reach them through the norm alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

from lalm_patch.errors import ModelError
from lalm_patch.models import LALM, Encoding, Family
from lalm_patch.stimuli import Prompt
from lalm_patch.truth.circuit import (
    AUDIO_ID,
    AUDIO_POSITIONS,
    AUDIO_TAG,
    BALLAST,
    BALLAST_VALUE,
    CLASSES,
    FREE,
    HEADS,
    HIDDEN,
    KEY_VALUE_HEADS,
    OPTION_IDS,
    OTHER_ID,
    OTHER_LOGIT,
    PAD_ID,
    SHARPNESS,
    SINK_ID,
    SINK_TAG,
    TEXT_ID,
    TEXT_TAG,
    VOCABULARY,
    Circuit,
    FloatArray,
    Move,
    Register,
    Truth,
    Window,
    token_table,
)

ARCHITECTURES = ("qwen2_audio", "voxtral")
ROPE_BASE = 1e6
MELS, ENCODER_WIDTH = 8, 16
CONSTANT = MELS
"""Channel of the audio encoder that is 1 for every frame: ballast and tag of audio positions come from it."""
FRAMES_PER_POSITION = {"qwen2_audio": 4, "voxtral": 8}
LOUDNESS = sqrt(ENCODER_WIDTH - 1)
"""What LayerNorm makes of a frame with energy in one band alone."""


class PlantedFamily(Family):
    """Planted models have no tokenizer: clips are mel frames and the prompt is given by its ids."""

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> dict[str, Tensor]:
        """Refused. Raises ModelError."""
        raise ModelError("planted models take mel frames, not waveforms; use PlantedLALM.encode_frames")

    def text_ids(self, prompt: Prompt, layout: str, continuation: str = "") -> list[int]:
        """Refused. Raises ModelError."""
        raise ModelError("planted models have no tokenizer; their options are PlantedLALM.option_ids")


class PlantedLALM(LALM):
    """An audio language model in which the truth is planted.

    Attributes:
        truth: what was planted.
        architecture: one of `ARCHITECTURES`.
        option_ids: the answer tokens; of a window model any token may be the answer.
    """

    def __init__(self, module: PreTrainedModel, architecture: str, truth: Truth) -> None:
        super().__init__(module, PlantedFamily(None), id=f"planted {architecture}")
        self.truth = truth
        self.architecture = architecture
        self.option_ids = OPTION_IDS if isinstance(truth, Circuit) else tuple(range(VOCABULARY))
        self._table = token_table(truth.text)

    @property
    def frames(self) -> int:
        """Mel frames of a clip."""
        return AUDIO_POSITIONS * FRAMES_PER_POSITION[self.architecture]

    def encode_frames(self, frames: Tensor) -> Encoding:
        """The decoder's inputs for a clip of mel frames [MELS, frames]; silence is zeros."""
        inputs = {"input_ids": torch.tensor([self._table.ids]), "input_features": frames[None]}
        if self.architecture == "qwen2_audio":
            inputs["feature_attention_mask"] = torch.ones(1, self.frames, dtype=torch.long)
        return self.embed(self._table, inputs)

    @staticmethod
    def audio_register(encoding: Encoding) -> FloatArray:
        """The class as the decoder gets it: [audio position, class]."""
        states = encoding.inputs_embeds[0, list(encoding.tokens.audio_positions)]
        return states[:, list(Register.AUDIO.channels)].double().numpy()


@dataclass(frozen=True)
class Clip:
    """A clip: mel frames [MELS, frames] and its class."""

    frames: Tensor
    label: int


def draw_clips(count: int, frames: int, seed: int) -> list[Clip]:
    """Clips of all classes in turn. Loudness of the class and of the noise differ from clip to clip."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for index in range(count):
        loudness = 1.5 + 1.5 * torch.rand(1, generator=generator)
        mel = 3 * torch.rand(MELS, 1, generator=generator) * torch.rand(MELS, frames, generator=generator)
        mel[:CLASSES] *= 0.3
        mel[index % CLASSES] += loudness
        clips.append(Clip(mel, index % CLASSES))
    return clips


def plant_circuit(
    circuit: Circuit, architecture: str = "qwen2_audio", background: float = 0.0, seed: int = 0
) -> PlantedLALM:
    """A model with a circuit written into it.

    Args:
        circuit: what to plant.
        architecture: one of `ARCHITECTURES`.
        background: scale of the random weights around it; 0: none, 0.5: small beside the circuit, 1: as large as it.
        seed: of the background.
    """
    module = _module(architecture, circuit.layers)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        _plant_ears(module, architecture)
        _plant_vocabulary(module, circuit)
        if background:
            _plant_background(module, background, seed)
        decoder: Any = module.get_decoder()
        for norm in (decoder.norm, *(n for each in decoder.layers for n in _norms(each))):
            norm.weight.fill_(1.0)
        for move in circuit.moves:
            _plant_head(decoder.layers[move.layer].self_attn, move)
    return PlantedLALM(module, architecture, circuit)


def plant_window(window: Window, architecture: str = "qwen2_audio", seed: int = 0) -> PlantedLALM:
    """A model of random weights, its attention output zero outside the window.

    The weights are large enough for every layer to matter, and the head's for probabilities far from uniform.
    """
    module = _module(architecture, window.layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
        module.get_output_embeddings().weight.mul_(6)
        decoder: Any = module.get_decoder()
        for index, layer in enumerate(decoder.layers):
            # Attention strong enough against the rest for the answer to depend on the clip.
            layer.self_attn.v_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(6)
            if not window.first <= index < window.end:
                layer.self_attn.o_proj.weight.zero_()
    return PlantedLALM(module, architecture, window)


def _module(architecture: str, layers: int) -> Any:
    """An audio language model of transformers with its own initial weights."""
    text = {
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HIDDEN // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "pad_token_id": PAD_ID,
        "bos_token_id": SINK_ID,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    audio = {"num_mel_bins": MELS}
    torch.manual_seed(0)
    if architecture == "qwen2_audio":
        audio |= {"d_model": ENCODER_WIDTH, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        audio["max_source_positions"] = AUDIO_POSITIONS * FRAMES_PER_POSITION[architecture] // 2
        config = Qwen2AudioConfig(
            audio_config=audio, text_config=text | {"model_type": "qwen2"}, audio_token_index=AUDIO_ID
        )
        return Qwen2AudioForConditionalGeneration(config)
    if architecture == "voxtral":
        audio |= {"hidden_size": ENCODER_WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
        audio["intermediate_size"] = 4 * ENCODER_WIDTH  # four frames are stacked into one audio embedding
        audio["max_source_positions"] = AUDIO_POSITIONS * FRAMES_PER_POSITION[architecture] // 2
        config = VoxtralConfig(audio_config=audio, text_config=text | {"model_type": "llama"}, audio_token_id=AUDIO_ID)
        return VoxtralForConditionalGeneration(config)
    raise ValueError(f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")


def _norms(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _plant_ears(module: Any, architecture: str) -> None:
    """Audio tower and projector: mel band k becomes class k of the audio register, at about 1 for a clear clip."""
    tower, projector = module.model.audio_tower, module.model.multi_modal_projector
    for band in range(MELS):
        tower.conv1.weight[band, band, 1] = 1.0
        tower.conv2.weight[band, band, 1] = 1.0
    tower.layer_norm.weight[:CLASSES] = 1.0
    tower.layer_norm.bias[CONSTANT] = 1.0
    written = [(CONSTANT, BALLAST, BALLAST_VALUE), (CONSTANT, AUDIO_TAG, 1.0)]
    written += [(option, channel, 1 / LOUDNESS) for option, channel in enumerate(Register.AUDIO.channels)]
    for channel, target, factor in written:
        if architecture == "qwen2_audio":
            projector.linear.weight[target, channel] = factor
        else:  # the mean of the four frames; the second linear map undoes what GELU takes from the constant 1
            for frame in range(4):
                projector.linear_1.weight[target, frame * ENCODER_WIDTH + channel] = 1 / 4
            projector.linear_2.weight[target, target] = factor
    if architecture == "voxtral":
        passed = float(torch.nn.functional.gelu(torch.tensor(1.0)))
        for target in (BALLAST, AUDIO_TAG):
            projector.linear_2.weight[target, target] /= passed


def _plant_vocabulary(module: Any, circuit: Circuit) -> None:
    """Token embeddings with ballast and tag; an output head that reads the answer register."""
    embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
    embedding[:, BALLAST] = BALLAST_VALUE
    embedding[SINK_ID, SINK_TAG] = 1.0
    for index in range(circuit.text):
        embedding[TEXT_ID + index, TEXT_TAG + index] = 1.0
    for token, channel in zip(OPTION_IDS, Register.ANSWER.channels, strict=True):
        head[token, channel] = circuit.answer_gain
    head[OTHER_ID, BALLAST] = OTHER_LOGIT / BALLAST_VALUE


def _plant_head(attention: Any, move: Move) -> None:
    """One head that moves the class, in place of what its rows and columns held."""
    width = HIDDEN // HEADS
    group = move.head * KEY_VALUE_HEADS // HEADS
    queries = slice(move.head * width, (move.head + 1) * width)
    keys = slice(group * width, (group + 1) * width)
    for projection, rows in ((attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys)):
        projection.weight[rows] = 0.0
        if projection.bias is not None:
            projection.bias[rows] = 0.0
    attention.o_proj.weight[:, queries] = 0.0

    rests, looks = width // 2 - 1, width - 1  # rotary embedding turns channel i with channel i + width / 2
    score = sqrt(SHARPNESS * sqrt(width))
    source = AUDIO_TAG if move.source is None else TEXT_TAG + move.source
    attention.q_proj.weight[queries.start + rests, BALLAST] = score / BALLAST_VALUE
    attention.k_proj.weight[keys.start + rests, SINK_TAG] = score
    target = AUDIO_TAG if move.target is None else TEXT_TAG + move.target
    attention.q_proj.weight[queries.start + looks, target] = 2 * score
    attention.k_proj.weight[keys.start + looks, source] = score
    for index, (read, written) in enumerate(zip(move.reads.channels, move.writes.channels, strict=True)):
        attention.v_proj.weight[keys.start + index, read] = 1.0
        attention.o_proj.weight[written, queries.start + index] = move.gain


def _plant_background(module: Any, scale: float, seed: int) -> None:
    """Random heads, MLPs, embeddings and output head around the circuit: they write to the free channels only."""
    generator = torch.Generator().manual_seed(seed)

    def random(weight: Tensor, deviation: float) -> None:
        weight.copy_(scale * deviation * torch.randn(weight.shape, generator=generator))

    random(module.get_input_embeddings().weight[:, FREE:], 0.3)
    random(module.get_output_embeddings().weight[:, FREE:], 0.1)
    for layer in module.get_decoder().layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            random(projection.weight, 0.15)
            if projection.bias is not None:
                random(projection.bias, 0.15)
        # Read by values, the ballast would only add the same constant everywhere, and outgrow what is planted.
        layer.self_attn.v_proj.weight[:, BALLAST] = 0.0
        random(layer.self_attn.o_proj.weight[FREE:], 0.15)
        random(layer.mlp.gate_proj.weight, 0.15)
        random(layer.mlp.up_proj.weight, 0.15)
        random(layer.mlp.down_proj.weight[FREE:], 0.03)
