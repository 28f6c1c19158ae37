"""Where a scorer's model and store come from, and how newer ones are detected."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vista.arrays import Float32s
from vista.config.checks import Architecture, IndexKind, Precision, ScoringBackend
from vista.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ItemIndexError,
    ItemIndexMismatchError,
    SummarizerMismatchError,
    VistaError,
)
from vista.files import checked_path
from vista.machine import may_have_gpu
from vista.model.features import RowFeatureReader, Schema
from vista.model.item_projections import ItemProjections
from vista.model.saved_model import CONFIG_FILE, INDEX_MANIFEST, ModelDescription, SavedModel, SharedTables
from vista.model.serving_model import ADAPTER_SUFFIX, Adapter, ServingModel
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.store.reader import ShardedReader, StoreReader, open_store
from vista.store.record import TailColumn, UserColumn
from vista.threads import adopt_num_threads

if TYPE_CHECKING:
    import torch

    from vista.model.item_index import ItemIndex
    from vista.model.vista_model import VistaModel
    from vista.scorer.scorer import Scorer

logger = logging.getLogger(__name__)
WARNED_SHARE = 0.1
"""Of the items of an index: if more were added to the model later, requests become slower."""


@dataclass(frozen=True, slots=True)
class ServingSource:
    """A model and a store, to be opened together."""

    model: str | Path | VistaModel
    store: str | Path
    device: str
    key: bytes | None
    precision: Precision
    index: str | Path | None = None
    project_per_request: bool = False
    generation: int | None = None
    """Number of the store's generation to serve; None follows the published one."""
    backend: ScoringBackend = ScoringBackend.auto
    adapter: str | Path | Mapping[str, str | Path] | None = None
    """As in `Scorer.open`."""

    def open(self, old: ServingSnapshot | None = None) -> ServingSnapshot:
        """Open both. Opens them again if the model is replaced meanwhile, as by an export or `vista items add`.

        Args:
            old: what is in service. Adapters of the same model that cannot be read keep its values, if it has them.

        Raises:
            StoreError, CheckpointError: the model or the store is missing or damaged, or they do not match.
        """
        while True:
            identity = self._identity()
            try:
                opened = self._open(identity, old)
            except VistaError:
                if self._identity() == identity:
                    raise
            else:
                if self._identity() == identity:
                    return opened
                opened.store.close()

    def _open(self, identity: tuple[int, ...], old: ServingSnapshot | None) -> ServingSnapshot:
        stored = not self.project_per_request
        if isinstance(self.model, (str, Path)):
            is_cpu = self.device == "cpu" or (self.device == "auto" and not may_have_gpu())
            folder, device = Path(self.model), "cpu" if is_cpu else str(resolved(self.device))
            self._require_records(folder)
            served, items, checksum = _loaded(folder, device, with_candidate=stored)
        else:
            served, items = _in_memory(self.model, with_candidate=stored)
            device, checksum = str(self.model.device), None
        index = None if self.index is None else self._opened_index(items)
        opened = self._opened_store(served.summarizer_id, served.config.tail_len, served.schema, served.user_features)
        try:
            precision = self.precision
            if precision is Precision.auto:
                from vista.device import choose_precision  # asks torch what the processor multiplies

                precision = choose_precision(precision, resolved(device))
            kept = None if old is None or old.checksum != checksum else old.adapters
            adapters = self._adapters(served, kept)
            made = partial(ServingSnapshot, served, items, opened, device, precision, identity, checksum, index)
            return made(backend=self.backend, adapters=adapters)
        except BaseException:
            opened.close()
            raise

    def _opened_index(self, items: ItemProjections) -> ItemIndex:
        from vista.model.item_index import ItemIndex  # Searching an index needs torch.

        assert self.index is not None
        if items.retrieval is None:
            raise ConfigError(f"index={self.index}: this model has no retrieval head; open the scorer without an index")
        index = ItemIndex.load(self.index)
        index.require(items.retrieval, str(self.index))
        num_later = len(items.retrieval) - 1 - index.num_items
        if num_later > WARNED_SHARE * index.num_items and index.manifest.kind is not IndexKind.flat:
            logger.warning(
                "%s lacks %d items that were added to the model later, so each request compares all of them; run "
                "`vista index` again",
                self.index,
                num_later,
            )
        return index

    def open_newer(self, snapshot: ServingSnapshot, task: str) -> ServingSnapshot | None:
        """Open all again if the folder holds another model, whose summaries are published and whose index is there, or
        if the index was replaced; None otherwise.

        Args:
            snapshot: what is in service.
            task: a task that the new model must have.

        Raises:
            StoreError, CheckpointError: the new ones cannot be served, or the new model lacks `task`.
        """
        if self._identity() in (snapshot.identity, ()):
            return None
        try:
            opened = self.open(snapshot)
        except (SummarizerMismatchError, ItemIndexMismatchError) as error:
            logger.warning("%s holds a new model, but the old one stays in service: %s", self.model, error)
            return None
        if task not in opened.tasks:
            opened.store.close()
            raise CheckpointError(
                f"{self.model} holds a new model without the task {task!r}; open a scorer for another task"
            )
        return opened

    def _require_records(self, folder: Path) -> None:
        """Check that the store has records that the model in a folder can read, before its large files are read: a
        service tries this again and again while it waits for a refresh.

        Raises:
            SummarizerMismatchError, RecordContentsError: the store has none.
        """
        try:
            saved = ModelDescription.read(folder)
            if saved.summarizer_id is None:
                return
            users = RowFeatureReader.load(folder, "user", saved.schema.user_features)
        except (VistaError, OSError, ValueError):
            return  # Opening the model reports what is wrong with it.
        self._opened_store(bytes.fromhex(saved.summarizer_id), saved.config.tail_len, saved.schema, users).close()

    def _opened_store(
        self, summarizer_id: bytes, tail_len: int, schema: Schema, users: RowFeatureReader | None
    ) -> StoreReader | ShardedReader:
        return open_store(
            self.store,
            summarizer_id=summarizer_id,
            key=self.key,
            tail_len=tail_len,
            tail_columns=[TailColumn(*column) for column in schema.tail_sizes.items()],
            user_columns=[] if users is None else [UserColumn(*column) for column in users.digests()],
            generation=self.generation,
        )

    def _adapters(self, served: ServingModel, kept: Mapping[str | None, Float32s] | None) -> dict[str | None, Float32s]:
        """Values by name. With `kept`, one that cannot be read has the value there, or is left out."""
        adapters = {}
        for name, path in adapter_files(self.adapter).items():
            try:
                adapters[name] = Adapter.read(path, served).values
            except AdapterError as error:
                if kept is None:
                    raise
                if name in kept:
                    adapters[name] = kept[name]
                state = "the old one stays in service" if name in kept else "requests cannot name it"
                logger.error("%s; %s", error, state)
        return adapters

    def _identity(self) -> tuple[int, ...]:
        """Identifies the export in the folder, the index, and adapters, all of which may be replaced; () if there is
        none."""
        if not isinstance(self.model, (str, Path)):
            return ()
        files = [checked_path(self.model, CheckpointError) / CONFIG_FILE]
        files += adapter_files(self.adapter).values()
        if self.index is not None:
            files.append(checked_path(self.index, ItemIndexError) / INDEX_MANIFEST)
        try:
            found = [file.stat() for file in files]
        except OSError:
            return ()  # such as between the two renames of an export, where names cannot be exchanged
        return tuple(number for status in found for number in (status.st_dev, status.st_ino, status.st_mtime_ns))


