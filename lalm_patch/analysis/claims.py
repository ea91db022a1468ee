"""Claims checked against runs: supported, contradicted or undecided, with the numbers.

A claim about several models and attributes has one part for each. A part is supported if the whole interval of its
number lies in the claim's region, contradicted if all of it lies outside, else undecided; so is one whose groups are
too few for an interval. The intervals hold together: their level is 1 - 0.05 / parts (Bonferroni). A claim is supported
if all its parts are, contradicted if one of them is, else undecided; so is one for which runs are missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import xarray as xr

from lalm_patch.analysis.alignment import align_tokens
from lalm_patch.analysis.comparison import depth_shares
from lalm_patch.analysis.depth import crossing
from lalm_patch.analysis.paper import CLAIMS, Claim
from lalm_patch.analysis.profiles import object_difference, object_effect
from lalm_patch.analysis.recovery import curves_together, group_names, layer_curves
from lalm_patch.analysis.resampling import (
    CONFIDENCE,
    ClusterSums,
    Estimate,
    FloatArray,
    Resampled,
    resample,
    resample_together,
    too_few,
)
from lalm_patch.analysis.run_info import about

DRAWS = 4000
FAMILY_ERROR = 0.05

Key = tuple[str, str, str]
Index = Mapping[Key, Sequence[xr.Dataset]]


class Verdict(StrEnum):
    """What the runs say on a claim."""

    SUPPORTED = "supported"
    CONTRADICTED = "contradicted"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Part:
    """A claim for one model and attribute.

    Attributes:
        about: which.
        verdict: what the run says.
        number: the measured number with its interval; None if it could not be measured.
        note: why not, what was tested besides, or why there is no interval.
    """

    about: str
    verdict: Verdict
    number: Estimate | None = None
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim, what the runs say on it, and on its parts."""

    claim: Claim
    verdict: Verdict
    parts: tuple[Part, ...]


class _Missing(Exception):
    """Runs that a part needs are not there, or say nothing."""


