"""The replay engine: the direct engine's numbers with the shared work removed.

Everything a patched run has in common with the run into which states are put is taken from there: the audio tower, the
layers below the first patched one, the positions before the first patched one (causal attention). What is left of each
cell is a suffix of the sequence through the upper layers.

One pass goes up the layers. At each of them the two base runs are computed, then every cell that has started below,
then the cells that start here begin as suffixes of the one base run with states of the other written in. So a layer's
weights are used once per pass, and nothing of the base runs is kept beyond the layer in hand.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lalm_patch.engine.base_runs import (
    BaseRun,
    LayerInputs,
    LayerView,
    layer_inputs,
    read_logits,
)
from lalm_patch.engine.cuts import check_cuts
from lalm_patch.engine.interface import Progress, Sweep, ignore_progress
from lalm_patch.engine.memory import (
    GIB,
    KEPT_SHARE,
    MOST_CLIPS,
    PACK_TOKENS,
    base_run_bytes,
    free_budget,
    give_back_holes,
    is_out_of_memory,
    rows_within,
    states_within,
    tokens_within,
)
from lalm_patch.engine.packs import Pack, Write, arranged, on, prepared, started
from lalm_patch.engine.passes import ClipSweep, PassPart, collect_beforehand, plan_passes
from lalm_patch.engine.path_states import PathStates, check_paths, path_sites, senders_of, sent_sites
from lalm_patch.engine.readout import Readout
from lalm_patch.engine.sites import check_sites, columns, overwrite, states_at
from lalm_patch.engine.sources import RUNS, Put, TakenStates, run_places, sites_inside
from lalm_patch.engine.suffix_attention import KeysAndValues, SuffixLayout, suffix_attention_in
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import Origin, Site
from lalm_patch.models import LALM, Encoding

log = logging.getLogger(__name__)


class ReplayEngine:
    """Runs all interventions of a grid in one pass up the layers, or in as few as memory allows.

    Args:
        lalm: the model.
        pack_tokens: most suffix positions that go through a layer together; None: what the device likes best.
        memory_budget: what a pass may take, in GiB; None: a share of the memory that is free when a sweep starts.
    """

    name = "replay"

    def __init__(self, lalm: LALM, pack_tokens: int | None = None, memory_budget: float | None = None) -> None:
        self.lalm = lalm
        self.pack_tokens = PACK_TOKENS.get(lalm.device.type, PACK_TOKENS["cpu"]) if pack_tokens is None else pack_tokens
        self.memory_budget = memory_budget
        self._sites: dict[Origin, frozenset[Site]] = dict.fromkeys(RUNS, frozenset())
        self._source_keys = False
        self._first: int | None = None
        self._runs: list[BaseRun] = []
        self._suffixes = suffix_attention_in(lalm.decoder_module)

    def base(self, source: Encoding, target: Encoding, option_ids: Sequence[int]) -> Readout:
        """See `Engine.base`."""
        return self.bases([(source, target, option_ids)])[0]

    def bases(self, pairs: Sequence[tuple[Encoding, Encoding, Sequence[int]]]) -> list[Readout]:
        """As `base`, for several clips at once: they go up the layers together.

        Their states are kept for the sweeps that follow, as far as memory allows it.
        """
        budget = self._budget() / len(pairs)
        runs: list[BaseRun] = []
        for source, target, _ in pairs:
            own = self._run(target, True, budget, runs)
            shared = source is target and not self._sites[Origin.OTHER]
            runs += [own if shared else self._run(source, False, budget, runs), own]
        self._runs = runs
        for layer in range(self.lalm.num_layers + 1):
            for run in runs:
                if not run.known or run.layer:  # not one that a former clip had in common with these
                    run.view(layer)
        logits = []
        for first, second in zip(runs[::2], runs[1::2], strict=True):
            logits.append(torch.cat([first.logits(), second.logits()]))
        for run in runs:
            run.forget()
        return [Readout.of(found, pair[2], found) for found, pair in zip(logits, pairs, strict=True)]

    def sweep(
        self,
        source: Encoding,
        target: Encoding,
        grid: Grid,
        option_ids: Sequence[int],
        progress: Progress = ignore_progress,
    ) -> Readout:
        """See `Engine.sweep`; ModelError, too, if not even a single cell fits into memory."""
        return self.sweeps([Sweep(source, target, grid, option_ids, progress)])[0]

    def sweeps(self, sweeps: Sequence[Sweep]) -> list[Readout]:
        """As `sweep`, for several clips at once: they share the passes up the layers."""
        self._look_at(sweeps)
        budget = self._budget()
        clips = [self._clip(sweep) for sweep in sweeps]
        plan = self._plan(clips, states_within(budget, self.lalm))
        lowest = [min(part.lowest for part in parts) for parts in plan]
        collect_beforehand(clips, plan, lowest)
        for number, parts in enumerate(plan):
            self._go_up(parts, lowest[number], set(lowest[number + 1 :]), budget)
        for clip in clips:
            clip.parts += self._unpatched(clip)
            clip.source.forget()
            clip.target.forget()
            clip.sweep.progress(len(clip.cells) - clip.told)
        return [Readout.scatter(clip.parts) for clip in clips]

    def clips_within(self, source: Encoding, target: Encoding) -> int:
        """How many clips like this one should share a pass: several, where weights have to be brought in for it."""
        if self.lalm.offloaded is None:
            return 1
        sizes = [
            base_run_bytes(self.lalm, len(encoding.tokens), encoding.tokens.text_positions[0], 1, keys)
            for encoding, keys in ((source, False), (target, True))
        ]
        return max(1, min(MOST_CLIPS, int(KEPT_SHARE * self._budget() / sum(sizes))))

    # --- the two base runs -------------------------------------------------------------------------------------

    def _look_at(self, sweeps: Sequence[Sweep]) -> None:
        """Which states the sweeps need, and whether the model has them."""
        cells = [cell for sweep in sweeps for cell in sweep.grid.cells]
        places = run_places(cells)
        sites = {patch.site for cell in cells for patch in cell.patches} | {place.site for place in places}
        sites |= path_sites(cells)
        check_paths(self.lalm, cells)
        if Site.TOWER in sites:
            raise ModelError("replay starts behind the audio encoder: expected sites of the decoder, use engine=direct")
        check_sites(self.lalm, sites)
        if wrong := [place for place in places if place.layer >= self.lalm.num_layers]:
            raise ModelError(
                f"states of layer {wrong[0].layer} are asked for: expected 0 to {self.lalm.num_layers - 1}"
            )
        if any(cell.cuts for cell in cells):
            check_cuts(self.lalm)
        sent = sent_sites(cells)
        self._sites = {origin: known | sites_inside(cells, origin) | sent for origin, known in self._sites.items()}
        self._source_keys |= any(sender.reads is not None for sender in senders_of(cells))
        # States are kept from the first text position on, or from the first earlier one that is patched or taken.
        taken = [min(patch.taken_positions) for cell in cells for patch in cell.patches if patch.taken_from is not None]
        taken += [cell.path.earliest_position for cell in cells if cell.path is not None and not cell.idle]
        self._first = min(
            [cell.first_position for cell in cells if not cell.idle]
            + [sweep.target.tokens.text_positions[0] for sweep in sweeps]
            + taken
        )

    def _clip(self, sweep: Sweep) -> ClipSweep:
        length = len(sweep.target.tokens)
        source, target = self._run(sweep.source, False, 0), self._run(sweep.target, True, 0)
        work = sum(
            (self.lalm.num_layers + 1 - cell.entry_layer) * (length - cell.first_position)
            for cell in sweep.grid.cells
            if not cell.idle
        )
        cells = sweep.grid.cells
        paths = PathStates(self.lalm, cells, partial(self._inputs, target=sweep.target), self._heads)
        return ClipSweep(sweep, source, target, TakenStates(cells, self._sites), work, paths)

    def _run(self, encoding: Encoding, own: bool, budget: float, others: Sequence[BaseRun] = ()) -> BaseRun:
        """A base run: a known one, where it serves; else a new one, which is kept if a budget has room for it.

        `own` is the one that is patched, whose keys and values are needed in any case.
        """
        text = encoding.tokens.text_positions[0]
        first = text if self._first is None else min(text, self._first)
        sites, keys = self._sites[Origin.OWN if own else Origin.OTHER], own or self._source_keys
        for run in (*self._runs, *others):
            if run.serves(encoding, first, sites, keys):
                return run
        size = base_run_bytes(self.lalm, len(encoding.tokens), first, len(sites), keys)
        return BaseRun(self.lalm, encoding, first, sites, keys, keep=size <= KEPT_SHARE * budget)

    # --- passes ------------------------------------------------------------------------------------------------

    def _budget(self) -> float:
        """Bytes a pass may take."""
        return free_budget(self.lalm.decoder_module) if self.memory_budget is None else self.memory_budget * GIB

    def _plan(self, clips: Sequence[ClipSweep], most: int) -> list[list[PassPart]]:
        """The cells of each pass: those that start lowest first, as many as `most` positions hold."""
        passes: list[list[PassPart]] = []
        passed: list[dict[int, list[int]]] = []
        for chosen in plan_passes([(clip.cells, clip.length) for clip in clips], self.lalm.num_layers, most):
            parts = []
            for number, indices in chosen.items():
                clip, entering = clips[number], dict[int, list[int]]()
                for index in indices:
                    entering.setdefault(clip.cells[index].entry_layer, []).append(index)
                part = PassPart(clip, entering, clip.taken.top(indices), min(entering))
                parts.append(part if any(number in known for known in passed) else part.with_senders())
            passed.append(chosen)
            passes.append(parts)
        return passes

    def _go_up(self, parts: Sequence[PassPart], lowest: int, later: set[int], budget: float) -> None:
        """One pass up the layers, from the lowest that a cell starts at; `later` passes start at those layers."""
        tokens = tokens_within(budget, self.lalm, max(part.clip.length for part in parts))
        # Base runs that are not kept come up to it side by side: one after another, they would call for all weights.
        runs = {id(run): run for part in parts for run in (part.clip.target, part.clip.source)}.values()
        begins = {id(run): run.computes_from(lowest) for run in runs}
        for layer in range(min(begins.values()), lowest):
            for run in runs:
                if layer >= begins[id(run)]:
                    run.view(layer)
        for layer in range(lowest, self.lalm.num_layers + 1):
            for part in parts:
                clip = part.clip
                target = clip.target.view(layer, layer in later)
                source = None
                if layer <= part.source_top or not clip.source.known:
                    source = clip.source.view(layer, layer in later)
                    clip.taken.take(Origin.OTHER, layer, source)
                clip.taken.take(Origin.OWN, layer, target)
                clip.paths.take(layer, target, source)
                self._start(clip, part.entering.get(layer, []), layer, source, target)
                if layer < self.lalm.num_layers:
                    self._advance_all(clip, layer, source, target, tokens)
            give_back_holes()
        for part in parts:
            self._read(part.clip, rows_within(budget, self.lalm))

    def _start(
        self, clip: ClipSweep, indices: list[int], layer: int, source: LayerView | None, target: LayerView
    ) -> None:
        """Let cells begin at a layer; those above the last one are there already."""
        if not indices:
            return
        indices = sorted(indices, key=lambda index: clip.cells[index].first_position)
        cells = [clip.cells[index] for index in indices]
        pack = Pack.of(cells, indices, clip.length)
        top = layer == self.lalm.num_layers
        puts = self._prepared(clip, pack.first_writes(layer), source, target.entering.device)
        pack = started(pack, target, puts, None if top else clip.make_room(target.entering, pack.tokens))
        clip.paths.enter(pack, layer, pack.states)
        if top:
            clip.top.append((pack.indices, pack.states[0].index_select(0, pack.lasts)))
            clip.tell(pack.tokens)
        else:
            clip.packs.append(pack)

    def _advance_all(
        self, clip: ClipSweep, layer: int, source: LayerView | None, target: LayerView, tokens: int
    ) -> None:
        """Take all packs of a clip through one layer."""
        waiting = arranged(clip.packs, min(self.pack_tokens, tokens))[::-1]
        clip.packs = []
        while waiting:
            pack = waiting.pop()
            try:
                if layer == self.lalm.num_layers - 1:
                    clip.top.append((pack.indices, self._last_layer(clip, pack, source, target)))
                else:
                    clip.packs.append(self._advance(clip, pack, layer, source, target))
            except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
                if not is_out_of_memory(error):
                    raise
                self._make_smaller(pack, clip, error)
                waiting = [piece for other in waiting for piece in reversed(other.cut(self.pack_tokens))]
                waiting += reversed(pack.cut(self.pack_tokens))
            else:
                clip.tell(pack.tokens * (2 if layer == self.lalm.num_layers - 1 else 1))

    def _make_smaller(self, pack: Pack, clip: ClipSweep, error: BaseException) -> None:
        """Halve the size of packs after one did not fit."""
        if len(pack.cells) == 1:
            raise ModelError(
                f"out of memory with a single cell of {clip.length} positions in a pack: {error}; "
                "use a device with more memory, a smaller model.dtype or shorter clips"
            ) from error
        gc.collect()  # a failed trace leaves cycles behind that hold its tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.pack_tokens = max(1, min(self.pack_tokens, pack.tokens) // 2)
        log.warning(
            "out of memory with %d positions in a pack: going on with %d (engine.pack_tokens=%d avoids the attempt)",
            pack.tokens,
            self.pack_tokens,
            self.pack_tokens,
        )

    # --- a pack in a layer -------------------------------------------------------------------------------------

    def _advance(self, clip: ClipSweep, pack: Pack, layer: int, source: LayerView | None, target: LayerView) -> Pack:
        """A pack after one layer."""
        layout = self._layout(clip, pack, layer, target)
        writes = self._prepared(clip, pack.writes(layer), source, pack.states.device)
        if pack.inputs is None:
            pack.inputs = self._inputs(pack.positions, clip.sweep.target)
        leaving = self._call(layer, pack.states, pack.inputs, layout, writes)
        # Before the pack's own states are written over: out of memory, it has to be where it was.
        clip.paths.enter(pack, layer + 1, leaving)
        if leaving.device == pack.states.device:
            pack.states.copy_(leaving)
        else:
            pack.states = leaving
        return pack

    def _layout(self, clip: ClipSweep, pack: Pack, layer: int, target: LayerView) -> SuffixLayout:
        """Who sees whom and what in a layer; the pack's states are those that enter it."""
        layout = pack.layout(target, pack.blocked(layer, self.lalm.num_heads))
        edited = clip.paths.edits(pack, layer, target)
        return replace(layout, edited=edited) if edited else layout

    def _last_layer(self, clip: ClipSweep, pack: Pack, source: LayerView | None, target: LayerView) -> Tensor:
        """What leaves the last layer at the last position of each cell, [cells, hidden].

        Only the last position is read, so of the others keys and values are computed alone.
        """
        layer, rows = self.lalm.num_layers - 1, len(pack.cells)
        layout = self._layout(clip, pack, layer, target)
        if pack.tokens > rows:
            if pack.inputs is None:
                pack.inputs = self._inputs(pack.positions, clip.sweep.target)
            _, *own = self._heads(layer, pack.states, pack.inputs)
            layout = layout.last_positions((own[0], own[1]), pack.lasts)
        states = pack.states.index_select(1, pack.lasts)
        inputs = self._inputs(torch.full((rows,), clip.length - 1), clip.sweep.target)
        writes = self._prepared(clip, pack.last_writes(layer), source, states.device)
        return clip.paths.enter_last(pack, self._call(layer, states, inputs, layout, writes)[0])

    def _inputs(self, positions: Tensor, target: Encoding) -> LayerInputs:
        """What the decoder hands its layers for tokens at some positions."""
        ids = target.position_ids[..., on(positions, target.position_ids.device)]
        embeds = target.inputs_embeds[:, :1].expand(-1, len(positions), -1)  # of their number alone is made use
        with self._suffixes:
            return layer_inputs(self.lalm, embeds, ids, use_cache=False)

    def _heads(self, layer: int, states: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [heads, tokens, head size] that a layer makes of states [1, tokens, hidden]."""
        try:
            self._call(layer, states, inputs, SuffixLayout.to_collect(states), [])
        except KeysAndValues as known:
            return known.query, *known.found
        raise ModelError(f"layer {layer} did not call its attention; use engine=direct")

    def _call(
        self, layer: int, states: Tensor, inputs: LayerInputs, layout: SuffixLayout, writes: Sequence[Put]
    ) -> Tensor:
        """States [1, tokens, hidden] after a layer, with states put in on the way."""
        keywords = inputs.keywords | {"suffixes": layout}
        wrapped = self.lalm.layer(layer)
        with torch.no_grad(), self._suffixes:
            if not writes:  # nothing to intervene in
                module: Any = self._modules[layer]
                leaving: Tensor = module(states, *inputs.rest, **keywords)
                return leaving
            with wrapped.trace(states, *inputs.rest, **keywords):
                for put in writes:
                    there = put.states if put.states is not None else states_at(wrapped, put.site)[0]
                    overwrite(wrapped, put.site, put.within, put.where, put.onto(there))
                out = wrapped.output.save()
        return torch.as_tensor(out)

    @property
    def _modules(self) -> Any:
        decoder: Any = self.lalm.decoder_module
        return decoder.layers

    def _prepared(
        self, clip: ClipSweep, writes: Sequence[Write], source: LayerView | None, device: torch.device
    ) -> list[Put]:
        """Writes of one layer with what they put in."""
        return prepared(writes, source, clip.taken, clip.sweep.grid.arrays, partial(columns, self.lalm), device)

    @staticmethod
    def _unpatched(clip: ClipSweep) -> list[tuple[list[int], Readout]]:
        """The cells that are the unpatched run by their definition."""
        idle = [index for index, cell in enumerate(clip.cells) if cell.idle]
        if not idle:
            return []
        own, references = clip.target.logits(), torch.cat([clip.source.logits(), clip.target.logits()])
        once = Readout.of(own, clip.sweep.option_ids, references)
        return [([index], once) for index in idle]

    def _read(self, clip: ClipSweep, rows: int) -> None:
        """Logits of what has come out at the top."""
        references = torch.cat([clip.source.logits(), clip.target.logits()])
        for indices, states in clip.top:
            for start in range(0, len(indices), rows):
                logits = read_logits(self.lalm, states[start : start + rows])
                part = Readout.of(logits, clip.sweep.option_ids, references)
                clip.parts.append((indices[start : start + rows], part))
                give_back_holes()
        clip.top = []
        clip.end_pass()
