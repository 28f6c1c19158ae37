"""The decoders in C++ (docs/reference/record_decoder.hpp, and the one of the library) against vista's own reader: same
values, same refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from tests.conftest import made_once
from tests.refresh import conftest as growing
from tests.required_program import require_compiler, require_library
from tests.store import test_counters_and_states as counted
from tests.store import test_record as plain
from tests.store.conftest import records
from tests.store.test_record import with_checksum
from vista.config.checks import Codec
from vista.errors import RecordError
from vista.refresh import refresh
from vista.store import record_reading
from vista.store.keys import user_keys
from vista.store.reader import StoreReader
from vista.store.record import CODEC_NUMBERS, HEADER_BYTES, RecordSpec
from vista.store.record_encoding import KEY_VARIABLE, encode_records, key_id
from vista.store.record_reading import checked_records, read_records

SOURCES = Path(__file__).parents[2] / "docs" / "reference"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
INCLUDES = [f"-I{SOURCES}", f"-I{Path(pyarrow.get_include(), 'arrow', 'vendored', 'xxhash')}"]
"""The latter has xxhash.h of libxxhash-dev."""
KEYS = user_keys(plain.USERS)


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """docs/reference/record_to_json.cpp, compiled to stop at any access out of bounds and any undefined behavior."""
    require_compiler()
    return made_once(tmp_path_factory, "record-decoder", compile_program) / "record_to_json"


def compile_program(folder: Path) -> None:
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", *INCLUDES]
    source, out = str(SOURCES / "record_to_json.cpp"), folder / "record_to_json"
    (folder / "key_id.cpp").write_text(
        '#include "record_authentication.hpp"\n#include <cstdio>\n'
        "int main() { vista::SecretKey key{}; for (int i = 0; i < 32; ++i) key[i] = uint8_t(i);\n"
        'std::printf("%s", vista::key_id(key).c_str()); }\n'
    )
    small = [*command, str(folder / "key_id.cpp"), "-o", str(folder / "key_id")]
    has_sanitizers = subprocess.run([*small, *SANITIZERS], capture_output=True).returncode == 0
    if not has_sanitizers:
        subprocess.run(small, check=True)
    subprocess.run([*command, *(SANITIZERS if has_sanitizers else []), source, "-o", str(out)], check=True)


def decode(program: Path, records: Sequence[bytes], keys: Sequence[bytes], spec: RecordSpec) -> list[dict[str, Any]]:
    """What the program prints of each record."""
    layout: dict[str, Any] = {
        "tokens": spec.num_tokens,
        "dim": spec.dim,
        "codec": CODEC_NUMBERS[spec.codec],
        "generation": spec.generation,
        "summarizer_id": spec.summarizer_id.hex(),
        "user_columns": ",".join(str(column.size or 0) for column in spec.user_columns),
        "tail_columns": ",".join(str(column.size or 0) for column in spec.tail_columns),
    }
    if spec.counters is not None:
        layout["counter_key_bytes"] = ",".join(map(str, spec.counters.key_bytes))
        layout["counter_values"] = spec.counters.spec.num_columns
    lines = "".join(f"{key.hex()} {record.hex()}\n" for key, record in zip(keys, records, strict=True))
    command = [str(program), *(f"{name}={value}" for name, value in layout.items())]
    environment = {} if spec.key is None else {KEY_VARIABLE: spec.key.hex()}
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=120)
    decoded = [json.loads(line) for line in done.stdout.splitlines()]
    assert not done.stderr
    assert done.returncode == any("error" in record for record in decoded)
    assert len(decoded) == len(records)
    return decoded


def assert_same(decoded: dict[str, Any], record: bytes, key: bytes, spec: RecordSpec) -> None:
    """The program's output and vista's reading of one record agree in every bit."""
    raw = checked_records([record], [key], spec)
    header = raw.headers[0]
    for name in ("generation", "applied_segment", "history_digest", "created_at", "last_event_ts", "event_count"):
        assert decoded[name] == header[name].item(), name
    summary, expected = np.array(decoded["summary"], np.float32), raw.summary.ravel()
    same = summary.view(np.uint32) == expected.view(np.uint32)
    assert (same | (np.isnan(summary) & np.isnan(expected))).all()  # NaN occurs only in mutated rows
    assert decoded["items"] == raw.tail.items.tolist()
    assert decoded["times"] == raw.tail.times.tolist()
    assert decoded["actions"] == raw.tail.actions.tolist()
    read = [raw.features[column.name] for column in spec.user_columns]
    read += [raw.tail.features[column.name] for column in spec.tail_columns]
    for values, expected in zip(decoded["user"] + decoded["tail"], read, strict=True):
        np.testing.assert_array_equal(np.array(values, expected.dtype), expected)
    for codes, values in zip(raw.counters, decoded["counters"], strict=True):
        assert values == [[key, row] for key, row in zip(codes.key.tolist(), codes.codes.tolist(), strict=True)]


PLAIN = {codec.value: (dataclasses.replace(plain.SPEC, codec=codec), plain.TAIL, {}) for codec in Codec}
GOLDEN = PLAIN | {
    "tail features": (*plain.TAILS["with features"], {}),
    "user features": (
        dataclasses.replace(plain.SPEC, user_columns=plain.USER_COLUMNS),
        plain.TAIL,
        plain.USER_FEATURES,
    ),
    "authenticated": (dataclasses.replace(plain.SPEC, key=bytes(range(32))), plain.TAIL, {}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_records(program, name):
    spec, tail, features = GOLDEN[name]
    records = plain.encode(spec, tail=tail, features=features)
    if name in PLAIN:
        assert records[0].hex() == plain.GOLDEN[spec.codec]
    for decoded, record, key in zip(decode(program, records, KEYS, spec), records, KEYS, strict=True):
        assert_same(decoded, record, key, spec)


@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["plain", "authenticated"])
@pytest.mark.parametrize("layout", [counted.ITEMS, counted.CATEGORIES], ids=["items", "categories"])
def test_golden_counters(program, layout, key):
    spec, records, users = counted.spec_of(layout, key), counted.encode(layout, key), counted.USERS
    for decoded, record, user in zip(decode(program, records, users, spec), records, users, strict=True):
        assert_same(decoded, record, user, spec)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dim", [8, 33])
def test_rows_with_any_values(program, codec, dim):
    """Also values below the smallest normal number of float16, and an odd number of int4 values."""
    rng = np.random.default_rng(dim)
    summary = (rng.standard_normal((2, 6, dim)) * 10.0 ** rng.integers(-7, 4, (2, 6, 1))).astype(np.float32)
    spec = dataclasses.replace(plain.SPEC, codec=codec, dim=dim, num_tokens=6)
    records = plain.encode(spec, summary)
    for decoded, record, key in zip(decode(program, records, KEYS, spec), records, KEYS, strict=True):
        assert_same(decoded, record, key, spec)


def test_a_refreshed_store(program, tmp_path):
    model = growing.model(num_tail_features=2, counter_keys=["item", "genre"])
    log = growing.append(tmp_path / "log", growing.events({user: 1 + user % 9 for user in range(30)}))
    refresh(model, log, tmp_path / "store")
    with StoreReader.open(tmp_path / "store") as reader:
        spec = reader.manifest.spec()
    held = records(tmp_path / "store")
    keys, values = list(held), list(held.values())
    assert len(keys) == 30
    for decoded, record, key in zip(decode(program, values, keys, spec), values, keys, strict=True):
        assert_same(decoded, record, key, spec)


def mutated(record: bytes, rng: np.random.Generator) -> bytes:
    """A record with some other bytes or another length; most have a right checksum and payload length nevertheless."""
    damaged = bytearray(record)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, HEADER_BYTES if rng.random() < 0.5 else len(damaged)))
        damaged[place] = int(rng.choice([0, 1, 2, 127, 128, 255, rng.integers(0, 256)]))
    if rng.random() < 0.4:
        keep = int(rng.integers(0, len(damaged) + 1))
        damaged = damaged[:keep] if rng.random() < 0.5 else damaged + bytes(int(rng.integers(1, 40)))
    if rng.random() < 0.9 and len(damaged) >= HEADER_BYTES:
        damaged[20:24] = (len(damaged) - HEADER_BYTES).to_bytes(4, "little")
        return with_checksum(damaged)
    return bytes(damaged)


def cases() -> dict[str, tuple[RecordSpec, list[bytes], list[bytes]]]:
    """Spec, records, and keys."""
    golden = {
        name: (spec, plain.encode(spec, tail=tail, features=features), KEYS)
        for name, (spec, tail, features) in GOLDEN.items()
    }
    layout, key = counted.CATEGORIES, bytes(range(32))
    return golden | {
        "counters": (counted.spec_of(layout), counted.encode(layout), counted.USERS),
        "authenticated counters": (counted.spec_of(layout, key), counted.encode(layout, key), counted.USERS),
    }


@pytest.mark.parametrize("name", cases())
def test_damaged_records_are_refused_where_vista_refuses_them(program, name):
    spec, records, keys = cases()[name]
    rng = np.random.default_rng(0)
    which = rng.integers(0, len(records), 400)
    damaged, owners = [mutated(records[index], rng) for index in which], [keys[index] for index in which]
    num_refused = 0
    for decoded, record, key in zip(decode(program, damaged, owners, spec), damaged, owners, strict=True):
        try:
            checked_records([record], [key], spec)
        except RecordError:
            assert "error" in decoded, record.hex()
            num_refused += 1
        else:
            assert_same(decoded, record, key, spec)
    assert 50 < num_refused < 400


def assert_equal(ours: record_reading.RawRecords, expected: record_reading.RawRecords) -> None:
    """Two readings agree in every bit, and in the types of all arrays."""

    def parts(raw: record_reading.RawRecords) -> list[Any]:
        tail = raw.tail
        arrays = [raw.headers, raw.summary, tail.items, tail.times, tail.actions, tail.offsets]
        arrays += [*tail.features.values(), *raw.features.values()]
        return arrays + [part for one in raw.counters for part in (one.key, one.codes, one.offsets, one.clock)]

    for mine, other in zip(parts(ours), parts(expected), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        if mine.dtype == np.float32:
            nan = np.isnan(mine) & np.isnan(other)
            mine, other = np.where(nan, 0, mine).view(np.uint32), np.where(nan, 0, other).view(np.uint32)
        np.testing.assert_array_equal(mine, other)
    assert list(ours.tail.features) == list(expected.tail.features) and list(ours.features) == list(expected.features)


@pytest.mark.parametrize("name", [name for name in cases() if not name.startswith("authenticated")])
def test_the_library_reads_and_refuses_what_vista_does(name):
    require_library()
    record_reading.record_decoder.cache_clear()
    spec, records, keys = cases()[name]
    decoder = record_reading.record_decoder(spec)
    several = records + records[::-1] * 3, keys + keys[::-1] * 3
    assert_equal(record_reading._decoded(decoder, *several, spec), checked_records(*several, spec))
    rng = np.random.default_rng(1)
    num_refused = 0
    for index in rng.integers(0, len(records), 150):
        damaged = mutated(records[index], rng)
        found = record_reading._decoded(decoder, [damaged], [keys[index]], spec)
        together = record_reading._decoded(decoder, [records[0], damaged], [keys[0], keys[index]], spec)
        try:
            expected = checked_records([damaged], [keys[index]], spec)
        except RecordError as error:
            assert found is None and together is None, damaged.hex()
            with pytest.raises(RecordError, match=re.escape(str(error))):
                read_records([damaged], [keys[index]], spec)
            num_refused += 1
        else:
            assert_equal(found, expected)
            assert together is not None
    assert 19 <= num_refused < 150


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("dim", [8, 33])
def test_rows_of_the_library(codec, dim):
    require_library()
    record_reading.record_decoder.cache_clear()
    rng = np.random.default_rng(dim)
    summary = (rng.standard_normal((2, 6, dim)) * 10.0 ** rng.integers(-7, 4, (2, 6, 1))).astype(np.float32)
    spec = dataclasses.replace(plain.SPEC, codec=codec, dim=dim, num_tokens=6)
    records = plain.encode(spec, summary)
    found = record_reading._decoded(record_reading.record_decoder(spec), records, KEYS, spec)
    assert_equal(found, checked_records(records, KEYS, spec))


def test_the_records_of_others_are_refused(program):
    (record, _), (key, other) = plain.encode(), KEYS
    for spec, user, reason in (
        (plain.SPEC, other, "key_hash"),
        (dataclasses.replace(plain.SPEC, generation=8), key, "generation"),
        (dataclasses.replace(plain.SPEC, summarizer_id=bytes(32)), key, "summarizer_id"),
        (dataclasses.replace(plain.SPEC, key=bytes(32)), key, "flags"),
    ):
        assert decode(program, [record], [user], spec)[0]["error"].startswith(reason)


def test_authentication_codes(program):
    """Of ids of all lengths modulo the 128 bytes of BLAKE2b's blocks. Each changed byte of the payload is noticed."""
    spec = dataclasses.replace(plain.SPEC, key=bytes(range(32)))
    other = dataclasses.replace(spec, key=bytes(range(1, 33)))
    users = user_keys(["u" * length for length in range(1, 129)])
    arrays = plain.summaries()
    records = [encode_records(dataclasses.replace(arrays, keys=[user, user]), spec)[0] for user in users]
    assert not any("error" in decoded for decoded in decode(program, records, users, spec))
    assert all(decoded["error"].startswith("authentication_code") for decoded in decode(program, records, users, other))
    changed = []
    for place in range(HEADER_BYTES, len(records[0])):
        damaged = bytearray(records[0])
        damaged[place] ^= 1
        changed.append(with_checksum(damaged))
    refused = [decoded["error"] for decoded in decode(program, changed, users[:1] * len(changed), spec)]
    assert all(reason.startswith("authentication_code") for reason in refused)


def test_the_name_of_a_key(program):
    named = subprocess.run([str(program.with_name("key_id"))], capture_output=True, text=True, check=True).stdout
    assert named == key_id(bytes(range(32)))
