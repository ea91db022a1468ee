"""Approximations of a grid from a few forward and backward passes: never exact, and never used without being measured.

To first order, a quantity v of the patched run is that of the run it goes into, plus what the gradient says:

    v(cell) = v(target run) + sum over patched states of <dv/dstate in the target run, state of the source run - state>

with v each option's logit and the log-sum-exp of all other tokens. The softmax over these is then taken as it is, so
that probabilities stay between 0 and 1. The rules differ in which gradient it is:

    attribution            the target run's own (attribution patching: Nanda 2023; Syed et al., arXiv 2310.10348)
    integrated_gradients   the mean of those on the straight line between the two runs' inputs of the decoder, by the
                           midpoint rule (Sundararajan et al., arXiv 1703.01365; Hanna et al., arXiv 2403.17806)
    relevance              a gradient that takes norms' scales, attention weights and activation functions' quotients of
                           output and input as constants, and halves products of two states (Achtibat et al., arXiv
                           2402.05602; Jafari et al., arXiv 2508.21258)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import numpy as np
import torch
from torch import Tensor, nn

from lalm_patch.engine.constant_attention import constant_attention_in
from lalm_patch.engine.interface import Engine, Progress, ignore_progress
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.sites import check_sites, head_size
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import Patch, Site
from lalm_patch.models import LALM, Encoding

Place = tuple[int, Site]
"""Layer and site."""

_WITHIN_LAYER = ("input_layernorm", "post_attention_layernorm", "mlp.act_fn", "mlp.down_proj")


class ApproximateEngine:
    """Approximates a whole grid at once.

    Args:
        lalm: the model.
        exact: the engine that computes the base runs, and cells to compare with.
        rule: attribution, integrated_gradients or relevance.
        steps: points on the line of integrated_gradients.

    Raises:
        ModelError: `relevance` with a decoder whose parts it does not know.
    """

    def __init__(self, lalm: LALM, exact: Engine, rule: str, steps: int) -> None:
        self.lalm = lalm
        self.exact = exact
        self.name = rule
        self.steps = steps if rule == "integrated_gradients" else 1
        if rule == "relevance":
            check_relevance(lalm)

    def base(self, source: Encoding, target: Encoding, option_ids: Sequence[int]) -> Readout:
        """See `Engine.base`: these are exact."""
        return self.exact.base(source, target, option_ids)

    def sweep(
        self,
        source: Encoding,
        target: Encoding,
        grid: Grid,
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
    ) -> Readout:
        """See `Engine.sweep`; the most probable token is not known (-1), cuts and the audio encoder are refused."""
        patches = [patch for cell in grid.cells for patch in cell.patches]
        if any(cell.path is not None for cell in grid.cells):
            raise ModelError(f"{self.name} approximates patches of states, not paths: use engine=auto")
        if any(cell.cuts for cell in grid.cells) or any(patch.site is Site.TOWER for patch in patches):
            raise ModelError(f"{self.name} approximates patches in the decoder only: expected no cuts, no site tower")
        if not all(patch.plain for patch in patches):
            raise ModelError(
                f"{self.name} follows a gradient from one run's state to the other's at the same place, and nothing "
                "says how far that holds for other sources: expected patches without one of their own, use engine=auto"
            )
        check_sites(self.lalm, {patch.site for patch in patches})
        places = sorted({(patch.layer, patch.site) for patch in patches}, key=_moment)
        unpatched = self.exact.base(source, target, option_ids).rows(slice(1, 2))
        others = _log_difference(unpatched.logsumexp, np.logaddexp.reduce(unpatched.option_logits, axis=1))
        effects = self._effects(source, target, places, option_ids)
        changes = np.stack([self._change(cell.patches, effects) for cell in grid.cells])
        progress(len(grid.cells))
        logits = unpatched.option_logits + changes[:, :-1]
        return Readout(
            logits,
            np.logaddexp(others + changes[:, -1], np.logaddexp.reduce(logits, axis=1)),
            np.full(len(grid.cells), -1, np.int64),
        )

    def _change(self, patches: Iterable[Patch], effects: dict[Place, np.ndarray]) -> np.ndarray:
        """What a cell's patches change of the options' logits and the others' log-sum-exp: float32 [options + 1]."""
        total: Any = 0.0
        for patch in patches:
            effect = effects[patch.layer, patch.site]
            columns = slice(None) if patch.head is None else slice(patch.head, patch.head + 1)
            total = total + effect[:, list(patch.positions), columns].sum(axis=(1, 2))
        return np.asarray(total, np.float32)

    def _effects(
        self, source: Encoding, target: Encoding, places: Sequence[Place], option_ids: Sequence[int]
    ) -> dict[Place, np.ndarray]:
        """First-order effect of every position at every place, [options + 1, positions, heads or 1]."""
        begin, end = target.inputs_embeds, source.inputs_embeds
        with torch.no_grad():
            there = self._run(source, end, places)[0]
            here = self._run(target, begin, places)[0]
        moved = [one - other for one, other in zip(there, here, strict=True)]
        gradients: dict[int, list[Tensor]] = defaultdict(list)
        for step in range(self.steps):
            # The middle of each piece of the line; for the other rules the line has no length.
            share = (step + 0.5) / self.steps if self.name == "integrated_gradients" else 0.0
            embeds = (begin + share * (end - begin)).detach().requires_grad_(True)
            with torch.enable_grad():
                states, last = self._run(target, embeds, places, relevance=self.name == "relevance")
                logits = self.lalm.logits(last, gradient=True)[0]
                others = logits.index_fill(0, torch.tensor(option_ids, device=logits.device), float("-inf"))
                values = [*(logits[id] for id in option_ids), others.logsumexp(-1)]
            for index, value in enumerate(values):
                found = torch.autograd.grad(value, states, retain_graph=True, allow_unused=True)
                # Nothing leads from positions of the last layer before the last one to the logits.
                each = [torch.zeros_like(m) if g is None else g for g, m in zip(found, moved, strict=True)]
                known = gradients[index]
                gradients[index] = [a + b for a, b in zip(known, each, strict=True)] if known else each
        effects: dict[Place, np.ndarray] = {}
        for index, place in enumerate(places):
            width = head_size(self.lalm) if place[1] is Site.HEAD else moved[index].shape[-1]
            products = torch.stack([g[index] * moved[index] for g in gradients.values()])[:, 0].double() / self.steps
            of_heads = products.view(*products.shape[:-1], -1, width)
            effects[place] = of_heads.sum(-1).cpu().numpy()
        return effects

    def _run(
        self, encoding: Encoding, embeds: Tensor, places: Sequence[Place], relevance: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """States [1, positions, width] at places, in their order, and the normed last position, [1, hidden].

        Differentiable where gradients are on.
        """
        wanted: dict[int, list[Site]] = defaultdict(list)
        for layer, site in places:
            wanted[layer].append(site)
        constants, last_weights = self._constants(relevance, embeds)
        trace: Any = self.lalm.decoder.trace(inputs_embeds=embeds, position_ids=encoding.position_ids, use_cache=False)
        with constant_attention_in(self.lalm.decoder_module, relevance), trace:
            found = nnsight.save([])
            for index, layer in enumerate(self.lalm.layers):
                found.extend(_through(layer, wanted.get(index, ()), constants[index]))
            if relevance:
                self.lalm.norm.output = _scaled(self.lalm.norm.input, self.lalm.norm.output, last_weights)
            last = self.lalm.norm.output[:, -1].save()
        return list(found), last

    def _constants(self, relevance: bool, like: Tensor) -> tuple[Sequence[_Constants | None], Tensor]:
        """Of every layer, and the final norm's weights; nothing for the other rules."""
        decoder: Any = self.lalm.decoder_module
        if not relevance:
            return [None] * self.lalm.num_layers, like
        width, tiny = like.shape[-1], torch.tensor(1e-3)
        made = []
        for layer in decoder.layers:
            entering = _weights(layer.input_layernorm, width, like)
            between = _weights(layer.post_attention_layernorm, width, like)
            made.append(_Constants(entering, between, float((layer.mlp.act_fn(tiny) - layer.mlp.act_fn(-tiny)) / 2e-3)))
        return made, _weights(decoder.norm, width, like)


def _through(layer: Any, sites: Sequence[Site], constants: _Constants | None) -> list[Tensor]:
    """Inside a trace: states of a layer's sites in the order of a forward pass; constants make its parts linear."""
    found: list[Tensor] = []
    if Site.EMBED in sites:
        found.append(layer.input)
    if constants is not None:
        norm = layer.input_layernorm
        norm.output = _scaled(norm.input, norm.output, constants.entering)
    if Site.HEAD in sites:
        found.append(layer.self_attn.o_proj.input)
    if Site.ATTN in sites:
        output = layer.self_attn.output
        found.append(output[0] if isinstance(output, tuple) else output)
    if constants is not None:
        norm, activation = layer.post_attention_layernorm, layer.mlp.act_fn
        norm.output = _scaled(norm.input, norm.output, constants.between)
        activation.output = _divided(activation.input, activation.output, constants.slope)
        # A product of gate and value gets half of the relevance on either way.
        product = layer.mlp.down_proj.input
        layer.mlp.down_proj.input = product / 2 + (product / 2).detach()
    if Site.MLP in sites:
        output = layer.mlp.output
        found.append(output[0] if isinstance(output, tuple) else output)
    if Site.RESID in sites:
        found.append(layer.output)
    return found


@dataclass(frozen=True)
class _Constants:
    """What makes a layer's parts linear.

    Attributes:
        entering: weights [hidden] of the norm before attention.
        between: of the norm before the MLP.
        slope: of the activation function at 0, where output and input have no quotient.
    """

    entering: Tensor
    between: Tensor
    slope: float


def _weights(norm: nn.Module, width: int, like: Tensor) -> Tensor:
    """Weights [width] of a root-mean-square norm, whatever it calls them: what it makes of ones."""
    with torch.no_grad():
        weights: Tensor = norm(torch.ones(1, 1, width, dtype=like.dtype, device=_device(norm, like)))[0, 0]
    return weights


def _device(module: nn.Module, like: Tensor) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), like.device)


