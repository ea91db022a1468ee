"""Which engine a model gets: replay where the decoder allows it, shown on a few cells; else the direct one."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lalm_patch.checks import Check
from lalm_patch.engine.approximate import ApproximateEngine
from lalm_patch.engine.cuts import check_cuts
from lalm_patch.engine.direct import DirectEngine
from lalm_patch.engine.interface import Engine
from lalm_patch.engine.replay import ReplayEngine
from lalm_patch.engine.sites import check_sites
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import (
    Grid,
    Place,
    at_place,
    audio_grid,
    edge_grid,
    layer_grid,
    path_grid,
    token_grid,
)
from lalm_patch.interventions.patches import Intervention, Patch, Site
from lalm_patch.models import LALM, Encoding
from lalm_patch.models.proof import TOLERANCE, Told, in_float32, tell_nobody
from lalm_patch.settings import APPROXIMATE, EngineSettings

if TYPE_CHECKING:
    from lalm_patch.models.proof import Pair

log = logging.getLogger(__name__)

PROOF_CELLS = 6
PROOF_STEPS = 3 + PROOF_CELLS
"""What `choose_engine` tells of, where replay works: replay's cells, the direct engine's, and the noise floor."""
EXACT_STEPS = 1 + PROOF_CELLS
"""What it tells of besides for a model that computes in less than float32."""
STANDARD = Place()
"""The residual stream after single layers."""


def replay_obstacle(lalm: LALM) -> str | None:
    """Why replay cannot work with this decoder, or None.

    Replay takes every position's keys and values from the residual stream below it and attends to all of them; a
    decoder with windows, recurrent states or keys shared between layers does something else.
    """
    config: Any = lalm.decoder_module.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention"}:
        return f"its layers are of kinds {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None) or math.inf
    # A window no prompt can outgrow is none.
    if window < getattr(config, "max_position_embeddings", math.inf) and getattr(config, "use_sliding_window", True):
        return f"it attends through a sliding window of {config.sliding_window}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores"
    if any(name.endswith("sinks") for name, _ in lalm.decoder_module.named_parameters()):
        return "its attention has sinks"
    if not getattr(lalm.decoder_module, "_supports_attention_backend", False):
        return "its attention cannot be exchanged (no attention interface)"
    return None


def choose_engine(
    lalm: LALM,
    settings: EngineSettings,
    pair: Pair,
    option_ids: tuple[int, ...],
    place: Place = STANDARD,
    told: Told = tell_nobody,
) -> tuple[Engine, list[Check]]:
    """The engine for a model, and what was checked to choose it: of an approximation, its exact engine.

    Of a model that computes in less than float32, cells are computed in float32, too: two engines may differ by what
    the direct one is wrong by, see `Pair.tolerance`.

    `told` hears of every forward pass of the direct engine, and of what replay computes.

    Raises:
        ModelError: the model lacks the place, replay was asked for and cannot work, or it does not give the direct
            engine's numbers.
    """
    check_sites(lalm, [place.site])
    if place.knockout:
        check_cuts(lalm)
    exact = replace(settings, name="auto") if settings.name in APPROXIMATE else settings
    engine, checks = _choose(lalm, exact, pair, option_ids, place, told)
    if place.site in (Site.ATTN, Site.MLP, Site.HEAD):
        checks = [*checks, site_adds_up(lalm, pair, option_ids, place.site)]
    told("noise_floor")
    checks = [*checks, noise_floor(engine, pair.silence, option_ids, pair.tolerance, place)]
    if settings.name in APPROXIMATE:
        return ApproximateEngine(lalm, engine, settings.name, settings.steps), checks
    return engine, checks


def site_adds_up(lalm: LALM, pair: Pair, ids: tuple[int, ...], site: Site) -> Check:
    """Whether attention and MLP are all that layers add to the residual stream.

    Both runs end with the same token. Where what attention (or all its heads) and the MLP give at that position is the
    noise's in every layer, its residual stream is the noise's, and so are the probabilities.
    """
    last = (len(pair.silence.tokens) - 1,)
    heads: Iterable[int | None] = range(lalm.num_heads) if site is Site.HEAD else (None,)
    attention = [(Site.HEAD if site is Site.HEAD else Site.ATTN, head) for head in heads]
    everything = Intervention(
        Patch(layer, last, *part) for layer in range(lalm.num_layers) for part in (*attention, (Site.MLP, None))
    )
    engine = DirectEngine(lalm)
    (restored,) = engine.cells(pair.noise, pair.silence, [everything], ids).probabilities
    expected = engine.base(pair.noise, pair.silence, ids).probabilities[0]
    return Check.at_most("site_adds_up", float(np.abs(restored - expected).max()), pair.tolerance)


def noise_floor(
    engine: Engine,
    corrupted: Encoding,
    ids: tuple[int, ...],
    tolerance: float,
    place: Place = STANDARD,
) -> Check:
    """How far rounding alone moves a probability: the corrupted run's own states are put back into it.

    By definition every such cell is the corrupted run again, in any engine and for any weights.
    """
    grid = _random_cells(engine.lalm, corrupted, place)
    unpatched = engine.base(corrupted, corrupted, ids).probabilities[1]
    patched = engine.sweep(corrupted, corrupted, grid, ids).probabilities
    return Check.at_most("noise_floor", float(np.abs(patched - unpatched).max()), tolerance)


def _choose(
    lalm: LALM,
    settings: EngineSettings,
    pair: Pair,
    option_ids: tuple[int, ...],
    place: Place,
    told: Told,
) -> tuple[Engine, list[Check]]:
    if settings.name == "direct" or place.site is Site.TOWER:  # in the encoder every frame hears every other
        return DirectEngine(lalm), []
    obstacle = replay_obstacle(lalm)
    if obstacle is None:
        replay = ReplayEngine(lalm, settings.pack_tokens, settings.memory_budget)
        try:
            checks = _proof(replay, pair, option_ids, place, told)
        except NotImplementedError as error:
            obstacle = str(error)
        else:
            failed = [check for check in checks if not check.passed]
            if not failed:
                return replay, checks
            check = failed[0]
            obstacle = (
                f"it differs from the direct engine by {check.value:.2g} in probability (bound {check.bound:.2g})"
            )
    if settings.name == "replay":
        raise ModelError(
            f"engine=replay does not work with {type(lalm.module).__name__}: {obstacle}; use engine=direct or auto"
        )
    log.warning("replay does not work with %s: %s; using the direct engine", type(lalm.module).__name__, obstacle)
    return DirectEngine(lalm), []


def _proof(replay: ReplayEngine, pair: Pair, ids: tuple[int, ...], place: Place, told: Told) -> list[Check]:
    """Compare the engines on the two base runs and a few random cells of both kinds of grid."""
    lalm = replay.lalm
    grid = _random_cells(replay.lalm, pair.noise, place, place.knockout)
    runs = pair.noise, pair.silence
    told("replay_at_load, by replay")
    base = replay.base(*runs, ids).probabilities
    fast = replay.sweep(*runs, grid, ids).probabilities
    direct = DirectEngine(replay.lalm)
    if pair.logits:
        direct.remember(*runs, torch.cat([pair.logits["noise"], pair.logits["silence"]]))
    told("replay_at_load, by the direct engine")
    slow = direct.sweep(*runs, grid, ids, lambda _: told("replay_at_load, by the direct engine")).probabilities
    differences = np.abs(fast - slow).max(), np.abs(base - direct.base(*runs, ids).probabilities).max()
    checks = []
    if not lalm.exact:
        told("rounding, cells in float32")
        with lalm.exactly():
            exactly = in_float32(lalm, pair.noise), in_float32(lalm, pair.silence)
            direct = DirectEngine(lalm)
            if pair.exact:
                direct.remember(*exactly, torch.cat([pair.exact["noise"], pair.exact["silence"]]))
            exact = direct.sweep(*exactly, grid, ids, lambda _: told("rounding, cells in float32")).probabilities
            again = (
                ReplayEngine(lalm, replay.pack_tokens, replay.memory_budget).sweep(*exactly, grid, ids).probabilities
            )
        pair.measured(slow, exact)
        checks = [Check.at_most("replay_in_float32", float(np.abs(again - exact).max()), TOLERANCE)]
    return [Check.at_most("replay_at_load", float(max(differences)), pair.tolerance), *checks]


def _random_cells(lalm: LALM, encoding: Encoding, place: Place, knockout: bool = False) -> Grid:
    """A few cells, seeded, of the layer- and the token-wise grid; of windows of the audio; of edges that are cut."""
    tokens, layers = encoding.tokens, range(place.num_layers or lalm.num_layers)
    if knockout:
        made = [edge_grid(tokens, layers, place.edges)]
    elif place.receivers:
        made = [path_grid(tokens, layers, place)]
    elif place.spans is not None:
        made = [audio_grid(tokens, layers, place)]
    else:
        made = [layer_grid(tokens, layers), token_grid(tokens, layers)]
    grids = made if place.receivers else [at_place(grid, place) for grid in made]
    cells = tuple(cell for grid in grids for cell in grid.cells if not cell.idle)
    chosen = np.random.default_rng(0).choice(len(cells), min(PROOF_CELLS, len(cells)), replace=False)
    return Grid(("cell",), {"cell": np.arange(len(cells))}, cells).chosen(chosen)
