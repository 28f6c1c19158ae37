"""Results of commands fit a terminal of 40 columns, and stay in one piece per line in a pipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Served
from vista.cli.main import main

Printed = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """Runs a command; returns its stdout on a terminal of 40 columns, or in a pipe."""

    def run(*words: object, columns: str | None = "40") -> str:
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_store_stats(served: Served, printed: Printed) -> None:
    assert widest(printed("store", "stats", f"store={served.store}")) <= 40
    lines = printed("store", "stats", f"store={served.store}", columns=None).splitlines()
    assert len(lines) == 2 and len(lines[1]) > 120


def test_an_evaluation_and_a_comparison(served: Served, tmp_path: Path, printed: Printed) -> None:
    words = ["evaluate", f"model={served.model_dir}", f"store={served.test_store}", f"data={served.log.path}"]
    words += ["baselines=true", "popularity=true", "recall=true", "progress=false", f"out={tmp_path / 'a.json'}"]
    text = printed(*words)
    assert widest(text) <= 40
    assert "\nbaselines, next item\n" in text and "\n  recommended: " in text and "\n0-31\n  own: 0." in text
    piped = printed(*words, columns=None)
    assert "\n  popularity   " in piped and "age in events        own" in piped
    compare = ("compare", f"a=[{tmp_path / 'a.json'}]", f"b=[{tmp_path / 'a.json'}]")
    assert widest(printed(*compare)) <= 40 and "  95 % interval: " in printed(*compare)
    assert "b - a        95 % interval" in printed(*compare, columns=None)


def test_windows(served_tasks: Served, printed: Printed) -> None:
    words = ["evaluate", f"model={served_tasks.model_dir}", f"store={served_tasks.test_store}"]
    words += [f"data={served_tasks.log.path}", "target=window", "horizon_events=[5]", "top_k=[5]", "progress=false"]
    text = printed(*words)
    assert widest(text) <= 40 and "\nnext 5 events\n" in text and "\nusers\n  all: " in text


def test_a_report(served: Served, tmp_path: Path, printed: Printed) -> None:
    words = [f"run={served.config.run_dir}", f"store={served.test_store}", f"out={tmp_path / 'r.html'}"]
    assert widest(printed("report", *words, "baselines=false", "progress=false", "num_threads=1")) <= 40
