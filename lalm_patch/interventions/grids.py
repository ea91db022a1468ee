"""Grids: a granularity becomes a labelled array of interventions. A grid's coordinates become the result's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lalm_patch.errors import ConfigError
from lalm_patch.interventions.patches import Cut, Intervention, Origin, Patch, Site, Source
from lalm_patch.interventions.segments import AUDIO, AUDIO_TEXT, KNOCKOUTS, edge, edge_names, has_edge
from lalm_patch.interventions.spans import Spans, audio_windows, tower_windows
from lalm_patch.interventions.ways import STANDARD, way_cell
from lalm_patch.settings import GranularitySettings, SiteSettings

if TYPE_CHECKING:
    from lalm_patch.models import LALM, TokenTable


@dataclass(frozen=True)
class Grid:
    """Interventions with named dimensions.

    Attributes:
        dims: names of the dimensions, outermost first.
        coords: labels along each dimension.
        cells: the interventions in row-major order of `dims`.
        arrays: vectors and bases that the cells' sources name, see `Source`; a grid without them can be looked at, not
            swept.
    """

    dims: tuple[str, ...]
    coords: dict[str, np.ndarray]
    cells: tuple[Intervention, ...]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.cells) != prod(self.shape):
            raise ValueError(f"a grid of shape {self.shape} needs {prod(self.shape)} cells, got {len(self.cells)}")
        self._check_arrays()

    def _check_arrays(self) -> None:
        if not self.arrays:
            return
        sources = {patch.source for cell in self.cells for patch in cell.patches if not patch.plain}
        for key, array in self.arrays.items():
            if array.ndim not in (1, 2) or not np.isfinite(array).all():
                raise ValueError(f"array {key}: expected one or two dimensions and finite numbers, got {array.shape}")
        for basis in {source.basis for source in sources if source.basis is not None} & set(self.arrays):
            rows = np.asarray(self.arrays[basis], np.float64)
            if rows.ndim != 2 or not np.allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-4):
                raise ValueError(
                    f"basis {basis}: expected orthonormal rows [k, width], got {rows.shape}; numpy.linalg.qr makes them"
                )

    def chosen(self, indices: Iterable[int]) -> Grid:
        """Some of the cells, by their indices, along one dimension `cell`."""
        chosen = [int(index) for index in indices]
        return Grid(("cell",), {"cell": np.array(chosen)}, tuple(self.cells[index] for index in chosen), self.arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the dimensions."""
        return tuple(len(self.coords[dim]) for dim in self.dims)


def layer_grid(tokens: TokenTable, layers: Sequence[int]) -> Grid:
    """All text positions of one layer's output at once, for each layer."""
    cells = tuple(Intervention([Patch(layer, tokens.text_positions)]) for layer in layers)
    return Grid(("layer",), {"layer": np.asarray(layers)}, cells)


def token_grid(tokens: TokenTable, layers: Sequence[int]) -> Grid:
    """One text position of one layer's output, for each (layer, position); `token` counts from the first of them."""
    positions = tokens.text_positions
    cells = tuple(Intervention([Patch(layer, (position,))]) for layer in layers for position in positions)
    return Grid(("layer", "token"), {"layer": np.asarray(layers), "token": np.arange(len(positions))}, cells)


def segment_grid(tokens: TokenTable, layers: Sequence[int]) -> Grid:
    """All positions of one segment of the text in one layer's output, for each (layer, segment)."""
    text, names = set(tokens.text_positions), tokens.segments
    positions = [tuple(p for p in tokens.positions(name) if p in text) for name in names]
    cells = tuple(Intervention([Patch(layer, chosen)]) for layer in layers for chosen in positions)
    coords = {"layer": np.asarray(layers), "segment": np.array(names, object)}
    return Grid(("layer", "segment"), coords, cells)


def audio_grid(tokens: TokenTable, layers: Sequence[int], place: Place) -> Grid:
    """Audio positions (at the site `tower`, the encoder's frames) of a window of the clip, for each (layer, window).

    Raises:
        ModelError: see `lalm_patch.interventions.spans`.
    """
    spans = place.spans or Spans()
    tower = place.site is Site.TOWER
    windows = (tower_windows if tower else audio_windows)(tokens, spans)
    cells = [Intervention([Patch(layer, chosen)]) for layer in layers for chosen in windows.values()]
    coords = {"layer": np.asarray(layers), "window": np.array(list(windows), object)}
    return Grid(("layer", "window"), coords, tuple(cells))


