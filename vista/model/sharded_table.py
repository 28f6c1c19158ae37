"""The item table of a model in training, divided row-wise among the ranks of a job by TorchRec.

A step reads the rows of its batch in three stages: TorchRec sends each row's number to the rank that holds the row,
FBGEMM looks the rows up there, and TorchRec sends the vectors back. The backward pass stops before and after the last
stage. So the gradient arrives at the ranks that hold the rows before anything is updated, and can be scaled by the
global norm.

Letters: N rows of the table, n of them on this rank, W their width; R rows that this rank reads; G reads of this rank's
rows by all ranks.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vista.config.checks import TablePrecision
from vista.errors import ConfigError, MissingDependencyError
from vista.installation import install_command
from vista.model.layers import TABLE_STD
from vista.ranks import JobRanks, Ranks, talking

# The only module that imports TorchRec and FBGEMM.

_before = logging.root.manager.disable
logging.disable(max(_before, logging.INFO))  # FBGEMM logs each of its libraries
try:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from torchrec.distributed.comm_ops import set_gradient_division
    from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
except (ImportError, OSError) as error:  # OSError: a library of another version or for GPUs
    raise MissingDependencyError(
        f"model.table=torchrec needs TorchRec 1.8 and FBGEMM 1.8, which fit torch 2.13 ({error}); install them in a "
        f"virtual environment of their own with: {install_command('torchrec')}"
    ) from error
finally:
    logging.disable(_before)

# It warns of a function that TorchRec calls.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

__all__ = [
    "DataType",
    "EmbOptimType",
    "EmbeddingCollection",
    "EmbeddingCollectionSharder",
    "EmbeddingConfig",
    "KeyedJaggedTensor",
    "ShardedEmbeddingCollection",
    "ShardingEnv",
    "SparseType",
    "construct_module_sharding_plan",
    "row_wise",
    "set_gradient_division",
]


NAME, FEATURE = "item_table", "item"
ROWS_DRAWN_AT_ONCE = 1 << 16
EPSILON = 1e-8
"""Of row-wise Adagrad."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What the gradient of a read passes on its way back."""

    row: Tensor
    """int64 [G] rows of this rank, from its first one."""
    looked_up: list[Tensor]
    """[G, W], which leads to FBGEMM's update."""
    sent: Tensor
    """[G, W], from which TorchRec made `arrived`."""
    arrived: Tensor
    """[R, W]."""
    vectors: Tensor
    """[R, W], from which the loss is computed."""


