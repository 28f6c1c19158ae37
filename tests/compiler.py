"""The C++ compiler of tests that compile."""

from __future__ import annotations

import os
import shutil

import pytest


def require_compiler() -> None:
    """Skip the test without g++; in continuous integration, it fails instead."""
    if shutil.which("g++") is None:
        reason = "needs g++ (on Debian: apt-get install g++)"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
