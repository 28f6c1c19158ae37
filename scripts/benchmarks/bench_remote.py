"""Benchmark stores on a Valkey server over loopback against the client alone, and against LMDB.

    python -m scripts.benchmarks.bench_remote

Starts a server of its own without persistence. Raw `MGET` gets the same bytes under the same names with redis-py's
defaults; raw `MSET` sets the same bytes. All contestants alternate in one process with one thread.

- Reads: batches of 256 users, checked, and also decoded to float32; the latter also from LMDB.
- Cache: the same reads with all records in the cache of the host.
- Writes: batches of 512 records of a new generation. Each also updates the list of users, the manifest, and the cursor
  in one transaction.
"""

from __future__ import annotations

import itertools
import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis

from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, recording
from scripts.benchmarks.store_workloads import RECORDS_PER_READ, RECORDS_PER_WRITE, SUMMARIZER, StoreShape, records_of
from vista.device import keep_freed_memory, set_threads
from vista.store import StoreReader, user_keys
from vista.store.server_connection import KeyNames

SHAPES = (StoreShape(32, 64), StoreShape(128, 256))
"""The shapes of the default model and of the paper's model."""
WARMUP = 2


@contextmanager
def valkey_server(folder: Path) -> Iterator[int]:
    """Port of a server that keeps everything in memory."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise SystemExit("needs valkey-server or redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            yield port
        finally:
            process.kill()


def bench_shape(recorder: BenchmarkRecorder, folder: Path, port: int, shape: StoreShape) -> None:
    """Time writes of a new generation, then reads of it."""
    rounds = 5 if recorder.quick else 31
    num_users = (rounds + WARMUP) * RECORDS_PER_WRITE
    url, client = f"redis://127.0.0.1:{port}/mine", redis.Redis(port=port)
    client.flushall()
    with shape.writer(url, num_users) as writer, shape.writer(folder / str(shape), num_users) as local:
        names = KeyNames("mine").generation(1)
        batches = [
            records_of(np.arange(first, first + RECORDS_PER_WRITE) + 1, writer.spec)
            for first in range(0, num_users, RECORDS_PER_WRITE)
        ]
        ours, theirs = iter(batches), iter(batches)

        def write() -> None:
            keys, records = next(ours)
            writer.put_batch(keys, records, writer.cursor + len(keys))

        def write_raw() -> None:
            keys, records = next(theirs)
            client.mset({b"raw:" + key: record for key, record in zip(keys, records, strict=True)})

        timing = interleaved(
            {"ours": write, "raw": write_raw}, rounds=rounds, warmup=WARMUP, min_sample_s=0, max_seconds=math.inf
        )
        writer.publish()
        for keys, records in batches:
            local.put_batch(keys, records, local.cursor + len(keys))
        local.publish()
    case, unit = f"{shape}: writes of {RECORDS_PER_WRITE} records, against raw MSET", "records/s"
    recorder.add_rate(case, RECORDS_PER_WRITE, timing["ours"], unit, baseline=timing["raw"])

    rng = np.random.default_rng(3)
    users = [rng.choice(num_users, RECORDS_PER_READ, replace=False) + 1 for _ in range(8)]
    keys_of = [user_keys(some) for some in users]
    names_of = [[names.record(key) for key in keys] for keys in keys_of]
    turns: dict[str, Any] = {
        name: itertools.cycle(range(len(users))) for name in ("read", "raw", "get_many", "lmdb", "cached")
    }
    with (
        StoreReader.open(url, summarizer_id=SUMMARIZER) as store,
        StoreReader.open(f"{url}?cache={folder / 'cache'}", summarizer_id=SUMMARIZER) as cached,
        StoreReader.open(folder / str(shape), summarizer_id=SUMMARIZER) as lmdb,
    ):
        for some in users:
            cached.get_many(some)
        timing = interleaved(
            {
                # The part of get_many that reads and checks records, without the conversion to float32.
                "ours": lambda: store._current().read(keys_of[next(turns["read"])]),
                "raw": lambda: client.mget(names_of[next(turns["raw"])]),
                "get_many": lambda: store.get_many(users[next(turns["get_many"])]),
                "cached": lambda: cached.get_many(users[next(turns["cached"])]),
                "lmdb": lambda: lmdb.get_many(users[next(turns["lmdb"])]),
            },
            rounds=9 if recorder.quick else 151,
        )
        assert np.array_equal(store.get_many(users[0]).summary, lmdb.get_many(users[0]).summary)
    case = f"{shape}: reads of {RECORDS_PER_READ} users"
    recorder.add_rate(
        f"{case}, checked, against raw MGET",
        RECORDS_PER_READ,
        timing["ours"],
        unit,
        baseline=timing["raw"],
        bar="ratio >= 0.8",
    )
    for name, what in (("get_many", "checked and as float32"), ("cached", "the same with a cache")):
        recorder.add_time(f"{case}, {what}, against the same from LMDB", timing[name], "ms", baseline=timing["lmdb"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    set_threads(1)
    keep_freed_memory()
    with recording("remote", __doc__, arguments) as recorder, valkey_server(recorder.folder) as port:
        for shape in SHAPES:
            bench_shape(recorder, recorder.folder, port, shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
