"""A granularity and a prompt's tokens in; a labelled grid of interventions, as plain data, out."""

from __future__ import annotations

from lalm_patch.interventions.grids import GRANULARITIES, Grid, Place, at_place, make_grid
from lalm_patch.interventions.patches import Cut, Intervention, Origin, Patch, Site, Source
from lalm_patch.interventions.paths import Input, PathPatch, Receiver, Sender
from lalm_patch.interventions.spans import Spans

__all__ = [
    "GRANULARITIES",
    "Cut",
    "Grid",
    "Input",
    "Intervention",
    "Origin",
    "Patch",
    "PathPatch",
    "Place",
    "Receiver",
    "Sender",
    "Site",
    "Source",
    "Spans",
    "at_place",
    "make_grid",
]
