"""A granularity and a prompt's tokens in; a labelled grid of interventions, as plain data, out."""

from __future__ import annotations

from lalm_patch.interventions.grids import GRANULARITIES, Grid, Place, at_place, make_grid
from lalm_patch.interventions.patches import Cut, Intervention, Origin, Patch, Site, Source
from lalm_patch.interventions.spans import Spans

__all__ = [
    "GRANULARITIES",
    "Cut",
    "Grid",
    "Intervention",
    "Origin",
    "Patch",
    "Place",
    "Site",
    "Source",
    "Spans",
    "at_place",
    "make_grid",
]
