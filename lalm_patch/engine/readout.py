"""What is kept of a run's last position: enough for every metric on the options, without the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """Logits at the last position, one row per run.

    Attributes:
        option_logits: [runs, options] float32.
        logsumexp: [runs] float32, over the whole vocabulary; log P(option) = option_logits - logsumexp.
        top_id: [runs] int64, the most probable token of the whole vocabulary.
    """

    option_logits: np.ndarray
    logsumexp: np.ndarray
    top_id: np.ndarray

    def __len__(self) -> int:
        return len(self.logsumexp)

    @property
    def probabilities(self) -> np.ndarray:
        """P(option) under the softmax over the whole vocabulary: [runs, options] float32."""
        return np.asarray(np.exp(self.option_logits - self.logsumexp[:, None]))

    def rows(self, chosen: slice) -> Readout:
        """Some of the rows."""
        return Readout(self.option_logits[chosen], self.logsumexp[chosen], self.top_id[chosen])

    @classmethod
    def of(cls, logits: Tensor, option_ids: Sequence[int]) -> Readout:
        """Read float32 logits [runs, vocabulary]."""
        ids = torch.as_tensor(list(option_ids), device=logits.device)
        return cls(
            logits[:, ids].cpu().numpy(),
            torch.logsumexp(logits, dim=-1).cpu().numpy(),
            logits.argmax(dim=-1).cpu().numpy(),
        )

    @classmethod
    def scatter(cls, parts: Sequence[tuple[Sequence[int], Readout]]) -> Readout:
        """Put parts back into the order of the cells: each part comes with its rows' indices."""
        order = np.concatenate([np.asarray(indices, dtype=int) for indices, _ in parts])
        inverse = np.argsort(order, kind="stable")
        joined = (np.concatenate([getattr(part, name) for _, part in parts])[inverse] for name in _FIELDS)
        return cls(*joined)


_FIELDS = ("option_logits", "logsumexp", "top_id")
