"""Programs that tests need, and that a machine may lack."""

from __future__ import annotations

import os

import pytest


def required(program: str | None, name: str, package: str) -> str:
    """Path of a program. Skip the test without it; in continuous integration, it fails instead.

    Args:
        program: its path, or None if it is missing.
        name: what the test needs, in words.
        package: of Debian.
    """
    if program is None:
        reason = f"needs {name} (on Debian: apt-get install {package})"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return program
