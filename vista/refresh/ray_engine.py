"""Ray as the engine of a full refresh: actors encode batches of users, and the caller writes what they return."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from vista.arrays import Int
from vista.config.checks import Precision
from vista.config.store_config import RayConfig
from vista.device import keep_freed_memory, set_threads
from vista.errors import ConfigError, LogFormatError, SummarizerMismatchError, VistaError, WorkerDiedError, shown
from vista.installation import require_module
from vista.log.event_log import EventLog
from vista.machine import usable_cores
from vista.model.vista_model import VistaModel
from vista.refresh.full import BatchEncoder, StageClock, UserRecords
from vista.store.record import RecordSpec
from vista.store.state_record import StateSpec


@dataclass(frozen=True, slots=True)
class ActorJob:
    """All that an actor needs: a few hundred bytes, since model and log come from files."""

    model: str
    """Folder of the model."""
    device: str
    num_threads: int
    log: str
    """Folder of the log."""
    last_segment: int
    log_digest: str
    """Of `log_digest`."""
    precision: Precision
    tokens_per_batch: int
    spec: RecordSpec
    state_spec: StateSpec | None


@dataclass(frozen=True, slots=True)
class ActorResult:
    """What an actor returns for a batch."""

    process: int
    """Process id of the actor. It changes if the actor is restarted."""
    records: UserRecords | VistaError
    """An error is returned and raised by the caller, because Ray would change its class and message."""


class RefreshActor:
    """Loads the model and maps the log once, then encodes batches of users. A restarted actor opens model and log
    again, up to the same segment."""

    def __init__(self, job: ActorJob) -> None:
        self._job = job
        self._encoder: BatchEncoder | None = None

    def encode(self, users: Int, counts: Int) -> ActorResult:
        """The records of a batch, as of `BatchEncoder.encode`."""
        try:
            # Not in the constructor, whose errors Ray turns into text.
            self._encoder = self._encoder or _open(self._job)
            records = self._encoder.encode(users, counts, self._job.spec, self._job.state_spec, StageClock())
            return ActorResult(os.getpid(), records)
        except VistaError as error:
            return ActorResult(os.getpid(), error)


def log_digest(log: EventLog) -> str:
    """Digest of what a log's manifests say, which includes the checksums of its files."""
    return hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode()).hexdigest()


def _open(job: ActorJob) -> BatchEncoder:
    set_threads(job.num_threads)
    keep_freed_memory()
    log = EventLog.open(job.log, last_segment=job.last_segment)
    if log_digest(log) != job.log_digest:
        raise LogFormatError(
            f"{job.log}: is not the log with which this refresh began, or was compacted since then; run the refresh "
            "again"
        )
    model = VistaModel.from_pretrained(job.model, torch.device(job.device)).eval()
    if model.summarizer_id() != job.spec.summarizer_id:
        raise SummarizerMismatchError(
            f"{job.model}: is not the model with which this refresh began; name the folder of that model, which must "
            "not change, then run the refresh again"
        )
    return BatchEncoder.of(model, log, job.precision, job.tokens_per_batch)


ray: Any = require_module("ray", "ray")

logger = logging.getLogger(__name__)
QUEUED = 2
"""Batches that an actor holds: the one that it encodes, and the next one."""
AHEAD = 4
"""Batches per actor that are being encoded or wait for the writer, so that a long history does not delay others."""
_OBJECT_STORE_BYTES = 256 << 20
"""On this machine: shared memory for results that wait for the writer. Results that do not fit spill to disk."""
CONNECT_S = 10.0
PATIENCE_S = 60.0
"""If no batch returns for so long, a warning says what is pending."""
MAX_RETRIES = 10
"""How often a batch is repeated if its actor dies. After that, the batch is the likely cause, such as by its size."""


