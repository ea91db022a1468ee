"""A clean or a corrupted run, layer by layer from the bottom: what cells need of it at the layer in hand.

Whoever goes up the layers asks for one layer after another. Nothing of the layers below is kept, unless it is asked
for: a run that several sweeps start from is then computed once.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers import DynamicCache

from lalm_patch.engine.sites import states_at
from lalm_patch.interventions.patches import Site
from lalm_patch.models import LALM, Encoding

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer: each [key-value heads, positions, head size], positions already rotated in."""
INSIDE = (Site.HEAD, Site.ATTN, Site.MLP, Site.RESID)
"""Sites of a layer that are read while it is computed; `embed` is what enters the first one."""


@dataclass(frozen=True)
class LayerInputs:
    """What a decoder hands its layers for a sequence.

    Attributes:
        states: [1, positions, hidden], what enters the first layer.
        rest: further positional arguments.
        keywords: keyword arguments: rotations of the positions, a mask, ...
    """

    states: Tensor
    rest: tuple[Any, ...]
    keywords: dict[str, Any]


def layer_inputs(lalm: LALM, embeds: Tensor, position_ids: Tensor, **extra: Any) -> LayerInputs:
    """Let the decoder prepare a sequence [1, positions, hidden] for its layers; none of them is computed."""
    resting = nullcontext() if lalm.offloaded is None else lalm.offloaded.resting()
    with (
        resting,
        torch.no_grad(),
        lalm.decoder.trace(inputs_embeds=embeds, position_ids=position_ids, **extra) as tracer,
    ):
        received = nnsight.save(lalm.layers[0].inputs)
        tracer.stop()
    args, keywords = received
    keywords = dict(keywords)
    states = args[0] if args else keywords.pop("hidden_states")
    return LayerInputs(states, tuple(args[1:]), keywords)


@dataclass(frozen=True)
class LayerView:
    """What a run has at one layer, from a position on.

    Attributes:
        first: that position.
        entering: [positions from `first` on, hidden]; of the view above the last layer what leaves that.
        states: [positions from `first` on, width] of the sites that were asked for.
        prefix: the layer's keys and values for all positions; None where they were not asked for.
    """

    first: int
    entering: Tensor
    states: dict[Site, Tensor] = field(default_factory=dict)
    prefix: KeyValue | None = None


