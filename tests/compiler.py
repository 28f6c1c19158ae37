"""The C++ compiler of tests that compile."""

from __future__ import annotations

import shutil

from tests.required_program import required


def require_compiler() -> None:
    """Skip the test without g++, or fail it, as `required`."""
    required(shutil.which("g++"), "g++", "g++")