def _scaled(given: Tensor, result: Tensor, weights: Tensor) -> Tensor:
    """A root-mean-square norm's values as the input times constants: its weights, and each position's scale."""
    linear = given * weights
    with torch.no_grad():
        square = (linear.float() ** 2).sum(-1, keepdim=True)
        scale = (result.float() * linear.float()).sum(-1, keepdim=True) / square.clamp_min(1e-30)
    return _with_values(linear * scale.to(linear.dtype), result)


def _divided(given: Tensor, result: Tensor, slope: float) -> Tensor:
    """An activation function's values as the input times constants."""
    with torch.no_grad():
        small = given.abs() < 1e-6
        factor = torch.where(small, torch.full_like(given, slope), result / torch.where(small, 1.0, given))
    return _with_values(given * factor, result)


def _with_values(linear: Tensor, values: Tensor) -> Tensor:
    """The gradient of one tensor with the values of another: rounding must not change the forward pass."""
    return linear + (values - linear).detach()


def check_relevance(lalm: LALM) -> None:
    """Raises ModelError for a decoder whose layers lack the parts that the rule changes."""
    decoder: Any = lalm.decoder_module
    for index, layer in enumerate(decoder.layers):
        for path in _WITHIN_LAYER:
            part = layer
            for name in path.split("."):
                part = getattr(part, name, None)
            if part is None:
                raise ModelError(
                    f"engine=relevance: layer {index} of {type(decoder).__name__} has no {path}; engine=attribution "
                    "and engine=integrated_gradients need the layers' states only"
                )
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ModelError(
            f"engine=relevance: {type(decoder).__name__} has no attention interface; use engine=attribution"
        )


def _log_difference(large: np.ndarray, small: np.ndarray) -> np.ndarray:
    """log(exp(large) - exp(small)), for large > small."""
    return np.asarray(large + np.log1p(-np.exp(np.minimum(small - large, -np.finfo(np.float32).eps))))


def _moment(place: Place) -> tuple[int, int]:
    return place[0], list(Site).index(place[1])
