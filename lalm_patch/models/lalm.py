"""One class for every audio language model: what the engines need, found by role and not by name."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import nnsight
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.models.answers import answer_ids
from lalm_patch.models.cache_keyword import cache_keyword
from lalm_patch.models.checkpoint import Checkpoint, find_checkpoint
from lalm_patch.models.family import Family
from lalm_patch.models.files import opening, processor_files, weights_entry
from lalm_patch.models.offload import Offloaded, computed_dtypes
from lalm_patch.models.placement import dtype_of, placement, refuse_files_to_unpack
from lalm_patch.models.precision import HALF, compute_with, exactly, stored_parameters, sums_in_float32
from lalm_patch.models.registry import FAMILIES
from lalm_patch.models.tokens import TokenTable, assign_roles, token_spans
from lalm_patch.models.weights import check_finite
from lalm_patch.settings import ModelSettings
from lalm_patch.stimuli import Prompt


@dataclass(frozen=True)
class Encoding:
    """What the decoder gets for one waveform.

    Attributes:
        tokens: the token table, one row per position.
        inputs: keyword arguments of the whole model's forward pass, audio included.
        inputs_embeds: [1, positions, hidden], the decoder's input after audio tower and projector ran.
        position_ids: [1, positions] or, with several position axes, [axes, 1, positions].
        overwritten: whether `inputs_embeds` is something else than audio tower and projector make of `inputs`; a trace
            of the whole model then has to put it in, see `LALM.enter`.
    """

    tokens: TokenTable
    inputs: dict[str, Tensor]
    inputs_embeds: Tensor
    position_ids: Tensor
    overwritten: bool = False


class LALM:
    """An audio encoder, a connector and a language-model decoder, wrapped by nnsight.

    Attributes:
        module: the transformers model.
        family: the adapter that builds its inputs.
        traced: nnsight's wrapper of the whole model; `traced.trace(**encoding.inputs)` is one forward pass.
        decoder: nnsight's wrapper of the decoder; takes `inputs_embeds`.
        layers: nnsight's wrappers of the decoder layers; `.output` is [batch, positions, hidden].
        norm: nnsight's wrapper of the norm after the last layer.
        tower_layers: nnsight's wrappers of the audio encoder's layers; empty where they are not found.
        offloaded: what brings layers' weights in, where they are not all on the device.
        precision: what it computes with; `as_loaded` for float32 weights, which are exact as they are.
    """

    def __init__(self, module: PreTrainedModel, family: Family, *, id: str = "", commit: str = "") -> None:
        self.offloaded: Offloaded | None = None
        self.precision = "as_loaded"
        self.module = module.eval().requires_grad_(False)
        self.family = family
        self.id = id
        self.commit = commit
        with warnings.catch_warnings():
            # A submodule called `output` (BERT's) is renamed, `.output` stays the module's output: what is read here.
            warnings.filterwarnings("ignore", message="Module '.*' has a submodule named")
            self.traced = nnsight.NNsight(self.module)
        decoder = _role(module, "get_decoder", "a decoder")
        self.decoder_module: nn.Module = decoder
        self._logit_scale = family.logit_scale(module)
        self._head: nn.Linear = _role(module, "get_output_embeddings", "output embeddings")
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not hasattr(decoder, "norm"):
            raise ModelError(
                f"{type(module).__name__}: expected a decoder with `layers` and a final `norm`, got "
                f"{type(decoder).__name__}; this architecture needs an adapter of its own"
            )
        self.decoder = self._envoy(decoder)
        self.layers = [self._envoy(layer) for layer in decoder.layers]
        self.norm = self._envoy(decoder.norm)
        towers = [part for name, part in module.named_modules() if name.rpartition(".")[2] == "audio_tower"]
        found = getattr(towers[0], "layers", None) if len(towers) == 1 else None
        self.tower_layers = [self._envoy(layer) for layer in found] if isinstance(found, nn.ModuleList) else []

    @classmethod
    def load(
        cls, settings: ModelSettings, told: Callable[[str], None] = lambda step: None, precision: str = "as_loaded"
    ) -> LALM:
        """Open a checkpoint by its settings: a hub id, a local folder, or the demo shipped with the package.

        Args:
            settings: which one, and where it computes.
            told: hears what is done next.
            precision: what it computes with, see `lalm_patch.models.precision`.

        Raises:
            ModelError: not found, gated, unreachable, or without the parts the method needs.
            ConfigError: an unknown family, dtype or device.
        """
        told("finding its files")
        checkpoint = find_checkpoint(settings)
        weights, device = placement(settings)
        refuse_files_to_unpack(settings, (part.folder for part in checkpoint.parts.values()))
        weights["attn_implementation"] = settings.attn_implementation
        family_class = _family(settings, checkpoint)
        told("reading every byte of its files: they are the ones meant")
        with checkpoint.verified():
            told("loading weights")
            try:
                module, family = family_class.load(checkpoint, **weights)
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(
                    f"model.id={settings.id}: cannot be opened as family {settings.family!r} from {checkpoint.folder} "
                    f"({type(error).__name__}: {error}); download it again"
                ) from error
            _check_processor(family, module, checkpoint)
        exact = compute_with(module, precision)
        offloaded = None
        if settings.offload != "none":
            assert device is not None
            language_model = _path(module, _role(module, "get_decoder", "a decoder")).rpartition(".")[0]
            dtypes = computed_dtypes(module, dtype_of(settings), "" if family.whole_dtype else language_model)
            if exact:  # the others are float32 already
                dtypes = {name: dtypes[name] for name in stored_parameters(module) & dtypes.keys()}
            offloaded = Offloaded(module, device, dtypes, settings.offload == "disk", _places(checkpoint))
        else:
            if device is not None:
                module.to(device)
            told("looking whether its weights are numbers")
            check_finite(module, _places(checkpoint))
        lalm = cls(module, family, id=checkpoint.id, commit=checkpoint.revision)
        lalm.offloaded = offloaded
        lalm.precision = precision if exact else "as_loaded"
        return lalm

    @classmethod
    def outline(cls, settings: ModelSettings) -> LALM:
        """As `load`, on the meta device: prompts and shapes, nothing can be computed; needs no weights."""
        checkpoint = find_checkpoint(settings, weights=False)
        module, family = _family(settings, checkpoint).outline(checkpoint)
        _check_processor(family, module, checkpoint)
        module.to(dtype_of(settings))
        return cls(module, family, id=checkpoint.id, commit=checkpoint.revision)

    # --- shapes and places -------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """Number of attention heads in each decoder layer."""
        config: Any = self.decoder_module.config
        return int(config.num_attention_heads)

    @property
    def cache_keyword(self) -> str:
        """The keyword under which the decoder takes its cache of keys and values.

        Raises:
            ModelError: it takes none.
        """
        # The class's: on the instance, nnsight and accelerate put a function of their own.
        return cache_keyword(type(self.decoder_module).forward)

    @property
    def decoder_path(self) -> str:
        """Where the decoder is in the whole model: names of submodules, joined by dots."""
        return self._path(self.decoder_module)

    @property
    def device(self) -> torch.device:
        """Device of the token embeddings, where inputs go; the CPU for a model that is only an outline."""
        weight: Tensor = self.module.get_input_embeddings().weight
        return torch.device("cpu") if weight.device.type == "meta" else weight.device

    def layer(self, index: int) -> Any:
        """nnsight's wrapper of a decoder layer that is traced by itself, its weights in place."""
        decoder: Any = self.decoder_module
        if self.offloaded is not None:  # nnsight takes inputs to the device that it finds the weights on
            self.offloaded.bring_in(decoder.layers[index])
        return self.layers[index]

    def layer_device(self, layer: int) -> torch.device:
        """Where a decoder layer computes."""
        if self.offloaded is not None:
            return self.offloaded.device
        decoder: Any = self.decoder_module
        device: torch.device = next(decoder.layers[layer].parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the decoder's weights."""
        weight: Tensor = self.module.get_input_embeddings().weight
        return weight.dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """Floating-point type of the states between layers."""
        return self.dtype if self.precision == "as_loaded" else torch.float32

    @property
    def exact(self) -> bool:
        """Whether it computes as a model in float32 does."""
        if self.dtype not in HALF:
            return True
        return self.precision == "float32" and not sums_in_float32(self.device.type, self.dtype)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Plain float32 of the same weights while the context is open: what rounding is measured against."""
        before = self.precision
        with exactly(self.module, self.offloaded):
            self.precision = "float32"
            try:
                yield
            finally:
                self.precision = before

    # --- inputs ------------------------------------------------------------------------------------------------

    def inputs(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> tuple[TokenTable, dict[str, Tensor]]:
        """Token table and model inputs of a clip and a question; nothing is computed by the model yet.

        Raises:
            ModelError: a layout the family lacks, no audio position, a control token in the prompt, a question the
                tokenizer rewrites, or a token the model has no embedding for.
        """
        if layout not in self.family.layouts:
            known = ", ".join(self.family.layouts)
            raise ModelError(f"prompt layout {layout!r}: this model has {known}; set prompt.layout to one of these")
        self.family.refuse_control_tokens(prompt)
        tensors = {name: value.to(self.device) for name, value in self.family.inputs(waveform, prompt, layout).items()}
        if tensors["input_ids"].shape[0] != 1:
            raise ModelError(f"expected one sequence per clip, got {tensors['input_ids'].shape[0]}")
        mask = self.family.audio_mask(tensors, self.module)
        roles = self.family.roles(tensors, prompt, layout)
        table = self._token_table(tensors["input_ids"][0], mask, prompt, roles)
        return replace(table, clock=self.family.clock(len(waveform))), tensors

    def encode(self, waveform: np.ndarray, prompt: Prompt, layout: str) -> Encoding:
        """Run audio tower and projector once; the decoder does not run.

        Raises:
            ModelError: as `inputs`; or the model changed the sequence's length on its own.
        """
        tokens, inputs = self.inputs(waveform, prompt, layout)
        return self.embed(tokens, inputs)

    def embed(self, tokens: TokenTable, inputs: dict[str, Tensor]) -> Encoding:
        """The decoder's inputs for inputs that `inputs` returned."""
        with torch.no_grad(), self.traced.trace(**inputs) as tracer:
            received = nnsight.save(dict(self.decoder.inputs[1]))
            # Some decoders take ids and put the audio in themselves: what enters the first layer is the same thing.
            entering = self.layers[0].input.clone().save()
            tracer.stop()
        given = received.get("inputs_embeds")
        embeds: Tensor = entering if given is None else given
        positions = embeds.shape[1]
        if positions != len(tokens):
            raise ModelError(
                f"the decoder received {positions} positions for a prompt of {len(tokens)}: the processor did not "
                "expand the audio placeholder, so positions cannot be matched with tokens"
            )
        mask = received.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            raise ModelError("the prompt is padded; expected one unpadded sequence per clip")
        position_ids = received.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(positions, device=embeds.device)[None]
        return Encoding(tokens, inputs, embeds, position_ids)

    def enter(self, encoding: Encoding) -> None:
        """Inside a trace of the whole model on an encoding's inputs: the decoder starts from its `inputs_embeds`."""
        if not encoding.overwritten:
            return
        args, kwargs = self.decoder.inputs
        embeds = encoding.inputs_embeds.clone()  # patches are written into it
        if kwargs.get("inputs_embeds") is None:  # a decoder that takes ids and puts the audio in itself, see `embed`
            self.layers[0].input = embeds
        else:
            self.decoder.inputs = args, kwargs | {"inputs_embeds": embeds}

    def target_ids(self, prompt: Prompt, layout: str, target: str = "leading_space") -> tuple[int, ...]:
        """First token of each answer where it follows the response phrase, in the prompt's order of options.

        Raises:
            ModelError: a control token in the prompt, an option that merges with the phrase before it, or two options
                that begin with the same token.
        """
        return tuple(ids[0] for ids in self.answer_ids(prompt, layout, target, whole=False))

    def answer_ids(self, prompt: Prompt, layout: str, target: str, *, whole: bool) -> tuple[tuple[int, ...], ...]:
        """Tokens of each answer where it follows the response phrase, see `models.answers.answer_ids`."""
        return answer_ids(self.family, self.check_output_ids, prompt, layout, target, whole=whole)

    def check_output_ids(self, ids: list[int]) -> None:
        """Raises ModelError for a token that the model has no output embedding for."""
        self._check_range(ids, self._head.weight.shape[0], "output")

    def logits(self, states: Tensor, gradient: bool = False) -> Tensor:
        """Logits [rows, vocabulary] in float32 of normed states [rows, hidden]; differentiable if asked to."""
        with torch.set_grad_enabled(gradient):
            logits: Tensor = self._head(states.to(self._head.weight.device))
            softcap = getattr(self.module.config.get_text_config(), "final_logit_softcapping", None)
            if softcap is not None:
                logits = torch.tanh(logits.float() / softcap) * softcap
        return self.scaled(logits)

    def scaled(self, logits: Tensor) -> Tensor:
        """The trained model's logits in float32, from those that the model's class returns."""
        return logits.float() * self._logit_scale

    # --- inside ------------------------------------------------------------------------------------------------

    def _token_table(self, ids: Tensor, audio: Tensor, prompt: Prompt, roles: tuple[str, ...] | None) -> TokenTable:
        if not bool(audio.any()):
            raise ModelError("the prompt has no audio position: the model would answer without hearing the clip")
        numbers: list[int] = ids.tolist()
        rows: int = self.module.get_input_embeddings().weight.shape[0]
        # Placeholders of audio may lie beyond: they are overwritten.
        self._check_range([number for number, heard in zip(numbers, audio, strict=True) if not heard], rows, "input")
        tokenizer = self.family.tokenizer
        # Most positions are the audio's placeholder: each id is decoded once.
        decoded = {number: str(tokenizer.decode([number], skip_special_tokens=False)) for number in set(numbers)}
        texts = tuple(decoded[number] for number in numbers)
        if roles is not None:
            return TokenTable(tuple(numbers), texts, roles)
        audio_positions = audio.nonzero()[:, 0].tolist()
        first, end = audio_positions[0], audio_positions[-1] + 1
        text, spans = token_spans(tokenizer, numbers[end:])
        after = assign_roles(spans, text, prompt.user_parts, prompt.response, self.id or type(self.module).__name__)
        # Ids between two clips are neither before nor after the audio: they count as template.
        between = ["audio" if audio[i] else "template" for i in range(first, end)]
        return TokenTable(tuple(numbers), texts, ("pre",) * first + tuple(between) + tuple(after))

    def _check_range(self, ids: list[int], rows: int, which: str) -> None:
        if max(ids, default=0) >= rows:
            raise ModelError(
                f"{self.id or type(self.module).__name__}: its tokenizer gives token {max(ids)}, but its {which} "
                f"embeddings have {rows} rows; tokenizer and weights are of different checkpoints, download both again"
            )

    def _envoy(self, module: nn.Module) -> Any:
        """nnsight's wrapper of a submodule."""
        return operator.attrgetter(self._path(module))(self.traced)

    def _path(self, module: nn.Module) -> str:
        return _path(self.module, module)


def _path(whole: nn.Module, part: nn.Module) -> str:
    """Names of submodules on the way to a part, joined by dots."""
    path: str = next(name for name, candidate in whole.named_modules() if candidate is part)
    return path


def _family(settings: ModelSettings, checkpoint: Checkpoint) -> type[Family]:
    """The adapter of these settings, if the checkpoint is one of its."""
    if settings.family not in FAMILIES:
        raise ConfigError(f"model.family={settings.family!r}: expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[settings.family]
    family.check_type(checkpoint.folder)
    return family


def _check_processor(family: Family, module: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Tokenizer and chat template make a prompt, the feature extractor what the encoder takes.

    One that is damaged or of another model is found here, where its file can be named.
    """
    folder = checkpoint.parts["decoder"].folder if "decoder" in checkpoint.parts else checkpoint.folder
    with opening(processor_files(folder)):
        family.text_ids(Prompt("a", ("b", "c"), "d"), family.layouts[0])
    wanted = getattr(getattr(module.config, "audio_config", None), "num_mel_bins", None)
    if None not in (wanted, family.mel_bins) and wanted != family.mel_bins:
        extractor = processor_files(checkpoint.parts.get("encoder", checkpoint).folder)
        raise ModelError(
            f"{extractor}: gives {family.mel_bins} mel bins, and the model's config.json says {wanted}; one of the "
            "files is damaged or of another checkpoint, download both again"
        )


def _places(checkpoint: Checkpoint) -> str:
    """Where a model's weights are, for messages."""
    folders = [repository.folder for repository in (checkpoint, *checkpoint.parts.values())]
    return ", ".join(str(weights_entry(folder) or folder) for folder in folders)


def _role(module: PreTrainedModel, getter: str, what: str) -> Any:
    find: Callable[[], Any] | None = getattr(module, getter, None)
    found = find() if find is not None else None
    if found is None:
        raise ModelError(f"{type(module).__name__} has no {what} (`{getter}()`); this architecture is not supported")
    return found
