"""Path patching by its definition: everything between senders and receivers is held, module by module.

For one cell, each of these is a forward pass of the whole model:

1. for each sender that reads: the patched run with the other run's keys and values in that one place; its output;
2. the frozen run: every attention and every MLP puts out what it does in the patched run, senders what they send. What
   then enters a receiver's layer, minus what enters it in the patched run, is what the receiver gets;
3. for each layer with receivers of queries, keys or values: the run in hand with that added to all that the layer
   reads, to have them;
4. the patched run, in which receivers read what they get and all else does not.

It shares nothing with replay's arithmetic: no sum is formed of single differences, and attention is a loop over edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import nnsight
import torch
from torch import Tensor

from lalm_patch.engine.attention import (
    AttentionInputs,
    attention_in,
    causal_weights,
    for_each_head,
    register_attention,
)
from lalm_patch.engine.path_states import check_paths, path_sites
from lalm_patch.engine.sites import check_sites, columns, overwrite, states_at
from lalm_patch.errors import ModelError
from lalm_patch.interventions.patches import Intervention, Site
from lalm_patch.interventions.paths import Input, PathPatch, Receiver, Sender
from lalm_patch.models import LALM, Encoding

ATTENTION_NAME = "lalm_patch_edges"
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of one layer for a whole run, each [heads, positions, head size]."""
Place = tuple[int, Site]
"""Layer and site."""
Reached = Sequence[tuple[Receiver, tuple[int, ...]]]
"""Receivers, each with the positions whose residual stream it reads otherwise."""


@dataclass
class Edges:
    """What attention does otherwise in one run, and what it was given there.

    Attributes:
        changed: by layer, the receivers and the queries, keys and values that these read.
        given: by layer, what attention was given.
    """

    changed: dict[int, tuple[Reached, Heads]] = field(default_factory=dict)
    given: dict[int, Heads] = field(default_factory=dict)


def edge_attention(inputs: AttentionInputs, edges: Edges) -> Tensor:
    """Causal attention, edge by edge where something is changed; see `AttentionFunction`."""
    keys, values = for_each_head(inputs.key, inputs)[0], for_each_head(inputs.value, inputs)[0]
    edges.given[inputs.layer] = inputs.query[0].clone(), keys.clone(), values.clone()
    weights = causal_weights(inputs)[0].to(values.dtype)
    out = weights @ values
    if inputs.layer in edges.changed:
        reached, (other_query, other_keys, other_values) = edges.changed[inputs.layer]
        heads, length, _ = keys.shape
        for head in range(heads):
            for position in range(length):
                mine = [each for each in reached if _concerns(each[0], head, position)]
                if not mine:
                    continue
                query, own_keys, own_values = inputs.query[0, head, position], keys[head].clone(), values[head].clone()
                for receiver, changed in mine:
                    if receiver.input is Input.QUERY and position in changed:
                        query = other_query[head, position]
                    if receiver.input is Input.KEY:
                        own_keys[list(changed)] = other_keys[head, list(changed)]
                    if receiver.input is Input.VALUE:
                        own_values[list(changed)] = other_values[head, list(changed)]
                scores = (own_keys[: position + 1] @ query * inputs.scale).float()
                out[head, position] = scores.softmax(-1).to(own_values.dtype) @ own_values[: position + 1]
    return out.transpose(0, 1)[None]


def _concerns(receiver: Receiver, head: int, position: int) -> bool:
    """Whether a receiver is asked about by a head's query at a position."""
    return receiver.head in (None, head) and (receiver.seen_by is None or position in receiver.seen_by)


register_attention(ATTENTION_NAME, edge_attention, argument="edges", ignores_mask=True)


def direct_passes(cells: Iterable[Intervention]) -> int:
    """Forward passes that cells take, paths among them, besides those of the two runs that are shared by all."""
    total, reads = 0, False
    for cell in cells:
        total += 1
        if cell.path is not None:
            by_head = {receiver.layer for receiver in cell.path.receivers if receiver.input is not Input.RESID}
            reading = sum(sender.reads is not None for sender in cell.path.senders)
            total, reads = total + 1 + reading + len(by_head), reads or reading > 0
    return total + reads


