"""Damaged source files: every format that vista reads, mutated at random, and how each of them is taken or refused."""

from __future__ import annotations

import gzip
import random
import resource
import shutil
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl

from vista.config import ItemTableConfig, PrepareConfig, SourceConfig
from vista.config.choices import OnBadRows
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.ingest.source_parser import SourceParser

MAX_SECONDS = 60.0
"""Time that a damaged file of a few kilobytes may take."""
COLUMNS = {"timestamp": "timestamp", "time_unit": "ms", "action": "action", "rating": "rating"}


def _frame() -> pl.DataFrame:
    chance = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user": chance.integers(0, 40, 300),
            "item": chance.integers(0, 90, 300),
            "timestamp": np.sort(chance.integers(1_600_000_000_000, 1_700_000_000_000, 300)),
            "action": [("view", "like", "buy")[code] for code in chance.integers(0, 3, 300)],
            "rating": chance.random(300).astype(np.float32),
        }
    )


def _parquet(compression: str) -> bytes:
    buffer = BytesIO()
    _frame().write_parquet(buffer, compression=compression, row_group_size=128)  # type: ignore[arg-type]
    return buffer.getvalue()


def _items() -> pl.DataFrame:
    chance = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "item": chance.permutation(200),
            "kind": [("a", "b", None)[code] for code in chance.integers(0, 3, 200)],
            "tags": [["x", "yy", "z"][:code] for code in chance.integers(0, 4, 200)],
            "price": chance.random(200),
            "vector": chance.random((200, 3)).astype(np.float32),
        }
    )


def _items_parquet() -> bytes:
    buffer = BytesIO()
    _items().write_parquet(buffer, row_group_size=64)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer, frame = BytesIO(), _frame()
    users, user = np.unique(frame["user"].to_numpy(), return_inverse=True)
    items, item = np.unique(frame["item"].to_numpy(), return_inverse=True)
    times = frame["timestamp"].to_numpy() // 1000
    np.savez_compressed(buffer, user=user, item=item, user_raw=users, item_raw=items, time=times)
    return buffer.getvalue()


FORMATS = {
    "events.parquet": lambda: _parquet("zstd"),
    "plain.parquet": lambda: _parquet("uncompressed"),
    "events.csv": lambda: _frame().write_csv().encode(),
    "events.csv.gz": lambda: gzip.compress(_frame().write_csv().encode(), mtime=0),
    "events.tsv": lambda: _frame().write_csv(separator="\t").encode(),
    "events.npz": _npz,
    "items.parquet": _items_parquet,
    "items.csv": lambda: _items().select("item", "kind", "price").write_csv().encode(),
}
"""File name -> the undamaged content."""


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with one damage: flipped bits, other bytes or lengths, a cut, a doubled or a moved piece."""
    damaged = bytearray(content)
    # Footers and headers describe the rest, so half of the damage is near an end.
    near_end = len(damaged) - 1 - min(int(chance.expovariate(1 / 200)), len(damaged) - 1)
    at = chance.choice([chance.randrange(len(damaged)), near_end, len(damaged) - 1 - near_end])
    kind = chance.choice(["bit", "byte", "length", "cut", "double", "move", "truncate"])
    if kind == "bit":
        damaged[at] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        damaged[at] = chance.choice([0, 0x7F, 0x80, 0xFF, damaged[at] ^ 1])
    elif kind == "length":
        size = chance.choice([4, 8])
        value = chance.choice([2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63]) % 2 ** (8 * size)
        damaged[at : at + size] = value.to_bytes(size, "little")
    elif kind == "cut":
        del damaged[at : at + chance.randrange(1, 40)]
    elif kind == "double":
        damaged[at:at] = damaged[at : at + chance.randrange(1, 40)]
    elif kind == "move":
        start = chance.randrange(len(damaged))
        piece = damaged[start : start + 16]
        damaged[at : at + len(piece)] = piece
    else:
        del damaged[at:]
    return bytes(damaged)


def outcomes(name: str, count: int, folder: Path, parser: SourceParser, seed: int = 0) -> Counter[str]:
    """Prepare `count` mutations of a format; counts "taken" and the types of errors.

    A source has no checksum, so a damaged one may be taken.

    Raises:
        BaseException: what prepare raises, unless it is a DataError or ConfigError.
        AssertionError: a file took too long, or something is left of a refused one.
    """
    content, chance, counts = FORMATS[name](), random.Random(f"{name} {seed}"), Counter[str]()
    file, log = folder / name, folder / "log"
    kind = "npz" if name.endswith(".npz") else "table"
    source = SourceConfig(kind=kind, paths=[str(file)], **(COLUMNS if kind == "table" else {}))
    items = None
    if name.startswith("items"):
        items = ItemTableConfig(paths=[str(file)])
        source.paths = [str(folder / "whole.csv")]
        (folder / "whole.csv").write_bytes(FORMATS["events.csv"]())
    for number in range(count):
        file.write_bytes(mutated(content, chance))
        bad_rows = OnBadRows.error if number % 2 else OnBadRows.quarantine
        began = time.monotonic()
        try:
            settings = PrepareConfig(out=str(log), events=source, items=items, on_bad_rows=bad_rows, progress=False)
            prepare(settings, parser=parser)
            counts["taken"] += 1
            assert items is None or EventLog.open(log).item_features is not None
        except (DataError, ConfigError) as error:
            counts[type(error).__name__] += 1
            assert not log.exists() and "\n" not in str(error)
        assert time.monotonic() - began < MAX_SECONDS, f"{name}: mutation {number} took too long"
        shutil.rmtree(log, ignore_errors=True)
    return counts


def peak_memory_of_children() -> int:
    """Largest resident memory in bytes of any child process that has ended."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
