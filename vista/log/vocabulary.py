"""Append-only vocabularies: raw ids (integers or strings) to rows and back. NumPy only.

On disk, in a folder that may have other files:
    integers: `<name>.ids.npy` int64 [N];
    strings: `<name>.ids.npy` uint8, all ids as concatenated UTF-8, and `<name>.offsets.npy` int64 [N + 1];
    rows whose id was removed (`without_ids`): `<name>.blank.npy` int64, ascending; their id is 0, or has no bytes.
All files are memory-mapped on loading. An id keeps its row forever. A row whose id was removed is never reused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, id_array, map_array, offsets_of
from vista.errors import ConfigError, LogFormatError, shown

Ids = Sequence[int] | Sequence[str] | Sequence[int | str] | NDArray[Any]
"""Raw ids: all integers, or all strings."""

_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_SMALL_QUERY = 16
_TABLE_SLACK = 8


class Vocabulary:
    """Raw ids and their rows 0..N-1. Immutable: `extended` returns a new vocabulary.

    Args:
        kind: "int" (int64 ids) or "str".
        ids: int64 [N], or for strings the concatenated UTF-8 bytes of all ids, uint8.
        offsets: int64 [N + 1] byte positions; only for strings.
        blank: int64, ascending: rows without an id; None if all have one.
    """

    __slots__ = ("_ascending", "_blank", "_by_id", "_data", "_offsets", "_order", "_table", "kind")

    def __init__(self, kind: str, ids: NDArray[Any], offsets: Int | None = None, blank: Int | None = None) -> None:
        if kind not in ("int", "str"):
            raise ValueError(f"kind must be 'int' or 'str', got {kind!r}")
        if (kind == "str") != (offsets is not None):
            raise ValueError("offsets are required for string ids, and only for them")
        self.kind = kind
        self._data = ids
        self._offsets = offsets
        self._blank = blank if blank is not None and len(blank) else None
        self._ascending: bool | None = None
        self._order: Int | None = None
        self._table: tuple[int, Int] | None = None
        self._by_id: dict[str, int] | None = None

    @classmethod
    def empty(cls, kind: str) -> Vocabulary:
        """A vocabulary without ids."""
        if kind == "int":
            return cls("int", np.empty(0, np.int64))
        return cls("str", np.empty(0, np.uint8), np.zeros(1, np.int64))

    @classmethod
    def from_ids(cls, ids: Ids) -> Vocabulary:
        """A vocabulary of the distinct `ids`, in sorted order. The type of the ids decides the kind."""
        array = id_array(ids)
        kind = "int" if array.dtype.kind in "iu" or (array.dtype == object and _all_int(array)) else "str"
        if array.size == 0:
            raise ValueError("ids is empty; use Vocabulary.empty(kind)")
        return cls.empty(kind).extended(ids)

    def __len__(self) -> int:
        return len(self._data) if self._offsets is None else len(self._offsets) - 1

    def __repr__(self) -> str:
        blanks = "" if self._blank is None else f", {len(self._blank)} of them removed"
        return f"Vocabulary({self.kind}, {len(self)} ids{blanks})"

    def __reduce__(self) -> tuple[Any, ...]:
        offsets, blank = (None if array is None else np.array(array) for array in (self._offsets, self._blank))
        return Vocabulary, (self.kind, np.array(self._data), offsets, blank)

    def has_ids(self, rows: Any) -> NDArray[np.bool_]:
        """Which rows (int [N]) have an id: bool [N]; False where it was removed."""
        index = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        if self._blank is None:
            return np.ones(len(index), np.bool_)
        at = np.minimum(np.searchsorted(self._blank, index), len(self._blank) - 1)
        return np.asarray(self._blank[at] != index)

    def _real_rows(self) -> Int:
        """Rows that have an id."""
        rows = np.arange(len(self))
        return rows if self._blank is None else np.delete(rows, self._blank)

    @property
    def num_blank(self) -> int:
        """Number of rows whose id was removed."""
        return 0 if self._blank is None else len(self._blank)

    def rows(self, ids: Ids) -> Int:
        """Rows of raw ids.

        Returns:
            int64 [N]; -1 where an id is unknown.

        Raises:
            TypeError: if the ids are of the other kind.
        """
        return self._int_rows(_as_int_ids(ids)) if self.kind == "int" else self._str_rows(_as_str_ids(ids))

    def ids(self, rows: Any) -> NDArray[Any]:
        """Raw ids of rows: int64 [N], or an object array [N] of str. Raises IndexError if a row is outside [0, N), and
        LookupError if the id of a row was removed (`has_ids`)."""
        index = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"row {int(index.min() if index.min() < 0 else index.max())} is outside [0, {len(self)})")
        if self._blank is not None and len(gone := index[~self.has_ids(index)]):
            raise LookupError(f"the id of row {int(gone[0])} was removed; check with has_ids first")
        return self._stored_ids(index)

    def _stored_ids(self, index: Int) -> NDArray[Any]:
        """The ids of rows; 0 or "" where the id was removed."""
        if self._offsets is None:
            return np.asarray(self._data[index])
        out = np.empty(len(index), dtype=object)
        starts, stops = self._offsets[index].tolist(), self._offsets[index + 1].tolist()
        if len(index) > len(self) // 4:
            blob = self._data.tobytes()
            out[:] = [blob[a:b].decode() for a, b in zip(starts, stops, strict=True)]
        else:
            out[:] = [self._data[a:b].tobytes().decode() for a, b in zip(starts, stops, strict=True)]
        return out

    def extended(self, new_ids: Ids) -> Vocabulary:
        """This vocabulary with the new ones of `new_ids` appended in sorted order. Existing rows stay. Strings are
        sorted by their UTF-8 bytes."""
        if self.kind == "int":
            ids = np.unique(_as_int_ids(new_ids))
            fresh = ids[self._int_rows(ids) < 0]
            return self if not len(fresh) else Vocabulary.concatenated([self, Vocabulary("int", fresh)])
        known = self._str_rows(names := _as_str_ids(new_ids))
        encoded = sorted({name.encode() for name, row in zip(names, known.tolist(), strict=True) if row < 0})
        return self if not encoded else Vocabulary.concatenated([self, _from_bytes(encoded)])

    def part(self, start: int = 0, stop: int | None = None) -> Vocabulary:
        """The ids of the rows [start, stop), as a separate vocabulary."""
        stop, blank = len(self) if stop is None else stop, self._blank
        if blank is not None:
            blank = blank[slice(*np.searchsorted(blank, [start, stop]))] - start
        if self._offsets is None:
            return Vocabulary("int", self._data[start:stop], None, blank)
        offsets = self._offsets[start : stop + 1]
        return Vocabulary("str", self._data[offsets[0] : offsets[-1]], offsets - offsets[0], blank)

    def without_ids(self, rows: Int) -> Vocabulary:
        """This vocabulary without the ids of `rows`. The rows stay, but their ids become unknown."""
        blank = np.union1d(rows, np.empty(0, np.int64) if self._blank is None else self._blank).astype(np.int64)
        if self._offsets is None:
            data = np.array(self._data)
            data[blank] = 0
            return Vocabulary("int", data, None, blank)
        sizes = np.diff(self._offsets)
        keeps = np.ones(len(self), np.bool_)
        keeps[blank] = False
        data = self._data[np.repeat(keeps, sizes)]
        return Vocabulary("str", data, offsets_of(sizes * keeps), blank)

    @staticmethod
    def concatenated(parts: Sequence[Vocabulary]) -> Vocabulary:
        """Concatenate vocabularies of one kind; their ids must be disjoint. A single part is returned unchanged."""
        kinds = {part.kind for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"cannot concatenate vocabularies of kinds {sorted(kinds)}; they must be of one kind")
        if len(parts) == 1:
            return parts[0]
        data = np.concatenate([part._data for part in parts])
        starts = np.cumsum([0, *(len(part) for part in parts)])
        blanks = [part._blank + start for part, start in zip(parts, starts, strict=False) if part._blank is not None]
        blank = np.concatenate(blanks) if blanks else None
        if kinds == {"int"}:
            return Vocabulary("int", data, None, blank)
        sizes = np.concatenate([np.diff(part._offsets) for part in parts if part._offsets is not None])
        return Vocabulary("str", data, offsets_of(sizes), blank)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to store, by the ending of their file's name: ids, offsets (of strings), and blank (if any)."""
        arrays = {"ids": self._data, "offsets": self._offsets, "blank": self._blank}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}

    @classmethod
    def of_arrays(
        cls, ids: NDArray[Any], offsets: NDArray[Any] | None, blank: NDArray[Any] | None, path: Path, remedy: str
    ) -> Vocabulary:
        """A vocabulary from stored arrays.

        Args:
            path: where they are stored, without an ending, for an error; remedy: what to do then.

        Raises:
            LogFormatError: if they do not match.
        """
        for ending, array in (("ids", ids), ("offsets", offsets), ("blank", blank)):
            expected = np.uint8 if ending == "ids" and offsets is not None else np.int64
            if array is not None and (array.dtype != expected or array.ndim != 1):
                raise LogFormatError(f"{path}.{ending}.npy: is not an array of {np.dtype(expected)}; {remedy}")
        if offsets is not None and (not len(offsets) or int(offsets[-1]) != len(ids)):
            raise LogFormatError(f"{path}.ids.npy: does not match {path.name}.offsets.npy ({len(ids)} bytes); {remedy}")
        return cls("int" if offsets is None else "str", ids, offsets, blank)

    def save(self, folder: str | os.PathLike[str], name: str) -> list[Path]:
        """Write the ids into `folder` under `name`; returns the files. It is not atomic or durable by itself."""
        files = []
        for ending, array in self.arrays().items():
            files.append(Path(folder) / f"{name}.{ending}.npy")
            np.save(files[-1], array, allow_pickle=False)
        return files

    @classmethod
    def load(cls, folder: str | os.PathLike[str], name: str) -> Vocabulary:
        """Open a saved vocabulary, memory-mapped. Raises LogFormatError if a file is missing, truncated or of another
        type."""
        path, remedy = Path(folder) / name, "write the folder again"
        paths = [path.with_name(f"{name}.{ending}.npy") for ending in ("ids", "offsets", "blank")]
        ids = map_array(paths[0], remedy)
        offsets, blank = (map_array(file, remedy) if file.exists() else None for file in paths[1:])
        return cls.of_arrays(ids, offsets, blank, path, remedy)

    def digest(self) -> str:
        """Hex SHA-256 of the kind and the content."""
        sha = hashlib.sha256(f"vista-vocabulary {self.kind} {len(self)}\n".encode())
        for array in (self._offsets, self._data, self._blank):
            if array is not None:
                for start in range(0, len(array), 1 << 20):
                    sha.update(np.ascontiguousarray(array[start : start + (1 << 20)]).data)
        return sha.hexdigest()

    def _int_rows(self, ids: Int) -> Int:
        rows = self._stored_int_rows(ids)
        return rows if self._blank is None else np.where(self.has_ids(rows), rows, -1)

    def _stored_int_rows(self, ids: Int) -> Int:
        """The row that stores each id, preferring rows whose id was not removed; -1 without one."""
        if not len(self) or not len(ids):
            return np.full(len(ids), -1, np.int64)
        if len(ids) <= _SMALL_QUERY and self._table is None and self._is_ascending():
            at = np.minimum(np.searchsorted(self._data, ids), len(self) - 1)
            return np.where(self._data[at] == ids, at, -1).astype(np.int64)
        low, table = self._lookup_table()
        if table is not None:
            # Compare before subtracting, because int64 extremes must not wrap.
            inside = (ids >= low) & (ids <= low + len(table) - 1)
            return np.where(inside, table[np.where(inside, ids - low, 0)], -1)
        if self._order is None and not self._is_ascending():
            if self._blank is None:
                self._order = np.argsort(self._data, kind="stable")
            else:
                self._order = np.lexsort((~self.has_ids(np.arange(len(self))), self._data))
        at = np.minimum(np.searchsorted(self._data, ids, sorter=self._order), len(self) - 1)
        rows = at if self._order is None else self._order[at]
        return np.where(self._data[rows] == ids, rows, -1).astype(np.int64)

    def _is_ascending(self) -> bool:
        if self._ascending is None:
            self._ascending = bool(np.all(self._data[1:] > self._data[:-1]))
        return self._ascending

    def _lookup_table(self) -> tuple[int, Int | None]:
        """(lowest id, row of each id from there on) if ids are dense enough for a table; else (0, None)."""
        if self._table is None:
            rows = self._real_rows()
            ids = self._data if len(rows) == len(self) else self._data[rows]
            low, high = int(ids.min(initial=2**63 - 1)), int(ids.max(initial=-(2**63)))
            if high < low or high - low >= _TABLE_SLACK * len(self) + 1024:
                return 0, None
            table = np.full(high - low + 1, -1, np.int64)
            table[ids - low] = rows
            self._table = (low, table)
        return self._table

    def _str_rows(self, ids: list[str]) -> Int:
        if self._by_id is None:
            if len(ids) <= _SMALL_QUERY and self._is_ascending_str():
                return np.array([self._bisect(name.encode()) for name in ids], dtype=np.int64)
            rows = self._real_rows()
            self._by_id = dict(zip(self.ids(rows).tolist(), rows.tolist(), strict=True))
        get = self._by_id.get
        return np.fromiter((get(name, -1) for name in ids), np.int64, len(ids))

    def _is_ascending_str(self) -> bool:
        if self._ascending is None:
            if self._blank is not None:
                return False
            offsets = np.asarray(self._offsets).tolist()
            blob = self._data.tobytes()
            names = [blob[a:b] for a, b in pairwise(offsets)]
            self._ascending = all(a < b for a, b in pairwise(names))
        return self._ascending

    def _bisect(self, name: bytes) -> int:
        offsets = self._offsets
        assert offsets is not None
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            stored = self._data[offsets[middle] : offsets[middle + 1]].tobytes()
            if stored == name:
                return middle
            low, high = (middle + 1, high) if stored < name else (low, middle)
        return -1


