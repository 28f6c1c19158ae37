"""Programs that tests need, and that a machine may lack."""

import os
import shutil
from typing import NoReturn

import pytest

from scripts.benchmarks.explore_visit import browser_program
from vista_kernels.cpp_backend.build import build
from vista_kernels.cpp_backend.library import LibraryError, load


def missing(reason: str) -> NoReturn:
    """Skip a test without what it needs; in continuous integration, it fails."""
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


def required(program: str | None, name: str, package: str) -> str:
    """Path of a program, where None is one that is `missing`."""
    if program is None:
        missing(f"needs {name} (on Debian: apt-get install {package})")
    return program


def require_chromium() -> str:
    return required(browser_program(), "Chromium", "chromium")


def require_compiler() -> str:
    return required(shutil.which("g++"), "g++", "g++")


def require_library() -> None:
    """Build the C++ library in this checkout, if it is missing or of other sources."""
    try:
        load()
    except LibraryError:
        require_compiler()
        build()
        load()