def adapter_files(adapter: str | Path | Mapping[str, str | Path] | None) -> dict[str | None, Path]:
    """Files by the names of requests; that of None is for all requests. `adapter`: as in `Scorer.open`."""
    if adapter is None or isinstance(adapter, Mapping):
        return {name: checked_path(path, AdapterError) for name, path in (adapter or {}).items()}
    path = checked_path(adapter, AdapterError)
    return {file.stem: file for file in sorted(path.glob(f"*{ADAPTER_SUFFIX}"))} if path.is_dir() else {None: path}


def resolved(device: str) -> torch.device:
    """`resolve_device`; loads torch."""
    from vista.device import resolve_device

    return resolve_device(device)


def _loaded(folder: Path, device: str, *, with_candidate: bool) -> tuple[ServingModel, ItemProjections, str | None]:
    """The model of a folder, the projections of its items, and the checksum of its config.json."""
    ModelDescription.read(folder).require(Architecture.vista, folder, "VistaModel")
    tables = SharedTables(is_shared=device == "cpu")
    saved = SavedModel.read(folder, tables)

    @cache
    def made() -> VistaModel:
        from vista.model.vista_model import VistaModel  # loads torch

        model = VistaModel.built(saved).to(device).eval()
        if model.features is not None:
            model.features.share_rows(tables)
        adopt_num_threads()
        return model

    served = ServingModel.load(saved, tables, made)
    items = ItemProjections.load(saved, tables, with_candidate=with_candidate)
    return served, items, saved.description.checksum


