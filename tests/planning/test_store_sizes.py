"""Planned bytes per user are those that a refresh writes, and that LMDB and a server take for them."""

from __future__ import annotations

from pathlib import Path

import lmdb
import pytest

from scripts.benchmarks.bench_store import StoreShape, user_values, write_store
from scripts.benchmarks.workloads import lifelong_log, untrained
from tests.store.remote.valkey_server import ValkeyServer
from vista.config.checks import Codec, StateDtype
from vista.config.model_config import ModelConfig
from vista.errors import ConfigError
from vista.planning.capacity_plan import StoreSizes, lmdb_bytes, server_bytes
from vista.refresh import RefreshOptions, refresh
from vista.store.keys import user_keys
from vista.store.layout import environment_path, read_current, state_path

REPOSITORY = Path(__file__).parents[2]
NUM_ITEMS, LENGTH = 1_000, 300


@pytest.mark.parametrize("counters", [False, True])
@pytest.mark.parametrize(("codec", "state"), [("int8", "float32"), ("float16", "float16"), ("int4", "none")])
def test_sizes_are_those_that_a_refresh_writes(tmp_path: Path, counters: bool, codec: str, state: str) -> None:
    log = lifelong_log(tmp_path / "log", [LENGTH] * 3, num_items=NUM_ITEMS)
    model = untrained(log, dim=16, num_seeds=4, counters=counters)
    options = RefreshOptions(codec=Codec(codec), state=StateDtype(state))
    refresh(model, log, tmp_path / "store", options=options)
    sizes = StoreSizes.of(model.config, options.codec, StateDtype(state), num_items=NUM_ITEMS, history_events=LENGTH)
    generation = read_current(tmp_path / "store")
    records = user_values(environment_path(tmp_path / "store", generation)).values()
    if counters:  # Events that lie 49 days back have longer times.
        assert all(0 <= len(record) - sizes.record <= 4 * model.config.tail_len for record in records)
    else:
        assert {len(record) for record in records} == {sizes.record}
    if state == "none":
        assert (sizes.state, sizes.state_on_disk) == (0, 0)
        return
    states = [len(one) for one in user_values(state_path(tmp_path / "store", generation)).values()]
    if counters:  # The plan counts each event as another item.
        assert all(0.8 * sizes.state < size <= sizes.state for size in states)
    else:
        assert set(states) == {sizes.state}


@pytest.mark.parametrize("value_bytes", [100, 900, 1_890, 2_020, 2_021, 4_080, 4_081, 34_336, 131_352])
def test_pages_are_those_that_lmdb_writes(tmp_path: Path, value_bytes: int) -> None:
    num_users = 20_000 if value_bytes < 1_000 else 2_000 if value_bytes < 5_000 else 300
    keys = user_keys(range(num_users))
    with lmdb.open(str(tmp_path), map_size=1 << 32, lib_version=0, sync=False) as environment:
        for first in range(0, num_users, 500):
            with environment.begin(write=True) as transaction:
                for key in keys[first : first + 500]:
                    transaction.put(key, bytes(value_bytes), append=True)
        pages = environment.stat()
    live = pages["psize"] * (pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])
    assert lmdb_bytes(value_bytes) == pytest.approx(live / num_users, rel=0.01)


def used_memory(server: ValkeyServer) -> int:
    import redis

    with redis.Redis(port=server.port) as client:
        return int(client.info("memory")["used_memory"])


@pytest.mark.parametrize(("num_tokens", "dim"), [(16, 64), (32, 128)])
def test_memory_is_what_a_server_uses(tmp_path: Path, num_tokens: int, dim: int) -> None:
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    server, num_users = ValkeyServer(tmp_path / "server"), 6_000
    try:
        before = used_memory(server)
        write_store(server.url(), StoreShape(num_tokens, dim), num_users)
        used = used_memory(server) - before
    finally:
        server.kill()
    record_bytes = 128 + num_tokens * (dim + 8) + 32 * 13
    assert server_bytes(record_bytes) == pytest.approx(used / num_users, rel=0.04)


def test_too_large_a_record_is_refused() -> None:
    model = ModelConfig(dim=1024, num_seeds=65_535)
    with pytest.raises(ConfigError, match=r"model\.num_seeds: 65535 rows of 1032 bytes do not fit a record"):
        StoreSizes.of(model, Codec.int8, StateDtype.none, num_items=1, history_events=1)


def test_the_guide_shows_these_sizes() -> None:
    lines = (REPOSITORY / "docs" / "guides" / "choose-settings.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    shown = {name: values for name, _, *values in cells if len(values) == 4}
    for column, (num_seeds, dim) in enumerate(((16, 64), (128, 64), (16, 256), (128, 256))):
        plain, counted = (
            StoreSizes.of(
                ModelConfig(num_seeds=num_seeds, dim=dim, counters=counters),
                Codec.int8,
                StateDtype.float32,
                num_items=2_000_000,
                history_events=1_000,
            )
            for counters in (False, True)
        )
        ten_million = 1e7 / 1e9  # users, in GB
        expected = {
            "a record, int8": plain.record / 1e3,
            "the same with counters of 64 items (of 2 million)": counted.record / 1e3,
            "records of a generation on disk": plain.record_on_disk * ten_million,
            "the same in the memory of Valkey": plain.on_server * ten_million,
            "a state, float32": plain.state / 1e3,
            "states of a generation on disk": plain.state_on_disk * ten_million,
            "the same with counters, 1,000 distinct items per user": counted.state_on_disk * ten_million,
        }
        found = {name: float(shown[name][column].split()[0].replace(",", "")) for name in expected}
        assert found == pytest.approx(expected, rel=0.03)
