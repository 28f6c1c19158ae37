"""Tests that compile are never skipped in continuous integration."""

from __future__ import annotations

import shutil

import pytest

from tests.compiler import require_compiler


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"apt-get install g\+\+"):
        require_compiler()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=r"apt-get install g\+\+"):
        require_compiler()
