"""Builds the batches of an epoch in a thread while steps run."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from vista.examples.batch import Batch
from vista.examples.batch_source import BatchSource

NUM_AHEAD = 2
"""Batches in memory besides that of the current step: one that is ready, and one that is being built. If building a
batch takes longer than a step, as for the first batch of a long history, the next step uses the one that is ready."""


class BatchPrefetcher:
    """An iterator over the batches of an epoch. One thread builds them in order, at most NUM_AHEAD ahead.

    The batches are those of `BatchSource.batch`, bit for bit. If building a batch fails, `next` raises the
    error of the thread, with its type and traceback, at that batch. Use this as a context manager, which ends the
    thread; until then, do not ask the source for another epoch.

    A thread is enough. Steps release the interpreter's lock in every operation of torch, and building releases it in
    NumPy and while it reads the log. A process would need its own copy of the source, and seconds to start.
    """

    def __init__(self, source: BatchSource, epoch: int, first: int) -> None:
        """
        Args:
            first: index of the first batch.
        """
        self._source, self._epoch = source, epoch
        self._left = iter(range(first, source.num_batches(epoch)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vista-batches")
        self._ahead: deque[Future[Batch]] = deque()

    def __enter__(self) -> BatchPrefetcher:
        for _ in range(NUM_AHEAD):
            self._build_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the batches that no step has asked for, and wait for the one that is being built."""
        self._thread.shutdown(cancel_futures=True)

    def __iter__(self) -> BatchPrefetcher:
        return self

    def __next__(self) -> Batch:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft().result()
        self._build_next()
        return batch

    def _build_next(self) -> None:
        if (index := next(self._left, None)) is not None:
            self._ahead.append(self._thread.submit(self._source.batch, self._epoch, index))
