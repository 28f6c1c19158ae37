"""Types of arrays, where packed parts lie in one, and files of arrays: `.npy`, written in blocks, and safetensors."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import sys
from contextlib import suppress
from operator import countOf
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import safe_open

from vista.errors import LogFormatError
from vista.files import HashedFile, open_file

Int = NDArray[np.int64]
Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]


def offsets_of(lengths: Int | NDArray[np.bool_]) -> Int:
    """Where packed parts with these lengths [B] begin and end: int64 [B + 1], from 0. A bool counts as its number."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=offsets[1:])
    return offsets


def id_array(ids: Any) -> NDArray[Any]:
    """Convert ids to an array: of int64 if all are such integers, and of objects if a list holds texts.

    NumPy alone gives every text of a list the memory of the longest one, and turns [1, "a"] into texts.

    Raises:
        ValueError: the rows of nested lists differ in length.
    """
    if isinstance(ids, str) or hasattr(ids, "__array__"):
        return np.asarray(ids)
    if isinstance(ids, (list, tuple)) and countOf(map(type, ids), int) == len(ids):  # as fast as NumPy alone
        with suppress(OverflowError):
            return np.fromiter(ids, np.int64, len(ids))
    array = np.array(ids, object)
    kinds = set(map(type, array.ravel().tolist()))
    has_text = any(issubclass(kind, (str, bytes)) for kind in kinds)
    return array if has_text and not kinds & {list, tuple} else np.asarray(ids)


def is_tensor(values: Any) -> bool:
    """Whether a caller passes a tensor; does not load torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


Content = mmap.mmap | bytes
_SMALL_BYTES = 1 << 16
"""Up to this size in bytes a file is read instead: a mapping keeps its file open, and small segments may be many."""
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<size>[\x00-\xff]{2})\{'descr': '(?P<dtype>\|[biu]1|<[iuf][248])', 'fortran_order': False, "
    rb"'shape': \((?P<rows>\d{1,18}),(?: (?P<width>\d{1,18}))?\), \} *\n"
)
"""How NumPy begins a file with a little-endian array of one or two dimensions. Its own parser evaluates the header as a
Python expression, which can fail in many ways if it is damaged."""


class ArrayWriter:
    """Writes a `.npy` file of known shape block by block.

    Raises:
        ValueError: on closing, if more or fewer rows were written than announced.
    """

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        self._raw = path.open("wb")
        self._file = HashedFile(self._raw)
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._rows = 0
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: NDArray[Any]) -> None:
        """Write rows."""
        if values.shape[1:] != self._shape[1:]:
            raise ValueError(f"{self._raw.name}: rows have shape {values.shape[1:]}, expected {self._shape[1:]}")
        self._rows += len(values)
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).reshape(-1).data)

    def close(self) -> None:
        """End the file."""
        self._raw.close()
        if self._rows != self._shape[0]:
            raise ValueError(f"{self._raw.name}: {self._rows} rows written, {self._shape[0]} announced")

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says about the file, once it is closed."""
        return {
            "dtype": self._dtype.str,
            "shape": list(self._shape),
            "bytes": self._file.size,
            "xxh3": self._file.hexdigest(),
        }


def map_file(path: Path, remedy: str, size: int | None = None) -> Content:
    """Map a regular file into memory, read-only.

    Args:
        remedy: what to do if that fails, for the error.
        size: bytes that the file must have; None accepts any number.

    Raises:
        LogFormatError: if the file is missing, has another size, or is not a regular file that can be read.
    """
    try:
        descriptor = open_file(path)
        try:
            actual = os.fstat(descriptor).st_size
            if size is not None and size != actual:
                raise LogFormatError(
                    f"{path}: expected {size} bytes, found {actual}; the file is "
                    f"{'truncated' if actual < size else 'too long'}: copy it again, or {remedy}"
                )
            if actual <= _SMALL_BYTES:
                return os.pread(descriptor, actual, 0)
            return mmap.mmap(descriptor, actual, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise LogFormatError(f"{path}: missing; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or the file is shrinking
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            remedy = "raise the limit of open files (ulimit -n), then run `vista log compact`"
        raise LogFormatError(f"{path}: cannot be read ({error}); {remedy}") from error


def array_in(content: Content, path: Path, remedy: str) -> NDArray[Any]:
    """The array in a mapped `.npy` file, as a read-only view. Raises LogFormatError if the header does not describe the
    rest of the file."""
    header = _HEADER.match(content)
    if header is None or int.from_bytes(header["size"], "little") != header.end() - 10:
        raise LogFormatError(f"{path}: not a .npy file with numbers; {remedy}")
    dtype = np.dtype(header["dtype"].decode())
    shape = tuple(int(size) for size in (header["rows"], header["width"]) if size is not None)
    if header.end() + math.prod(shape) * dtype.itemsize != len(content):
        raise LogFormatError(
            f"{path}: has {len(content)} bytes, which does not fit an array of shape {shape} and type {dtype}; {remedy}"
        )
    return np.frombuffer(content, dtype, math.prod(shape), header.end()).reshape(shape)


def map_array(path: Path, remedy: str) -> NDArray[Any]:
    """The array of a `.npy` file, mapped into memory, read-only. Raises LogFormatError as `map_file` and `array_in`."""
    return array_in(map_file(path, remedy), path, remedy)


_TENSOR_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


def mapped_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Map the arrays of a safetensors file, by name. They may be written to, which does not change the file. Raises
    OSError or ValueError or SafetensorError if the file cannot be read, is damaged, or has a type that NumPy lacks."""
    with safe_open(path, "numpy"):  # checks the header
        pass
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        fields = json.loads(file.read(begin - 8))
    content = np.asarray(np.memmap(path, np.uint8, "c"))[begin:]
    arrays = {}
    for name, field in fields.items():
        if name == "__metadata__":
            continue
        if field["dtype"] not in _TENSOR_DTYPES:
            raise ValueError(f"{name} is of type {field['dtype']}")
        part = content[slice(*field["data_offsets"])]
        arrays[name] = part.view(_TENSOR_DTYPES[field["dtype"]]).reshape(field["shape"])
    return arrays
