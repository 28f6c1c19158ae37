"""A child process that parses source files: a damaged file can crash the process that parses it, or exhaust its memory.

The child runs `parser_process`. Requests and replies are lines of JSON; a reply may be followed by raw bytes. This
module does not import Polars, so that a command can start the child before it imports Polars itself.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import IO, Any

from vista import errors
from vista.errors import DataError, shortened
from vista.machine import usable_cores

MEMORY_BYTES = 768 << 20
"""Memory that parsing a file of any size may take."""
THREAD_BYTES = 128 << 20
"""Additional memory per processor."""
BYTES_PER_BYTE = 16
"""Additional memory per byte of the file."""
NPZ_SHARE = 4
"""A part of the parser's memory that the arrays of an .npz file may take: their rows are copied twice."""
ROWS_BYTES = 1 << 30
"""Disk space that the rows of a file of any size may take."""
ROWS_BYTES_PER_BYTE = 256
"""Additional disk space per byte of the file."""
TIMEOUT_S = 30.0
"""Time that a request may take, plus one second per `BYTES_PER_S` of the file."""
BYTES_PER_S = 1_000_000
_NOISE = (" ", "note:", "stack backtrace", "skipping backtrace", "Current thread", "Thread 0x", "Extension modules")
"""Prefixes of the lines of a backtrace."""
_REASON = 500
"""Most characters of the child's stderr that an error message quotes."""
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vista.log.ingest.parser_process import main; main()"
)


class SourceParser:
    """Parses source files in a child process, which starts at the first call and restarts after it has ended.

    It serves one call at a time. Use it in a `with` block: the child ends with the block, or with this process.

    Args:
        timeout_s: seconds that a call may take, in addition to one second per megabyte of its file.
        rows_bytes: disk space that the rows of a file may take, in addition to `ROWS_BYTES_PER_BYTE`.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S, rows_bytes: int = ROWS_BYTES) -> None:
        self._timeout_s, self._rows_bytes = timeout_s, rows_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def __enter__(self) -> SourceParser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the child if it is not running, without waiting until it is ready."""
        if self._child is not None and self._child.poll() is None:
            return
        self.close()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def close(self) -> None:
        """End the child. The next call starts a new one."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout, self._stderr):
                with suppress(BrokenPipeError):  # a request that the child did not read may be left in a buffer
                    if pipe is not None:
                        pipe.close()
        self._child = None

    def call(self, task: str, path: str | os.PathLike[str], **arguments: Any) -> tuple[Any, bytes]:
        """Have the child run a task on a file.

        Args:
            task: name of a method of `ParserProcess`.
            path: the file.
            arguments: arguments of the method, as JSON values.

        Returns:
            (the result, as a JSON value; raw bytes, empty for most tasks).

        Raises:
            DataError, ConfigError, LogWriteError: if the task raises one. Also a DataError if the path is not a regular
                file, or if the parser panics, crashes, needs more memory than `memory_limit`, or takes too long.
        """
        path = os.fspath(path)
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
        if not stat.S_ISREG(status.st_mode):  # The parser would wait for the writer of a named pipe.
            raise DataError(f"{path}: is not a regular file; write its contents to a file first")
        size = status.st_size
        timeout_s, memory_bytes = self._timeout_s + size / BYTES_PER_S, memory_limit(size)
        request = {
            "task": task,
            "path": path,
            "folder": os.getcwd(),
            "memory_bytes": memory_bytes,
            "rows_bytes": self._rows_bytes + ROWS_BYTES_PER_BYTE * size,
            "arguments": arguments,
        }
        try:
            self.start()
            reply, payload = self._exchange(json.dumps(request).encode() + b"\n", timeout_s)
        except EOFError:
            raise DataError(
                f"{path}: cannot be read: the parser {self._how_it_ended()}; the file is damaged, or needs more than "
                f"{memory_bytes >> 20:,} MiB of memory: write it again, with smaller row groups if it is Parquet"
            ) from None
        except TimeoutError:
            why, remedy = "the file is damaged, or the disk is too slow", "write the file again"
            if path.endswith(".gz"):  # It may expand a thousandfold.
                why, remedy = f"it holds too much for a compressed file of {size:,} bytes", "decompress it"
            raise DataError(
                f"{path}: the parser gave no rows within {timeout_s:.0f} s; {why}: {remedy}, or split it"
            ) from None
        except BaseException:
            self.close()  # the reply may still arrive, and must not be mistaken for that of another call
            raise
        if reply.get("panicked"):
            self.close()
        if "error" in reply:
            name, text = reply["error"]
            raise getattr(errors, name)(text)
        return reply["result"], payload

    def _exchange(self, request: bytes, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """Send a request and receive the reply, with the bytes that follow it."""
        child, is_late = self._child, threading.Event()
        assert child is not None and child.stdin is not None and child.stdout is not None

        def end_child() -> None:
            is_late.set()
            child.kill()

        timer = threading.Timer(timeout_s, end_child)
        timer.daemon = True
        timer.start()
        try:
            child.stdin.write(request)
            child.stdin.flush()
            line = child.stdout.readline()
            if not line.endswith(b"\n"):
                raise EOFError
            reply: dict[str, Any] = json.loads(line)
            num_bytes = reply.get("payload_bytes", 0)
            payload = child.stdout.read(num_bytes)
            if len(payload) < num_bytes:
                raise EOFError
            return reply, payload
        except (BrokenPipeError, EOFError):
            if is_late.is_set():
                raise TimeoutError from None
            raise EOFError from None
        finally:
            timer.cancel()
            if is_late.is_set():
                self.close()

    def _how_it_ended(self) -> str:
        """How the child ended, with the last informative line that it wrote to stderr."""
        assert self._child is not None and self._stderr is not None
        code = self._child.wait()
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 4096))
        lines = self._stderr.read().decode(errors="replace").splitlines()
        telling = [line for line in lines if line and not line.startswith(_NOISE)]
        words = shortened(telling[-1], _REASON) if telling else "without a message"
        self.close()
        return f"{f'was killed by {signal.Signals(-code).name}' if code < 0 else f'exited with code {code}'} ({words})"


def memory_limit(file_bytes: int) -> int:
    """Memory in bytes that parsing a file of this size may take."""
    return MEMORY_BYTES + THREAD_BYTES * usable_cores() + BYTES_PER_BYTE * file_bytes


def npz_limit(file_bytes: int) -> int:
    """Bytes that the arrays of an .npz file of this size may hold uncompressed."""
    return memory_limit(file_bytes) // NPZ_SHARE


logger = logging.getLogger(__name__)
