"""Circuits in; models in which they are planted, and how well tracing finds them, out.

circuit     circuits as data, and what every intervention on them must give
decoder     the same circuits written into real Qwen2-Audio and Voxtral models
population  seeded random circuits and windows of many kinds
methods     the ways of tracing that are scored, by registration
measure     a planted model traced by the package's engines
scoring     what was found against what was planted
benchmark   a population scored, as a table
"""

from __future__ import annotations

from lalm_patch.truth.circuit import Circuit, Move, Register, Window
from lalm_patch.truth.decoder import PlantedLALM, draw_clips, plant_circuit, plant_window
from lalm_patch.truth.measure import Measured, measure
from lalm_patch.truth.methods import METHODS, Method, register
from lalm_patch.truth.population import KINDS, Plan, make_population, too_late
from lalm_patch.truth.scoring import Score, score

__all__ = [
    "KINDS",
    "METHODS",
    "Circuit",
    "Measured",
    "Method",
    "Move",
    "Plan",
    "PlantedLALM",
    "Register",
    "Score",
    "Window",
    "draw_clips",
    "make_population",
    "measure",
    "plant_circuit",
    "plant_window",
    "register",
    "score",
    "too_late",
]
