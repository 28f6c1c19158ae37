"""Tables with drawn values, unless they are about to be read from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vista.errors import CheckpointError

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


# A limit on the memory that building a model allocates, for models whose sizes come from a file.

FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye),
    *(torch.arange, torch.linspace),
}
SIZED_BY_VALUES = {torch.arange, torch.linspace}
"""Their arguments are numbers, and the largest one bounds the size of the result."""


class AllocationLimit(TorchFunctionMode):
    """In a `with` block, torch's factories make tensors of at most `elements` elements in total.

    Raises:
        `error`, before the tensor that would exceed the limit is made.
    """

    def __init__(self, elements: int, error: Exception) -> None:
        super().__init__()
        self._left = elements
        self._error = error

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            self._left -= _size(func, args, kwargs)
            if self._left < 0:
                raise self._error
        return func(*args, **kwargs)


def _size(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """The number of elements of a factory's result, or an upper bound."""
    if func in SIZED_BY_VALUES:
        return max((math.ceil(abs(value)) for value in args if isinstance(value, int | float)), default=0)
    size = kwargs.get("size", args)
    if len(size) and isinstance(size[0], Sequence):
        size = size[0]
    return math.prod(size)


def finite_weights(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        OSError, ValueError, SafetensorError: it cannot be read.
        CheckpointError: a weight is not finite.
    """
    weights = load_file(file)
    for name, weight in weights.items():
        bounds = weight.aminmax() if weight.is_floating_point() and weight.numel() else ()  # NaN if any value is
        if not all(math.isfinite(bound.item()) for bound in bounds):
            raise CheckpointError(
                f"{file}: {name} is not finite; export an earlier checkpoint, or train the model again"
            )
    return weights


class EmbeddingFeature(IntEnum):
    """The feature whose values are hashed."""

    item = 1
    action = 2
    gap = 3


# One table for all categorical features, read by hashes: Unified Embedding (Coleman et al., NeurIPS 2023).
#
# Each hash function names one row for a feature's value, and the concatenated rows are its vector. Values share rows,
# within a feature and across features. Two values have the same vector only if all their rows agree.
#
# Saved models rely on which value reads which row, so the numbers of features and the hash functions never change.
# Letters: N rows that are hashed to, P hash functions, M model dim; a row is M / P wide.


def mix64(x: Tensor) -> Tensor:
    """SplitMix64 of states int64 [...] (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words.

    The definition uses unsigned words. int64 has the same bits, since sums and products wrap around.
    """
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def hashed_rows(values: Tensor, feature: EmbeddingFeature, num_hashes: int, num_rows: int) -> Tensor:
    """Rows int64 [..., P] in 1 … num_rows of a feature's values int64 [...]; no value hashes to row 0.

    Hash function i of feature f maps the value v to 1 + (mix64(v XOR mix64(2^32 f + i)) >> 1) mod num_rows.
    """
    keys = mix64((int(feature) << 32) + torch.arange(num_hashes, device=values.device))
    return 1 + _shift_right(mix64(values.unsqueeze(-1) ^ keys), 1) % num_rows


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """[..., M] vectors of rows int64 [..., P] of a table [1 + N, M / P], whose gradient is sparse.

    Row 0 belongs to no value. It has no gradient, so it stays 0.
    """
    return F.embedding(rows, table, padding_idx=0, sparse=True).flatten(-2)


class HashedEmbedding(nn.Module):
    """In place of an `nn.Embedding` of few values: reads the table that all features share."""

    rows: Tensor

    def __init__(
        self, table: nn.Parameter, feature: EmbeddingFeature, num_values: int, num_hashes: int, num_rows: int
    ) -> None:
        """
        Args:
            num_rows: N of the whole table, of which a sharded one has only a part here.
        """
        super().__init__()
        self.set_table(table)
        rows = hashed_rows(torch.arange(num_values), feature, num_hashes, num_rows)
        self.register_buffer("rows", rows, persistent=False)
        self.read: Tensor | None = None
        """[num_values, M] vectors of all values, as `read_together` has read them from a sharded table."""

    def set_table(self, table: nn.Parameter) -> None:
        """Read another table."""
        # In a tuple, hidden from torch: the parameter belongs to the model, which moves and saves it once.
        self._table = (table,)

    def forward(self, values: Tensor) -> Tensor:
        """[..., M] vectors of values int64 [...]."""
        # All values first, then each event's, so that the table's gradient has these few rows instead of every event's.
        return F.embedding(values, gather(self._table[0], self.rows) if self.read is None else self.read)


def read_together(read: Callable[[Tensor], Tensor], rows: Tensor, embeddings: Sequence[HashedEmbedding]) -> Tensor:
    """[..., M] vectors of rows int64 [..., P], and those of all values of `embeddings`, from one read of a table.

    Args:
        read: vectors [K, M / P] of rows int64 [K].
    """
    asked = [rows, *(embedding.rows for embedding in embeddings)]
    read_rows = torch.split(read(torch.cat([each.flatten() for each in asked])), [each.numel() for each in asked])
    vectors = [part.view(*each.shape, part.shape[1]).flatten(-2) for part, each in zip(read_rows, asked, strict=True)]
    for embedding, own in zip(embeddings, vectors[1:], strict=True):
        embedding.read = own
    return vectors[0]


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word


_GAMMA, _FIRST, _SECOND = (_signed(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: fills with zeros from the left, while the shift of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
