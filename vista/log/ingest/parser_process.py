"""The process that parses source files for a `SourceParser`: it reads requests from stdin and replies on stdout."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from vista.config import SourceConfig
from vista.config.checks import OnBadRows
from vista.errors import ConfigError, DataError, LogWriteError, VistaError
from vista.installation import require_module
from vista.log.ingest.column_guess import guess_columns
from vista.log.ingest.feature_sources import scan_features
from vista.log.ingest.rows import id_kind, read_part
from vista.log.ingest.sources import CONFIGS, ScannedSource, column_types, scan_source
from vista.log.ingest.times import FormCount, count_forms

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


_PR_SET_PDEATHSIG = 1
_Version = tuple[int, int, int]


class ParserProcess:
    """The tasks, and the files that stay open between them. Each task is a method that takes a path and JSON arguments,
    and returns a JSON result or bytes."""

    def __init__(self) -> None:
        self._sources: dict[tuple[str, str], tuple[ScannedSource, _Version]] = {}
        """By table and path."""
        self._batches: Iterator[pl.DataFrame] = iter(())

    def open_source(
        self, path: str, config: Mapping[str, Any], table: str, max_bytes: int, kind: str
    ) -> dict[str, Any]:
        """Open a source file; returns the fields of a Source. `kind` is that of features."""
        version = _version(path)
        if table in CONFIGS:
            source = scan_features(Path(path), CONFIGS[table](**config), kind)
        else:
            source = scan_source(Path(path), SourceConfig(**config), table, max_bytes)
        source = replace(source, max_values=config["max_values"])
        self._sources[table, path] = source, version
        return source.described()

    def id_kind(self, path: str, table: str, column: str) -> str:
        """`rows.id_kind` of an open source."""
        return id_kind(self._sources[table, path][0], column, "auto")

    def guess_columns(
        self, path: str, config: Mapping[str, Any], required: list[str]
    ) -> tuple[dict[str, str], list[str]] | None:
        """`column_guess.guess_columns`."""
        return guess_columns(Path(path), SourceConfig(**config), required)

    def count_forms(self, path: str, table: str) -> list[FormCount] | None:
        """`times.count_forms` of an open source."""
        return count_forms(self._sources[table, path][0])

    def read_part(
        self,
        path: str,
        kinds: Mapping[str, str],
        table: str,
        folder: str,
        number: int,
        on_bad_rows: str,
        time_form: str | None,
    ) -> tuple[int, int]:
        """`rows.read_part` of an open source, which is then closed; returns the numbers of good and of bad rows."""
        source, version = self._sources.pop((table, path))
        source = replace(source, time_form=time_form)
        part = read_part(source, kinds, table, Path(folder), number, OnBadRows(on_bad_rows))
        if _version(path) != version:
            raise DataError(f"{path}: changed while it was read; wait until its writer is done, then try again")
        return part.num_rows, part.num_bad

    def column_types(self, path: str) -> dict[str, str]:
        """`sources.column_types`."""
        return column_types(Path(path))

    def metadata(self, path: str) -> dict[str, str]:
        """The metadata of a Parquet file."""
        return pl.read_parquet_metadata(path)

    def open_batches(self, path: str, columns: list[str], rows: int) -> None:
        """Start reading binary columns of a Parquet file in batches of `rows` rows, in the file's order."""
        chosen = pl.scan_parquet(path, glob=False).select(pl.col(name).cast(pl.Binary) for name in columns)
        self._batches = chosen.collect_batches(chunk_size=rows, maintain_order=True)

    def next_batch(self, path: str) -> bytes:
        """The next batch as an Arrow IPC file; empty after the last one."""
        batch = next(self._batches, None)
        return b"" if batch is None else _ipc(batch)


def main() -> None:
    """Serve requests until stdin ends. Interrupts are left to the parent, which ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # End with the parent even if a library holds the interpreter lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing else can write between the replies
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    process = ParserProcess()
    while True:
        _serve(process, json.loads(requests.get()), replies)


def _receive(requests: queue.SimpleQueue[bytes]) -> None:
    """Queue the requests. If the parent ends, exit at once: another process may soon write the same files."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(0)


def _serve(process: ParserProcess, request: Mapping[str, Any], replies: IO[bytes]) -> None:
    """Run one task and write the reply. `panicked` in the reply means that a library may be in an unknown state."""
    path, payload = request["path"], b""
    reply: dict[str, Any]
    try:
        _limit(resource.RLIMIT_DATA, request["memory_bytes"])
        _limit(resource.RLIMIT_FSIZE, request["rows_bytes"])
        os.chdir(request["folder"])
        result = getattr(process, request["task"])(path, **request["arguments"])
        if isinstance(result, bytes):
            payload, reply = result, {"result": None, "payload_bytes": len(result)}
        else:
            reply = {"result": result}
    except (ConfigError, DataError, LogWriteError) as error:
        reply = {"error": [type(error).__name__, str(error)]}
    except pl.exceptions.PolarsError as error:
        reply = {"error": [DataError.__name__, f"{path}: cannot be read: {_first_line(error)}; write the file again"]}
    except MemoryError as error:
        print("MemoryError:", _first_line(error), file=sys.stderr, flush=True)
        os._exit(1)  # the parent knows the limit, and starts another child
    except BaseException as error:  # Polars' panics are not Exceptions
        reason = f"{type(error).__name__}: {_first_line(error)}"
        text = f"{path}: cannot be read: {reason}; write the file again"
        reply = {"error": [DataError.__name__, text], "panicked": not isinstance(error, VistaError)}
    replies.write(json.dumps(reply).encode() + b"\n" + payload)
    replies.flush()


def _limit(resource_kind: int, wanted: int) -> None:
    hard = resource.getrlimit(resource_kind)[1]
    resource.setrlimit(resource_kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:500]


def _version(path: str) -> _Version:
    """What changes when the file is written or replaced: inode, size, and modification time (ns)."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _ipc(frame: pl.DataFrame) -> bytes:
    buffer = BytesIO()
    frame.write_ipc(buffer)
    return buffer.getvalue()
