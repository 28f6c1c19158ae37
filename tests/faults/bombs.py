"""Small files that claim, or unpack to, far more than they hold."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

ZEROS = bytes(1 << 24)
TIMES = 192
"""Times ZEROS that an archive unpacks to: 3 GiB."""


def npz(path: Path) -> None:
    """An archive of two arrays of 1.5 GiB each, compressed to a few MB."""
    entries, directory, place = b"", b"", 0
    for name in (b"user.npy", b"item.npy"):
        count = TIMES // 2 * len(ZEROS) // 8
        text = b"{'descr': '<i8', 'fortran_order': False, 'shape': (%d,), }" % count
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117) + b"\n"
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        start = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
        piece = packer.compress(ZEROS) + packer.flush(zlib.Z_FULL_FLUSH)  # may be repeated after a full flush
        data = start + piece * (TIMES // 2) + packer.flush()
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, 0, len(data), len(header) + 8 * count, len(name), 0)
        entry = b"PK\x03\x04" + fields + name + data
        directory += b"PK\x01\x02\x14\x00" + fields + bytes(10) + struct.pack("<I", place) + name
        entries, place = entries + entry, place + len(entry)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 2, 2, len(directory), place, 0)
    path.write_bytes(entries + directory + end)


def csv_gz(path: Path) -> None:
    """A table whose third line is 3 GiB long, in gzip members."""
    path.write_bytes(gzip.compress(b"user,item,timestamp\n1,2,3\n") + gzip.compress(ZEROS) * TIMES)


def csv_line(path: Path) -> None:
    """A line of 64 MiB."""
    path.write_bytes(b"user,item,timestamp\n1,2,3\n" + b"x" * (1 << 26) + b"\n")


def csv_columns(path: Path) -> None:
    """A header of a million columns."""
    path.write_bytes(b",".join([b"user,item,timestamp", *(b"c%d" % number for number in range(10**6))]) + b"\n")


def parquet(path: Path) -> None:
    """Twelve row groups with 10^7 rows of one value each, in some KB."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    column = pyarrow.repeat(pyarrow.scalar(7, pyarrow.int64()), 10**7)
    table = pyarrow.table(dict.fromkeys(("user", "item", "timestamp"), column))
    with ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(12):
            writer.write_table(table, row_group_size=10**7)


def yaml_aliases(path: Path) -> None:
    """Nine levels of nine aliases each."""
    levels = (f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9))
    path.write_text("a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(levels))


def yaml_cycle(path: Path) -> None:
    """A mapping that contains itself."""
    path.write_text("model: &m\n  dim: *m\n")


def yaml_deep(path: Path) -> None:
    """20,000 nested lists."""
    path.write_text("a: " + "[" * 20_000)


def yaml_long(path: Path) -> None:
    """A value of 30 MB."""
    path.write_text("run_dir: '" + "x" * 30_000_000 + "'\n")
