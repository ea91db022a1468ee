"""Where a site is in a wrapped decoder layer: how its states are read, and how they are overwritten, inside a trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lalm_patch.errors import ModelError
from lalm_patch.interventions.patches import Site
from lalm_patch.models import LALM


def check_sites(lalm: LALM, sites: Iterable[Site]) -> None:
    """Raises ModelError for a site that the model's decoder layers do not have."""
    decoder: Any = lalm.decoder_module
    for site in sites:
        if site is Site.TOWER and not lalm.tower_layers:
            raise ModelError(
                f"site=tower: {type(lalm.module).__name__} has no audio_tower with layers; site=embed patches what the "
                "audio encoder and the projector give, in every model"
            )
        for index, layer in enumerate(decoder.layers):
            missing = [path for path in _PATHS[site] if not _has(layer, path)]
            if missing:
                raise ModelError(
                    f"site={site}: layer {index} of {type(decoder).__name__} has no {missing[0]}; "
                    "site=resid works with every decoder"
                )


def head_size(lalm: LALM) -> int:
    """Width of one attention head in what enters the output projection."""
    decoder: Any = lalm.decoder_module
    return int(decoder.layers[0].self_attn.o_proj.in_features // lalm.num_heads)


def layer_at(lalm: LALM, layer: int, site: Site) -> Any:
    """The wrapped layer that a site is in: of the decoder, or of the audio encoder."""
    return lalm.tower_layers[layer] if site is Site.TOWER else lalm.layers[layer]


def states_at(layer: Any, site: Site) -> Any:
    """States [batch, positions, width] of a site, for a wrapped layer inside a trace. Heads come side by side.

    The audio encoder's chunks are one sequence of frames, [1, frames, width].
    """
    if site is Site.RESID:
        return layer.output
    if site is Site.EMBED:
        return layer.input
    if site is Site.TOWER:
        output = _first(layer.output)
        return output.view(1, -1, output.shape[-1])  # no copy: what is written into it is written into the chunks
    if site is Site.MLP:
        return _first(layer.mlp.output)
    if site is Site.ATTN:
        return _first(layer.self_attn.output)
    return layer.self_attn.o_proj.input


def overwrite(layer: Any, site: Site, head: slice, where: Any, states: Tensor) -> None:
    """Put states [positions, width] at positions of a site, for a wrapped layer inside a trace.

    Args:
        layer: the wrapped layer.
        site: which site.
        head: columns of one head; all columns for the other sites.
        where: positions, as indices.
        states: what to put there.
    """
    states_at(layer, site)[:, where, head] = states


def columns(lalm: LALM, head: int | None) -> slice:
    """Columns of a head among those that enter the output projection; all columns for None."""
    if head is None:
        return slice(None)
    size = head_size(lalm)
    return slice(head * size, (head + 1) * size)


def _first(output: Any) -> Any:
    """The states, of a module that may return weights or scores beside them."""
    return output[0] if isinstance(output, tuple) else output


_PATHS = {
    Site.TOWER: (),
    Site.EMBED: (),
    Site.RESID: (),
    Site.MLP: ("mlp",),
    Site.ATTN: ("self_attn",),
    Site.HEAD: ("self_attn", "self_attn.o_proj"),
}


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None