class BaseRun:
    """One unpatched run of a prompt.

    Args:
        lalm: the model.
        encoding: of the prompt.
        first: position from which on states are wanted.
        sites: sites inside the layers whose states are wanted.
        keys: whether keys and values are wanted.
        keep: whether the views are kept, so that they can be had again; else any layer can be had again at the price of
            computing those below it.
    """

    def __init__(
        self,
        lalm: LALM,
        encoding: Encoding,
        first: int,
        sites: Collection[Site] = (),
        keys: bool = False,
        keep: bool = False,
    ) -> None:
        self.lalm = lalm
        self.encoding = encoding
        self.first = first
        self.sites = frozenset(sites)
        self.keys = keys
        self.keep = keep
        self._kept: dict[int, LayerView] = {}
        self._inputs: LayerInputs | None = None
        self._unused: DynamicCache | None = None
        self._marks: dict[int, Tensor] = {}
        self._layer = 0
        self._states: Tensor | None = None
        self._logits: Tensor | None = None
        self._current: tuple[int, LayerView] | None = None

    def serves(self, encoding: Encoding, first: int, sites: Collection[Site], keys: bool) -> bool:
        """Whether this is the run of an encoding, with these states."""
        enough = self.first <= first and self.sites >= set(sites) and self.keys >= keys
        return self.encoding is encoding and enough

    @property
    def layer(self) -> int:
        """The layer in hand."""
        return self._layer

    @property
    def known(self) -> bool:
        """Whether the run has been through to its logits."""
        return self._logits is not None

    def view(self, layer: int, mark: bool = False) -> LayerView:
        """What the run has at a layer, the number of layers for what is above the last one.

        With `mark`, what enters the layer is remembered until `forget`, so that a later call can start from here.
        """
        if layer in self._kept:
            return self._kept[layer]
        if self._current is not None and self._current[0] == layer and not mark:
            return self._current[1]  # clips can have a run in common
        self._go_to(layer)
        if mark:
            self._marks[layer] = self._entering
        if layer == self.lalm.num_layers:
            view = LayerView(self.first, self._entering[0, self.first :])
            self._finish()
        else:
            view = self._step()
        if self.keep:
            # Copies: a slice would hold on to all positions.
            states = {site: states.clone() for site, states in view.states.items()}
            view = LayerView(self.first, view.entering.clone(), states, view.prefix)
            self._kept[layer] = view
        else:
            self._current = layer, view
        return view

    def computes_from(self, layer: int) -> int:
        """The layer from which on it has to compute to have the view of a layer; that layer, where it is kept."""
        if layer in self._kept:
            return layer
        if self._layer <= layer:
            return self._layer
        return max((mark for mark in self._marks if mark <= layer), default=0)

    def logits(self) -> Tensor:
        """Logits [1, vocabulary] at the last position; what is missing of the run is computed."""
        if self._logits is None:
            for layer in range(self._layer, self.lalm.num_layers + 1):
                self.view(layer)
        assert self._logits is not None
        return self._logits

    def forget(self) -> None:
        """Let go of all states that are not kept; the logits stay."""
        self._marks.clear()
        self._states = self._inputs = self._current = None
        self._layer = 0

    # --- inside ------------------------------------------------------------------------------------------------

    @property
    def _entering(self) -> Tensor:
        """What enters the layer in hand: [1, positions, hidden]."""
        if self._states is None:
            self._states = self._prepared.states
        return self._states

    @property
    def _prepared(self) -> LayerInputs:
        if self._inputs is None:
            # The cache that is handed over is never filled: each layer gets one of its own, see `_step`.
            self._unused = DynamicCache(config=self._config)
            cache = {self.lalm.cache_keyword: self._unused} if self.keys else {}
            encoding = self.encoding
            self._inputs = layer_inputs(
                self.lalm, encoding.inputs_embeds, encoding.position_ids, use_cache=self.keys, **cache
            )
        return self._inputs

    @property
    def _config(self) -> Any:
        return self.lalm.decoder_module.config

    def _go_to(self, layer: int) -> None:
        if layer < self._layer:
            below = self.computes_from(layer)
            self._layer, self._states = below, self._marks.get(below)
        while self._layer < layer:
            self._step()

    def _step(self) -> LayerView:
        """Compute the layer in hand."""
        index, entering, prepared = self._layer, self._entering, self._prepared
        wanted = [site for site in INSIDE if site in self.sites]
        cache: Any = DynamicCache(config=self._config) if self.keys else None
        keywords = {  # layers may call it otherwise than the decoder does
            name: cache if value is self._unused else value for name, value in prepared.keywords.items()
        }
        layer = self.lalm.layer(index)
        with torch.no_grad(), layer.trace(entering, *prepared.rest, **keywords):
            found = nnsight.save([states_at(layer, site)[0, self.first :].clone() for site in wanted])
            leaving = layer.output.save()
        self._layer, self._states = index + 1, leaving
        filled = None if cache is None else cache.layers[index]
        prefix = None if filled is None else (filled.keys[0], filled.values[0])
        return LayerView(self.first, entering[0, self.first :], dict(zip(wanted, found, strict=True)), prefix)

    def _finish(self) -> None:
        if self._logits is None:
            self._logits = read_logits(self.lalm, self._entering[0, -1:])


def read_logits(lalm: LALM, states: Tensor) -> Tensor:
    """Logits [rows, vocabulary] of what leaves the last layer, [rows, hidden]."""
    norm: Any = lalm.decoder_module.norm
    with torch.no_grad():
        return lalm.logits(norm(states[None])[0])