def edge_grid(tokens: TokenTable, layers: Sequence[int], edges: Sequence[str] = ()) -> Grid:
    """Attention between two segments cut in one layer, for each (layer, edge); without edges, all of the prompt's."""
    names = tuple(edges) or edge_names(tokens.segments)
    present = [name for name in names if has_edge(name, tokens.segments)]
    cells = tuple(Intervention(cuts=[edge(tokens, name, layer)]) for layer in layers for name in present)
    return Grid(("layer", "edge"), {"layer": np.asarray(layers), "edge": np.array(present, object)}, cells)


def early_text_only_grid(tokens: TokenTable, layers: Sequence[int]) -> Grid:
    """No text position attends to the audio in a layer and all below it, for each layer (arXiv 2603.13768, 5.3)."""
    cells = [Intervention(cuts=[edge(tokens, AUDIO_TEXT, low) for low in range(layer + 1)]) for layer in layers]
    return Grid(("layer",), {"layer": np.asarray(layers)}, tuple(cells))


def mean_key(segment: str, site: Site, layer: int) -> str:
    """Name of a mean over clips among a grid's arrays."""
    return f"mean of {segment} at {site} of layer {layer}"


def direction_key(name: str, layer: int) -> str:
    """Name of a direction among a grid's arrays."""
    return f"{name} at layer {layer}"


def back_grid(tokens: TokenTable, layers: Sequence[int], place: Place) -> Grid:
    """The audio positions' states of one layer written where another begins, for each (layer, source layer).

    They are those of the clean run: of the run into which they are put where that is the clean one (noising).
    """
    origin = Origin.OWN if place.noising else Origin.OTHER
    audio = tokens.audio_positions
    starts = [(layer - 1, Site.RESID) if layer else (0, Site.EMBED) for layer in layers]
    cells = [
        Intervention([Patch(before, audio, site, source=Source(origin, taken, site=Site.RESID))])
        for before, site in starts
        for taken in place.sources
    ]
    coords = {"layer": np.asarray(layers), "source_layer": np.asarray(place.sources)}
    return Grid(("layer", "source_layer"), coords, tuple(cells))


def ablate_grid(tokens: TokenTable, layers: Sequence[int], place: Place) -> Grid:
    """Zeros, or means over clips, in place of the states of the audio or of a segment, for each (layer, segment)."""
    positions = {AUDIO: tokens.audio_positions}
    text = set(tokens.text_positions)
    positions |= {name: tuple(p for p in tokens.positions(name) if p in text) for name in tokens.segments}

    def source(segment: str, layer: int) -> Source:
        if place.replacement == "zero":
            return Source(Origin.ZERO)
        return Source(Origin.VECTOR, vector=mean_key(segment, place.site, layer))

    cells = [
        Intervention(Patch(at, chosen, place.site, source=source(name, at)) for at in place.layers_from(layer))
        for layer in layers
        for name, chosen in positions.items()
    ]
    coords = {"layer": np.asarray(layers), "ablated": np.array(list(positions), object)}
    return Grid(("layer", "ablated"), coords, tuple(cells))


def steer_grid(tokens: TokenTable, layers: Sequence[int], place: Place) -> Grid:
    """A direction added at all text positions of one layer's output, for each (layer, direction): that of the clip's
    class, and random ones of the same length. Where the clean run is steered (noising), it is taken away instead."""
    alpha = -place.strength if place.noising else place.strength
    names = (CLASS_DIRECTION, *(f"random {number}" for number in range(1, place.controls + 1)))
    cells = [
        Intervention(
            [
                Patch(
                    layer,
                    tokens.text_positions,
                    source=Source(Origin.VECTOR, vector=direction_key(name, layer), alpha=alpha, added=True),
                )
            ]
        )
        for layer in layers
        for name in names
    ]
    coords = {"layer": np.asarray(layers), "steering": np.array(names, object)}
    return Grid(("layer", "steering"), coords, tuple(cells))


def path_grid(tokens: TokenTable, layers: Sequence[int], place: Place) -> Grid:
    """A way through the prompt (`lalm_patch.interventions.ways`), for each (layer of the senders, of the receivers).

    Each layer stands for its window; what is written above the receivers does not reach them.

    Raises:
        ConfigError: the prompt has no such way, or none of these receivers is above a sender.
    """
    cells = tuple(
        way_cell(tokens, place.way, place.layers_from(low), place.layers_from(high), place.site)
        for low in layers
        for high in place.receivers
    )
    if all(cell.idle for cell in cells):
        raise ConfigError(
            f"granularity.layers={list(layers)}, granularity.receivers={list(place.receivers)}: no path leads "
            "from these to those; expected receivers in a layer above one of the senders"
        )
    coords = {"layer": np.asarray(layers), "receiver_layer": np.asarray(place.receivers)}
    return Grid(("layer", "receiver_layer"), coords, cells)


