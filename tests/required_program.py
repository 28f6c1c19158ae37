"""Programs that tests need, and that a machine may lack."""

import os
import shutil

import pytest

from scripts.benchmarks.explore_visit import browser_program


def required(program: str | None, name: str, package: str) -> str:
    """Path of a program, or None if it is missing. A test skips without it; in continuous integration, it fails."""
    if program is None:
        reason = f"needs {name} (on Debian: apt-get install {package})"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return program


def require_chromium() -> str:
    return required(browser_program(), "Chromium", "chromium")


def require_compiler() -> str:
    return required(shutil.which("g++"), "g++", "g++")
