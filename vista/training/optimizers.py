"""The two optimizers of a model, AdamW for dense parameters and sparse Adam for tables; and what ranks do in a step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from vista.config import OptimConfig
from vista.config.checks import TableOptimizer, planned
from vista.examples.batch import Batch, balanced_parts, batch_part, chunk_work
from vista.examples.batch_source import MEASURED_BATCHES, BatchSource
from vista.model.feature_encoders import FeatureEncoder
from vista.model.layers import CandidateHead, restored
from vista.model.losses import Losses, LossPart, loss_names, weighted_losses
from vista.model.ranking_model import RankingModel
from vista.ranks import JobRanks

BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
"""Decoupled weight decay (AdamW) of linear maps. Tables have none."""
GRADIENT_CLIP = 1.0
"""Largest global norm of a gradient."""
HEAD_RATE = 5.0
"""Learning rate of the heads that read counters, statistics, and pooled vectors, as a multiple of the network's. After
epoch 0, which fits them, it is 1."""
RECENCY = 8.0
"""About the last 1 / (RECENCY + 1) of all steps make the average of the weights."""
FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate as a multiple of the network's."""

CLIP_EPSILON = 1e-6
"""Added to the norm by which gradients are divided, as torch does."""


class WeightAverage:
    """The average of weights over the newest part of a training, which is validated and exported.

    At a constant learning rate, weights keep moving around the place where a falling rate would let them settle. Their
    average is close to that place after any number of steps, so training can stop after any epoch. The k-th weights
    that are added have the share (RECENCY + 1) / (k + RECENCY) of it: polynomial-decay averaging (Shamir and Zhang,
    ICML 2013).
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """
        Args:
            weights: parameters that are trained, by name.
        """
        self._weights = weights
        self.count = 0
        """How often weights were added."""
        self.values: dict[str, Tensor] = {}
        """By name, in float32 or wider; empty before the first time."""

    @torch.no_grad()
    def add(self) -> None:
        """Add the weights as they are now."""
        self.count += 1
        share = (RECENCY + 1) / (self.count + RECENCY)  # 1 at first
        for name, weight in self._weights.items():
            wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            if self.count == 1:
                self.values[name] = wide.clone()
            else:
                self.values[name].lerp_(wide, share)

    @torch.no_grad()
    def settle(self) -> None:
        """Set the weights to their average."""
        for name, value in self.values.items():
            self._weights[name].copy_(value)

    def restore(self, count: int, values: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint. Raises ValueError, TypeError, or AttributeError if it is the average of other
        weights, or is not finite."""
        own = {name: weight.shape for name, weight in self._weights.items()} if count else {}
        if type(count) is not int or count < 0 or {name: value.shape for name, value in values.items()} != own:
            raise ValueError("its average has other weights than the model")
        if not all(math.isfinite(float(value.sum(dtype=torch.float64))) for value in values.values()):
            raise ValueError("its average is not finite")
        self.count, self.values = count, {name: value.to(self._weights[name].device) for name, value in values.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """In this block, the weights are their average."""
        with restored(self._weights[name] for name in self.values):
            self.settle()
            yield


class Optimizers:
    """Updates all parameters of a model that require gradients."""

    def __init__(
        self,
        model: RankingModel,
        optim: OptimConfig,
        *,
        frozen_rows: int = 0,
        head_rate: float = HEAD_RATE,
        trains_tables: bool = True,
        combine: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
    ) -> None:
        """
        Args:
            frozen_rows: leading rows of the item table that stay as they are.
            head_rate: learning rate of the heads that read more than attention's outputs, as a multiple of the
                network's.
            trains_tables: False if no loss reads a table, as in epoch 0.
            combine: replaces the gradients of dense parameters and of tables by those of all ranks; None for a single
                process.
        """
        self._optim, self._frozen_rows, self._combine = optim, frozen_rows, combine
        self._item_table, self._sharded = model.item_table, model.sharded_table if trains_tables else None
        self._by_row = optim.table_optimizer is TableOptimizer.rowwise_adagrad
        self._row_scale = 1.0
        names = {id(p): name for name, p in model.named_parameters()}
        self._table_rate = planned(optim.table_rate, "optim.table_rate")
        tables = [(model.item_table, self._table_rate)]
        encoders = [part for part in model.modules() if isinstance(part, FeatureEncoder)]
        tables += [(encoder.values, 1.0) for encoder in encoders]
        self._tables = [table for table, _ in tables]
        is_table = {id(p) for p in self._tables}
        self._dense: list[Tensor] = [p for p in model.parameters() if p.requires_grad and id(p) not in is_table]
        heads: list[nn.Module] = [part for part in (model.counted, model.statistics) if part is not None]
        heads += [part.network for part in model.modules() if isinstance(part, CandidateHead)]
        counted: list[Tensor] = [p for head in heads for p in head.parameters()]
        is_counted = {id(p) for p in counted}
        # Matrices of linear maps decay. Norms, biases, embeddings, seeds and position biases do not.
        linear = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
        decayed: list[Tensor] = [weight for weight in linear if weight.requires_grad and id(weight) not in is_counted]
        is_decayed = {id(p) for p in decayed}
        plain = [p for p in self._dense if id(p) not in is_decayed | is_counted]
        groups: list[tuple[list[Tensor], float, float]] = [(decayed, WEIGHT_DECAY, 1.0), (plain, 0.0, 1.0)]
        if counted:
            groups.append((counted, WEIGHT_DECAY, head_rate))
        # With names, so that a checkpoint says whose moments it holds.
        self.dense = torch.optim.AdamW(
            [
                {"params": [(names[id(p)], p) for p in group], "weight_decay": decay, FACTOR: rate}
                for group, decay, rate in groups
            ],
            lr=optim.learning_rate,
            betas=BETAS,
        )
        self.table = torch.optim.SparseAdam(
            [{"params": [(names[id(table)], table)], FACTOR: rate} for table, rate in tables],
            lr=optim.learning_rate,
            betas=BETAS,
        )
        if not trains_tables:
            self._tables = []
        trained = [*self._dense, *(table for table in self._tables if table.requires_grad)]
        if self._by_row:  # Adagrad's rates fall by themselves, and its table is chosen to be small.
            trained = [p for p in trained if p is not self._item_table]
        self.average = WeightAverage({names[id(p)]: p for p in trained})

    def schedule(self, step: int, warmup_steps: int) -> float:
        """Set the learning rates, and return the network's: a linear warm-up, then constant (`WeightAverage`).

        Args:
            step: steps done.
            warmup_steps: steps of the warm-up.
        """
        rate = self._optim.learning_rate * min(1.0, (step + 1) / max(warmup_steps, 1))
        for group in (*self.dense.param_groups, *self.table.param_groups):
            group["lr"] = rate * group[FACTOR]
        if self._sharded is not None:
            self._sharded.set_rate(rate * self._table_rate)
        return rate

    def backward(self, loss: Tensor) -> float:
        """Compute the gradient, scale it to a norm of GRADIENT_CLIP at most, and return its norm before."""
        self.dense.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        sharded = None if self._sharded is None else self._sharded.take_gradient()
        for table in self._tables:
            if table.grad is not None:
                table.grad = table.grad.coalesce()  # a row that was read twice counts once, with the sum
                if self._frozen_rows and table is self._item_table:
                    table.grad = _rows_from(table.grad, self._frozen_rows)
        if self._combine is not None:
            # That of a sharded table is a sum already.
            self._combine(self._dense, self._tables if self._sharded is None else self._tables[1:])
        used: list[Tensor] = [p for p in self._dense if p.grad is not None]
        for table in self._tables:
            if table.grad is not None:
                # torch computes no norm of sparse tensors: a stand-in shows the same memory as a dense gradient.
                touched = torch.empty_like(table.grad.values())
                touched.grad = table.grad.values()
                used.append(touched)
        if sharded is None or self._sharded is None:
            return float(nn.utils.clip_grad_norm_(used, GRADIENT_CLIP))
        replicated = nn.utils.get_total_norm([p.grad for p in used if p.grad is not None])
        norm = math.hypot(float(replicated), self._sharded.norm_of_ranks(sharded.values()))
        nn.utils.clip_grads_with_norm_(used, GRADIENT_CLIP, torch.tensor(norm))
        self._row_scale = min(GRADIENT_CLIP / (norm + CLIP_EPSILON), 1.0)
        if not self._by_row:
            sharded.values().mul_(self._row_scale)
            self._item_table.grad = sharded
        return norm

    def step(self) -> None:
        """Update the parameters."""
        self.dense.step()
        self.table.step()  # type: ignore[no-untyped-call]
        if self._by_row and self._sharded is not None and self._item_table.requires_grad:
            self._sharded.step_by_row(self._row_scale)
        for table in self._tables:
            table.grad = None


def _rows_from(gradient: Tensor, first: int) -> Tensor:
    """A coalesced gradient without the rows before `first`. Adam would move these even by a gradient of 0."""
    kept = gradient.indices()[0] >= first
    index, values = gradient.indices()[:, kept], gradient.values()[kept]
    return torch.sparse_coo_tensor(index, values, gradient.shape, is_coalesced=True, check_invariants=False)


# Data-parallel training: the ranks of a torchrun job each train a part of every batch, and take the same step.
#
# The losses and the gradient are those of the whole batch. The loss of a rank is a mean over its own labels, so it
# counts by its share of the labels of all ranks. Then the gradients of the ranks are summed. Letters: K names of
# losses.

logger = logging.getLogger(__name__)
MOST_IDLE = 0.2
"""Share of time that ranks may wait for the one with the largest part. Above it, a run warns."""


class DataParallel:
    """The part of a training step that only ranks need: divide batches, and combine losses and gradients."""

    def __init__(self, ranks: JobRanks, tasks: list[str], optim: OptimConfig, seed: int) -> None:
        """
        Args:
            tasks: of the model.
            seed: of the run.
        """
        self._ranks, self._optim, self._seed = ranks, optim, seed
        self._names = loss_names(tasks)

    def part(self, batch: Batch, step: int) -> Batch | None:
        """This rank's part of a batch; None if it has none. Also seeds what the model draws in this step. There is a
        seed per step and rank, so a resumed run is bit-identical without storing each rank's random state."""
        drawn = np.random.SeedSequence([self._seed, step, self._ranks.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0]))
        chunks = balanced_parts(chunk_work(batch), self._ranks.size)[self._ranks.rank]
        return batch_part(batch, chunks) if len(chunks) else None

    def combined(self, own: Losses) -> tuple[Losses, Tensor]:
        """The losses of all ranks, and what this rank minimizes. `own`: losses of this rank's part."""
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