def _in_memory(model: VistaModel, *, with_candidate: bool) -> tuple[ServingModel, ItemProjections]:
    model.eval()
    served = ServingModel.of(model, model.empty_summary().cpu().numpy())
    return served, ItemProjections.of(model, with_candidate=with_candidate)


class Forkable(Protocol):
    """An object that holds what does not survive a fork, such as a lock or a thread."""

    def _after_fork(self) -> None:
        """Make the copy in a forked child usable."""


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def repair_after_fork(held: Forkable) -> None:
    """Call `held._after_fork()` in every child that is forked during the object's life."""
    _registered.add(held)


def _repair() -> None:
    for held in _registered:
        held._after_fork()


os.register_at_fork(after_in_child=_repair)


class Follower:
    """Calls `reload` at regular intervals in a daemon thread, between `start` and `stop`, while the scorer exists.

    The scorer counts errors. An error is logged only if it differs from the previous one.

    Args:
        scorer: only a weak reference is kept, so that the thread does not keep the scorer alive.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = weakref.ref(scorer)
        self._running: tuple[threading.Thread, threading.Event] | None = None
        repair_after_fork(self)

    def start(self, every_s: float) -> None:
        """Call `reload` every `every_s` seconds, instead of at an earlier interval.

        Raises:
            ValueError: every_s is not positive or too large.
        """
        if not 0 < every_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"every_s: must be positive and at most {threading.TIMEOUT_MAX:.0f}, got {every_s}")
        self.stop()
        stopped = threading.Event()
        parts = self._scorer, stopped, every_s
        thread = threading.Thread(target=_follow, args=parts, name="vista-follow", daemon=True)
        self._running = thread, stopped
        thread.start()

    def stop(self) -> None:
        """End the thread, if there is one, and wait for a running reload to finish."""
        running, self._running = self._running, None
        if running is not None:
            thread, stopped = running
            stopped.set()
            if thread is not threading.current_thread():
                thread.join()

    def _after_fork(self) -> None:
        self._running = None  # Only the parent has the thread.


def _follow(reference: weakref.ref[Scorer], stopped: threading.Event, every_s: float) -> None:
    problem = ""
    while not stopped.wait(every_s):
        scorer = reference()
        if scorer is None:
            return
        try:
            scorer.reload()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # Panics of extensions in Rust are not Exceptions.
            if stopped.is_set():
                return
            text = f"{type(error).__name__}: {error}"
            if text != problem:
                logger.warning("reload failed; the previous model and store stay in service: %s", text)
            problem = text
        else:
            if problem:
                logger.info("reload works again")
            problem = ""
        del scorer