def _all_int(array: NDArray[Any]) -> bool:
    return all(isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in array.ravel())


def _as_int_ids(ids: Ids) -> Int:
    array = np.atleast_1d(id_array(ids))
    if array.ndim != 1:
        raise TypeError(f"ids must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind in "iu" or (array.dtype == object and _all_int(array)):
        if array.dtype.kind == "u" or array.dtype == object:
            beyond = [x for x in array.tolist() if not -(2**63) <= x < 2**63] if array.dtype.itemsize == 8 else []
            if beyond:
                raise TypeError(
                    f"id {beyond[0]} does not fit into int64, the type of this vocabulary's ids; pass int64 ids"
                )
        return array.astype(np.int64)
    raise TypeError(
        f"this vocabulary has integer ids, got {_describe(array)}; pass int64 ids "
        "(convert text with numpy.asarray(ids).astype('int64'))"
    )


def _as_str_ids(ids: Ids) -> list[str]:
    if isinstance(ids, str):
        return [ids]
    values: Iterable[Any] = ids.ravel().tolist() if isinstance(ids, np.ndarray) else ids
    names = list(values)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"this vocabulary has string ids, got {type(name).__name__} {name!r}; pass strings "
                "(convert numbers with [str(i) for i in ids])"
            )
    return names


def _describe(array: NDArray[Any]) -> str:
    first = array.ravel()[0]
    return f"{type(first).__name__ if array.dtype == object else array.dtype} {shown(first)}"


def _from_bytes(encoded: list[bytes]) -> Vocabulary:
    sizes = np.fromiter((len(name) for name in encoded), np.int64, len(encoded))
    offsets = offsets_of(sizes)
    return Vocabulary("str", np.frombuffer(b"".join(encoded), np.uint8), offsets)


def ids_of_words(words: Sequence[str], name: str, kind: str | None) -> list[Any]:
    """Convert ids from a command line to the kind of ids of a store or vocabulary.

    Args:
        words: ids as written.
        name: key that names the ids in an error.
        kind: "int" for integers; any other value leaves text.

    Raises:
        ConfigError: if an id is not an integer but must be one.
    """
    if kind != "int":
        return list(words)
    try:
        if not all(_INTEGER.fullmatch(word) for word in words):  # int() also accepts 1_000 and 012
            raise ValueError
        return list(np.array([int(word) for word in words], np.int64).tolist())
    except (ValueError, OverflowError):
        raise ConfigError(f"{name}: ids must be integers, as in the log, got {', '.join(words)}") from None
