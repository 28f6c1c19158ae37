"""`vista doctor`: what it prints and writes, for machines and folders that work and that do not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import Served, run_python, sign_model
from vista.cli.main import main
from vista.config import SourceColumns
from vista.installation import install_command
from vista.log.event_log import EventLog
from vista.refresh import refresh

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from vista.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command line in an environment without a module."""
TITLES = ("Packages", "Extras", "Processor", "Threads", "Memory", "GPU", "Disk", "Limits")


def diagnosis(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Output of a run with an exit code, as one line without the breaks of the table."""
    capsys.readouterr()
    assert main(["doctor", *words]) == code
    return " ".join(capsys.readouterr().out.split())


def test_all_that_works(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (f"model={served.model_dir}", f"store={served.store}", f"data={served.log.path}", "out=doctor.json")
    text = diagnosis(capsys, 0, *words)
    assert "Nothing is broken." in text and "x Broken" not in text
    assert "summarizer the model's" in text and "16 users, 40 items, 233 events" in text
    sections = json.loads((tmp_path / "doctor.json").read_text())["sections"]
    assert [section["title"] for section in sections] == [*TITLES, "Model", "Store", "Log"]
    found = [finding for section in sections for finding in section["findings"]]
    assert {finding["verdict"] for finding in found} <= {"fine", "limited"}
    assert all(finding["value"] and bool(finding["advice"]) == (finding["verdict"] == "limited") for finding in found)
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]


def test_without_folders_only_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line in (*TITLES, "Model", "Store", "Log")] == list(TITLES)


def test_a_store_of_another_model(
    served: Served, served_tasks: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = diagnosis(capsys, 1, f"model={served_tasks.model_dir}", f"store={served.store}")
    own, other = served_tasks.model.summarizer_id().hex(), served.model.summarizer_id().hex()
    assert f"{other[:12]}… wrote the store, but the model's is {own[:12]}…: name the model that wrote it" in text
    assert "Nothing is broken" not in text


def test_a_store_that_is_behind_the_log(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, words = shutil.copytree(served.log.path, tmp_path / "log"), [f"store={tmp_path / 'store'}"]
    refresh(served.model, EventLog.open(log), tmp_path / "store")
    assert "covers" in (text := diagnosis(capsys, 0, *words, f"data={log}")) and "behind the log" not in text
    frame = {"user": [100], "item": [10], "timestamp": [2_000_000_000_000], "action": ["click"], "rating": [5.0]}
    columns = SourceColumns(action="action", rating="rating")
    EventLog.from_frame(frame, log, time_unit="ms", append=True, columns=columns)
    text = " ".join(diagnosis(capsys, 0, *words, f"data={log}").split())
    assert "behind the log" in text and "1 newer segment with changes of 1 user; run `vista refresh" in text


def test_a_store_without_its_model(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = diagnosis(capsys, 1, "model=nowhere", f"store={served.store}")
    assert "nowhere: no readable model" in text and "train one with `vista train run_dir=…`" in text
    assert "the model cannot be read, so it was not compared" in text
    assert "(pass model= to compare it)" in diagnosis(capsys, 0, f"store={served.store}")


def test_a_model_of_another_version(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(served.model_dir, tmp_path / "old")
    sign_model(tmp_path / "old", lambda fields: fields.update(format_version=1))
    text = diagnosis(capsys, 1, f"model={tmp_path / 'old'}")
    assert "format 1, but this version of vista reads" in text and "export the model again" in text


def test_a_model_without_one_of_its_files(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(served.model_dir, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    os.truncate(weights, 100)
    assert f"{weights}:holds100bytesinsteadof" in "".join(diagnosis(capsys, 1, f"model={weights.parent}").split())
    weights.unlink()
    found = "".join(diagnosis(capsys, 1, f"model={weights.parent}").split())  # A long path is broken across lines.
    assert f"{weights}:ismissing;copythemodelagain" in found


def test_folders_that_are_something_else(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    text = diagnosis(capsys, 1, f"model={served.store}", f"store={served.log.path}", f"data={served.model_dir}")
    assert "no readable model" in text and "is not a store, but a log, a model or a run" in text
    assert text.count("(cannot be used)") == 3


def test_a_damaged_generation(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    os.truncate(tmp_path / "store" / "gen-1" / "summary" / "data.mdb", 5000)
    assert "none can be served" in diagnosis(capsys, 1, f"store={tmp_path / 'store'}")


def test_a_log_of_many_segments_keeps_many_files_open(
    event_log: EventLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        text = diagnosis(capsys, 0, f"data={event_log.path}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "open files (at most 512): the log has" in text and "vista log compact" in text


def test_missing_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("faiss", "polars"):
        monkeypatch.setitem(sys.modules, module, None)
    shown = "".join(diagnosis(capsys, 0).split())  # A long path is broken across lines.
    assert all("".join(install_command(extra).split()) in shown for extra in ("faiss", "data"))


def test_a_missing_core_package() -> None:
    done = run_python(BLOCKED, "torch", "doctor")
    text = " ".join(done.stdout.split())
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch (cannot be imported): ModuleNotFoundError" in text and "pip install 'torch" in text
    assert "threads (unknown): this check needs torch" in text
    assert "memory" in text and "open files" in text, "the other checks still run"
    assert "error: broken: torch, processor, threads" in done.stderr


def test_a_missing_core_package_is_one_line_of_every_command() -> None:
    done = run_python(BLOCKED, "hydra", "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: hydra is not installed; install vista again: {install_command()}\n"
