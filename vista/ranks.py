"""The ranks of a torchrun job: processes that train one model together.

`torchrun --nproc-per-node=2 -m vista.cli train …` starts two. They communicate through gloo on CPUs and NCCL
on GPUs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.errors import ConfigError, RankError

TIMEOUT = timedelta(days=1)
"""Longest time that a rank waits for another one, for example while that one checks a large log or writes a checkpoint.
A rank that ends is noticed at once, because its connections close, and torchrun ends the others."""

PIECE_BYTES = 1 << 26
"""Most bytes of a table that one rank sends to another at a time."""


class Ranks:
    """The processes that work together. This class is a process alone; `JobRanks` is one of several. All methods except
    the properties are called by all ranks in one order."""

    rank, size = 0, 1
    _current: ClassVar[JobRanks | None] = None

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device, *, as_job: bool = False) -> Iterator[Ranks]:
        """Join the other ranks for a block.

        Args:
            device: if this is cuda, each rank of a machine uses its own GPU.
            as_job: whether a process without others is a job of one rank too.

        Raises:
            ConfigError: if the machine has fewer GPUs than ranks.
        """
        launched = is_launched()
        if not launched and not as_job:
            yield ALONE
            return
        backend = "gloo"
        if device.type == "cuda":
            device, backend = _own_gpu(device) if launched else torch.device("cuda", device.index or 0), "nccl"
            torch.cuda.set_device(device)
        with talking():
            if launched:
                dist.init_process_group(backend, timeout=TIMEOUT)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            Ranks._current = JobRanks(device)
            yield Ranks._current
        finally:
            Ranks._current = None
            dist.destroy_process_group()

    @classmethod
    def current(cls) -> JobRanks | None:
        """The job that this process has joined; None outside of `joined`."""
        return Ranks._current

    def own_device(self, device: torch.device) -> torch.device:
        """Where this rank computes, if the configuration names `device`."""
        return device

    @property
    def leads(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0

    @property
    def checks_files(self) -> bool:
        """Whether this rank checks files for its machine."""
        return True

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Check that all ranks have the same configuration, log, and versions. Raises ConfigError on every rank if
        the facts of a rank differ from those of rank 0."""
        all_facts = self.gather(dict(facts))
        first = all_facts[0]
        for rank, own in enumerate(all_facts):
            changed = [f"{k} ({first.get(k)} -> {own.get(k)})" for k in first | own if first.get(k) != own.get(k)]
            if changed:
                raise ConfigError(
                    f"rank {rank} differs from rank 0 in {', '.join(changed)}; start all ranks with the same command, "
                    "log, and versions"
                )

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        return [value]

    def part_of(self, work: Int) -> slice:
        """This rank's cases among all cases of an evaluation: consecutive ones, with its share of the work. `work`:
        int64 [N] of each case, at least 1."""
        done = np.cumsum(work)
        rank_of_case = (done - work) * self.size // done[-1] if len(work) else work
        low, high = np.searchsorted(rank_of_case, [self.rank, self.rank + 1]).tolist()
        return slice(low, high)

    def of_all_cases(self, own: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Arrays with one row per case, by name: combine those of each rank's `part_of` the cases. `own`: by name. A
        rank without cases may pass no arrays."""
        parts = [part for part in self.gather(dict(own)) if part]
        return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def from_first(self, value: Any) -> Any:
        """The value of rank 0."""
        return value

    def any(self, value: bool) -> bool:
        """Whether a value is True on any rank."""
        return value

    def check_weights(self, tensors: Iterable[Tensor], step: int) -> None:
        """Check that all ranks have the same tensors, bit for bit, as they must after the same steps.

        Args:
            tensors: parameters and buffers that every rank holds whole.
            step: steps done, for the message.

        Raises:
            RankError: on every rank, if those of a rank differ from those of rank 0.
        """

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks the tensors of rank 0, such as parameters and buffers."""

    def wait(self) -> None:
        """Wait until all ranks have called this."""


class JobRanks(Ranks):
    """This process among those of a job.

    Raises:
        RankError: from all methods, if another rank has ended or cannot be reached.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        """Where this rank computes."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def own_device(self, device: torch.device) -> torch.device:
        return self.device

    @property
    def checks_files(self) -> bool:
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with talking():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        values = [value]
        with talking():
            dist.broadcast_object_list(values)
        return values[0]

    def check_weights(self, tensors: Iterable[Tensor], step: int) -> None:
        own = [
            xxhash.xxh3_128_hexdigest(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
            for tensor in tensors
        ]
        first, *others = self.gather(own)
        for rank, digests in enumerate(others, 1):
            if changed := sum(mine != theirs for mine, theirs in zip(digests, first, strict=True)):
                raise RankError(
                    f"step {step}: rank {rank} has other weights than rank 0 ({changed} of {len(first)} tensors); a "
                    "machine may have faulty memory or another kind of processor. Rerun the command on other machines "
                    "to resume from the last checkpoint, up to which the ranks agreed"
                )

    def share(self, tensors: Iterable[Tensor]) -> None:
        with talking():
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all ranks, which is bit-identical on all of them."""
        with talking():
            dist.all_reduce(tensor)

    def any(self, value: bool) -> bool:
        count = torch.tensor(int(value), device=self.device)
        self.sum(count)
        return bool(count > 0)

    def sum_sparse(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Sums over all ranks of coalesced sparse tensors with one sparse dimension. None stands for zeros; the sum
        is None where all ranks have None.

        Args:
            like: dense tensors of their shapes.
        """
        if not tensors:
            return []
        facts = torch.tensor([_num_rows_and_key(each) for each in tensors], device=self.device)
        all_facts = torch.stack(self._gathered(facts)).cpu()
        sums: list[Tensor | None] = []
        for each, table, own_facts in zip(tensors, like, all_facts.unbind(1), strict=True):
            own_counts = own_facts[:, 0]
            most = int(own_counts.max())
            if each is not None and most > 0 and bool((own_facts == own_facts[0]).all()):
                # The usual case: all ranks have the rows of the whole batch's items.
                total = each.clone()
                self.sum(total.values())
                sums.append(total)
                continue
            if most < 0:
                sums.append(None)
                continue
            # A gradient without rows counts as a step of the optimizer, as in a single process; None does not.
            index = torch.zeros(max(most, 1), dtype=torch.int64, device=self.device)
            values = torch.zeros(max(most, 1), *table.shape[1:], dtype=table.dtype, device=self.device)
            if each is not None:
                index[: len(each.values())] = each.indices()[0]
                values[: len(each.values())] = each.values()
            of_ranks = zip(self._gathered(index), self._gathered(values), own_counts.clamp(min=0).tolist(), strict=True)
            rows, entries = zip(*((rows[:count], entries[:count]) for rows, entries, count in of_ranks), strict=True)
            total = torch.sparse_coo_tensor(
                torch.cat(rows)[None], torch.cat(entries), table.shape, check_invariants=False
            )
            sums.append(total.coalesce())
        return sums

    def rows_at_first(self, own: Tensor) -> Iterator[Tensor]:
        """The rows of all ranks in their order, at rank 0, on its CPU, at most PIECE_BYTES at a time.

        Other ranks send theirs while rank 0 iterates, and get no tensors.

        Args:
            own: [n, ...] rows of this rank. The ranks have the same trailing sizes and dtype.
        """
        step = max(PIECE_BYTES // (own.element_size() * math.prod(own.shape[1:])), 1)
        for rank, count in enumerate(self.gather(len(own))):
            for begin in range(0, count, step):
                if rank == self.rank:
                    piece = own[begin : begin + step].contiguous()
                elif self.leads:
                    piece = own.new_empty(min(step, count - begin), *own.shape[1:])
                with talking():
                    if rank == self.rank and not self.leads:
                        dist.send(piece, 0)
                    elif rank != self.rank and self.leads:
                        dist.recv(piece, rank)
                if self.leads:
                    yield piece.cpu()

    def wait(self) -> None:
        self.any(False)

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with talking():
            dist.all_gather(parts, tensor)
        return parts


ALONE = Ranks()
"""A process without others."""


def is_launched() -> bool:
    """Whether torchrun has started this process and at least one other."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def _num_rows_and_key(tensor: Tensor | None) -> tuple[int, int]:
    """Number of rows of a coalesced sparse tensor, and a hash of which ones; -1 and 0 for None."""
    if tensor is None:
        return -1, 0
    index = tensor.indices()[0].cpu()
    return len(index), xxhash.xxh3_64_intdigest(index.contiguous().numpy().data) >> 1  # as int64


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of this rank."""
    local, on_machine, count = int(os.environ["LOCAL_RANK"]), os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
    if device != torch.device("cuda"):
        raise ConfigError(f"device={device}: each rank uses its own GPU; write device=cuda")
    if local >= count:
        raise ConfigError(
            f"device=cuda: this machine has {count} GPUs for {on_machine} ranks; lower --nproc-per-node, or set "
            "device=cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def talking() -> Iterator[None]:
    """In a `with` block of communication, errors are those of other ranks. Raises RankError in place of
    RuntimeError."""
    try:
        yield
    except torch.OutOfMemoryError:  # of this rank
        raise
    except RuntimeError as error:  # gloo and NCCL raise nothing more specific
        reason = str(error).partition("\n")[0]
        raise RankError(
            f"another rank has ended or cannot be reached ({reason}); see its message, then rerun the command to resume"
        ) from error
