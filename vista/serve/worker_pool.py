"""The service: its address, and its workers."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from vista.config import ServeConfig
from vista.config.serve_config import ModelsFile
from vista.errors import CheckpointError, ConfigError, VistaError, WorkerDiedError, log_to_stderr
from vista.machine import bound_socket, is_loopback
from vista.serve.shared import FOLDER_VARIABLE, read_tokens, shared_numbers

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0
"""Pause between two starts of a worker that keeps dying."""
OTHER_FILES = 100
"""File descriptors of a worker besides its clients' connections: of models, stores, and connections that it refuses."""
GRACE_S = 5.0
"""Time that workers have, after `stop_s`, before they are killed."""


@dataclass
class _Worker:
    """A process, and whether it has started to listen."""

    process: SpawnProcess
    started: Connection | None
    """Receives a message when the worker listens; None after that, or if the worker has closed it."""
    is_ready: bool = False


class WorkerPool:
    """Workers that share an address: started, replaced when they die, and stopped together.

    Each is a fresh process with a scorer of its own.

    The kernel assigns each connection to a worker. If a worker dies, its connections break, and clients that connect
    again reach the others.
    """

    def __init__(self, config: ServeConfig, file: ModelsFile | None, host: str, port: int) -> None:
        self._config = config
        self._file = file
        self._address = host, port
        self._context = get_context("spawn")
        self._workers: list[_Worker] = []
        self._pauses: list[float] = []
        """When workers that died may start again, s of the monotonic clock."""
        self._failures = 0
        self._has_started = False
        """Whether all workers have listened at the same time."""
        self._stopping = False

    def run(self, on_startup: Callable[[], None]) -> None:
        """Keep the workers running until SIGTERM or SIGINT, then wait until they have stopped.

        Args:
            on_startup: called once all workers listen.

        Raises:
            WorkerDiedError: the first worker died before it listened.
        """
        before = {one: signal.signal(one, self._stop) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._start()
            while not self._stopping and not self._workers[0].is_ready:
                if self._watch() and not self._stopping:  # SIGTERM also ends the first worker.
                    raise WorkerDiedError("the first worker ended before it could listen; its message is above")
            for _ in range(1, self._config.workers):
                self._start()
            while not self._stopping:
                for dead in self._watch():
                    self._replace_later(dead)
                ready = sum(worker.is_ready for worker in self._workers)
                if not self._has_started and ready == self._config.workers:
                    on_startup()
                    self._has_started = True
                while self._pauses and self._pauses[0] <= time.monotonic() and not self._stopping:
                    self._pauses.pop(0)
                    self._start()
        finally:
            self._end()
            for one, handler in before.items():
                signal.signal(one, handler)

    def _start(self) -> None:
        started, ours = self._context.Pipe(duplex=False)
        # While the service starts, none waits for the rest of an upgrade without listening: all would.
        others_serve = self._has_started and any(worker.is_ready for worker in self._workers)
        process = self._context.Process(
            target=_work, args=(self._config, self._file, *self._address, ours, others_serve), name="vista-worker"
        )
        process.start()
        ours.close()
        self._workers.append(_Worker(process, started))
        if self._stopping:  # The signal arrived before the worker was in the list.
            process.terminate()

    def _watch(self) -> list[_Worker]:
        """Wait briefly, note which workers listen, and remove and return those that died."""
        starting = {worker.started: worker for worker in self._workers if worker.started is not None}
        events = connection.wait([*starting, *(worker.process.sentinel for worker in self._workers)], timeout=0.2)
        for started, worker in starting.items():
            if started in events:
                try:
                    started.recv_bytes()
                    worker.is_ready, self._failures = True, 0
                except EOFError:
                    pass  # It has died, as its exit code will show.
                started.close()
                worker.started = None
        dead = [worker for worker in self._workers if worker.process.exitcode is not None]
        self._workers = [worker for worker in self._workers if worker not in dead]
        return dead

    def _replace_later(self, dead: _Worker) -> None:
        """Plan the start of another worker: at once if this one has listened, otherwise after a pause."""
        from prometheus_client.multiprocess import mark_process_dead  # reads the folder that `run_server` sets

        pid = dead.process.pid
        assert pid is not None
        mark_process_dead(pid)  # type: ignore[no-untyped-call]
        pause = 0.0 if dead.is_ready else min(LONGEST_PAUSE_S, 2.0**self._failures)
        self._failures += not dead.is_ready
        self._pauses.append(time.monotonic() + pause)
        self._pauses.sort()
        # An operator who replaces a token or a key sends SIGTERM, which also ends a worker that does not listen yet.
        planned = dead.process.exitcode in (0, -signal.SIGTERM)
        logger.log(
            logging.INFO if planned else logging.ERROR,
            *("worker %d ended with status %s; another one starts in %.0f s", pid, dead.process.exitcode, pause),
        )
        if dead.process.exitcode == -signal.SIGBUS:
            logger.error(
                "probably a mapped file of a model, an index, or a store was overwritten in place (copy into another "
                "folder, and rename it), or a disk is full"
            )

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.process.terminate()

    def _end(self) -> None:
        """Ask all workers to stop, and kill those that do not."""
        self._stopping = True
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + self._config.stop_s + GRACE_S
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.exitcode is None:
                logger.error("worker %s did not stop in time and is killed", worker.process.pid)
                worker.process.kill()
                worker.process.join()


def _work(
    config: ServeConfig, file: ModelsFile | None, host: str, port: int, started: Connection, others_serve: bool
) -> None:
    """The main function of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent then sends SIGTERM.
    log_to_stderr(logging.INFO)
    threading.Thread(target=_stop_with_parent, name="vista-parent", daemon=True).start()
    from vista.serve.worker import run_worker

    try:
        with bound_socket(host, port, shared=True) as listening:
            run_worker(config, file, listening, lambda: started.send_bytes(b"listening"), others_serve=others_serve)
    except VistaError as error:
        logger.error("error: %s", " ".join(str(error).split()))
        sys.exit(1)
    except Exception:  # Otherwise multiprocessing prints the traceback, with passwords.
        logger.exception("the worker ended unexpectedly")
        sys.exit(1)


def _stop_with_parent() -> None:
    """Stop this worker when its parent dies, for example because it was killed."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def run_server(config: ServeConfig) -> None:
    """Answer requests until SIGTERM or SIGINT; errors as of `run_worker`.

    Raises:
        ConfigError: the address cannot be used, the file of models is wrong or names a model that is missing, or the
            system does not allow `max_connections`.
        WorkerDiedError: with several workers, the first one could not start; its own message is in the log.
    """
    _allow_connections(config.max_connections)
    file = None if config.models is None else read_models(config.models)
    bound_socket(config.host, config.port).close()  # Another service on a shared port would not be noticed.
    with bound_socket(config.host, config.port, shared=config.workers > 1) as listening:
        host, port = listening.getsockname()[:2]
        if not read_tokens(config.token_file) and not is_loopback(listening):
            logger.warning("anyone who can reach %s may send requests; set token_file to require a token", host)

        def say() -> None:
            address = f"[{host}]" if ":" in host else host
            logger.info("listening on http://%s:%d", address, port)

        os.environ.pop(FOLDER_VARIABLE, None)
        if config.workers == 1:
            from vista.serve.worker import run_worker  # imports torch, which the parent of several workers does without

            run_worker(config, file, listening, say)
        else:
            with shared_numbers():
                WorkerPool(config, file, host, port).run(say)
    logger.info("stopped")


def _allow_connections(number: int) -> None:
    """Raise the limit on open files, which workers inherit, if it is too low: clients beyond it would get no answer."""
    needed = number + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(
            f"max_connections: {number:,} connections need {needed:,} file descriptors per worker, but a process may "
            f"have {hard:,} here (ulimit -Hn); raise that limit, or lower max_connections"
        ) from error


def read_models(path: str) -> ModelsFile:
    """The file of `models=`, whose models exist. All workers serve what it says now. Raises ConfigError if it is wrong,
    or names a folder without a model."""
    from vista.model.saved_model import ModelDescription  # most services do not need it

    file = ModelsFile.read(path)
    for name, served in file.models.items():
        try:
            ModelDescription.read(Path(served.model))
        except CheckpointError as error:
            raise ConfigError(f"{path}: models.{name}.model: {error}") from error
    return file
