"""The operations that write, each with what it promises once it has returned.

All of them work on a copy of a small world: log/, model/ and store/ in one folder. They run in children, because other
processes than the one that wrote must find everything on the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conftest import DAY, LENGTHS, small_config, small_frame
from vista.config import SimulateConfig, SourceColumns, SourceConfig, WatchConfig
from vista.config.checks import Codec
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog
from vista.log.ingest.source_parser import SourceParser
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, merge, refresh, refresh_incremental
from vista.store import StoreReader, user_keys
from vista.store.admin import compact_store, copy_generation, roll_back, verify_store
from vista.store.folder_files import Tombstones
from vista.store.layout import Shard, list_generations
from vista.store.writer import erase
from vista.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vista.training.log_schema import schema_of

USERS = range(100, 100 + len(LENGTHS))
COLUMNS: dict[str, Any] = {"time_unit": "ms", "columns": SourceColumns(action="action", rating="rating")}
ERASED_BEFORE = range(900, 940)
"""Users without records who were erased before the operation."""


@dataclass(frozen=True)
class Operation:
    """One operation on a folder."""

    run: Callable[[Path], Any]
    holds: Callable[[Path], Any]
    """AssertionError or VistaError if the folder is not as the operation promises once it has returned."""
    before: Callable[[Path], Any] = lambda folder: None
    """What another process did earlier."""
    repeated: str = ""
    """Part of the VistaError by which the operation refuses to be repeated; empty if it must not refuse."""
    store: str = "store"
    """The store that it writes."""


@cache
def parser() -> SourceParser:
    """The parser of this process, which ends with it."""
    return SourceParser()


def log_of(folder: Path) -> EventLog:
    return EventLog.open(folder / "log")


def save_model(log: EventLog, folder: Path, *, counters: bool) -> VistaModel:
    """Make an untrained model; refreshes do not depend on training."""
    config = small_config(log, "unused", model__counter_keys=["item"] if counters else [])
    model = VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()
    model.save_pretrained(folder)
    return model


def model_of(folder: Path) -> VistaModel:
    return VistaModel.from_pretrained(folder / "model")


def later_frame() -> dict[str, Any]:
    """More events of the same users."""
    frame = small_frame(seed=1)
    return frame | {"timestamp": frame["timestamp"] + 400 * DAY}


def served_users(store: Path) -> list[int]:
    """All users with a readable record in the published generation."""
    with StoreReader.open(store) as opened:
        users = list(map(int, opened.keys()))
        assert not users or opened.get_many(users).found.all(), "a listed user is not found"
        return users


def refresh_full(folder: Path, store: str = "store", **options: Any) -> None:
    refresh(model_of(folder), log_of(folder), folder / store, options=RefreshOptions(codec=Codec.float16), **options)


def holds_everyone(folder: Path, store: str = "store") -> None:
    with StoreReader.open(folder / store) as opened:
        assert opened.manifest.codec == "float16", "the generation before is served"
    assert served_users(folder / store) == list(USERS)


def holds_shard(folder: Path) -> None:
    users = served_users(folder / "sharded" / "part-0-of-2")
    assert users and set(users) < set(USERS), users


def append(folder: Path) -> None:
    EventLog.from_frame(later_frame(), folder / "log", append=True, **COLUMNS)


def holds_all_events(folder: Path) -> None:
    with StoreReader.open(folder / "store") as opened:
        counts = opened.get_many(list(USERS)).event_count
    assert counts.tolist() == [2 * length for length in LENGTHS], counts


def erase_before(folder: Path) -> None:
    erase(folder / "store", list(ERASED_BEFORE))


def erasure(count: int) -> Operation:
    """Erase as many users, most of whom have no record."""
    users = range(101, 101 + count)

    def holds(folder: Path) -> None:
        assert not set(served_users(folder / "store")) & set(users), "erased users are served"
        everyone = [*ERASED_BEFORE, *users]
        erased = Tombstones(folder / "store").erased(user_keys(everyone))
        assert all(erased), f"{len(everyone) - sum(erased)} of {len(everyone)} erased users may come back"

    return Operation(lambda folder: erase(folder / "store", list(users)), holds, before=erase_before)


def holds_copy(folder: Path) -> None:
    assert served_users(folder / "served" / "copy") == list(USERS)


def merge_store(folder: Path) -> None:
    merge(model_of(folder), [(folder / "store", log_of(folder))], folder / "merged")


def holds_merged(folder: Path) -> None:
    """All users, and that those who were erased from the part stay erased."""
    assert served_users(folder / "merged") == list(USERS)
    assert all(Tombstones(folder / "merged").erased(user_keys(ERASED_BEFORE)))


def export(folder: Path) -> None:
    from vista.store.parquet import export_store

    export_store(folder / "store", folder / "exported.parquet")


def import_to(folder: Path, store: str) -> None:
    from vista.store.parquet import import_store

    import_store(folder / "exported.parquet", folder / store, parser=parser())


def holds_export(folder: Path) -> None:
    import_to(folder, "check")
    assert served_users(folder / "check") == list(USERS)


def compact(folder: Path) -> None:
    compact_store(folder / "store")


def compact_before(folder: Path) -> None:
    refresh_full(folder)
    erase(folder / "store", [101])


def holds_compacted(folder: Path) -> None:
    assert served_users(folder / "store") == [user for user in USERS if user != 101]
    generations = list_generations(folder / "store")
    assert min(generations) > 2, f"{generations}: an old generation is left"


def holds_rolled_back(folder: Path) -> None:
    with StoreReader.open(folder / "store") as opened:
        assert opened.generation == 1, opened.generation
    assert served_users(folder / "store") == list(USERS)


def num_events(log: EventLog) -> int:
    """Events of the log, all of which must be readable."""
    count = log.gather(np.arange(log.num_users)).num_events
    assert count == log.num_events, (count, log.num_events)
    return count


def holds_appended(folder: Path) -> None:
    log = log_of(folder)
    assert log.last_segment == 2 and num_events(log) == 2 * sum(LENGTHS), log


def new_log(folder: Path) -> None:
    EventLog.from_frame(later_frame(), folder / "logs" / "deep" / "log", **COLUMNS)


def holds_new_log(folder: Path) -> None:
    assert num_events(EventLog.open(folder / "logs" / "deep" / "log")) == sum(LENGTHS)


def holds_log_erased(folder: Path) -> None:
    assert num_events(log_of(folder)) == sum(LENGTHS[2:])


def first_event() -> dict[str, list[int]]:
    frame = small_frame()
    return {name: [int(frame[name][0])] for name in ("user", "item", "timestamp")}


def holds_forgotten(folder: Path) -> None:
    assert num_events(log_of(folder)) == sum(LENGTHS) - 1


def log_compact_before(folder: Path) -> None:
    append(folder)
    erase_users(folder / "log", [100])


def holds_log_compacted(folder: Path) -> None:
    log = log_of(folder)
    assert len(log.segments) == 1 and num_events(log) == 2 * sum(LENGTHS[1:]), log


def watch_before(folder: Path) -> None:
    import polars as pl

    (folder / "in").mkdir()
    pl.DataFrame(later_frame()).write_csv(folder / "in" / "day.csv")
    (folder / "in" / "day.csv.done").touch()


def watch_once(folder: Path) -> None:
    from vista.refresh.watch import Watch

    events = SourceConfig(timestamp="timestamp", time_unit="ms", action="action", rating="rating")
    data, model, store, incoming = (str(folder / name) for name in ("log", "model", "store", "in"))
    watched = Watch(WatchConfig(data=data, model=model, store=store, folder=incoming, events=events, once=True))
    watched.look()


def holds_watched(folder: Path) -> None:
    holds_appended(folder)
    holds_all_events(folder)


def checkpoints(folder: Path, since: int = 5) -> None:
    """Save the checkpoints of the steps up to 7."""
    for step in range(since, 8):
        save_checkpoint(folder / "run" / "checkpoints", step, {"a": torch.full((1000,), float(step))}, {})


def resumed_checkpoints(folder: Path) -> None:
    """Save those after the newest checkpoint, as a run that resumes: a save removes the checkpoints of later steps."""
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    checkpoints(folder, 5 if newest is None else int(newest.name.removeprefix("step-")) + 1)


def holds_checkpoints(folder: Path) -> None:
    assert latest_checkpoint(folder / "run" / "checkpoints") == folder / "run" / "checkpoints" / "step-00000007"
    whole_checkpoints(folder)


def whole_checkpoints(folder: Path) -> None:
    """Each checkpoint that has its name is complete, whether or not it was acknowledged."""
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        tensors, _ = load_checkpoint(path)
        assert (tensors["a"] == float(path.name.removeprefix("step-"))).all()


def train_before(folder: Path) -> None:
    """Put a model where the run will export its own, without the checkpoints of its run."""
    shutil.copytree(folder / "model", folder / "runs" / "new" / "best")


def train_small(folder: Path) -> None:
    from vista.training.trainer import train

    train(small_config(log_of(folder), folder / "runs" / "new", optim__epochs=1))


def run_model(folder: Path) -> VistaModel:
    return VistaModel.from_pretrained(folder / "runs" / "new" / "best")


def holds_trained(folder: Path) -> None:
    run_model(folder)
    best, model = (
        (place / "config.json").read_bytes() for place in (folder / "runs" / "new" / "best", folder / "model")
    )
    assert best != model, "the earlier model is still there"


ADDED = [5000, 5010, 7000]
"""Items that `vista items add` adds to the model."""


def item_table(items: Any) -> dict[str, Any]:
    """A table with a feature of each kind."""
    rng = np.random.default_rng(len(items))
    brands = [f"brand {value}" for value in rng.integers(0, 5, len(items))]
    texts = rng.normal(size=(len(items), 3)).tolist()
    return {"item": list(items), "brand": brands, "price": rng.lognormal(size=len(items)), "text": texts}


def add_items_before(folder: Path) -> None:
    """Make featured/ with a model of items with features, its store, and a table of new items."""
    import polars as pl

    from vista.training.warm_start import drawn_model

    made = folder / "featured"
    known = np.unique(small_frame()["item"])
    log = EventLog.from_frame(small_frame(), made / "log", items=item_table(known), **COLUMNS)
    config = small_config(log, "unused")
    torch.manual_seed(0)
    model = drawn_model(config, log, schema_of(log, config), {})
    with torch.no_grad():
        for weight in model.parameters():  # heads start at zero
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(made / "model", card="A card.")
    refresh(VistaModel.from_pretrained(made / "model"), log, made / "store")
    pl.DataFrame(item_table(ADDED)).write_parquet(made / "new.parquet")


def add_items(folder: Path) -> None:
    from vista.cli.item_commands import run_items_add
    from vista.config import ItemsAddConfig, ItemTableConfig

    made = folder / "featured"
    table = ItemTableConfig(paths=[str(made / "new.parquet")])
    run_items_add(ItemsAddConfig(model=str(made / "model"), items=table))


def ranked(folder: Path) -> list[float]:
    """Scores of the added items and a known one for a user. Added items score alike while the model lacks them."""
    from vista.scorer import Scorer

    with Scorer.open(folder / "featured" / "model", folder / "featured" / "store") as scorer:
        return scorer.score([100], [*ADDED, int(small_frame()["item"][0])])[0].tolist()  # type: ignore[no-any-return]


def holds_added(folder: Path) -> None:
    assert len(set(ranked(folder)[:3])) == 3, "the model does not rank the added items"


def index_items(folder: Path) -> None:
    from vista.cli.item_commands import run_index
    from vista.config import IndexConfig

    run_index(IndexConfig(model=str(folder / "model")))


def holds_index(folder: Path) -> None:
    """A scorer of the index retrieves what a scan finds."""
    from vista.scorer import Scorer

    with Scorer.open(folder / "model", folder / "store", index=folder / "model.index") as scorer:
        best = scorer.retrieve([100], top_k=5)[0].items
        assert best.tolist() == scorer.rank(100, top_k=5).items.tolist()


def simulate_small(folder: Path) -> None:
    from vista.simulation.simulate import simulate

    few: dict[str, Any] = {"num_users": 6, "events_per_user": 20, "num_items": 40, "num_topics": 8, "days": 200}
    more: dict[str, Any] = {"episode_events": 10, "session_events": 5, "impressions_per_user": 10}
    simulate(SimulateConfig(out=str(folder / "simulated" / "new"), **few, **more))


def holds_simulated(folder: Path) -> None:
    from vista.config import PrepareConfig
    from vista.log.ingest.prepare import prepare

    shutil.rmtree(folder / "check", ignore_errors=True)
    source = SourceConfig(kind="simulated", paths=[str(folder / "simulated" / "new")])
    prepare(PrepareConfig(out=str(folder / "check"), events=source), parser=parser())


OPERATIONS: dict[str, Operation] = {
    "a full refresh": Operation(refresh_full, holds_everyone),
    "a full refresh into a new store": Operation(
        lambda folder: refresh_full(folder, "new/deep/store"),
        lambda folder: holds_everyone(folder, "new/deep/store"),
        store="new/deep/store",
    ),
    "a refresh of a shard": Operation(
        lambda folder: refresh_full(folder, "sharded", shard=Shard(0, 2)), holds_shard, store="sharded/part-0-of-2"
    ),
    "an incremental refresh": Operation(
        lambda folder: refresh_incremental(model_of(folder), log_of(folder), folder / "store"),
        holds_all_events,
        before=append,
    ),
    "an erasure of 5": erasure(5),
    "an erasure of 40": erasure(40),
    "an erasure of 400": erasure(400),
    "a copy": Operation(
        lambda folder: copy_generation(folder / "store", folder / "served" / "copy"), holds_copy, store="served/copy"
    ),
    "a merge": Operation(merge_store, holds_merged, before=erase_before, store="merged"),
    "an export": Operation(export, holds_export),
    "an import": Operation(
        lambda folder: import_to(folder, "imported/store"),
        lambda folder: served_users(folder / "imported" / "store"),
        before=export,
        store="imported/store",
    ),
    "a compaction": Operation(compact, holds_compacted, before=compact_before),
    "a rollback": Operation(
        lambda folder: roll_back(folder / "store"),
        holds_rolled_back,
        before=refresh_full,
        repeated="no complete generation before",
    ),
    "an append": Operation(append, holds_appended, repeated="already contains it"),
    "a new log": Operation(new_log, holds_new_log, repeated="already exists"),
    "an erasure from a log": Operation(lambda folder: erase_users(folder / "log", [100, 101]), holds_log_erased),
    "a deletion of events": Operation(
        lambda folder: forget_events(folder / "log", first_event()), holds_forgotten, repeated="match no event"
    ),
    "a compaction of a log": Operation(
        lambda folder: compact_log(folder / "log"), holds_log_compacted, before=log_compact_before
    ),
    "a look of watch": Operation(watch_once, holds_watched, before=watch_before),
    "three checkpoints": Operation(resumed_checkpoints, holds_checkpoints),
    "an addition of items": Operation(add_items, holds_added, before=add_items_before, store="featured/store"),
    "an index of items": Operation(index_items, holds_index),
    "a training run": Operation(train_small, holds_trained, before=train_before),
    "a simulation": Operation(simulate_small, holds_simulated),
}
"""By name, as in "a power cut during NAME"."""


def verified(store: Path) -> None:
    """Require that `vista store verify` finds no problem."""
    report = verify_store(store)
    assert not report.num_problems, f"verify finds {report.problems[:2]}"
