"""The commit of vista's sources."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

_SOURCES = ("vista", "kernels", "conf", "scripts", "pyproject.toml")
"""Files that a result depends on. docs/results is not one of them: it changes with every result."""


def source_commit() -> str:
    """Short hash of this file's checkout, with "+dirty" if its sources were changed.

    Sources are the package, kernels, conf and scripts, including untracked files. Outside a checkout: "v" and the
    version of the installed package.
    """
    file = Path(__file__).resolve()
    root = file.parents[1]
    # This file may lie inside another repository, so it counts only if it is tracked.
    if _git(root, "ls-files", "--error-unmatch", str(file.relative_to(root))) is not None:
        short = _git(root, "rev-parse", "--short", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", *_SOURCES)
        if short is not None and changes is not None:
            return short + ("+dirty" if changes else "")
    try:
        return "v" + importlib.metadata.version("vista-recsys")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