class RayEngine:
    """Encodes batches in actors of Ray, each of which loads the model and maps the log.

    If an actor or its node dies, Ray restarts the actor and repeats the batches that it had not returned. The engine
    uses the Ray instance of this process if there is one. Otherwise it starts or joins one for the refresh.

    Args:
        model: folder of the model that `refresh` gets. Actors read it and the log's folder by these paths.
        config: address and number of actors.
        device: where actors compute; on cuda, each actor has one GPU.
        num_threads: CPU threads per actor.
    """

    def __init__(
        self,
        model: str | Path,
        config: RayConfig | None = None,
        *,
        device: torch.device | None = None,
        num_threads: int = 1,
    ) -> None:
        self._model = Path(model).absolute()
        self._config = config or RayConfig()
        self._device = "cpu" if device is None else device.type
        self._num_threads = num_threads

    def encode(
        self,
        encoder: BatchEncoder,
        batches: Iterable[tuple[Int, Int]],
        spec: RecordSpec,
        state_spec: StateSpec | None,
        clock: StageClock,
    ) -> Generator[UserRecords, None, None]:
        """The records of batches, in their order.

        Args:
            encoder: of this process; each actor has an equal one.
            batches: (users, counts) of each, as in `BatchEncoder.encode`. They are taken as they are needed.
            spec: what each record must hold.
            state_spec: what each state must hold; None to make no states.
            clock: gets the time of each stage.

        Raises:
            ConfigError: Ray cannot be started or reached, or has too few CPUs or GPUs for the actors.
            WorkerDiedError: the actor of a batch died more than `MAX_RETRIES` times.
            VistaError: as raised in an actor.
        """
        job = ActorJob(
            model=str(self._model),
            device=self._device,
            num_threads=self._num_threads,
            log=os.path.abspath(encoder.log.path),
            last_segment=encoder.log.last_segment,
            log_digest=log_digest(encoder.log),
            precision=encoder.precision,
            tokens_per_batch=encoder.tokens_per_batch,
            spec=spec,
            state_spec=state_spec,
        )
        remaining = iter(batches)
        first = next(remaining, None)
        if first is not None:  # A run that was killed before it published has none left.
            with self._instance(), self._actors(job) as actors:
                yield from _in_order(actors, encoder.log, chain([first], remaining), clock)

    @contextmanager
    def _instance(self) -> Iterator[None]:
        """Ray, started or joined if this process has not done so; what is started here is stopped."""
        if ray.is_initialized():
            yield
            return
        arguments: dict[str, Any] = {"address": self._config.address}
        folder = None
        if self._config.address == "local":
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            folder = tempfile.mkdtemp(prefix="vista-ray-")
            arguments |= {
                "num_cpus": self._config.num_actors * self._num_threads or max(usable_cores(), self._num_threads),
                "object_store_memory": _OBJECT_STORE_BYTES,
                "include_dashboard": False,
                "_temp_dir": folder,
            }
        try:
            try:
                _check_port(self._config.address)
                ray.init(**arguments, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"ray.address={shown(self._config.address)}: Ray cannot be started or reached there: {error}; "
                    "check the address and the cluster (`ray status`), or leave out ray"
                ) from error
            yield
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _actors(self, job: ActorJob) -> Iterator[list[Any]]:
        """Handles of the actors, which end with the context."""
        num_gpus = int(self._device == "cuda")
        resource, each = ("GPU", num_gpus) if num_gpus else ("CPU", self._num_threads)
        # An actor does not span machines.
        room = sum(int(node["Resources"].get(resource, 0)) // each for node in ray.nodes() if node["Alive"])
        wanted = self._config.num_actors or room
        if not 0 < wanted <= room:
            raise ConfigError(
                f"ray.num_actors={self._config.num_actors}: Ray at {self._config.address} has room for {room} actors "
                f"of {each} {resource}(s); request fewer actors, or add machines to the cluster"
            )
        remote = ray.remote(RefreshActor).options(
            num_cpus=self._num_threads, num_gpus=num_gpus, max_restarts=-1, max_task_retries=MAX_RETRIES
        )
        actors = [remote.remote(job) for _ in range(wanted)]
        try:
            yield actors
        finally:
            for actor in actors:
                _end(actor)


def _end(actor: Any) -> None:
    """End an actor. A cluster that is gone does not hide the error with which the refresh ended."""
    try:
        ray.kill(actor)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        logger.warning("ray: an actor could not be ended (%s); it ends with Ray", error)


def _check_port(address: str) -> None:
    """Raise OSError if nothing answers at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()


@dataclass(frozen=True, slots=True)
class _Task:
    """A batch that an actor has."""

    result: Any
    """Reference to the ActorResult."""
    place: int
    """Of the actor."""
    users: Int


def _in_order(
    actors: Sequence[Any], log: EventLog, batches: Iterable[tuple[Int, Int]], clock: StageClock
) -> Iterator[UserRecords]:
    """The records of batches in their order, with a bounded number of batches in progress."""
    remaining = iter(batches)
    underway: deque[_Task] = deque()
    unfinished: set[Any] = set()
    processes: dict[int, int] = {}
    while True:
        load = Counter(task.place for task in underway if task.result in unfinished)
        while len(underway) < AHEAD * len(actors):
            place = min(range(len(actors)), key=load.__getitem__)
            batch = next(remaining, None) if load[place] < QUEUED else None
            if batch is None:
                break
            task = _Task(actors[place].encode.remote(*batch), place, batch[0])
            underway.append(task)
            unfinished.add(task.result)
            load[place] += 1
        if not underway:
            return
        with clock.stage("wait"):
            finished, _ = ray.wait(list(unfinished), fetch_local=False, timeout=PATIENCE_S)
        if not finished:
            _warn_of_pending(log, [task for task in underway if task.result in unfinished], len(processes))
        unfinished.difference_update(finished)
        while underway and underway[0].result not in unfinished:
            task = underway.popleft()
            with clock.stage("wait"):
                result = _get(task, log)
            before = processes.setdefault(task.place, result.process)
            if result.process != before:
                logger.warning("ray: the process %d of an actor ended; its batches were repeated", before)
                processes[task.place] = result.process
            if isinstance(result.records, VistaError):
                raise result.records
            yield result.records


def _warn_of_pending(log: EventLog, tasks: Sequence[_Task], num_active: int) -> None:
    """Warn that no batch has returned for a while.

    Args:
        tasks: the pending batches, oldest first.
        num_active: actors that have returned a batch before.
    """
    users = log.users.ids(tasks[0].users[[0, -1]]).tolist()
    free, total = ray.available_resources(), ray.cluster_resources()
    resources = ", ".join(
        f"{free.get(name, 0):g} of {total[name]:g} {name}(s)" for name in ("CPU", "GPU") if name in total
    )
    logger.warning(
        "ray: no batch has returned for %g s; %d pending, the first from user %r to user %r; %d actor(s) have returned "
        "batches so far, and %s are free: if others use them, the actors cannot start",
        PATIENCE_S, len(tasks), *users, num_active, resources,
    )  # fmt: skip


def _get(task: _Task, log: EventLog) -> ActorResult:
    exceptions = ray.exceptions
    try:
        result: ActorResult = ray.get(task.result)
        return result
    except exceptions.RayTaskError:  # an error of the code, with the actor's traceback
        raise
    except exceptions.RayError as error:
        first, last = log.users.ids(task.users[[0, -1]]).tolist()
        batch = f"the batch from user {first!r} to user {last!r}"
        deaths = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.OutOfMemoryError)
        if isinstance(error, deaths):
            raise WorkerDiedError(
                f"the actor of {batch} died {MAX_RETRIES + 1} time(s), perhaps for lack of memory; lower "
                f"tokens_per_batch or ray.num_actors, then run the refresh again to resume: {error}"
            ) from error
        raise WorkerDiedError(
            f"Ray did not return {batch}; check its nodes, memory, and disks, then run the refresh again to resume: "
            f"{error}"
        ) from error
