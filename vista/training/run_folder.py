"""The folder of a run, the text files that it appends to, and how it takes Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vista.config import TrainConfig
from vista.errors import ConfigError
from vista.files import open_file, recover_folder, remove_leftovers, writable_folder
from vista.runs.tracking import TrackedRun
from vista.training.checkpoint import remove_checkpoints

logger = logging.getLogger(__name__)


def open_to_append(path: Path) -> TextIO:
    """Open a text file of a run to read and append; it is created if it does not exist.

    Raises:
        ConfigError: it cannot be opened, is a symbolic link, or is not a regular file. A named pipe is refused at once.
    """
    try:
        return open(
            path,
            "a+",
            encoding="utf-8",
            errors="replace",
            opener=lambda _, flags: open_file(path, flags, 0o666, follow=False),
        )
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); correct this path, or choose another run_dir"
        ) from error


@contextlib.contextmanager
def claimed_folder(config: TrainConfig) -> Iterator[None]:
    """Make the folder of a run, check what can be checked before anything is read, and keep `log_file` open.

    Raises:
        ConfigError: its files cannot be written, or another process is training here.
        MissingDependencyError: the tracker of the run is not installed.
    """
    folder = Path(config.run_dir)
    writable_folder(folder, "run_dir")
    TrackedRun(folder, config.tracking)
    with log_file(folder / "train.log"):
        yield


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Copy vista's log records to a file of the run, which is locked meanwhile.

    Raises:
        ConfigError: as for `open_to_append`, or another process is training in this folder.
    """
    file = open_to_append(path)
    if not _locked(file):
        file.close()
        raise ConfigError(
            f"run_dir={path.parent}: another process is training here; wait for it, or choose another run_dir"
        )
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("vista")
    level = root.level
    root.addHandler(handler)
    if level == logging.NOTSET:
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
        file.close()


def _locked(file: TextIO) -> bool:
    """Whether the lock of a file is ours now, or its file system has none. `vista runs` may hold it for a moment."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return True
            raise
    return False


def clean_folder(run_dir: Path, *, starts_over: bool) -> None:
    """Remove what killed processes left in a run folder.

    Args:
        starts_over: whether to remove the checkpoints and the export too. Otherwise an export stays until a better one
            replaces it, even if its checkpoints are gone.
    """
    if starts_over:
        remove_checkpoints(run_dir / "checkpoints")
        for name in ("best", "best.old"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    recover_folder(run_dir / "best")
    remove_leftovers(run_dir)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Make Ctrl-C fill the list, so that the current step ends and a checkpoint is written; a second one stops at once.

    Outside the main thread signals cannot be handled, and the list stays empty.
    """
    mark: list[bool] = []

    def note(signum: int, frame: Any) -> None:
        if mark:
            raise KeyboardInterrupt
        mark.append(True)
        logger.warning("interrupt: finishing this step and writing a checkpoint (press Ctrl-C again to stop at once)")

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:
        previous = None
    try:
        yield mark
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
