"""Readers of damaged files return misses or typed errors, never wrong bytes; `verify` refuses what could crash them.

A format with a checksum must give the answer of the undamaged file, and another one the same answer each time.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import lmdb.verify
import pytest

from tests.faults import oracle, updates
from tests.faults.formats import FORMATS, HOW, mutated
from tests.faults.harness import DIFFERENT, Trial, attempt, judge, promise, try_each
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
from vista.errors import RecordError, StoreError
from vista.store import StoreReader, user_keys
from vista.store.layout import environment_path, state_path
from vista.store.state_record import encode_states

RUNS = [Run(salt=1, total=400, batch=50), Run(salt=2, total=100, batch=20, dim=300), Run(salt=3, dim=3000)]
"""Records within a page and of several pages, with enough users for branch pages."""
PAGE_BYTES = 4096
FLIPS, PART = 50, 16


@pytest.fixture(scope="module")
def stores(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A published store per run. Tests must not change them."""
    folder = tmp_path_factory.mktemp("whole")
    for number, run in enumerate(RUNS):
        nursery.call(oracle.write, folder / f"store-{number}", run.words)
    return [folder / f"store-{number}" for number in range(len(RUNS))]


def read_all(store: str, run: Run) -> str:
    """Read the list of users, all records at once, and a few records at a time.

    Returns:
        The worst outcome.

    Raises:
        AssertionError: if a reader returned other bytes than were written.
    """
    outcomes = {0: "unharmed"}
    users = range(run.total)
    try:
        with StoreReader.open(store, summarizer_id=oracle.SUMMARIZER) as opened:
            try:
                keys = list(opened.keys())
                assert set(keys) <= set(users), f"users that were never written: {sorted(set(keys) - set(users))[:5]}"
            except StoreError as error:
                outcomes[2] = type(error).__name__
            for part in [users, *(users[user : user + PART] for user in range(0, run.total, PART))]:
                try:
                    batch = opened.get_many(part)
                except StoreError as error:
                    outcomes[2] = type(error).__name__
                    continue
                wrong = oracle.differences(batch, run, part, opened.manifest.spec())
                assert not wrong, f"other bytes than were written: users {wrong[:5]}"
                if not batch.found.all():
                    outcomes[1] = "miss"
    except StoreError as error:
        outcomes[3] = f"{type(error).__name__} on opening"
    return outcomes[max(outcomes)]


def read_flipped(say: Say, store: str, words: dict[str, Any] | None, flips: list[tuple[int, int]]) -> None:
    """For each bit of the records of a run, or without one of the states: flip it, read, flip it back, and say the
    outcome."""
    path = (state_path if words is None else environment_path)(Path(store), 1) / "data.mdb"
    for place, bit in flips:
        flip(path, place, bit)
        say(read_states(store) if words is None else read_all(store, Run(**words)))
        flip(path, place, bit)


