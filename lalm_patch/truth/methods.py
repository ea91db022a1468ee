"""What is scored: every way of tracing there is, by name. A new one takes one `register`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lalm_patch.engine import ApproximateEngine, Progress, Readout, ReplayEngine
from lalm_patch.errors import ConfigError
from lalm_patch.interventions.grids import GRANULARITIES, Grid, Place, at_place
from lalm_patch.interventions.patches import Intervention, Site
from lalm_patch.interventions.paths import Input, PathPatch, Receiver, Sender
from lalm_patch.interventions.segments import TEXT, edge, edge_names
from lalm_patch.models import LALM, Encoding, TokenTable
from lalm_patch.settings import APPROXIMATE, EngineSettings
from lalm_patch.truth.circuit import HEADS


class Sweeper(Protocol):
    """What carries out a grid: an engine, or an approximation of one."""

    def base(self, clean: Encoding, corrupted: Encoding, option_ids: Sequence[int]) -> Readout:
        """The clean and the corrupted run: rows 0 and 1."""

    def sweep(
        self, clean: Encoding, corrupted: Encoding, grid: Grid, option_ids: Sequence[int], progress: Progress
    ) -> Readout:
        """One row per cell of the grid."""


@dataclass(frozen=True)
class Method:
    """A way of tracing.

    Attributes:
        name: as it is called on the command line.
        grid: what is patched; the first dimension is `layer`.
        engine: what carries it out on a model.
        site: where in a layer the grid patches.
        cuts: whether attention is cut in the clean run, instead of states put into the silent one.
        exact: whether the cells are those of the direct engine up to rounding; then some are computed again with it.
            Of an approximation some are computed exactly, to say how well it agrees.
    """

    name: str
    grid: Callable[[TokenTable, Sequence[int]], Grid]
    engine: Callable[[LALM], Sweeper] = ReplayEngine
    site: Site = Site.RESID
    cuts: bool = False
    exact: bool = True


METHODS: dict[str, Method] = {}
"""The registered methods by name."""


def register(method: Method) -> None:
    """Have a method scored.

    Raises:
        ValueError: its name is taken.
    """
    if method.name in METHODS:
        raise ValueError(f"a method named {method.name!r} is registered already")
    METHODS[method.name] = method


def chosen_methods(names: Sequence[str]) -> list[Method]:
    """Methods by name; all of them for no name.

    Raises:
        ConfigError: no such method; the message lists them.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise ConfigError(f"no method {', '.join(unknown)}: expected some of {', '.join(METHODS)}")
    return [METHODS[name] for name in names] if names else list(METHODS.values())


def head_grid(tokens: TokenTable, layers: Sequence[int]) -> Grid:
    """Single heads of a planted model, all text positions at once, for each (layer, head)."""
    return at_place(GRANULARITIES["layer"](tokens, layers), Place(Site.HEAD, 1, len(layers), HEADS))


def edge_grid(tokens: TokenTable, layers: Sequence[int]) -> Grid:
    """Single edges between segments, cut in single heads of a planted model, for each (layer, edge, head)."""
    names = [name for name in edge_names(tokens.segments) if not name.endswith(TEXT)]
    cells = [
        Intervention(cuts=[replace(edge(tokens, name, layer), head=head)])
        for layer in layers
        for name in names
        for head in range(HEADS)
    ]
    coords = {"layer": np.asarray(layers), "edge": np.array(names, object), "head": np.arange(HEADS)}
    return Grid(("layer", "edge", "head"), coords, tuple(cells))


def path_grid(tokens: TokenTable, layers: Sequence[int]) -> Grid:
    """Audio -> one text position -> last: what attention of one layer reads there from the audio, as attention of
    another layer at the last position reads it, for each (layer, receiving layer, position)."""
    *relays, last = tokens.text_positions
    audio = tokens.audio_positions
    cells = [
        Intervention(
            path=PathPatch(
                (Sender(low, (relay,), reads=audio),),
                tuple(Receiver(high, (relay,), kind, seen_by=(last,)) for kind in (Input.KEY, Input.VALUE)),
            )
        )
        for low in layers
        for high in layers
        for relay in relays
    ]
    coords = {"layer": np.asarray(layers), "receiver_layer": np.asarray(layers), "relay": np.arange(len(relays))}
    return Grid(("layer", "receiver_layer", "relay"), coords, tuple(cells))


def approximation(rule: str) -> Callable[[LALM], Sweeper]:
    """What makes an approximate engine for a model."""
    return lambda lalm: ApproximateEngine(lalm, ReplayEngine(lalm), rule, EngineSettings().steps)


register(Method("layer", GRANULARITIES["layer"]))
register(Method("token", GRANULARITIES["token"]))
register(Method("segment", GRANULARITIES["segment"]))
register(Method("head", head_grid, site=Site.HEAD))
register(Method("edge", edge_grid, site=Site.HEAD, cuts=True))
register(Method("path", path_grid, site=Site.ATTN))
for _rule in APPROXIMATE:
    register(Method(f"{_rule}_token", GRANULARITIES["token"], approximation(_rule), exact=False))
    register(Method(f"{_rule}_head", head_grid, approximation(_rule), Site.HEAD, exact=False))
