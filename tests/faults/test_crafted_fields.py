"""Odd values in the fields of JSON files, under a checksum that fits, are refused with a typed error or harmless.

Anyone who can write a folder can write such a file. The values have every type, and every size up to 10^30.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tests.faults import operations
from tests.faults.harness import Trial, promise
from tests.faults.judging import MAX_TEXT, attempt, judge, outcomes
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import OPERATIONS, USERS
from tests.faults.test_mutations import MOST_SECONDS, limit_resources
from tests.faults.test_skew import replace
from vista.errors import shown
from vista.log.log_verification import verify_log
from vista.log.segment_manifest import manifest_bytes
from vista.model.model_description import checksum_of
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.store.admin.store_stats import store_stats
from vista.store.admin.verification import verify_store
from vista.store.format.keys import MANIFEST_KEY
from vista.training import checkpoint

Fields = dict[str, Any]
MANIFESTS = 20
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**18, 10**30, 1.5, float("nan"), float("inf"), "", "x", "a" * 100),
    *("\0", "1" * 300, "../../etc/passwd", [], [1], [[]], {}, {"a": 1}),
]


@dataclass(frozen=True)
class Crafted:
    """A kind of file: how to read and write its fields, and what uses it."""

    read: Callable[[Path], Fields]
    write: Callable[[Path, Fields], None]
    uses: dict[str, Callable[[Path], Any]]


def write_manifest(folder: Path, fields: Fields) -> None:
    content = json.dumps(fields, sort_keys=True).encode()
    replace(str(folder / "store"), MANIFEST_KEY, xxhash.xxh3_64_hexdigest(content).encode() + b"\n" + content)


def read_manifest(folder: Path) -> Fields:
    with StoreReader.open(folder / "store") as opened:
        return dataclasses.asdict(opened.manifest)


def read_everything(folder: Path) -> None:
    with StoreReader.open(folder / "store") as opened:
        opened.get_many(list(USERS))
        opened.states(list(USERS))


def score(folder: Path) -> None:
    with Scorer.open(folder / "model", folder / "store", max_age_s=1e9) as scorer:
        scorer.score(list(USERS), [0, 10])


def without_checksum(path: Path, name: str = "checksum") -> Fields:
    return {field: value for field, value in json.loads(path.read_bytes()).items() if field != name}


def config(folder: Path) -> Path:
    return folder / "model" / "config.json"


def segment(folder: Path) -> Path:
    return folder / "log" / "segment-000001" / "manifest.json"


def state(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step-00000007" / checkpoint.STATE_FILE


def write_config(folder: Path, fields: Fields) -> None:
    config(folder).write_text(json.dumps(fields | {"checksum": checksum_of(fields)}))


def write_state(folder: Path, fields: Fields) -> None:
    body = json.dumps(fields, sort_keys=True).encode()
    state(folder).write_text(json.dumps(fields | {"sha256": hashlib.sha256(body).hexdigest()}))


CRAFTED: dict[str, Crafted] = {
    "the manifest of a generation": Crafted(
        read_manifest,
        write_manifest,
        {
            "read": read_everything,
            "stats": lambda folder: str(store_stats(folder / "store")),
            "verify": lambda folder: str(verify_store(folder / "store")),
            "score": score,
            **{name: OPERATIONS[name].run for name in ("a copy", "an incremental refresh", "an erasure of 5")},
            **{name: OPERATIONS[name].run for name in ("an export", "a compaction", "a full refresh")},
        },
    ),
    "the manifest of a segment": Crafted(
        lambda folder: without_checksum(segment(folder)),
        lambda folder, fields: segment(folder).write_bytes(manifest_bytes(fields)) and None,
        {
            "read": lambda folder: operations.num_events(operations.log_of(folder)),
            "print": lambda folder: str(operations.log_of(folder)),
            "verify": lambda folder: str(verify_log(folder / "log")),
            **{name: OPERATIONS[name].run for name in ("a full refresh", "an append", "a compaction of a log")},
        },
    ),
    "config.json of a model": Crafted(
        lambda folder: without_checksum(config(folder)),
        write_config,
        {"open": lambda folder: VistaModel.from_pretrained(folder / "model"), "score": score},
    ),
    "the state of a checkpoint": Crafted(
        lambda folder: without_checksum(state(folder), "sha256"),
        write_state,
        {"load": lambda folder: checkpoint.load_checkpoint(state(folder).parent)},
    ),
}


def places(fields: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys and indices that lead to each value."""
    for key, value in fields.items() if isinstance(fields, dict) else enumerate(fields):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def use_crafted(say: Say, world: str, scratch: str, numbers: list[int]) -> None:
    """Write an odd value for each number and use the file; says [outcome, text]."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit_resources()
    whole = Path(scratch, "whole")
    shutil.copytree(world, whole, dirs_exist_ok=True)  # another child may have died
    operations.checkpoints(whole)
    for number in numbers:
        chance = random.Random(number)
        name = list(CRAFTED)[number % len(CRAFTED)]
        folder = Path(scratch, f"crafted-{number}")
        shutil.copytree(whole, folder)
        fields = CRAFTED[name].read(folder)
        *above, last = chance.choice(list(places(fields)))
        value, use = chance.choice(ODD), chance.choice(list(CRAFTED[name].uses))
        inner: Any = fields
        for key in above:
            inner = inner[key]
        inner[last] = value
        CRAFTED[name].write(folder, fields)
        signal.alarm(MOST_SECONDS)
        outcome, text = use_once(CRAFTED[name].uses[use], folder)
        signal.alarm(0)
        field = ".".join(map(str, (*above, last)))
        say([outcome, f"{field}={shown(value)} in {name}, {use}: {text}"[:MAX_TEXT]])
        shutil.rmtree(folder)


def use_once(use: Callable[[Path], Any], folder: Path) -> tuple[str, str]:
    """Use a crafted file; returns the outcome, and a text if it breaks the promise."""
    outcome, text, _ = attempt(lambda: use(folder))
    return outcome or "used", text


@promise(
    "Errors are typed or documented",
    fault="an odd value in a JSON file with a checksum that fits",
    judged=True,
    full=4000,
    short=MANIFESTS,
    each=MANIFESTS,
)
def test_crafted_fields(trial: Trial, nursery: Nursery, world: Path) -> None:
    judge(trial, outcomes(nursery, use_crafted, world, trial.folder, numbers=list(trial.numbers), timeout_s=300))


def use_unchanged(say: Say, world: str, scratch: str) -> None:
    """Rewrite each file with the fields that it has, and use it."""
    shutil.copytree(world, Path(scratch, "world"))
    operations.checkpoints(Path(scratch, "world"))
    for name, crafted in CRAFTED.items():
        for use in crafted.uses:
            folder = Path(scratch, name, use)
            shutil.copytree(Path(scratch, "world"), folder)
            crafted.write(folder, crafted.read(folder))
            crafted.uses[use](folder)


def test_unchanged_fields_are_used(nursery: Nursery, world: Path, tmp_path: Path) -> None:
    nursery.call(use_unchanged, world, tmp_path)
