"""The two optimizers of a model: AdamW for dense parameters, sparse Adam for the tables of items and features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vista.config import OptimConfig
from vista.model.ranking_model import RankingModel

BETAS = (0.9, 0.98)
FINAL_RATE = 0.01
"""Share of the learning rate that remains at the end."""
FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate as a multiple of the network's."""


class Optimizers:
    """Updates all parameters of a model that require gradients."""

    def __init__(self, model: RankingModel, optim: OptimConfig) -> None:
        self._optim = optim
        tables = [(model.item_table, optim.table_rate)]
        if model.features is not None:
            tables.append((model.features.values, 1.0))
        self._tables = [table for table, _ in tables]
        is_table = {id(p) for p in self._tables}
        self._dense = [p for p in model.parameters() if p.requires_grad and id(p) not in is_table]
        counted = [p for head in (model.counted, model.popularity) if head is not None for p in head.parameters()]
        is_counted = {id(p) for p in counted}
        # Matrices of linear maps decay. Norms, biases, embeddings, seeds and position biases do not.
        linear = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
        decayed = [weight for weight in linear if weight.requires_grad and id(weight) not in is_counted]
        is_decayed = {id(p) for p in decayed}
        plain = [p for p in self._dense if id(p) not in is_decayed | is_counted]
        groups = [
            {"params": decayed, "weight_decay": optim.weight_decay, FACTOR: 1.0},
            {"params": plain, "weight_decay": 0.0, FACTOR: 1.0},
        ]
        if counted:
            groups.append({"params": counted, "weight_decay": optim.weight_decay, FACTOR: optim.counted_rate})
        self.dense = torch.optim.AdamW(
            groups,
            lr=optim.learning_rate,
            betas=BETAS,
        )
        self.table = torch.optim.SparseAdam(
            [{"params": [table], FACTOR: rate} for table, rate in tables],
            lr=optim.learning_rate,
            betas=BETAS,
        )

    def schedule(self, step: int, share_done: float, warmup_steps: int) -> float:
        """Set the learning rates, and return the network's: linear warm-up, then a cosine down to FINAL_RATE.

        Args:
            step: steps done.
            share_done: share of the training that is done.
            warmup_steps: steps of the warm-up.
        """
        warm = min(1.0, (step + 1) / max(warmup_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(share_done, 1.0)))
        rate = self._optim.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)
        for group in (*self.dense.param_groups, *self.table.param_groups):
            group["lr"] = rate * group[FACTOR]
        return rate

    def backward(self, loss: Tensor) -> float:
        """Compute the gradient, scale it to a norm of `optim.gradient_clip` at most, and return its norm before."""
        self.dense.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        used: list[Tensor] = [p for p in self._dense if p.grad is not None]
        for table in self._tables:
            if table.grad is not None:
                table.grad = table.grad.coalesce()  # a row that was read twice counts once, with the sum
                # torch computes no norm of sparse tensors: a stand-in shows the same memory as a dense gradient.
                touched = torch.empty_like(table.grad.values())
                touched.grad = table.grad.values()
                used.append(touched)
        return float(nn.utils.clip_grad_norm_(used, self._optim.gradient_clip))

    def step(self) -> None:
        """Update the parameters."""
        self.dense.step()
        self.table.step()  # type: ignore[no-untyped-call]
        for table in self._tables:
            table.grad = None
