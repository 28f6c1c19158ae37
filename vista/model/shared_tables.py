"""The large arrays of the models that one process serves: models with equal ones hold them once.

Models that keep the item table of an earlier one are exported with the same table, the same vocabulary, and often the
same retrieval vectors, but each in files of its own, which the system would keep in memory several times. So each array
has a key that follows from its content. A model takes the array that is held under this key, if another model has it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from vista.model.model_description import FileEntry

Table = TypeVar("Table")
MIN_BYTES = 1024
"""Smaller weights are not shared, because it would save nothing: a page of memory holds several of them."""


class _HeldTable:
    """An array that at least one model holds."""

    __slots__ = ("__weakref__", "num_bytes", "value")

    def __init__(self, value: Any, num_bytes: int) -> None:
        self.value = value
        self.num_bytes = num_bytes


_held: WeakValueDictionary[Hashable, _HeldTable] = WeakValueDictionary()
"""By key: what the models of this process hold. An entry lasts as long as the `SharedTables` that have it. Two threads
that open equal models at the same time may each keep their own."""


class SharedTables:
    """The large arrays of one model. They must not change.

    Args:
        device: of the model. Only arrays on the CPU are shared, because others are copies that belong to one model.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_shared = device.type == "cpu"
        self._own: list[_HeldTable] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return total_bytes([self])

    def bytes_of_others(self, others: Iterable[SharedTables]) -> int:
        """Bytes of the arrays that other models hold too."""
        elsewhere = {id(table) for other in others if other is not self for table in other._own}
        return sum(table.num_bytes for table in self._own if id(table) in elsewhere)

    def belong_to(self, model: nn.Module) -> None:
        """Keep these arrays as long as the model exists."""
        _of_models[model] = self

    def take(self, key: Hashable, num_bytes: int, make: Callable[[], Table]) -> Table:
        """The array that is held under a key, or else a new one, which later models get.

        Args:
            key: the same only for equal arrays.
            num_bytes: of the array.
            make: returns a new one.
        """
        held = _held.get(key) if self._is_shared else None
        if held is None:
            value = make()
            held = _HeldTable(value if self._is_shared else None, num_bytes)
            self._own.append(held)
            if self._is_shared:
                _held[key] = held
            return value
        self._own.append(held)
        return cast(Table, held.value)

    def take_files(self, files: dict[str, FileEntry], patterns: tuple[str, ...], make: Callable[[], Table]) -> Table:
        """What is read from the files whose names match a pattern, as of `take`.

        Args:
            files: of a model, by name. Their content has been compared with these entries.
            patterns: such as `items.*`.
            make: reads them.
        """
        used = {name: files[name] for name in sorted(files) if any(fnmatchcase(name, one) for one in patterns)}
        return self.take(tuple(used.items()), sum(entry.bytes for entry in used.values()), make)

    def take_tensors(
        self, tensors: Mapping[str, Tensor], map_again: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors by name, with those that other models hold in their place; small ones as they are.

        Args:
            tensors: mapped from one file.
            map_again: the same from another mapping.
        """
        keys = {name: _key_of(tensor) for name, tensor in tensors.items() if _num_bytes(tensor) >= MIN_BYTES}
        if self._is_shared and any(key in _held for key in keys.values()):
            # What has been read of the first mapping would stay in memory as long as one tensor is in it.
            tensors = map_again()
        return {
            name: self.take(keys[name], _num_bytes(tensor), partial(_same, tensor)) if name in keys else tensor
            for name, tensor in tensors.items()
        }


_of_models: WeakKeyDictionary[nn.Module, SharedTables] = WeakKeyDictionary()


def tables_of(model: nn.Module) -> SharedTables:
    """The arrays of a model that a scorer has opened; none for any other model."""
    return _of_models.get(model) or SharedTables(torch.device("cpu"))


def total_bytes(models: Iterable[SharedTables]) -> int:
    """Bytes of the arrays of several models, each counted once."""
    return sum(table.num_bytes for table in {id(table): table for one in models for table in one._own}.values())


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _key_of(tensor: Tensor) -> Hashable:
    content = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
    return tuple(tensor.shape), tensor.dtype, xxhash.xxh3_128_digest(content.data)


def _same(tensor: Tensor) -> Tensor:
    return tensor
