"""Progress on a narrow terminal and in a pipe, as a process shows it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

COLUMNS = 40
SETTINGS = """
import time
import vista.progress_bar as module
from vista.progress_bar import elapsed_time, progress_bar, progress_shown
module.PLAIN_DELAY_S, module.LINE_SECONDS, module.TERMINAL_DELAY_S = 0.05, 0.3, 0.05
"""
LONG = """
with progress_shown():
    for _ in progress_bar(range(50), desc="epoch 1/3", unit="batch"):
        time.sleep(0.02)
print("result")
"""


def _on_terminal(code: str) -> tuple[str, str]:
    """Stdout, and what a process writes to a terminal of 40 columns as its stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SETTINGS + code], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux reports the closed end as an error
            break
        if not part:
            break
        written += part
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, written.decode()
    return out.decode(), written.decode()


def _in_pipe(code: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", SETTINGS + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_narrow_terminal_has_one_line_with_rate_and_time_left() -> None:
    out, written = _on_terminal(LONG)
    assert out == "result\n"
    assert written.count("\n") == 1 and written.endswith("\n"), "a single line, updated in place"
    shown = [text for text in re.split(r"[\r\n]+", written) if text.strip()]
    assert len(shown) > 2 and max(map(len, shown)) <= COLUMNS
    pattern = r"epoch 1/3 \d+% \d+:\d\d left .*batch"
    assert all(re.search(pattern, text) for text in shown[1:]), shown


def test_a_pipe_has_plain_lines() -> None:
    out, written = _in_pipe(LONG)
    assert out == "result\n"
    lines = written.splitlines()
    assert 2 <= len(lines) <= 40 and "\r" not in written and "\x1b" not in written
    pattern = r"epoch 1/3: \d+ of 50 batch \(\d+%\), +[\d.]+(batch/s|s/batch), \d\d:\d\d left"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert lines[-1].startswith("epoch 1/3: 50 of 50")


def test_short_work_shows_nothing() -> None:
    code = 'with progress_shown():\n    list(progress_bar(range(3), desc="x", unit="y"))'
    assert _in_pipe("module.PLAIN_DELAY_S = 60.0\n" + code) == ("", "")
    assert _on_terminal("module.TERMINAL_DELAY_S = 60.0\n" + code) == ("", "")


def test_bars_of_libraries_are_hidden_unless_a_command_shows_them() -> None:
    hidden = 'for _ in progress_bar(range(20), desc="x", unit="y"):\n    time.sleep(0.02)\n'
    assert _in_pipe(hidden) == ("", "")
    assert _in_pipe("with progress_shown():\n    pass\n" + hidden) == ("", "")
    told = 'with progress_shown():\n    for _ in progress_bar(range(20), desc="x", unit="y", shown=False):\n'
    assert _in_pipe(told + "        time.sleep(0.02)\n") == ("", "")


def test_a_step_of_unknown_length_shows_its_time() -> None:
    code = 'with progress_shown(), elapsed_time("index"):\n    time.sleep(2.5)'
    _, plain = _in_pipe(code)
    assert re.fullmatch(r"(index: \d\d:\d\d so far\n){2,}", plain), plain
    _, shown = _on_terminal(code)
    assert re.search(r"index: 00:0[12] so far", shown) and shown.count("\n") == 1


def test_unknown_totals_have_a_rate() -> None:
    code = """
with progress_shown():
    for _ in progress_bar(iter(range(20)), desc="x", unit="row"):
        time.sleep(0.02)
"""
    _, plain = _in_pipe(code)
    assert re.search(r"x: \d+ row, +[\d.]+row/s, \d\d:\d\d so far\n", plain), plain


def test_a_command_shows_progress_on_stderr_only(tmp_path: object) -> None:
    words = ["simulate", f"out={tmp_path}/source", "num_users=200", "events_per_user=20000", "impressions_per_user=1"]
    out, shown = _on_terminal(f"module.TERMINAL_DELAY_S = 0.0\nfrom vista.cli.main import main\nmain({words})")
    assert "simulate" in shown and "left" in shown
    assert out.startswith(f"{tmp_path}/source: 200 users") and "%" not in out


def test_slow_work_after_fast_work_is_shown() -> None:
    code = """
with progress_shown():
    for i in progress_bar(range(20_003), desc="x", unit="y"):
        time.sleep(0.4 if i >= 20_000 else 0)
"""
    _, written = _on_terminal("module.NARROW_COLUMNS = 0\n" + code)
    assert "20002/20003" in written, written


def test_a_failed_write_leaves_no_lock_behind() -> None:
    code = """
import sys

class Broken:
    def write(self, text):
        raise BrokenPipeError
    def flush(self):
        pass
    def isatty(self):
        return False

module.PLAIN_DELAY_S = 0.0
ours, sys.stderr = sys.stderr, Broken()
with progress_shown():
    try:
        list(progress_bar(range(3), desc="x", unit="y"))
    except BrokenPipeError:
        print("raised")
    sys.stderr = ours
    with elapsed_time("next"):
        time.sleep(1.5)
"""
    out, written = _in_pipe(code)
    assert out == "raised\n" and "next: 00:0" in written


BLOCKING = """
import os, signal, sys, threading

class Blocking:
    def __init__(self):
        self.reached, self.release = os.pipe(), threading.Event()
    def write(self, text):
        os.write(self.reached[1], b"w")
        self.release.wait(60)
    def flush(self):
        pass
    def isatty(self):
        return False

def draw(file):
    sys.stderr = file
    with progress_shown():
        list(progress_bar(range(50), desc="x", unit="y"))

module.PLAIN_DELAY_S = 0.0
ours, blocking = sys.stderr, Blocking()
"""


def test_a_forked_child_killed_while_it_draws_does_not_stop_its_parent() -> None:
    killed = """
draw(ours)
child = os.fork()
if child == 0:
    draw(blocking)
    os._exit(0)
os.read(blocking.reached[0], 1)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
draw(ours)
print("drawn")
"""
    assert _in_pipe(BLOCKING + killed)[0] == "drawn\n"


def test_a_child_forked_while_another_thread_draws_can_draw() -> None:
    forked = """
thread = threading.Thread(target=draw, args=(blocking,))
thread.start()
os.read(blocking.reached[0], 1)
sys.stderr = ours  # where Python 3.12 warns of forks with threads
child = os.fork()
if child == 0:
    draw(ours)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
blocking.release.set()
thread.join()
"""
    assert _in_pipe(BLOCKING + forked)[0] == "0\n"