class ShardedTable:
    """A table [N, W] that no rank holds whole. All ranks call its methods in one order."""

    def __init__(self, shape: torch.Size, precision: TablePrecision) -> None:
        """
        Args:
            shape: [N, W].

        Raises:
            ConfigError: outside of `Ranks.joined`, or if a rank would hold no rows.
            MissingDependencyError: without TorchRec.
        """
        ranks = Ranks.current()
        if ranks is None:
            raise ConfigError("model.table=torchrec divides a table among ranks; train this model with vista train")
        num_rows, per_rank = shape[0], -(-shape[0] // ranks.size)
        if (ranks.size - 1) * per_rank >= num_rows:
            raise ConfigError(
                f"model.table=torchrec: a table of {num_rows} rows is too small for {ranks.size} ranks; set "
                "model.table=plain, or start fewer ranks"
            )
        self._ranks, self.shape = ranks, shape
        with torch.random.fork_rng(devices=[]), _without_info():  # FBGEMM draws values that nothing uses
            self._sharded = _sharded(self.shape, ranks, precision)
        (stored,) = self._sharded.state_dict().values()
        (shard,) = stored.local_shards()
        self.first: int = shard.metadata.shard_offsets[0]
        """First row of this rank."""
        self.weight = nn.Parameter(shard.tensor)
        """[n, W] rows of this rank, in the memory that FBGEMM reads."""
        self._read: _Read | None = None

    @classmethod
    def drawn(cls, shape: torch.Size, precision: TablePrecision) -> ShardedTable:
        """A table with the values of `drawn_table`, which also leaves torch's generator in the same state."""
        table, begin, (num_rows, width) = cls(shape, precision), 0, shape
        while begin < num_rows:
            # A tensor of few values is drawn in another way, so the last piece is a large one.
            count = ROWS_DRAWN_AT_ONCE if num_rows - begin >= 2 * ROWS_DRAWN_AT_ONCE else num_rows - begin
            table.write(begin, nn.init.normal_(torch.empty(count, width), std=TABLE_STD))
            begin += count
        table.write(0, torch.zeros(1, width))
        return table

    @torch.no_grad()
    def write(self, first: int, vectors: Tensor) -> None:
        """Replace the rows from `first` on by vectors [_, W], where they are on this rank."""
        low, high = max(first, self.first), min(first + len(vectors), self.first + len(self.weight))
        if low < high:
            self.weight[low - self.first : high - self.first] = vectors[low - first : high - first].to(self.weight)

    @torch.no_grad()
    def write_rows(self, rows: Tensor, vectors: Tensor) -> None:
        """Replace rows int64 [K] of the table by vectors [K, W], where they are on this rank."""
        rows = rows.to(self.weight.device) - self.first
        is_own = (rows >= 0) & (rows < len(self.weight))
        self.weight[rows[is_own]] = vectors.to(self.weight)[is_own]

    def read(self, rows: Tensor) -> Tensor:
        """[R, W] float32 of rows int64 [R] of the table. Ranks may read different numbers of rows. Where gradients are
        recorded, `take_gradient` continues the backward pass from the last read."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        length = torch.tensor([len(rows)], device=rows.device)
        asked = KeyedJaggedTensor(keys=[FEATURE], values=rows, lengths=length)
        context = self._sharded.create_context()
        with talking():
            received = self._sharded.input_dist(context, asked).wait().wait()
            with torch.set_grad_enabled(trains):
                looked_up = self._sharded.compute(context, received)
                sent = [part.detach().requires_grad_(trains) for part in looked_up]
                arrived = self._sharded.output_dist(context, sent).wait()[FEATURE].values()
        vectors: Tensor = arrived.detach().requires_grad_(trains)
        if trains:
            self._read = _Read(received[0].values(), looked_up, sent[0], arrived, vectors)
        return vectors

    def take_gradient(self) -> Tensor | None:
        """After a backward pass, send the gradient of the last read to the ranks of its rows. Returns the sum over
        ranks of the gradient of `weight`, float32, sparse and coalesced; None if nothing was read."""
        read = self._read
        if read is None:
            return None
        gradient = torch.zeros_like(read.vectors) if read.vectors.grad is None else read.vectors.grad
        with talking():
            torch.autograd.backward([read.arrived], [gradient])
        assert read.sent.grad is not None
        index = read.row.unsqueeze(0)
        return torch.sparse_coo_tensor(index, read.sent.grad, self.weight.shape, check_invariants=False).coalesce()

    @property
    def adagrad_sums(self) -> Tensor:
        """[n] float32 state of row-wise Adagrad: the sum over steps of the mean square of each row's gradient."""
        (state,) = self._sharded.fused_optimizer.state_dict()["state"].values()
        sums: Tensor = state[f"{NAME}.momentum1"].local_shards()[0].tensor
        return sums

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of row-wise Adagrad for the rows that are read from now on: FBGEMM takes it then."""
        optimizer = self._sharded.fused_optimizer
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()  # only takes the rate: the backward pass updates

    def step_by_row(self, scale: float) -> None:
        """Update the rows of the last read by FBGEMM's row-wise Adagrad. `scale`: multiplies the gradient."""
        assert self._read is not None and self._read.sent.grad is not None
        torch.autograd.backward(self._read.looked_up, [self._read.sent.grad * scale])
        self._read = None

    @property
    def leads(self) -> bool:
        """Whether this rank writes files."""
        return self._ranks.leads

    def own(self, whole: Tensor) -> Tensor:
        """[n, ...] the part of this rank of what has a row per row of the table, [N, ...]."""
        return whole[self.first : self.first + len(self.weight)]

    def norm_of_ranks(self, own: Tensor) -> float:
        """Euclidean norm over all ranks of the values of one tensor of each."""
        square = own.double().square().sum()
        self._ranks.sum(square)
        return math.sqrt(float(square))

    def pieces(self, own: Tensor) -> Iterator[Tensor]:
        """All N rows of what has a row per row of the table, in pieces at rank 0: `Ranks.rows_at_first`. `own`: [n,
        ...] of this rank."""
        return self._ranks.rows_at_first(own.detach())


@contextmanager
def _without_info() -> Iterator[None]:
    """Without log records of level INFO, of which FBGEMM writes pages."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def _sharded(shape: torch.Size, ranks: JobRanks, precision: TablePrecision) -> Any:
    """TorchRec's module with the table, whose values are not set yet."""
    set_gradient_division(False)  # vista's gradients are sums over ranks
    is_half = precision is TablePrecision.float16
    config = EmbeddingConfig(
        name=NAME,
        num_embeddings=shape[0],
        embedding_dim=shape[1],
        feature_names=[FEATURE],
        data_type=DataType.FP16 if is_half else DataType.FP32,
        init_fn=lambda table: table,
    )
    whole = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    # Its state takes 4 bytes per row, also where another optimizer trains the rows.
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "eps": EPSILON, "output_dtype": SparseType.FP32}
    sharder = EmbeddingCollectionSharder(fused_params=fused)
    plan = construct_module_sharding_plan(
        whole,
        {NAME: row_wise(compute_kernel="fused")},
        sharder=sharder,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        world_size=ranks.size,
        device_type=ranks.device.type,
    )
    environment = ShardingEnv.from_process_group(dist.group.WORLD)
    return sharder.shard(whole, plan, environment, device=ranks.device)
