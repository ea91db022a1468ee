"""A stage of a training that may be killed: it goes on where it was, and ends with the same weights.

Every so often all that the next step depends on is written: weights, the optimiser's moments, both streams of random
numbers. The same seed gives the same weights, killed or not (on one machine, with one number of threads).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

WARM_UP = 100
REPORTED = 50
SECONDS_BETWEEN_SAVES = 120.0


class Stage:
    """Trains `modules` for so many steps, or the rest of them.

    Args:
        path: file of the stage's state; removed never, so that a finished stage is read instead of repeated.
        modules: what is trained (parameters that require no gradient are left out) and saved.
        steps: how many in all.
        rate: largest learning rate; warms up over `WARM_UP` steps, then half a cosine down to a hundredth.
        seed: of both streams of random numbers.
        weight_decay: of AdamW.

    Attributes:
        rng: random numbers for drawing batches.
        step: number of steps done.
        losses: of every step.
    """

    def __init__(
        self, path: Path, modules: nn.Module, *, steps: int, rate: float, seed: int, weight_decay: float = 0.05
    ) -> None:
        self.path, self.modules, self.steps, self._rate = path, modules, steps, rate
        self._parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=rate, weight_decay=weight_decay)
        self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.step = 0
        self.losses: list[float] = []
        if path.is_file():
            self._read()

    def run(self, loss: Callable[[Stage], Tensor], every: int = 0, report: Callable[[], str] | None = None) -> None:
        """Do what is left; `report` is logged every so many steps and at the end."""
        started, begun, saved = time.monotonic(), self.step, time.monotonic()
        self.modules.train()
        while self.step < self.steps:
            for group in self._optimiser.param_groups:
                group["lr"] = self.rate_now()
            value = loss(self)
            self._optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimiser.step()
            self.losses.append(float(value.detach()))
            self.step += 1
            if self.step % REPORTED == 0:
                speed = (self.step - begun) / (time.monotonic() - started)
                left = (self.steps - self.step) / speed / 60
                mean = np.mean(self.losses[-REPORTED:])
                log.info(
                    "%s: step %d/%d  loss %.3f  %.2f steps/s  about %.1f min left",
                    self.path.stem,
                    self.step,
                    self.steps,
                    mean,
                    speed,
                    left,
                )
            if report is not None and (self.step == self.steps or (every and self.step % every == 0)):
                self._report(report)
            if self.step == self.steps or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                self._write()
                saved = time.monotonic()
        self.modules.eval()

    def rate_now(self) -> float:
        """Learning rate of the coming step."""
        warm = min(1.0, (self.step + 1) / WARM_UP)
        return self._rate * warm * (0.505 + 0.495 * math.cos(math.pi * self.step / self.steps))

    def _report(self, report: Callable[[], str]) -> None:
        self.modules.eval()
        streams = torch.get_rng_state()
        with torch.no_grad():
            log.info("%s: %s", self.path.stem, report())
        torch.set_rng_state(streams)
        self.modules.train()

    def _write(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "rng": self.rng.bit_generator.state,
            "torch": torch.get_rng_state(),
            "step": self.step,
            "steps": self.steps,
            "losses": self.losses,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def _read(self) -> None:
        state = torch.load(self.path, weights_only=False)
        if state["steps"] != self.steps:
            raise ValueError(f"{self.path}: a stage of {state['steps']} steps, expected {self.steps}; remove the file")
        self.modules.load_state_dict(state["modules"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch"])
        self.step, self.losses = state["step"], state["losses"]
        log.info("%s: goes on after step %d", self.path.stem, self.step)
