"""Data-parallel training: the ranks of a torchrun job each train a part of every batch, and take the same step.

The losses and the gradient are those of the whole batch. The loss of a rank is a mean over its own labels, so it counts
by its share of the labels of all ranks. Then the gradients of the ranks are summed. Letters: K names of losses.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vista.config import OptimConfig
from vista.examples.batch import Batch, balanced_parts, batch_part, chunk_work
from vista.examples.batch_source import MEASURED_BATCHES, BatchSource
from vista.model.losses import Losses, LossPart, loss_names, weighted_losses
from vista.ranks import Ranks

logger = logging.getLogger(__name__)
MOST_IDLE = 0.2
"""Share of time that ranks may wait for the one with the largest part. Above it, a run warns."""


class DataParallel:
    """The part of a training step that only ranks need: divide batches, and combine losses and gradients."""

    def __init__(self, ranks: Ranks, tasks: list[str], optim: OptimConfig, seed: int) -> None:
        """
        Args:
            tasks: of the model.
            seed: of the run.
        """
        self._ranks, self._optim, self._seed = ranks, optim, seed
        self._names = loss_names(tasks)

    def part(self, batch: Batch, step: int) -> Batch | None:
        """This rank's part of a batch; None if it has none. Also seeds what the model draws in this step.

        There is a seed per step and rank, so a resumed run is bit-identical without storing each rank's random state.
        """
        drawn = np.random.SeedSequence([self._seed, step, self._ranks.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        chunks = balanced_parts(chunk_work(batch), self._ranks.size)[self._ranks.rank]
        return batch_part(batch, chunks) if len(chunks) else None

    def combined(self, own: Losses) -> tuple[Losses, Tensor]:
        """The losses of all ranks, and what this rank minimizes.

        Args:
            own: losses of this rank's part.
        """
        # By name: whether the loss exists, its labels, and its sum over them.
        table = torch.zeros(3, len(self._names), dtype=torch.float64, device=self._ranks.device)
        for column, name in enumerate(self._names):
            if name in own.parts:
                count = torch.as_tensor(own.counts[name], dtype=torch.float64, device=table.device)
                mean = own.parts[name].detach().double()
                table[:, column] = torch.stack([torch.ones_like(count), count, count * mean])
        counts = table[1].tolist()
        self._ranks.sum(table)
        exists, totals, sums = table.tolist()
        shared, whole = {}, {}
        for name, found, count, total, loss_sum in zip(self._names, exists, counts, totals, sums, strict=True):
            if not found:
                continue
            whole[name] = LossPart(torch.tensor(loss_sum / max(total, 1.0)), int(total))
            if name in own.parts:
                shared[name] = LossPart(own.parts[name] * (count / max(total, 1.0)), int(count))
        objective = weighted_losses(shared, self._optim).total
        if whole and not objective.requires_grad:  # other ranks have labels
            objective = torch.zeros((), device=objective.device, requires_grad=True)
        return weighted_losses(whole, self._optim), objective

    def combine_gradients(self, dense: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
        """Replace gradients by their sums over all ranks.

        Args:
            dense: parameters with dense gradients. One that no rank has used keeps None, as in a single process.
            tables: parameters with coalesced sparse gradients.
        """
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in dense]
        used = torch.tensor([p.grad is not None for p in dense], dtype=torch.float32, device=self._ranks.device)
        flat = torch.cat([*(part.flatten() for part in parts), used])
        self._ranks.sum(flat)
        *sums, used = torch.split(flat, [*(p.numel() for p in dense), len(dense)])
        for parameter, gradient, count in zip(dense, sums, used.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if count else None
        trained = [table for table in tables if table.requires_grad]
        gradients = self._ranks.sum_sparse([table.grad for table in trained], trained)
        for table, gradient_sum in zip(trained, gradients, strict=True):
            table.grad = gradient_sum

    def log_balance(self, source: BatchSource) -> None:
        """Log how evenly the first batches are divided."""
        largest = total = 0
        for index in range(min(source.num_batches(0), MEASURED_BATCHES)):
            work = chunk_work(source.batch(0, index))
            largest += max(int(work[part].sum()) for part in balanced_parts(work, self._ranks.size))
            total += int(work.sum())
        idle = 1 - total / max(largest * self._ranks.size, 1)
        logger.info("%d ranks; each waits about %.0f %% of a step for the largest part", self._ranks.size, 100 * idle)
        if idle > MOST_IDLE:
            logger.warning(
                "%d ranks wait about %.0f %% of their time, because the longest chunks fill most of a batch: raise "
                "data.tokens_per_batch, lower data.chunk_len, or start fewer ranks",
                self._ranks.size,
                100 * idle,
            )