def check_claims(runs: Sequence[xr.Dataset], claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """Check claims against runs; ones about other models and attributes are of no use to it."""
    index: dict[Key, list[xr.Dataset]] = defaultdict(list)
    for run in runs:
        info = about(run)
        if info.departs:
            continue  # the paper's claims are about its own method
        index[info.model, info.attribute, info.granularity].append(run)
    return [_check(claim, index) for claim in claims]


def relevant(findings: Sequence[Finding]) -> list[Finding]:
    """The findings for which at least one number could be measured."""
    return [finding for finding in findings if any(part.number is not None for part in finding.parts)]


def _check(claim: Claim, index: Index) -> Finding:
    measure = MEASURES[claim.measure]
    # A contrast between attributes is one number; a comparison without one has a number for each model compared with.
    attributes, others = claim.attributes, claim.against or ("",)
    if claim.contrast:
        attributes, others = (f"{', '.join(claim.attributes)} | {', '.join(claim.contrast)}",), ("",)
    places = [(model, attribute, other) for model in claim.models for attribute in attributes for other in others]
    confidence = 1 - FAMILY_ERROR / len(places)
    parts = []
    for model, attribute, other in places:
        name = f"{model}{f' against {other}' if other else ''}, {attribute}"
        try:
            number, note, agrees = measure(index, claim, model, attribute, other)
            found = number.estimate(confidence)
        except _Missing as missing:
            parts.append(Part(name, Verdict.UNDECIDED, note=str(missing)))
            continue
        note = "; ".join(filter(None, [note, found.reason and f"no interval, {found.reason}"]))
        verdict = _verdict(found, claim)
        if verdict is Verdict.SUPPORTED and not agrees(confidence):
            verdict = Verdict.UNDECIDED
        parts.append(Part(name, verdict, found, note))
    verdicts = {part.verdict for part in parts}
    if Verdict.CONTRADICTED in verdicts:
        whole = Verdict.CONTRADICTED
    else:
        whole = Verdict.SUPPORTED if verdicts == {Verdict.SUPPORTED} else Verdict.UNDECIDED
    return Finding(claim, whole, tuple(parts))


def _verdict(number: Estimate, claim: Claim) -> Verdict:
    if np.isnan(number.low) or np.isnan(number.high):
        return Verdict.UNDECIDED
    if number.low >= claim.low and number.high <= claim.high:
        return Verdict.SUPPORTED
    if number.high < claim.low or number.low > claim.high:
        return Verdict.CONTRADICTED
    return Verdict.UNDECIDED


Measured = tuple[Resampled, str, Callable[[float], bool]]


@dataclass(frozen=True)
class _Extreme(Resampled):
    """The largest (or smallest) of several numbers [row, cell].

    Of numbers that are about equal, the largest one found is too large, and largest ones of draws more so: their
    interval would lie beside the truth. Instead, the largest of the ends of each number's own interval. The largest is
    below a bound only if each is, so the upper ends need no correction (an intersection-union test: Berger 1982,
    Technometrics 24:4, 295-300); it is above one if any is, so the lower ends are Bonferroni's.
    """

    smallest: bool = False

    def estimate(self, confidence: float = CONFIDENCE) -> Estimate:
        sign = -1.0 if self.smallest else 1.0
        cells = replace(self, values=sign * self.values)
        each = 1 - (1 - confidence) / cells.values.shape[1]
        low, high = cells.interval(each)[0].max(), cells.interval(confidence)[1].max()
        if self.smallest:
            low, high = -high, -low
        value = sign * float(cells.values[0].max())
        return Estimate(value, float(low), float(high), self.n, self.groups, too_few(self.groups, each))


def _extreme(means: Resampled, values: FloatArray, smallest: bool = False) -> _Extreme:
    """The largest or smallest of numbers [row, cell] read off resampled means."""
    return _Extreme(values, means.left_out, means.n, means.groups, smallest)


def _always(confidence: float) -> bool:
    return True


def _one(index: Index, model: str, attribute: str, granularity: str) -> xr.Dataset:
    found = index.get((model, attribute, granularity), ())
    if not found:
        raise _Missing(f"no {granularity}-wise run of {model} on {attribute}")
    if len(found) > 1:
        raise _Missing(f"{len(found)} {granularity}-wise runs of {model} on {attribute}: give one")
    if not bool(found[0]["kept"].any()):
        raise _Missing(f"no sample counts for {model} on {attribute}")
    return found[0]


def _curve(index: Index, claim: Claim, model: str, attribute: str) -> tuple[xr.Dataset, Resampled, np.ndarray]:
    run = _one(index, model, attribute, claim.granularity)
    return run, resample(layer_curves(run), about(run).seed, DRAWS), run["layer"].values.astype(np.float64)


def depth(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Layer at which half of the final recovery is passed."""
    _, curves, layers = _curve(index, claim, model, attribute)
    return replace(curves, values=crossing(curves.values, layers, 0.5)), "", _always


def settled(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Layer at which 90 % of the final recovery is passed."""
    _, curves, layers = _curve(index, claim, model, attribute)
    return replace(curves, values=crossing(curves.values, layers, 0.9)), "", _always


def width(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Share of depth between passing 10 % and 90 % of the final recovery."""
    run, curves, layers = _curve(index, claim, model, attribute)
    passed = [crossing(curves.values, layers, level) for level in (0.1, 0.9)]
    return replace(curves, values=(passed[1] - passed[0]) / max(about(run).layers - 1, 1)), "", _always


def largest_in_window(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Largest mean recovery in the layers of the claim's window."""
    _, curves, layers = _curve(index, claim, model, attribute)
    inside = (layers >= claim.window[0]) & (layers <= claim.window[1])
    if not inside.any():
        raise _Missing(f"the run of {model} on {attribute} has none of the layers {claim.window}")
    return _extreme(curves, curves.values[:, inside]), "", _always


def earlier_than_others(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Fusion depth minus that of another model, as shares of depth."""
    mine, theirs = (_one(index, name, attribute, claim.granularity) for name in (model, other))
    one, two = resample_together(curves_together([mine, theirs]), about(mine).seed, DRAWS)
    return replace(one, values=depth_shares(mine, one.values) - depth_shares(theirs, two.values)), "", _always


def lead_contrast(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Mean lead over the other models on the claim's attributes, minus that on those of its contrast."""
    both = (*claim.attributes, *claim.contrast)
    keys = [(name, attr) for attr in both for name in (model, *claim.against)]
    runs = {key: _one(index, *key, claim.granularity) for key in keys}
    together = resample_together(curves_together(list(runs.values())), 0, DRAWS)
    shares = {key: depth_shares(runs[key], part.values) for key, part in zip(keys, together, strict=True)}
    lead = {
        attr: np.mean([shares[name, attr] for name in claim.against], axis=0) - shares[model, attr] for attr in both
    }
    here, there = (np.mean([lead[attr] for attr in some], axis=0) for some in (claim.attributes, claim.contrast))
    ahead = bool(here[0] > 0)
    return replace(together[0], values=here - there), "" if ahead else "there is no lead", lambda confidence: ahead


def last_above_others(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Recovery at the last token minus that at the best other token, both averaged over the layers before the last."""
    run = _one(index, model, attribute, claim.granularity)
    aligned = align_tokens(run)
    rates = aligned["recovery_rate"].transpose("sample", "layer", "token").values[:, :-1].mean(axis=1)
    if rates.shape[1] < 2 or np.isnan(rates).all():
        raise _Missing(f"the run of {model} on {attribute} has fewer than two layers or tokens")
    means = resample(ClusterSums.of(rates, group_names(aligned)), about(run).seed, DRAWS)
    best = int(np.nanargmax(means.values[0, :-1]))
    note = f"best other token: {aligned['token_text'].values[best]!r}"
    ahead = means.values[:, -1:] - means.values[:, :-1]
    return _extreme(means, ahead[:, ~np.isnan(ahead[0])], smallest=True), note, _always


def object_peak(index: Index, claim: Claim, model: str, attribute: str, other: str) -> Measured:
    """Largest difference between option tokens and the text around them, in a layer of the window."""
    run = _one(index, model, attribute, claim.granularity)
    difference, names = object_difference(run, claim.window)
    if not difference.sizes["layer"] or bool(difference.isnull().all()):
        raise _Missing(f"the run of {model} on {attribute} has no option tokens or no layers to look at")
    means = resample(ClusterSums.of(difference.values.astype(np.float64), names), about(run).seed, DRAWS)
    tested = object_effect(run, claim.window, about(run).seed)
    note = f"stands out most at layer {tested.layer}, p = {tested.p_text} for all layers looked at"
    return _extreme(means, means.values), note, lambda confidence: tested.p <= 1 - confidence


MEASURES: dict[str, Callable[[Index, Claim, str, str, str], Measured]] = {
    measure.__name__: measure
    for measure in (
        depth,
        settled,
        width,
        largest_in_window,
        earlier_than_others,
        lead_contrast,
        last_above_others,
        object_peak,
    )
}
"""What a claim can be about, by name."""
