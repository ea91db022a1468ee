"""Datasets of runs in; findings out. Needs no model and no torch: it works on a dataset opened anywhere.

run_info    which run a dataset is
options     what each option says, where questions differ from clip to clip
metric      other metrics than the probability
alignment   one token axis for all samples
resampling  the bootstrap over groups; which groups are too few for it
permutation exact tests over groups
lens        what the logit lens sees, in the causal curve's units
grounding   whether attention to the audio tells wrong answers
licence     how well approximate cells agree with exact ones
ledger      who counts and why not
precision   what rounding did to the numbers
recovery    means with intervals, the peak
depth       fusion depth and abruptness
profiles    recovery of the text's segments, the object-token effect
comparison  differences between runs
paper       what the paper says, as data
claims      statements checked against runs
"""

from __future__ import annotations

from lalm_patch.analysis.alignment import align_tokens, kept_samples, segments
from lalm_patch.analysis.claims import Finding, Part, Verdict, check_claims, relevant
from lalm_patch.analysis.comparison import Comparison, compare
from lalm_patch.analysis.depth import Fusion, fusion
from lalm_patch.analysis.grounding import Grounding, grounding
from lalm_patch.analysis.ledger import (
    KEPT,
    Accuracy,
    accuracy,
    exclusion_table,
    is_readable,
    is_right,
    lost_classes,
    why_none_counts,
)
from lalm_patch.analysis.lens import seen_at_tokens, seen_in_audio
from lalm_patch.analysis.licence import Licence, licence
from lalm_patch.analysis.metric import METRICS, with_metric
from lalm_patch.analysis.options import chance, classes, has_own_options, option_texts, right_options
from lalm_patch.analysis.paper import CLAIMS, Claim
from lalm_patch.analysis.precision import Precision, in_short, is_inexact, precision
from lalm_patch.analysis.profiles import ObjectEffect, object_effect, segment_profiles
from lalm_patch.analysis.recovery import (
    Cell,
    Peak,
    mean_recovery,
    over_layers,
    peak_interval,
    peak_layer,
    ratio_of_means,
)
from lalm_patch.analysis.resampling import Estimate
from lalm_patch.analysis.run_info import About, about, planted_window, run_settings, variants

__all__ = [
    "CLAIMS",
    "KEPT",
    "METRICS",
    "About",
    "Accuracy",
    "Cell",
    "Claim",
    "Comparison",
    "Estimate",
    "Finding",
    "Fusion",
    "Grounding",
    "Licence",
    "ObjectEffect",
    "Part",
    "Peak",
    "Precision",
    "Verdict",
    "about",
    "accuracy",
    "align_tokens",
    "chance",
    "check_claims",
    "classes",
    "compare",
    "exclusion_table",
    "fusion",
    "grounding",
    "has_own_options",
    "in_short",
    "is_inexact",
    "is_readable",
    "is_right",
    "kept_samples",
    "licence",
    "lost_classes",
    "mean_recovery",
    "object_effect",
    "option_texts",
    "over_layers",
    "peak_interval",
    "peak_layer",
    "planted_window",
    "precision",
    "ratio_of_means",
    "relevant",
    "right_options",
    "run_settings",
    "seen_at_tokens",
    "seen_in_audio",
    "segment_profiles",
    "segments",
    "variants",
    "why_none_counts",
    "with_metric",
]
