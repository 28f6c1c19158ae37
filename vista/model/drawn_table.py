"""Tables with drawn values, unless they are about to be read from a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

TABLE_STD = 0.02
"""Standard deviation of drawn values."""
_FROM_FILE = ContextVar("tables_from_file", default=False)


@contextmanager
def tables_from_file() -> Iterator[None]:
    """Models that are built in this block get their tables by `load_state_dict(…, assign=True)`.

    So a large model opens in little more memory than it needs afterwards.
    """
    token = _FROM_FILE.set(True)
    try:
        yield
    finally:
        _FROM_FILE.reset(token)


def drawn_table(shape: torch.Size) -> Tensor:
    """Drawn values, and 0 in the first row; without memory within `tables_from_file`."""
    if _FROM_FILE.get():
        return torch.empty(shape, device="meta")
    table = nn.init.normal_(torch.empty(shape), std=TABLE_STD)
    table[0] = 0.0
    return table
