"""A nursery imports vista once and forks a child per job, so that faults do not reach the tests' own process.

A job is a function of a module, called as `function(say, *arguments)`. `say(value)` sends a message immediately and
atomically, so that the test receives all messages from before a SIGKILL. The nursery runs
`python -m tests.faults.nursery`, optionally with a preloaded library or in a mount namespace. Its children end with it,
and it ends with the tests.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import vista
from tests.faults.preload import compiled

Say = Callable[[Any], None]
TIMEOUT_S = 240.0
_PR_SET_PDEATHSIG = 1
_messages = 1
"""Descriptor for messages to the tests."""


@dataclass
class Child:
    """The process of a job, as seen by the tests."""

    nursery: Nursery
    job: int
    pid: int = 0
    messages: list[Any] = field(default_factory=list)
    """Its messages, oldest first; `hear` returns them one by one."""
    exit_code: int | None = None
    """After its end: 0, 1 after an exception, -9 after SIGKILL."""
    returned: Any = None
    raised: str = ""
    """Type and text of the exception that ended it."""
    typed: bool = False
    """Whether that exception was a VistaError."""
    _heard: int = 0

    def hear(self, timeout_s: float = TIMEOUT_S) -> Any:
        """Wait for its next message; None if it ended without another one."""
        self.nursery.pump(lambda: len(self.messages) > self._heard or self.exit_code is not None, timeout_s)
        if len(self.messages) == self._heard:
            return None
        self._heard += 1
        return self.messages[self._heard - 1]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless the child has ended."""
        if self.exit_code is None and self.pid:  # 0 would be the process group of the tests.
            with suppress(ProcessLookupError):  # It ended, but its last message was not read yet.
                os.kill(self.pid, number)

    def end(self, timeout_s: float = TIMEOUT_S) -> Child:
        """Wait until it has ended."""
        self.nursery.pump(lambda: self.exit_code is not None, timeout_s)
        return self

    def result(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The function's return value; AssertionError with its message if it raised or was killed by a signal."""
        self.end(timeout_s)
        if self.exit_code != 0:
            raise AssertionError(self.raised or f"the child ended with {self.exit_code}")
        return self.returned


class Nursery:
    """Starts children; a context manager."""

    def __init__(self, prefix: Sequence[str] = (), **environment: str) -> None:
        """Start it.

        Args:
            prefix: command line before the nursery's, such as `unshare --mount`.
            environment: additional variables, such as LD_PRELOAD.
        """
        root = Path(vista.__file__).parents[1]
        path = os.pathsep.join(map(str, (Path(__file__).parents[2], root, root / "kernels")))
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.faults.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )
        self._children: dict[int, Child] = {}
        self._rest = b""
        self._num_jobs = 0

    def start(self, function: Callable[..., Any], *arguments: Any) -> Child:
        """Fork a child that calls `function(say, *arguments)`; arguments and messages go through JSON."""
        assert self._process.stdin is not None
        self._num_jobs += 1
        child = self._children[self._num_jobs] = Child(self, self._num_jobs)
        words = [str(word) if isinstance(word, Path) else word for word in arguments]
        job = {"job": child.job, "module": function.__module__, "function": function.__qualname__, "arguments": words}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self.pump(lambda: child.pid != 0, TIMEOUT_S)
        return child

    def imports(self, module: str) -> None:
        """Import a module once in the nursery, instead of in each child."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"imports": module}).encode() + b"\n")

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function in a child and return its result; AssertionError if it raises."""
        return self.start(function, *arguments).result()

    def pump(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Read messages until `ready`."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.listen(max(deadline - time.monotonic(), 0)):
                raise AssertionError(f"a child hangs: no message for {timeout_s:g} s")

    def listen(self, timeout_s: float = 0.0) -> bool:
        """Read pending messages; False if there are none within the time."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            return False
        block = os.read(self._process.stdout.fileno(), 1 << 16)
        if not block:
            raise AssertionError(f"the nursery died with {self._process.wait()}")
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return True

    def _take(self, message: dict[str, Any]) -> None:
        child = self._children[message.pop("job")]
        match message:
            case {"said": value}:
                child.messages.append(value)
            case {"exit": code}:
                child.exit_code = code
                del self._children[child.job]
            case _:
                for name, value in message.items():
                    setattr(child, name, value)

    def close(self) -> None:
        """Kill the nursery and its children."""
        for child in self._children.values():
            child.kill()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def shared_nursery() -> Nursery:
    """The nursery of all tests in this process, which ends with it: its imports take seconds. If there is a C compiler,
    it has the library of `preload`."""
    environment = {}
    if shutil.which("cc") is not None:
        folder = Path(tempfile.mkdtemp(prefix="preload-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        environment["LD_PRELOAD"] = str(compiled(folder))
    started = Nursery(**environment)
    atexit.register(started.close)
    return started


def die_with_parent() -> None:
    """End this process when its parent ends in any way."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tell_around(owner: type, name: str, tell: Callable[[str], Any], before: str = "", after: str = "") -> None:
    """In a child: have a method say when it is called, and when it returns."""
    function = getattr(owner, name)

    def told(*arguments: Any, **named: Any) -> Any:
        if before:
            tell(before)
        result = function(*arguments, **named)
        if after:
            tell(after)
        return result

    setattr(owner, name, told)


def _tell(job: int, **message: Any) -> None:
    line = json.dumps({"job": job, **message}).encode() + b"\n"
    assert len(line) <= select.PIPE_BUF, "only short messages are written atomically"
    os.write(_messages, line)


def _run(job: int, module: str, function: str, arguments: list[Any]) -> int:
    from vista.errors import VistaError

    try:
        job_function = getattr(importlib.import_module(module), function)
        _tell(job, returned=job_function(lambda value: _tell(job, said=value), *arguments))
        return 0
    except BaseException as error:
        _tell(job, raised=f"{type(error).__name__}: {error}"[:3000], typed=isinstance(error, VistaError))
        return 1


def main() -> None:
    """Fork a child per line of standard input."""
    global _messages
    # What modules of tests import, but not polars, whose threads would end with a fork.
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    import vista.refresh
    import vista.scorer
    import vista.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    _messages = os.dup(1)
    os.dup2(2, 1)  # Libraries print.
    die_with_parent()
    gc.freeze()
    jobs: dict[int, int] = {}
    starting = False

    def reap(*_: object) -> None:
        # A child may end before its pid is recorded. Blocking the signal would not help: Python may call this late.
        while not starting:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            _tell(jobs.pop(pid), exit=os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGCHLD, reap)
    for line in iter(sys.stdin.buffer.readline, b""):
        job = json.loads(line)
        if "imports" in job:
            importlib.import_module(job["imports"])
            continue
        starting = True
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            die_with_parent()
            os._exit(_run(**job))
        jobs[pid] = job["job"]
        _tell(job["job"], pid=pid)
        starting = False
        reap()


if __name__ == "__main__":
    main()
