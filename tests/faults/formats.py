"""The file formats that vista reads: how to make a small example of each, and how to read one for an answer.

`make` and `read` run in children. Answers are strings; two examples with the same contents have the same answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.conftest import small_frame
from tests.faults import operations
from tests.faults.operations import USERS, served_users
from tests.log.ingest.public.samples import SAMPLES
from vista.config import ImpressionsConfig, PrepareConfig, SourceColumns, SourceConfig, TrainConfig
from vista.config.composition import compose_config, to_yaml
from vista.evaluation.comparison import PerUserMetrics
from vista.evaluation.reference import Check, Reference
from vista.log import deletions
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS
from vista.log.ingest.prepare import prepare
from vista.model.serving_model import Adapter, ServingModel
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.store import StoreReader, user_keys
from vista.store.folder_files import Tombstones
from vista.store.writer import erase
from vista.training.checkpoint import latest_checkpoint, load_checkpoint

Make = Callable[[Path], None]
Read = Callable[[Path, Path], str]


@dataclass(frozen=True)
class Format:
    """A format, as files in a folder that starts as a copy of the world."""

    files: tuple[str, ...]
    """Patterns of the files to damage, relative to the folder."""
    read: Read
    """Called with the folder and with an undamaged world; returns the answer."""
    make: Make = lambda folder: None
    checked: bool = True
    """Whether the format has a checksum, so that another answer than of the undamaged files is an error. Otherwise, an
    error is only that reading the same damaged bytes twice gives two answers."""


def digest(parts: Iterable[Any]) -> str:
    """A digest of arrays and other values."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return state.hexdigest()


@cache
def loaded_model(world: Path) -> VistaModel:
    """The undamaged model of a world."""
    return operations.model_of(world)


def made(folder: Path) -> Path:
    """Where readers write; without what an earlier reader left there."""
    shutil.rmtree(folder / "made", ignore_errors=True)
    return folder / "made"


def contents(log: EventLog) -> str:
    """The checksums of all files of a log."""
    return digest(manifest["files"] for manifest in log.manifests)


def source(name: str, write: Callable[[Path], None], *, checked: bool = False, **columns: Any) -> Format:
    """A format of source files; `columns` are fields of SourceConfig."""
    if "kind" not in columns:
        columns |= {"timestamp": "timestamp", "time_unit": "ms"}

    def read(folder: Path, world: Path) -> str:
        events = SourceConfig(paths=[str(folder / name)], **columns)
        prepare(PrepareConfig(out=str(made(folder)), events=events), parser=operations.parser())
        log = EventLog.open(folder / "made")
        return f"{log.num_users} users, {operations.num_events(log)} events, {contents(log)}"

    return Format((name,), read, lambda folder: write(folder / name), checked)


def public_set(name: str) -> Format:
    """The files of a public data set, of which any may be damaged."""

    def make(folder: Path) -> None:
        (folder / name).mkdir()
        SAMPLES[name](folder / name)

    @cache
    def settings() -> PrepareConfig:
        words = [f"set={name}", "events.paths=[replaced]"]
        return compose_config(PrepareConfig, [*words, "filter.min_item_events=1", "filter.min_user_events=1"])

    def read(folder: Path, world: Path) -> str:
        events = dataclasses.replace(settings().events, paths=[str(folder / name)])
        prepare(dataclasses.replace(settings(), events=events, out=str(made(folder))), parser=operations.parser())
        return contents(EventLog.open(folder / "made"))

    return Format((f"{name}/**/*",), read, make, checked=False)


def frame() -> Any:
    import polars as pl

    return pl.DataFrame(small_frame())


