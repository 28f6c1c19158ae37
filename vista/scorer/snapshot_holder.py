"""Holds what a scorer serves: each call runs on one snapshot, and reloads replace it; safe after a fork."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vista.errors import StoreError, VistaError
from vista.scorer.forks import repair_after_fork
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.scorer.serving_source import ServingSource


class SnapshotHolder:
    """Holds the snapshot in service, replaces it, and closes it."""

    def __init__(self, source: ServingSource) -> None:
        self._source = source
        self._closed = self._inherited = False
        self._changing = threading.Lock()
        self.current = source.open()
        repair_after_fork(self)

    @contextmanager
    def use(self) -> Iterator[ServingSnapshot]:
        """The current snapshot; its store stays open until the block ends.

        This takes no lock, because a fork could copy it locked: `calls` is a set, and each operation on it is atomic.

        Raises:
            StoreError: the holder is closed.
        """
        self._require_open()
        call = object()
        snapshot = self.current
        snapshot.calls.add(call)
        while snapshot is not self.current:  # A reload happened between the two lines above.
            self._release(snapshot, call)
            snapshot = self.current
            snapshot.calls.add(call)
        try:
            yield snapshot
        finally:
            self._release(snapshot, call)

    def reload(self, task: str) -> bool:
        """Move to a new generation of the store or a new model in the model's folder; returns whether there was one.

        Args:
            task: a task that a new model must have.

        Raises:
            StoreError, CheckpointError: the new one cannot be served; the old one stays in service.
        """
        with self._changing:
            self._require_open()
            try:
                newer = self._source.open_newer(self.current, task)
            except VistaError:
                self.current.store.reload()  # A model that cannot be served must not block new generations.
                raise
            if newer is None:
                return self.current.store.reload()
            old, self.current = self.current, newer
            self._close_unused(old)
            return True

    def close(self) -> None:
        """Close the store; closing twice is allowed."""
        with self._changing:
            self._closed = True
            self.current.store.close()

    def after_fork(self) -> None:
        """Make the copy in a forked child usable."""
        self._inherited = torch.get_num_threads() > 1
        self._changing = threading.Lock()

    def _release(self, snapshot: ServingSnapshot, call: object) -> None:
        snapshot.calls.discard(call)
        if snapshot is not self.current:
            self._close_unused(snapshot)

    def _close_unused(self, snapshot: ServingSnapshot) -> None:
        if not snapshot.calls:
            snapshot.store.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"the scorer of {self.current.store.path} is closed; open a new one")
        if self._inherited:  # OpenMP's threads are not forked, so a child that waits for them would hang.
            self._inherited = False
            torch.set_num_threads(1)
