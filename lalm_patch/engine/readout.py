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
        option_rank: [runs, options] int64, 1 for the most probable token of the whole vocabulary; None if not known.
        divergence: [runs, 2] float32, KL(p || q) in nats over the whole vocabulary, where p is the source run (first)
            or the run into which states are put (second), and q this run; None if not known.
    """

    option_logits: np.ndarray
    logsumexp: np.ndarray
    top_id: np.ndarray
    option_rank: np.ndarray | None = None
    divergence: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.logsumexp)

    @property
    def probabilities(self) -> np.ndarray:
        """P(option) under the softmax over the whole vocabulary: [runs, options] float32."""
        return np.asarray(np.exp(self.option_logits - self.logsumexp[:, None]))

    def rows(self, chosen: slice) -> Readout:
        """Some of the rows."""
        rank, divergence = (None if part is None else part[chosen] for part in (self.option_rank, self.divergence))
        return Readout(self.option_logits[chosen], self.logsumexp[chosen], self.top_id[chosen], rank, divergence)

    @classmethod
    def of(cls, logits: Tensor, option_ids: Sequence[int], references: Tensor | None = None) -> Readout:
        """Read float32 logits [runs, vocabulary].

        Args:
            logits: of the runs.
            option_ids: target tokens.
            references: logits [2, vocabulary] of the source run and of the run into which states are put.
        """
        ids = torch.as_tensor(list(option_ids), device=logits.device)
        total = torch.logsumexp(logits, dim=-1)
        ranks = _ranks_on_cpu if logits.device.type == "cpu" else _ranks
        return cls(
            logits[:, ids].cpu().numpy(),
            total.cpu().numpy(),
            logits.argmax(dim=-1).cpu().numpy(),
            ranks(logits, ids),
            None if references is None else _divergence(references.to(logits), logits, total).cpu().numpy(),
        )

    @classmethod
    def scatter(cls, parts: Sequence[tuple[Sequence[int], Readout]]) -> Readout:
        """Put parts back into the order of the cells: each part comes with its rows' indices."""
        order = np.concatenate([np.asarray(indices, dtype=int) for indices, _ in parts])
        inverse = np.argsort(order, kind="stable")

        def joined(values: Sequence[np.ndarray | None]) -> np.ndarray | None:
            known = [part for part in values if part is not None]
            return np.concatenate(known)[inverse] if len(known) == len(values) else None

        readouts = [part for _, part in parts]
        return cls(
            np.concatenate([part.option_logits for part in readouts])[inverse],
            np.concatenate([part.logsumexp for part in readouts])[inverse],
            np.concatenate([part.top_id for part in readouts])[inverse],
            joined([part.option_rank for part in readouts]),
            joined([part.divergence for part in readouts]),
        )


def _ranks(logits: Tensor, ids: Tensor) -> np.ndarray:
    """Ranks of some tokens in each row, 1 for the largest logit: [runs, ids]."""
    # One by one: a comparison of all at once would need as many copies of the logits.
    found = [1 + (logits > logits[:, id, None]).sum(-1) for id in ids]
    return torch.stack(found, dim=-1).cpu().numpy()


def _ranks_on_cpu(logits: Tensor, ids: Tensor) -> np.ndarray:
    """As `_ranks`; on a CPU numpy counts twenty times faster than torch, which would add a fifth to a cell's time."""
    return np.array([[1 + np.count_nonzero(row > row[id]) for id in ids.tolist()] for row in logits.numpy()])


def _divergence(references: Tensor, logits: Tensor, total: Tensor) -> Tensor:
    """KL(reference || run) for two references: [runs, 2]. As products of matrices, without a copy of the logits."""
    log_p = references.log_softmax(dim=-1)
    p = log_p.exp()
    return ((p * log_p).sum(-1) - logits @ p.T + total[:, None]).clamp_min(0)