CLASS_DIRECTION = "class mean"
"""Name of the direction from the other classes' means to that of the clip's class."""


@dataclass(frozen=True)
class Place:
    """What of a layer is patched, and in how many layers at once.

    Attributes:
        site: where in the layer; `head` patches one attention head at a time.
        window: layers patched together: a cell's own and the ones above it, as far as there are any.
        num_layers: decoder layers of the model; at the site `tower` layers of its audio encoder.
        num_heads: attention heads of each.
        knockout: whether attention is cut, and no state exchanged.
        edges: which edges are cut; empty for all.
        spans: windows of the audio, where the audio is patched and not the text.
        noising: whether the run that is patched is the clean one.
        sources: of granularity=back, the layers whose states are written into others.
        replacement: of granularity=ablate, what is put in: `zero` or `mean`.
        strength: of granularity=steer, how much of a direction is added.
        controls: likewise, random directions.
        way: of granularity=path, the segments it leads through.
        receivers: likewise, the layers in which the last of them reads.
    """

    site: Site = Site.RESID
    window: int = 1
    num_layers: int = 0
    num_heads: int = 0
    knockout: bool = False
    edges: tuple[str, ...] = ()
    spans: Spans | None = None
    noising: bool = False
    sources: tuple[int, ...] = ()
    replacement: str = "zero"
    strength: float = 1.0
    controls: int = 0
    way: str = STANDARD
    receivers: tuple[int, ...] = ()

    @property
    def layer_kind(self) -> str:
        """Which layers they are."""
        return "audio encoder" if self.site is Site.TOWER else "decoder"

    def layers_from(self, layer: int) -> range:
        """The layers of the window that begins at one."""
        return range(layer, min(layer + self.window, self.num_layers))


def place_in(
    lalm: LALM, site: SiteSettings, granularity: GranularitySettings | None = None, direction: str = "denoising"
) -> Place:
    """The place that settings name, in a model.

    Raises:
        ConfigError: source layers that the model does not have.
    """
    where = Site(site.name)
    layers = {Site.TOWER: len(lalm.tower_layers), Site.EMBED: 1}.get(where, lalm.num_layers)
    place = Place(where, site.window, layers, lalm.num_heads, noising=direction == "noising")
    if granularity is not None and granularity.name == "audio":
        return replace(place, spans=Spans(granularity.seconds, granularity.positions))
    if granularity is not None and granularity.name == "back":
        return replace(place, sources=back_layers(layers, granularity.sources, "granularity.sources"))
    if granularity is not None and granularity.name == "ablate":
        return replace(place, replacement=granularity.replacement or "zero")
    if granularity is not None and granularity.name == "steer":
        strength = 1.0 if granularity.strength is None else granularity.strength
        return replace(place, strength=strength, controls=granularity.controls or 0)
    if granularity is not None and granularity.name == "path":
        receivers = window_starts(place, granularity.receivers, "granularity.receivers")
        return replace(place, way=granularity.path or STANDARD, receivers=receivers)
    if granularity is None or granularity.name not in KNOCKOUTS:
        return place
    return replace(place, knockout=True, edges=tuple(granularity.edges or ()))


def at_place(grid: Grid, place: Place) -> Grid:
    """The same grid at another site, over windows of layers; for the site `head` with a dimension `head`, the last."""
    if place.site is Site.RESID and place.window == 1:
        return grid
    heads = tuple(range(place.num_heads)) if place.site is Site.HEAD else (None,)
    cells = tuple(
        Intervention(
            (
                Patch(layer, patch.positions, place.site, head, patch.source)
                for patch in cell.patches
                for layer in place.layers_from(patch.layer)
            ),
            (Cut(layer, c.targets, c.sources, head) for c in cell.cuts for layer in place.layers_from(c.layer)),
        )
        for cell in grid.cells
        for head in heads
    )
    if place.site is not Site.HEAD:
        return Grid(grid.dims, grid.coords, cells, grid.arrays)
    # Single heads are asked about one edge: it needs no dimension.
    dims = tuple(dim for dim in grid.dims if dim != "edge")
    coords = {dim: grid.coords[dim] for dim in dims} | {"head": np.arange(place.num_heads)}
    return Grid((*dims, "head"), coords, cells, grid.arrays)


