"""A limit on the memory that building a model allocates, for models whose sizes come from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