def flip(path: Path, place: int, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def places(trial: Trial, path: Path) -> list[tuple[int, int]]:
    """Random bits of a file: a third in its meta pages, a third in the heads of pages, where the pointers are."""
    size = path.stat().st_size
    choose = trial.random.randrange
    return [
        (
            (choose(size), choose(2 * PAGE_BYTES // 16), choose(size // PAGE_BYTES) * PAGE_BYTES + choose(64))[
                choose(3)
            ],
            choose(8),
        )
        for _ in range(FLIPS)
    ]


def flip_and_read(trial: Trial, nursery: Nursery, whole: Path, words: dict[str, Any] | None) -> None:
    """Have `read_flipped` read a copy of a store, and count its outcomes."""
    store = trial.folder / "store"
    shutil.copytree(whole, store)
    data, undamaged = (
        (state_path if words is None else environment_path)(root, 1) / "data.mdb" for root in (store, whole)
    )
    flips = places(trial, data)
    while flips:
        reader = nursery.start(read_flipped, store, words, flips).end(timeout_s=600)
        for outcome in reader.messages:
            trial.count(outcome)
        done = len(reader.messages)
        if reader.exit_code == 0:
            return
        assert not reader.raised, f"{whole}, (byte, bit) {flips[done]}: {reader.raised}"
        # LMDB follows damaged page numbers. Only files that `lmdb.verify` refuses may crash a reader.
        refused = nursery.call(problems, data.parent)
        assert refused, f"{whole}, (byte, bit) {flips[done]}: {reader.exit_code}"
        trial.count("would end the process, refused by verify")
        shutil.copy(undamaged, data)
        flips = flips[done + 1 :]


@promise("No wrong bytes", fault="a flipped bit in data.mdb", full=2500, smoke=True, each=FLIPS)
def test_flipped_bits(trial: Trial, nursery: Nursery, stores: list[Path]) -> None:
    number = trial.number % len(RUNS)
    flip_and_read(trial, nursery, stores[number], RUNS[number].words)


@pytest.fixture(scope="module")
def stores_with_states(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Published stores with states within a page and of several pages. Tests must not change them."""
    folder = tmp_path_factory.mktemp("states")
    for head_dim in (8, 64):
        nursery.call(updates.publish, folder / f"store-{head_dim}", head_dim)
    return sorted(folder.iterdir())


def read_states(store: str) -> str:
    """Read all states at once, and a few at a time; returns the worst outcome. Raises AssertionError if another state
    was read than was written."""
    outcomes = {0: "unharmed"}
    users = range(updates.TOTAL)
    try:
        with StoreReader.open(store, summarizer_id=oracle.SUMMARIZER) as opened:
            spec = opened.manifest.state_spec()
            assert spec is not None
            written = dict(zip(users, updates.states(list(users), spec, 0), strict=True))
            spec = dataclasses.replace(spec, created_at=oracle.CREATED_AT)
            for part in [users, *(users[user : user + PART] for user in users[::PART])]:
                try:
                    read = opened.states(part)
                except StoreError as error:
                    outcomes[2] = type(error).__name__
                    continue
                assert read is not None
                found = [part[row] for row in read[0]]
                if len(found) < len(part):
                    outcomes[1] = "miss"
                if not found:
                    continue
                for user, state in zip(found, encode_states(user_keys(found), read[1], spec), strict=True):
                    assert state == written[user], f"user {user}: another state than was written"
    except StoreError as error:
        outcomes[3] = f"{type(error).__name__} on opening"
    return outcomes[max(outcomes)]


@promise("No wrong bytes", fault="a flipped bit in data.mdb of the states", full=2500, each=FLIPS)
def test_flipped_bits_of_states(trial: Trial, nursery: Nursery, stores_with_states: list[Path]) -> None:
    flip_and_read(trial, nursery, stores_with_states[trial.number % len(stores_with_states)], None)


def problems(say: Say, folder: str) -> int:
    """The number of problems that `lmdb.verify` finds in an environment, without opening it."""
    try:
        return len(lmdb.verify.verify(folder))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError:
        return 1


def test_a_damaged_key_is_not_listed(nursery: Nursery, stores: list[Path], tmp_path: Path) -> None:
    store, key = shutil.copytree(stores[0], tmp_path / "store"), user_keys([123])[0]
    data = environment_path(store, 1) / "data.mdb"
    place = data.read_bytes().rindex(key)  # The newest page of the copies that copy-on-write left.
    flip(data, place + 5, 3)
    with StoreReader.open(store) as opened, pytest.raises(RecordError, match=r"user \d+ .*key_hash"):
        list(opened.keys())


MUTATIONS = 10
TAKEN = "taken with other contents"


def make_format(say: Say, name: str, folder: str) -> None:
    """Make an undamaged example."""
    FORMATS[name].make(Path(folder))


@pytest.fixture(scope="module")
def whole_format(nursery: Nursery, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undamaged example of a format, made once."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "files"
        shutil.copytree(world, folder)
        nursery.call(make_format, name, folder)
        return folder

    return make


def read_damaged(say: Say, name: str, whole: str, world: str, scratch: str, numbers: list[int]) -> None:
    """Damage one file for each number and read it; says [outcome, text]."""
    example, undamaged = FORMATS[name], Path(scratch, "undamaged")
    shutil.copytree(whole, undamaged, dirs_exist_ok=True)
    expected = example.read(undamaged, Path(world))

    def read(folder: Path) -> tuple[str, str]:
        answer = example.read(folder, Path(world))
        if answer == expected:
            return "equal", ""
        if example.checked:
            return DIFFERENT, answer
        again = example.read(folder, Path(world))
        return (TAKEN, "") if again == answer else (DIFFERENT, f"{answer}, then {again}")

    def use(number: int, folder: Path) -> tuple[str, str]:
        chance = random.Random(f"{name} {number}")
        found = (path for pattern in example.files for path in folder.glob(pattern))
        files = sorted(path for path in found if path.is_file() and path.stat().st_size)
        path = files[number % len(files)]
        what, content = mutated(path.read_bytes(), HOW[(number + number // len(files)) % len(HOW)], chance)
        path.write_bytes(content)
        outcome, text, answer = attempt(lambda: read(folder))
        outcome, text = answer or (str(outcome), text)
        return outcome, f"{path}, {what}: {text}"

    try_each(say, whole, scratch, numbers, use)


@promise(
    "Damaged files are refused or read right",
    fault="changed bytes in {kind}",
    full=300,
    each=MUTATIONS,
    kinds=FORMATS,
    smoke=["models", "event logs", "CURRENT, LAST and tombstones"],
)
def test_mutations(trial: Trial, nursery: Nursery, world: Path, whole_format: Callable[[str], Path]) -> None:
    name = trial.promise.kind
    judge(trial, nursery, read_damaged, name, whole_format(name), world, trial.folder)