def write_npz(path: Path) -> None:
    columns = small_frame()
    arrays: dict[str, Any] = {"time": columns["timestamp"] // 1000, "rating": columns["rating"]}
    for name in ("user", "item"):
        arrays[f"{name}_raw"], arrays[name] = np.unique(columns[name], return_inverse=True)
    np.savez_compressed(path, **arrays)


def store_digest(store: Path) -> str:
    with StoreReader.open(store) as opened:
        users = list(opened.keys())
        batch = opened.get_many(users)
        tail = batch.tail
        return digest(
            [users, batch.found, batch.summary, batch.event_count, batch.last_event_ts, tail.items, tail.times]
        )


def read_export(folder: Path, world: Path) -> str:
    operations.import_to(folder, "imported")
    return store_digest(folder / "imported")


def make_two_generations(folder: Path) -> None:
    erase(folder / "store", [101, *operations.ERASED_BEFORE])
    operations.refresh_full(folder)


def read_small_files(folder: Path, world: Path) -> str:
    """The published generation, the erased users, and the number of the next generation."""
    with StoreReader.open(folder / "store") as opened:
        served = opened.generation
    users = served_users(folder / "store")
    erased = Tombstones(folder / "store").erased(user_keys([*USERS, *operations.ERASED_BEFORE]))
    report = refresh(loaded_model(world), operations.log_of(world), folder / "store")
    return f"{served}, {report.generation}, {sum(erased)}, {users}, {served_users(folder / 'store')}"


def make_log(folder: Path) -> None:
    operations.append(folder)
    operations.OPERATIONS["a deletion of events"].run(folder)


def read_log(folder: Path, world: Path) -> str:
    refresh(loaded_model(world), operations.log_of(folder), made(folder))
    return store_digest(folder / "made")


def make_log_with_impressions(folder: Path) -> None:
    operations.simulate_small(folder)
    source = {"kind": "simulated", "paths": [str(folder / "simulated" / "new")]}
    both = PrepareConfig(
        out=str(folder / "shown"), events=SourceConfig(**source), impressions=ImpressionsConfig(**source)
    )
    prepare(both, parser=operations.parser())
    log = EventLog.open(folder / "shown")
    ids = log.items.ids(range(6))
    features = {"kind": [*"abcabc"], "price": np.arange(6) / 2, "vector": np.ones((6, 2))}
    EventLog.from_frame(None, folder / "shown", append=True, items={"item": ids} | features)
    assert log.impressions is not None
    tasks = log.impressions.tasks
    rows = {"user": log.users.ids([0, 1, 2] * 2), "item": ids, "timestamp": np.arange(6) + 2**40}
    EventLog.from_frame(
        rows | {"action": log.actions[:1] * 6, "device": [*"abcab", None], "dwell": np.arange(6) / 2},
        folder / "shown",
        append=True,
        time_unit="ms",
        columns=SourceColumns(action="action", labels=tasks),
        impressions=rows | {"surface": [*"ababab"], "load": np.arange(6) / 4} | {task: [0, 1] * 3 for task in tasks},
        categories=["device"],
        numbers=["dwell"],
        request_categories=["surface"],
        request_numbers=["load"],
    )
    deletions.erase_users(folder / "shown", EventLog.open(folder / "shown").users.ids([1]).tolist())


def read_log_with_impressions(folder: Path, world: Path) -> str:
    log = EventLog.open(folder / "shown")
    log.verify()
    history, shown = log.gather(np.arange(log.num_users)), log.impressions
    assert shown is not None
    arrays = [getattr(shown, name) for name in ("offsets", "item", "timestamp", "label", "mask", "probability")]
    for column in log.item_features.values():
        arrays += [getattr(column, name) for name in column.__slots__ if name != "values"]
    arrays += [*history.features.columns.values(), *shown.features.columns.values()]
    for values in (*log.event_features.values(), *log.request_features.values()):
        arrays += [] if values is None else [values.ids(np.arange(len(values))).tolist()]
    return digest([history.item, history.timestamp, history.action, history.offsets, shown.tasks, *arrays])


def write_deletions(folder: Path) -> None:
    import polars as pl

    some = {name: column[:20] for name, column in small_frame().items() if name != "rating"}
    pl.DataFrame(some).write_csv(folder / "deletions.csv")


def read_deletions(folder: Path, world: Path) -> str:
    shutil.copytree(world / "log", made(folder))
    with mock.patch.object(deletions, "SourceParser", lambda: nullcontext(operations.parser())):
        deletions.forget_file(folder / "made", str(folder / "deletions.csv"), "ms")
    return contents(EventLog.open(folder / "made"))


def make_index(folder: Path) -> None:
    from vista.cli.item_commands import run_index
    from vista.config import IndexConfig
    from vista.config.checks import IndexKind

    kind = IndexKind.hnsw if find_spec("faiss") else IndexKind.flat
    run_index(IndexConfig(model=str(folder / "model"), kind=kind))


def read_index(folder: Path, world: Path) -> str:
    with Scorer.open(world / "model", world / "store", index=folder / "model.index") as scorer:
        return digest(ranking.items for ranking in scorer.retrieve(list(USERS), top_k=5))


def make_metrics(folder: Path) -> None:
    values = {name: np.random.default_rng(0).random(len(USERS)) for name in ("ndcg@10", "recall@50", "mrr")}
    question = {"data": "log", "until": "leave-last-out", "top_k": [10, 50]}
    PerUserMetrics(np.array(USERS), values, question).save(folder / "measured.npz")


def read_metrics(folder: Path, world: Path) -> str:
    metrics = PerUserMetrics.load(folder / "measured.npz")
    return digest([metrics.users, *metrics.values.items(), metrics.question])


def make_adapter(folder: Path) -> None:
    model = loaded_model(folder)
    served = ServingModel.of(model, model.empty_summary().numpy())
    values = np.random.default_rng(0).standard_normal(served.num_adapted).astype(np.float32)
    Adapter(values, served.stage2_id, model.data, []).write(folder / "de.adapter")


def read_adapter(folder: Path, world: Path) -> str:
    with Scorer.open(world / "model", world / "store", adapter=folder / "de.adapter") as scorer:
        return digest(scorer.predict(list(USERS[:3]), [0, 10, 390]).items())


def read_model(folder: Path, world: Path) -> str:
    with Scorer.open(folder / "model", world / "store") as scorer:
        scores = scorer.predict(list(USERS[:3]), [0, 10, 390])
        return digest([*scores.items(), *scorer.item_vectors()])


def read_checkpoint(folder: Path, world: Path) -> str:
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    tensors, state = load_checkpoint(newest)
    return digest([newest.name, state, *(part for name in sorted(tensors) for part in (name, tensors[name].numpy()))])


def make_yaml(folder: Path) -> None:
    (folder / "train.yaml").write_text(to_yaml(TrainConfig(run_dir="runs/mine")))


PUBLIC_SETS = ("amazon-reviews-2023", "kuairand", "yambda", "assist17")
"""Sets whose readers differ from that of a table."""


def write_reference(folder: Path) -> None:
    (folder / "reference").mkdir()
    check = Check("bins", 0.5, 0.1, 10.0, 8, [3, 4], [1.5])
    Reference(DAY_MS, 8, 0, 8 * DAY_MS, [1, 2], 32, {"items": check}).write(folder / "reference")


FORMATS: dict[str, Format] = {
    "Parquet sources": source(
        "day.parquet", lambda path: frame().write_parquet(path), action="action", numbers=["rating"]
    ),
    "CSV sources": source("day.csv", lambda path: frame().write_csv(path), rating="rating", categories=["action"]),
    "CSV sources with gzip": source(
        "day.csv.gz", lambda path: frame().write_csv(path, compression="gzip"), checked=True, rating="rating"
    ),
    "npz sources": source("events.npz", write_npz, checked=True, kind="npz"),
    **{f"files of {name}": public_set(name) for name in PUBLIC_SETS},
    "deletions to forget": Format(("deletions.csv",), read_deletions, write_deletions, checked=False),
    "metrics per user": Format(("measured.npz",), read_metrics, make_metrics),
    "exports": Format(("exported.parquet",), read_export, operations.export),
    "event logs": Format(("log/**/*",), read_log, make_log),
    "event logs with impressions and features": Format(
        ("shown/**/impressions/*", "shown/**/features/*", "shown/**/*_features/*", "shown/**/erased.npy"),
        read_log_with_impressions,
        make_log_with_impressions,
    ),
    "models": Format(("model/*",), read_model),
    "adapters": Format(("de.adapter",), read_adapter, make_adapter),
    "references": Format(
        ("reference/*",), lambda folder, _: repr(Reference.read(folder / "reference")), write_reference
    ),
    "indexes of items": Format(("model.index/*",), read_index, make_index),
    "CURRENT, LAST and tombstones": Format(
        ("store/CURRENT", "store/LAST", "store/tombstones"), read_small_files, make_two_generations
    ),
    "YAML": Format(
        ("train.yaml",),
        lambda folder, world: to_yaml(compose_config(TrainConfig, [], config_file=str(folder / "train.yaml"))),
        make_yaml,
        checked=False,
    ),
    "checkpoints": Format(("run/checkpoints/step-00000007/*",), read_checkpoint, operations.checkpoints),
}
"""By name, as in "damaged NAME"."""


NUMBERS = [0, 1, 0x7FFF_FFFF, 0xFFFF_FFFF, 2**63 - 1, 2**64 - 1]


HOW = ("flip", "set", "cut", "drop", "double", "splice", "zero", "step", "number")


def mutated(data: bytes, what: str, chance: random.Random) -> tuple[str, bytes]:
    """A copy of a file's bytes, damaged in one of the ways in HOW, and in words what was done."""
    content, size = bytearray(data), len(data)
    at = chance.choice(
        [chance.randrange(size), chance.randrange(min(size, 64)), size - 1 - chance.randrange(min(size, 512))]
    )
    length = min(chance.choice([1, 2, 4, 8, 16, 100, 512]), size - at)
    other = chance.randrange(size)
    piece = data[other : other + length]
    match what:
        case "flip":
            content[at] ^= 1 << chance.randrange(8)
        case "set":
            content[at] = chance.choice([0, 255, 127, 128])
        case "cut":
            del content[at:]
        case "drop":
            del content[at : at + length]
        case "double":
            content[at:at] = data[at : at + length]
        case "splice":
            content[at : at + len(piece)] = piece
        case "zero":
            content[at : at + length] = bytes(length)
        case "step":
            content[at] = (content[at] + chance.choice([-1, 1])) % 256
        case "number":
            width = chance.choice([4, 8])
            number = chance.choice(NUMBERS) & (1 << 8 * width) - 1
            content[at : at + width] = number.to_bytes(width, "little")
    return f"{what} at {at} of {size}, {length} bytes", bytes(content)