class DirectPaths:
    """Path patching between two runs, each cell by whole forward passes.

    Args:
        lalm: the model.
        source: the run whose senders' outputs are sent.
        target: the run that is patched.
        cells: the interventions that are asked for.
        states: gives states [1, positions, width] of an unpatched run at (layer, site).

    Raises:
        ModelError: a model that lacks a site, or whose attention cannot be taken apart.
    """

    def __init__(
        self,
        lalm: LALM,
        source: Encoding,
        target: Encoding,
        cells: Sequence[Intervention],
        states: Callable[[Encoding, set[Place]], dict[Place, Tensor]],
    ) -> None:
        self.lalm, self.target = lalm, target
        paths = [cell.path for cell in cells if cell.path is not None]
        check_sites(lalm, path_sites(cells))
        check_paths(lalm, cells)
        reads = any(sender.reads is not None for path in paths for sender in path.senders)
        self._by_head = reads or any(each.input is not Input.RESID for path in paths for each in path.receivers)
        if self._by_head and not getattr(lalm.decoder_module, "_supports_attention_backend", False):
            raise ModelError(
                f"paths to queries, keys and values: {type(lalm.decoder_module).__name__} has no attention interface; "
                "expected receivers of the input resid, or granularity=edge"
            )
        layers = range(lalm.num_layers)
        needed = {(layer, site) for layer in layers for site in (Site.ATTN, Site.MLP, Site.RESID)} | {(0, Site.EMBED)}
        sends = {(sender.layer, sender.site) for path in paths for sender in path.senders}
        needed |= {place for place in sends if place[1] is Site.HEAD}
        self._own = states(target, needed)
        self._other = states(source, sends)
        self._read = self._given(source) if reads else {}

    def logits(self, path: PathPatch) -> Tensor:
        """Logits [1, vocabulary] of the patched run with a path."""
        sent = {sender: self._sent(sender) for sender in path.senders}
        entering = self._frozen(sent)
        gets: dict[int, list[tuple[tuple[int, ...], Tensor]]] = {}
        edges = Edges()
        for layer in sorted({receiver.layer for receiver in path.receivers}):
            difference = entering[layer] - self._entering(layer)
            reached = [(receiver, receiver.positions) for receiver in path.receivers if receiver.layer == layer]
            by_head = [each for each in reached if each[0].input is not Input.RESID]
            if by_head:
                changed = tuple(sorted({position for _, positions in by_head for position in positions}))
                probe = Edges(dict(edges.changed))
                self._run(probe, gets | {layer: [*gets.get(layer, []), (changed, difference[0, list(changed)])]})
                edges.changed[layer] = by_head, probe.given[layer]
            for receiver, positions in reached:
                if receiver.input is Input.RESID:
                    gets.setdefault(layer, []).append((positions, difference[0, list(positions)]))
        return self._run(edges, gets)

    def _entering(self, layer: int) -> Tensor:
        """What enters a layer of the patched run, and leaves the last, [1, positions, hidden]."""
        return self._own[layer - 1, Site.RESID] if layer else self._own[0, Site.EMBED]

    def _given(self, encoding: Encoding) -> dict[int, Heads]:
        """What attention is given in an unpatched run."""
        edges = Edges()
        self._run(edges, {}, encoding)
        return edges.given

    def _sent(self, sender: Sender) -> Tensor:
        """What a sender puts out, [positions, width of its site]."""
        within, where = columns(self.lalm, sender.head), list(sender.positions)
        if sender.reads is None:
            return self._other[sender.layer, sender.site][0, where, within]
        reached = [
            (Receiver(sender.layer, sender.reads, input, sender.head, sender.positions), sender.reads)
            for input in (Input.KEY, Input.VALUE)
        ]
        edges, layer = Edges({sender.layer: (reached, self._read[sender.layer])}), self.lalm.layers[sender.layer]
        with torch.no_grad(), self._attention(), self.lalm.traced.trace(**self.target.inputs) as tracer:
            self.lalm.enter(self.target)
            for index in range(sender.layer + 1):
                self._hand_over(index, edges)
            written = states_at(layer, sender.site)[0, where, within].clone().save()
            tracer.stop()
        return torch.as_tensor(written)

    def _attention(self) -> AbstractContextManager[None]:
        """The model's own attention, unless single queries, keys or values are asked for."""
        return attention_in(self.lalm.decoder_module, ATTENTION_NAME) if self._by_head else nullcontext()

    def _hand_over(self, index: int, edges: Edges) -> None:
        """Inside a trace: tell a layer's attention its edges."""
        args, kwargs = self.lalm.layers[index].self_attn.inputs
        self.lalm.layers[index].self_attn.inputs = args, kwargs | {"edges": edges}

    def _frozen(self, sent: Mapping[Sender, Tensor]) -> list[Tensor]:
        """What enters every layer, and leaves the last, [1, positions, hidden], with all but the senders held."""
        lalm = self.lalm
        order = (Site.HEAD, Site.ATTN, Site.MLP, Site.RESID)
        with torch.no_grad(), lalm.traced.trace(**self.target.inputs):
            lalm.enter(self.target)
            for sender, states in sent.items():
                if sender.site is Site.EMBED:
                    overwrite(lalm.layers[0], Site.EMBED, slice(None), list(sender.positions), states)
            entering = nnsight.save([lalm.layers[0].input.clone()])
            for index, layer in enumerate(lalm.layers):
                own = [sender for sender in sent if sender.layer == index]
                single_heads = any(sender.site is Site.HEAD for sender in own)
                for site in order:
                    held = single_heads if site is Site.HEAD else site is not Site.RESID
                    if site is Site.ATTN and single_heads:
                        held = False  # what the output projection makes of the heads, held but for the senders
                    if held:
                        overwrite(layer, site, slice(None), slice(None), self._own[index, site][0])
                    for sender in own:
                        if sender.site is site:
                            where, within = list(sender.positions), columns(lalm, sender.head)
                            overwrite(layer, site, within, where, sent[sender])
                entering.append(layer.output.clone())
        return list(entering)

    def _run(
        self,
        edges: Edges,
        gets: Mapping[int, Sequence[tuple[tuple[int, ...], Tensor]]],
        encoding: Encoding | None = None,
    ) -> Tensor:
        """Logits [1, vocabulary] of a run with changed edges, and with differences [positions, hidden] added to what
        enters layers at some positions."""
        lalm, encoding = self.lalm, encoding or self.target
        with torch.no_grad(), self._attention(), lalm.traced.trace(**encoding.inputs):
            lalm.enter(encoding)
            for index, layer in enumerate(lalm.layers):
                for positions, difference in gets.get(index, ()):
                    states = layer.input[0, list(positions)] + difference
                    overwrite(layer, Site.EMBED, slice(None), list(positions), states)
                if self._by_head:
                    self._hand_over(index, edges)
            for positions, difference in gets.get(lalm.num_layers, ()):
                last = lalm.layers[-1]
                states = last.output[0, list(positions)] + difference
                overwrite(last, Site.RESID, slice(None), list(positions), states)
            logits = lalm.traced.output.logits[:, -1].clone().save()
        return lalm.scaled(torch.as_tensor(logits))
