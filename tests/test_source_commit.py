"""The commit that runs and results name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from vista import source_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_distinguishes_sources_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "vista" / "source_commit.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.jsonl").write_text("")
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(source_commit, "__file__", str(module))
    outside = source_commit.source_commit()  # nothing is tracked yet
    assert outside.startswith("v") or outside == "unknown"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    short = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert source_commit.source_commit() == short
    (tmp_path / "docs" / "results.jsonl").write_text("a result\n")
    assert source_commit.source_commit() == short
    (tmp_path / "vista" / "new.py").write_text("")
    assert source_commit.source_commit() == short + "+dirty"
    (tmp_path / "vista" / "new.py").unlink()
    module.write_text("# changed\n")
    assert source_commit.source_commit() == short + "+dirty"
