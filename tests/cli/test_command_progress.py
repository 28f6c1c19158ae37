"""Long commands say on stderr how far they are: in one line of a terminal, in plain lines of a pipe, or not at all."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Served, small_config
from vista import progress_bar
from vista.cli.main import main
from vista.log.event_log import EventLog
from vista.training.run_plan import RunClock
from vista.training.trainer import train

COLUMNS = 40
SETTINGS = """
import time
import vista.progress_bar as module
from vista.progress_bar import progress_bar, progress_shown
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
    _, all_lines = _in_pipe("module.LINE_SECONDS = 0\n" + LONG)
    assert all_lines.count("(100%)") == 1  # which tqdm draws when it is reached, and when the bar closes
    assert 2 <= len(lines) <= 40 and "\r" not in written and "\x1b" not in written
    pattern = r"epoch 1/3: \d+ of 50 batch \(\d+%\), +[\d.]+(batch/s|s/batch), \d\d:\d\d left"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert lines[-1].startswith("epoch 1/3: 50 of 50")


def test_short_work_and_libraries_show_nothing() -> None:
    bar = 'for _ in progress_bar(range(20), desc="x", unit="y"):\n        time.sleep(0.02)\n'
    code = f"with progress_shown(False):\n    {bar}"
    code += f"if True:\n    {bar}"  # after the command, and in a library without one
    code += f"module.PLAIN_DELAY_S = 60.0\nwith progress_shown():\n    {bar}"
    assert _in_pipe(code) == ("", "")


def test_a_command_shows_progress_on_stderr_only(tmp_path: object) -> None:
    words = ["simulate", f"out={tmp_path}/source", "num_users=60", "events_per_user=5000", "impressions_per_user=1"]
    out, shown = _on_terminal(f"module.TERMINAL_DELAY_S = 0.0\nfrom vista.cli.main import main\nmain({words})")
    assert "simulate" in shown and "left" in shown
    assert out.startswith(f"{tmp_path}/source: 60 users") and "%" not in out


OF = r"\d+ of \d+ \w+ \(\d+%\), +\S+, \S+ left"
Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Runs a command whose bars do not wait; returns its stderr."""
    for name in ("PLAIN_DELAY_S", "LINE_SECONDS"):
        monkeypatch.setattr(progress_bar, name, 0.0)

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().err

    return run


def test_an_import_counts_users(served: Served, tmp_path: Path, said: Said) -> None:
    said("store", "export", f"store={served.store}", f"out={tmp_path / 'a.parquet'}")
    err = said("store", "import", f"store={tmp_path / 'new'}", f"file={tmp_path / 'a.parquet'}")
    assert re.search(rf"^import: {OF}", err, re.M), err


def test_training_says_what_is_left_of_the_run(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PLAIN_DELAY_S", "LINE_SECONDS"):
        monkeypatch.setattr(progress_bar, name, 0.0)
    with progress_bar.progress_shown():
        train(small_config(event_log, tmp_path / "run"), event_log, metrics_every=1)
    err = capsys.readouterr().err
    assert re.search(r"^epoch 2/2: .* left, loss=\S+, run=\d+:\d\d left", err, re.M), err


def test_baselines_are_named_while_they_are_fitted(served: Served, tmp_path: Path, said: Said) -> None:
    words = ("evaluate", f"model={served.model_dir}", f"store={served.test_store}", f"data={served.log.path}")
    err = said(*words, "baselines=counting", f"out={tmp_path / 'a.json'}")
    assert re.search(rf"^baselines: {OF}, popularity$", err, re.M), err
    assert "baselines:" not in said(*words, "baselines=counting", "--quiet")


def test_the_time_left_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = RunClock(), iter([100.0, 100.0, 130.0, 160.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    assert clock.left(0.0) == {} and clock.left(0.25) == {}
    assert clock.left(0.5) == {"run": "01:00 left"} and clock.left(1.0) == {"run": "00:00 left"}
