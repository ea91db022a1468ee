"""What all trainings share: AdamW, a learning rate that warms up and comes down, clipped gradients, a log."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

WARM_UP = 100
REPORTED = 100


class Descent:
    """Descends, step by step.

    Args:
        parameters: those that require no gradient are left out.
        rate: largest learning rate.
        stages: steps of each stage; the learning rate warms up in each, then follows half a cosine down to a tenth.

    Attributes:
        losses: of every step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, *stages: int) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=rate, weight_decay=0.01)
        self._rates = [
            rate * min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            for steps in stages
            for step in range(steps)
        ]
        self._started = time.monotonic()
        self.losses: list[float] = []

    def step(self, loss: Tensor) -> None:
        """One step down, with gradients clipped to a norm of 1; logs loss, rate and time left now and then."""
        for group in self._optimiser.param_groups:
            group["lr"] = self._rates[len(self.losses)]
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self.losses.append(float(loss.detach()))
        done, total = len(self.losses), len(self._rates)
        if done % REPORTED == 0:
            speed = done / (time.monotonic() - self._started)
            left = (total - done) / speed / 60
            mean = np.mean(self.losses[-REPORTED:])
            log.info("step %d/%d  loss %.3f  %.2f steps/s  about %.1f min left", done, total, mean, speed, left)


def report_held_out(found: Mapping[str, tuple[float, int]]) -> None:
    """Log the share of held-out clips that are right, by attribute."""
    log.info("held out: %s", ", ".join(f"{name} {100 * share:.1f} %" for name, (share, _) in found.items()))
