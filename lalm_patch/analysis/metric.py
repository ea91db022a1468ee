"""Other metrics than the probability of the answer, from what a run stores; nothing is run again.

A run keeps the options' logits and ranks, the log-sum-exp over the vocabulary and the divergence from the clean run of
every cell. That is enough for every metric here. `with_metric` puts one in the place of the probability, and all of
this package's analysis, figures and reports work on what it returns. Why it matters: a probability saturates, so two
cells that differ by much may look alike near 0 and 1, while a margin of logits does not (Heimersheim and Nanda, arXiv
2404.15255; Zhang and Nanda, 2309.16042).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from lalm_patch.analysis.options import option_texts, right_options
from lalm_patch.analysis.run_info import about
from lalm_patch.errors import DataError
from lalm_patch.tracing.metrics import measured_as, share_moved

Measure = Callable[[xr.Dataset, str], xr.DataArray]
"""From a run's dataset and one of clean, corrupted, patched to what is measured of it; larger is better."""


def _logits(dataset: xr.Dataset, run: str) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Options' logits [..., option], log-sum-exp [...], whether an option is the right one [sample, option]."""
    right = right_options(dataset)
    return dataset[f"option_logit_{run}"].astype(float), dataset[f"logsumexp_{run}"].astype(float), right


def _right(logits: xr.DataArray, right: xr.DataArray) -> xr.DataArray:
    return logits.where(right).max("option")


def _exp(values: xr.DataArray) -> xr.DataArray:
    return values.copy(data=np.exp(values.values))


def probability(dataset: xr.Dataset, run: str) -> xr.DataArray:
    """Probability of the answer over the whole vocabulary: what a run reports."""
    return _exp(log_probability(dataset, run))


def log_probability(dataset: xr.Dataset, run: str) -> xr.DataArray:
    """Its logarithm, in nats."""
    logits, logsumexp, right = _logits(dataset, run)
    return _right(logits, right) - logsumexp


def logit_margin(dataset: xr.Dataset, run: str) -> xr.DataArray:
    """Logit of the answer minus that of the best other option, in nats."""
    logits, _, right = _logits(dataset, run)
    return _right(logits, right) - logits.where(~right).max("option")


def option_probability(dataset: xr.Dataset, run: str) -> xr.DataArray:
    """Probability of the answer among the options alone."""
    logits, _, right = _logits(dataset, run)
    shifted = _exp(logits - logits.max("option"))
    there = option_texts(dataset) != ""  # past a sample's last option there is nothing to add
    return _right(shifted, right) / shifted.where(there, 0.0).sum("option", skipna=False)


def rank(dataset: xr.Dataset, run: str) -> xr.DataArray:
    """Minus the logarithm of the answer's rank in the vocabulary: from rank 1000 to 100 is as far as from 10 to 1."""
    values = _stored(dataset, f"rank_{run}")
    return values.copy(data=-np.log(values.values))


def kl(dataset: xr.Dataset, run: str) -> xr.DataArray:
    """Minus KL(clean run || this run) over the vocabulary, in nats: 0 where the whole distribution is back."""
    return -_stored(dataset, f"kl_{run}")


def _stored(dataset: xr.Dataset, name: str) -> xr.DataArray:
    if name not in dataset:
        raise DataError(
            f"the run has no {name}: it was made on a server, by an approximation, or by an older version of this "
            "package; repeat it with backend=local engine=auto"
        )
    return dataset[name].astype(float)


METRICS: dict[str, tuple[Measure, str]] = {
    "probability": (probability, "1"),
    "log_probability": (log_probability, "nat"),
    "logit_margin": (logit_margin, "nat"),
    "option_probability": (option_probability, "1"),
    "rank": (rank, "1"),
    "kl": (kl, "nat"),
}
"""Metrics and their units, by name."""


def with_metric(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """The run's dataset with another metric in the place of the answer's probability.

    Args:
        dataset: a run's dataset.
        name: one of `METRICS`.

    Returns:
        A dataset whose `p_clean`, `p_corrupted`, `p_patched` hold the metric and whose `recovery_rate` follows from it;
        the same samples count. The rate is NaN where the metric is not larger in the clean run.

    Raises:
        ValueError: no such metric; the message lists them.
        DataError: a run that did not store what the metric needs.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r}: expected one of {', '.join(METRICS)}")
    measure, units = METRICS[name]
    text = (measure.__doc__ or name).split(":")[0].rstrip(".")
    runs = ("clean", "corrupted", "patched", *(["exact"] if "p_exact" in dataset else []))
    values = {run: measure(dataset, run) for run in runs}
    gap = values["clean"] - values["corrupted"]
    patched, clean, corrupted, gap = xr.broadcast(values["patched"], values["clean"], values["corrupted"], gap)
    order = dataset["recovery_rate"].dims
    moved = share_moved(patched.values, clean.values, corrupted.values, measured_as(about(dataset).direction, order))
    rate = patched.copy(data=moved).where(gap > 0)
    changed = {
        "recovery_rate": rate.transpose(*order).assign_attrs(dataset["recovery_rate"].attrs | {"metric": name}),
        **{
            f"p_{run}": value.assign_attrs(long_name=f"{text}, {run} run", units=units) for run, value in values.items()
        },
    }
    return dataset.assign(changed).assign_attrs(metric=name)
