"""Completion of command lines, in the real shells."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vista.cli.command_table import COMMANDS
from vista.cli.main import main
from vista.config.composition import ConfigKeys, groups_of

STEPS = [
    ("vista tr\t", "vista train "),
    ("\x15vista train model.mixi\t", "vista train model.mixing="),
    ("sep\t", "separable "),
    ("\x15vista prepare 'events.paths=[so\t", "'events.paths=[source/"),
    ("c\t", "config.yaml"),
    ("\x15vista train --config source/c\t", "vista train --config source/config.yaml"),
]
"""What is typed (control-U clears the line), and what the line then shows. zsh needs quotes around [."""


@pytest.fixture
def shell(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"needs {request.param}")
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder with a file, and a folder with the program `vista`, which is on the PATH."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.yaml").write_text("")
    (tmp_path / "bin").mkdir()
    vista = tmp_path / "bin" / "vista"
    vista.write_text(f'#!/bin/sh\nexec {sys.executable} -m vista.cli "$@"\n')
    vista.chmod(0o755)
    monkeypatch.setenv("PATH", f"{vista.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script that `vista completion` prints, as a file."""
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


class Terminal:
    """A shell that waits for keys in a pseudoterminal."""

    def __init__(self, *command: str) -> None:
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
            os.execvpe(command[0], command, environment)

    def type(self, keys: str, until: str, timeout_s: float = 30) -> str:
        """Type keys, and return what is printed until a text appears or the time is over."""
        os.write(self._terminal, keys.encode())
        printed, deadline = "", time.monotonic() + timeout_s
        while until not in printed.replace("\a", "") and time.monotonic() < deadline:
            if select.select([self._terminal], [], [], 0.1)[0]:
                printed += os.read(self._terminal, 65536).decode(errors="replace")
        return printed.replace("\a", "")

    def close(self) -> None:
        """End the shell."""
        os.close(self._terminal)
        os.waitpid(self._process, 0)


@pytest.mark.nightly
@pytest.mark.parametrize("shell", ["bash", "zsh"], indirect=True)
def test_tab_in_a_terminal(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(shell, folder, capsys)
    options = ["--norc"] if shell == "bash" else ["-f"]
    prepare = "autoload -U compinit; compinit -u -D; " if shell == "zsh" else ""
    terminal = Terminal(shell, *options, "-i")
    try:
        assert "ready" in terminal.type(f"{prepare}source {path}; PS1='% '; echo rea''dy\n", "ready")
        for keys, shown in STEPS:
            assert shown in terminal.type(keys, shown)
    finally:
        terminal.close()


def completed(shell: str, path: Path, line: str) -> list[str]:
    """What bash or fish offers after a line, without a terminal."""
    if shell == "fish":
        code = f"source {path}; complete -C '{line}'"
        command = ["fish", "--no-config", "-c", code]
    else:
        call = f"COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; _vista_complete; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        command = ["bash", "--norc", "-c", f"source {path}; {call}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return [words.partition("\t")[0].strip() for words in done.stdout.splitlines() if words]


@pytest.mark.parametrize("shell", ["bash", "fish"], indirect=True)
def test_words_of_a_line(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(shell, folder, capsys)
    assert {*completed(shell, path, "vista ")} >= {name.partition(" ")[0] for name in COMMANDS}
    mixing = completed(shell, path, "vista train run_dir=x model.mixing=")
    assert [word.rpartition("=")[2] for word in mixing] == ["bidirectional", "separable"]
    files = completed(shell, path, "vista prepare events.paths=[a,source/")
    assert [word.rpartition("=")[2] for word in files] == ["[a,source/config.yaml"]


def offered(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The words that the shells are given after `words`, of which the last may be empty."""
    capsys.readouterr()
    assert main(["completion", "--words", *words]) == 0
    return [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines() if line]


def test_words_that_shells_are_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {*offered(capsys, "store", "")} >= {"copy ", "erase ", "stats "}
    for name in ("train", "prepare", "store erase"):
        names = [*ConfigKeys.of(COMMANDS[name].schema).keys, *groups_of(name)]
        assert {*offered(capsys, *name.split(), "")} >= {f"{key}=" for key in names}
    for words, expected in (
        (["train", "data.split=l"], ["data.split=leave-last-out "]),
        (["train", "model.kind=fuxi"], ["model.kind=fuxi_linear "]),
        (["train", "data.path=so"], ["data.path=source/"]),
        (["prepare", "out=data/mine", "so"], ["source/"]),
        (["refresh", "incremental=f"], ["incremental=false "]),
        (["completion", "z"], ["zsh "]),
        (["log", "st"], ["stats "]),
        (["nothing", "known", ""], []),
        (["train", "seed="], []),
    ):
        assert offered(capsys, *words) == expected


def test_words_come_with_summaries_and_without_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from vista.cli.main import main; main(sys.argv[1:]); print({'torch', 'polars'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, "completion", "--words", "train", "model.num_see"]
    key, modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    word, summary = key.split("\t")
    assert word == "model.num_seeds=" and summary.endswith(".") and modules == "set()"
    assert main(["completion", "--words", "l"]) == 0
    assert capsys.readouterr().out == "log \tforget, erase, compact, verify, stats\n"
    assert main(["completion", "--words", "runs", "c"]) == 0
    assert capsys.readouterr().out == f"compare \t{COMMANDS['runs compare'].summary}\n"


@pytest.mark.parametrize("word", ["tcsh", "shell=tcsh"])
def test_an_unknown_shell_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", word]) == 2
    assert "shell: expected bash|zsh|fish, got tcsh" in capsys.readouterr().err
