"""Export to Parquet and import: readable columns, the same records, and refusal of anything but a complete export."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import xxhash

from tests.log.conftest import PARSER
from tests.store.conftest import damage_record, found, records, users_of
from vista.config.checks import Codec
from vista.errors import RecordError, StoreError
from vista.store import StoreReader, encode_records, user_keys
from vista.store.admin import verify_store
from vista.store.layout import list_generations
from vista.store.parquet import FORMAT, export_store, import_store

KEY = bytes(range(200, 232))


def mixed_store(root: Path, build: Any, users: list[Any], **options: Any) -> None:
    with build.open_writer(root, total_users=len(users), **options) as writer:
        held = users_of(user_keys(users), summary=build.summaries(range(len(users))))
        writer.put_batch(held.keys, encode_records(held, writer.spec), len(users))
        writer.publish()


@pytest.mark.parametrize("codec", Codec)
def test_columns_match_the_store(tmp_path, build, codec):
    build.write_store(tmp_path / "store", codec=codec.value)
    report = export_store(tmp_path / "store", tmp_path / "out.parquet")
    assert (report.num_records, report.generation) == (40, 1)
    assert (tmp_path / "out.parquet").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "store"]
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()  # read by another library than the one that wrote it
    with StoreReader.open(tmp_path / "store") as store:
        stored = store.get_many(table["user"])
    assert table["user"] == list(range(40)) and stored.found.all()
    assert table["event_count"] == stored.event_count.tolist()
    assert table["last_event_ts"] == stored.last_event_ts.tolist()
    np.testing.assert_array_equal(np.array(table["summary"], np.float32).reshape(40, 2, 8), stored.summary)
    for name, column in (("tail_item", "items"), ("tail_time", "times"), ("tail_action", "actions")):
        parts = np.split(getattr(stored.tail, column), stored.tail.offsets[1:-1])
        assert table[name] == [part.tolist() for part in parts]


def test_counters_are_columns_too(tmp_path, build):
    build.write_store(tmp_path / "store", counters=build.layout.to_dict())
    export_store(tmp_path / "store", tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    with StoreReader.open(tmp_path / "store") as store:
        items, genres = store.get_many(table["user"]).counters
    for user in range(40):
        parts = [one.select(np.array([user])) for one in (items, genres)]
        assert table["counter_field"][user] == [0] * len(parts[0].key) + [1] * len(parts[1].key)
        assert table["counter_key"][user] == [*parts[0].key.tolist(), *parts[1].key.tolist()]
        values = np.concatenate([part.values().reshape(-1) for part in parts]).astype(np.float32)
        assert table["counter_value"][user] == values.tolist()
    import_store(tmp_path / "out.parquet", tmp_path / "new", parser=PARSER)
    assert records(tmp_path / "new") == records(tmp_path / "store")


def test_features_of_the_tail_are_columns_too(tmp_path, build):
    build.write_store(tmp_path / "store", tail_columns=build.tail_columns)
    export_store(tmp_path / "store", tmp_path / "out.parquet")
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.schema["tail.surface"] == pl.List(pl.Int32) and frame.schema["tail.dwell"] == pl.List(pl.Float32)
    assert frame["tail.surface"].to_list()[:4] == [[], [1], [2, 2], [-1, -1, -1]]
    assert frame["tail.dwell"].to_list()[:3] == [[], [0.5], [1.0, 1.0]] and frame["tail.dwell"][3].is_nan().all()
    import_store(tmp_path / "out.parquet", tmp_path / "new", parser=PARSER)
    assert records(tmp_path / "new") == records(tmp_path / "store")


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
@pytest.mark.parametrize("codec", Codec)
def test_import_restores_the_records_with_a_new_generation(tmp_path, build, codec, key):
    build.write_store(tmp_path / "store", codec=codec.value, key=key, until="leave-last-out")
    export_store(tmp_path / "store", tmp_path / "out.parquet", key=key)
    build.write_store(tmp_path / "other", run_digest="log-9")
    report = import_store(tmp_path / "out.parquet", tmp_path / "other", key=key, parser=PARSER)
    assert report.generation == 2 and list_generations(tmp_path / "other") == [1, 2]
    before, after = records(tmp_path / "store", key=key), records(tmp_path / "other", key=key)
    assert list(before) == list(after)
    for user, record in after.items():
        old, new = bytearray(before[user]), bytearray(record)
        for changed in (slice(24, 32), slice(120, 128), *([slice(-16, None)] if key else [])):
            old[changed] = new[changed] = bytes(len(new[changed]))
        assert old == new
    with StoreReader.open(tmp_path / "other", key=key) as store:
        assert store.manifest.until == "leave-last-out" and len(store) == 40
    # With the same number, every byte is the same.
    report = import_store(tmp_path / "out.parquet", tmp_path / "new", key=key, shared_with_group=True, parser=PARSER)
    assert report.generation == 1 and records(tmp_path / "new", key=key) == before
    assert verify_store(tmp_path / "new", key=key).num_problems == 0
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o2750


@pytest.mark.parametrize("users", [["é", "x", "10"], [5, "5", "a"], [], [-(1 << 63), 0, (1 << 63) - 1]])
def test_user_ids_of_every_type_are_restored(tmp_path, build, users):
    mixed_store(tmp_path / "store", build, users)
    export_store(tmp_path / "store", tmp_path / "out.parquet")
    import_store(tmp_path / "out.parquet", tmp_path / "new", parser=PARSER)
    assert records(tmp_path / "new") == records(tmp_path / "store")
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert sorted(map(str, frame["user"].to_list())) == sorted(map(str, users))
    assert frame["last_event_ts"].to_list() == [None] * len(users)
    with StoreReader.open(tmp_path / "new") as store:
        assert len(store) == len(users)


def test_batches_and_row_groups(tmp_path, build):
    mixed_store(tmp_path / "store", build, list(range(2500)))
    export_store(tmp_path / "store", tmp_path / "out.parquet", group_bytes=300_000)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups > 3
    import_store(tmp_path / "out.parquet", tmp_path / "new", parser=PARSER)
    assert records(tmp_path / "new") == records(tmp_path / "store")


def exported(tmp_path: Path, build: Any) -> Path:
    build.write_store(tmp_path / "store", until="leave-last-out")
    export_store(tmp_path / "store", tmp_path / "out.parquet")
    build.write_store(tmp_path / "target", salt=1)
    return tmp_path / "out.parquet"


def sealed(about: dict[str, Any]) -> str:
    text = json.dumps(about)
    return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}"


def rewritten(file: Path, frame: pl.DataFrame, about: dict[str, str] | None = None) -> None:
    metadata = {"vista": pl.read_parquet_metadata(file)["vista"]} if about is None else about
    frame.write_parquet(file, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda frame: frame.head(39), "it holds 39 records, but 40 records, or other ones, were exported"),
        (lambda frame: frame.reverse(), "keys must ascend"),
        (lambda frame: frame.drop("record"), "record"),
        (lambda frame: frame.with_columns(record=pl.lit(None, pl.Binary)), "missing"),
        (lambda frame: frame.with_columns(key=pl.lit(b"x")), "key b'x'"),
        (lambda frame: frame.with_columns(record=pl.col("record").shift(1).fill_null(b"")), "user 0 .*length is 0"),
        (lambda frame: frame.with_columns(key=pl.col("key").shift(-1).fill_null(b"uiabcdefgh")), "key_hash"),
    ],
)
def test_an_edited_export_is_refused(tmp_path, build, change, named):
    file = exported(tmp_path, build)
    rewritten(file, change(pl.read_parquet(file)))
    with pytest.raises(StoreError, match=named):
        import_store(file, tmp_path / "target", parser=PARSER)
    assert list_generations(tmp_path / "target") == [1] and not list((tmp_path / "target").glob(".*"))
    assert all(found(tmp_path / "target", range(40)))
    assert build.write_store(tmp_path / "target", run_digest="log-2").generation == 2


def test_other_and_truncated_files_are_refused(tmp_path, build):
    file = exported(tmp_path, build)
    whole, frame = file.read_bytes(), pl.read_parquet(file)
    file.with_name("whole.parquet").write_bytes(whole)
    for damaged in (b"", b"not Parquet", whole[:-10], whole[: len(whole) // 2], whole[:-200] + bytes(200)):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match="is not a complete export of a store"):
            import_store(file, tmp_path / "target", parser=PARSER)
    written = pl.read_parquet_metadata(file.with_name("whole.parquet"))["vista"]
    for text in (
        "",
        "{}",
        written.replace("leave-last-out", "leave-last-two-out"),
        written[:-1],
        sealed({"format": 2}),
    ):
        rewritten(file, frame, {"vista": text})
        with pytest.raises(StoreError, match=r"not a complete export of a store: (its metadata are|it is a 2)"):
            import_store(file, tmp_path / "target", parser=PARSER)
    rewritten(file, frame, {"vista": sealed({"format": FORMAT, "manifest": {"format_version": 9}})})
    with pytest.raises(StoreError, match="format version 9"):
        import_store(file, tmp_path / "target", parser=PARSER)
    rewritten(file, frame, {})
    with pytest.raises(StoreError, match="not a complete export"):
        import_store(tmp_path / "none.parquet", tmp_path / "target", parser=PARSER)
    assert list_generations(tmp_path / "target") == [1]


def test_a_failed_export_keeps_the_old_file(tmp_path, build):
    file = exported(tmp_path, build)
    whole = file.read_bytes()
    damage_record(tmp_path / "store", 1, 5)
    with pytest.raises(RecordError, match="user 5"):
        export_store(tmp_path / "store", file)
    with pytest.raises(StoreError, match=r"cannot be written"):
        export_store(tmp_path / "target", tmp_path / "none" / "out.parquet")
    with pytest.raises(StoreError, match=r"cannot be written: .*Not a directory"):
        export_store(tmp_path / "target", file / "out.parquet")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="is not a regular file"):
        export_store(tmp_path / "target", tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    assert file.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "store", "target"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, build):
    build.write_store(tmp_path / "store")
    other = tmp_path / "other"
    other.write_bytes(b"of another account")
    other.chmod(0o644)
    (tmp_path / f".out.parquet.{os.getpid()}.tmp").symlink_to(other)
    export_store(tmp_path / "store", tmp_path / "out.parquet")
    assert other.read_bytes() == b"of another account" and other.stat().st_mode & 0o777 == 0o644
    exported_file = (tmp_path / "out.parquet").lstat()
    assert stat.S_ISREG(exported_file.st_mode) and exported_file.st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out.parquet", "store"]


def test_export_and_import_of_an_authenticated_store_need_its_key(tmp_path, build):
    build.write_store(tmp_path / "store", key=KEY)
    with pytest.raises(StoreError, match="authentication key"):
        export_store(tmp_path / "store", tmp_path / "out.parquet")
    export_store(tmp_path / "store", tmp_path / "out.parquet", key=KEY)
    for key in (None, bytes(32)):
        with pytest.raises(StoreError, match="authentication key"):
            import_store(tmp_path / "out.parquet", tmp_path / "new", key=key, parser=PARSER)
    assert KEY not in (tmp_path / "out.parquet").read_bytes()