GRANULARITIES: dict[str, Callable[[TokenTable, Sequence[int]], Grid]] = {
    "layer": layer_grid,
    "token": token_grid,
    "segment": segment_grid,
    "audio": lambda tokens, layers: audio_grid(tokens, layers, Place()),
    "edge": edge_grid,
    "early_text_only": early_text_only_grid,
    "back": lambda tokens, layers: back_grid(tokens, layers, Place(sources=tuple(layers))),
    "ablate": lambda tokens, layers: ablate_grid(tokens, layers, Place(num_layers=max(layers) + 1)),
    "steer": lambda tokens, layers: steer_grid(tokens, layers, Place()),
    "path": lambda tokens, layers: path_grid(
        tokens, layers, Place(Site.ATTN, num_layers=max(layers) + 1, receivers=tuple(layers))
    ),
}

SOURCED: dict[str, Callable[[TokenTable, Sequence[int], Place], Grid]] = {
    "back": back_grid,
    "ablate": ablate_grid,
    "steer": steer_grid,
}
"""Granularities whose patches put in something else than the same place's state of the other run."""

BACK_LAYERS = 9
"""Layers, evenly spaced, on either side of back-patching where none are named: its cells are their square."""


def back_layers(num_layers: int, layers: Sequence[int] | None, setting: str = "granularity.layers") -> tuple[int, ...]:
    """The layers of one side of back-patching: those asked for, or `BACK_LAYERS` evenly spaced, first and last among
    them; see `chosen_layers`."""
    if layers is not None:
        return chosen_layers(num_layers, layers, setting=setting)
    return tuple(sorted({round(float(layer)) for layer in np.linspace(0, num_layers - 1, BACK_LAYERS)}))


def window_starts(place: Place, layers: Sequence[int] | None, setting: str = "granularity.layers") -> tuple[int, ...]:
    """The layers that windows begin at: those asked for (see `chosen_layers`), or windows side by side over all."""
    if layers is not None:
        return chosen_layers(place.num_layers, layers, setting=setting)
    return tuple(range(0, place.num_layers, place.window))


def patched_layers(place: Place, granularity: GranularitySettings) -> tuple[int, ...]:
    """The layers of a run's grid; see `chosen_layers`, of granularity=back `back_layers`, of path `window_starts`."""
    if granularity.name == "back":
        return back_layers(place.num_layers, granularity.layers)
    if granularity.name == "path":
        return window_starts(place, granularity.layers)
    return chosen_layers(place.num_layers, granularity.layers, place.layer_kind)


def chosen_layers(
    num_layers: int, layers: Sequence[int] | None, kind: str = "decoder", setting: str = "granularity.layers"
) -> tuple[int, ...]:
    """The layers a run patches: all of them, or the ones asked for (negative ones count from the end).

    Args:
        num_layers: how many there are.
        layers: the ones asked for; None for all.
        kind: what layers they are, for the message.
        setting: what asks for them, likewise.

    Raises:
        ConfigError: a layer the model does not have, or one named twice.
    """
    if layers is None:
        return tuple(range(num_layers))
    wrong = [layer for layer in layers if not -num_layers <= layer < num_layers]
    if wrong or not layers:
        raise ConfigError(
            f"{setting}={list(layers)}: the model has {kind} layers 0 to {num_layers - 1}; "
            "give a list of those, or null for all"
        )
    chosen = sorted(layer % num_layers for layer in layers)
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"{setting}={list(layers)} names a layer twice")
    return tuple(chosen)


def make_grid(granularity: str, tokens: TokenTable, layers: Sequence[int], place: Place | None = None) -> Grid:
    """The grid of a granularity by its name; without a place, of single layers' outputs.

    Raises:
        ConfigError: no such granularity; the message lists them.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(f"granularity={granularity!r}: expected one of {', '.join(GRANULARITIES)}")
    if granularity == "edge" and place is not None:
        return at_place(edge_grid(tokens, layers, place.edges), place)
    if granularity == "audio" and place is not None:
        return at_place(audio_grid(tokens, layers, place), place)
    if granularity == "path" and place is not None:
        return path_grid(tokens, layers, place)
    if granularity in SOURCED and place is not None:
        return SOURCED[granularity](tokens, layers, place)
    grid = GRANULARITIES[granularity](tokens, layers)
    return grid if place is None else at_place(grid, place)
