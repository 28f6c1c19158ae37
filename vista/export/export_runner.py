"""The callable that runs an export that was just written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from vista.export.request_arrays import Arrays

ExportRunner: TypeAlias = Callable[[Arrays], Arrays]
"""Outputs by name from inputs by name, computed by the runtime that callers will use."""
