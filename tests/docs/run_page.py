"""Runs the blocks of a page in order: python blocks in one interpreter, commands in one shell, both in one folder."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tests.docs.page import Step, matches, steps_of

ROOT = Path(__file__).resolve().parents[2]
XXHASH_INCLUDE = Path(sysconfig.get_path("purelib"), "pyarrow", "include", "arrow", "vendored", "xxhash")
"""xxhash.h, which pages take from the system, as pyarrow brings it."""
_PROGRESS = re.compile(r"[^:]+: .*\d:\d\d (left|so far)(, \S+=.*)?")
"""A line of `vista.progress_bar`, which only work on a slow machine prints."""
TIME_LIMIT_S = 1800
"""For all blocks of one page together."""

_INTERPRETER = """
import json, os, sys, traceback, types
requests = os.fdopen(os.dup(0))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
page = sys.modules["__main__"] = types.ModuleType("__main__")
for request in requests:
    code, name, start, mark = json.loads(request)
    status = 0
    try:
        exec(compile("\\n" * start + code, name, "exec"), page.__dict__)
    except BaseException:
        traceback.print_exc()
        status = 1
    print(f"\\n{mark} {status}", flush=True)
"""


class PageFailed(AssertionError):
    """A block failed, printed something else than shown, or took too long."""


class _Session:
    """A python interpreter or a shell that runs one block after the other and says where each one's output ends."""

    def __init__(self, language: str, folder: Path) -> None:
        self.language = language
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        arguments = [sys.executable, "-u", "-c", _INTERPRETER] if language == "python" else ["bash", "--norc"]
        self.process = subprocess.Popen(
            arguments,
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A terminal shows both streams of a command; of python blocks a page shows what they print.
            stderr=self.errors if language == "python" else subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, step: Step, page: Path, timeout_s: float) -> tuple[list[str], int | None]:
        """Printed lines and exit status; the latter is None where the process ended, or was ended after `timeout_s`."""
        timer = threading.Timer(timeout_s, self.kill)
        timer.start()
        try:
            return self._run(step, page)
        finally:
            timer.cancel()

    def _run(self, step: Step, page: Path) -> tuple[list[str], int | None]:
        assert self.process.stdin is not None and self.process.stdout is not None
        mark = uuid.uuid4().hex
        if self.language == "python":
            request = json.dumps([step.code, str(page), step.start, mark])
        else:
            request = f"eval {shlex.quote(step.code)} </dev/null; printf '\\n%s %s\\n' {mark} $?"
        try:
            self.process.stdin.write(f"{request}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return [], None
        printed = []
        for raw in self.process.stdout:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            if line.startswith(f"{mark} "):
                return printed, int(line.split()[1])
            # What stays on a terminal of a line that a progress bar has overwritten.
            line = line.removesuffix("\r").rpartition("\r")[2]
            if not _PROGRESS.fullmatch(line):
                printed.append(line)
        return printed, None

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode("utf-8", "replace")

    def kill(self) -> None:
        """End it and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def close(self) -> None:
        self.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue


def environment() -> dict[str, str]:
    """The interpreter's own programs come first, and vista is this checkout's."""
    left_out = {"COLUMNS", "VISTA_AUTHENTICATION_KEY"}
    return {
        **{name: value for name, value in os.environ.items() if name not in left_out},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "PYTHONUNBUFFERED": "1",
        "REPOSITORY": str(ROOT),
        "CPLUS_INCLUDE_PATH": str(XXHASH_INCLUDE),
    }


def run_page(page: Path, folder: Path, *, limit_s: float = TIME_LIMIT_S) -> Iterator[tuple[Step, list[str]]]:
    """Run the blocks of a page one by one in `folder`, and give each with the lines that it printed.

    Raises:
        PageError: the page breaks a convention of `tests.docs.page`.
        PageFailed: a block failed, a command that shows an error did not, or the page took longer than `limit_s`.
    """
    sessions: dict[str, _Session] = {}
    deadline = time.monotonic() + limit_s
    try:
        for step in steps_of(page):
            if step.language not in sessions:
                sessions[step.language] = _Session(step.language, folder)
            session = sessions[step.language]
            printed, status = session.run(step, page, deadline - time.monotonic())
            place, output = f"{page}:{step.start + 1}", "\n".join(printed)
            if time.monotonic() > deadline:
                raise PageFailed(f"{place}: the page's blocks take longer than {limit_s} s\n{output}")
            if step.language == "python" and status != 0:
                raise PageFailed(f"{place}: the block raised an error\n{output}\n{session.stderr()}")
            if step.language == "console" and (status is None or (status != 0) != step.fails):
                rule = "a command fails if and only if its shown output has a line that begins with `error:`"
                raise PageFailed(f"{place}: $ {step.code}\nexit status {status}; {rule}\n{output}")
            yield step, printed
    finally:
        for session in sessions.values():
            session.close()


def check_page(page: Path, folder: Path, *, limit_s: float = TIME_LIMIT_S) -> int:
    """Run a page, compare every output that it shows, and return the number of blocks and commands that ran.

    Raises:
        PageError, PageFailed: see `run_page`; also where an output differs from what is shown.
    """
    count = 0
    for step, printed in run_page(page, folder, limit_s=limit_s):
        count += 1
        if step.shown is not None and not matches(step.shown, printed, step.tolerance):
            difference = "\n".join(difflib.unified_diff(step.shown, printed, "shown", "printed", lineterm=""))
            raise PageFailed(f"{page}:{step.shown_start + 1}: the output is not what the page shows\n{difference}")
    return count
