"""The one place that chooses a backend; the choice is logged once for each backend and kind of device."""

from __future__ import annotations

import logging
from functools import cache

import torch

BACKENDS = ("torch", "reference")
"""What an operator can run on; `auto` chooses among them by device."""

_LOG = logging.getLogger("vista_kernels")


def choose_backend(backend: str, device: torch.device) -> str:
    """Return the backend that runs tensors of `device`; `auto` is the fastest that is proven there.

    Raises:
        ValueError: if `backend` is neither `auto` nor one of `BACKENDS`.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    chosen = "torch" if backend == "auto" else backend
    if not torch.compiler.is_compiling():
        _announce(backend, chosen, device.type)
    return chosen


@cache
def _announce(asked: str, chosen: str, device_type: str) -> None:
    _LOG.info("backend %s for %s tensors (asked for: %s)", chosen, device_type, asked)
