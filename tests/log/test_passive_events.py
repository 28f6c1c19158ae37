"""Events made from impressions: models read them as history, and all that asks for active events is as without them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER
from vista.config import DataConfig, OptimConfig, PrepareConfig, SourceColumns, TrainConfig
from vista.config.checks import Split
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.evaluation.cases import impression_cases, next_item_cases, window_cases
from vista.evaluation.counting_baselines import Transitions, counting_baselines, fitted_scores
from vista.evaluation.label_baselines import label_baselines
from vista.evaluation.protocol import seen_columns
from vista.examples.batch_source import BatchSource, ModelReads
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users, forget_events
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.splits import visible_counts
from vista.training.run_plan import plan_run

HOUR = 3_600_000
CUT = 700 * HOUR
SHOWN = 100
COLUMNS = SourceColumns(action="kind", labels=["click", "like"])
Tables = tuple[pl.DataFrame, pl.DataFrame]


def some_tables(seed: int, num: int = 600) -> Tables:
    """Events and impressions of 15 users in 1,000 hours, some of them of one user at the same time."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(15, size=2 * num), rng.integers(12, size=2 * num)
    hour, click = rng.integers(1000, size=2 * num), rng.integers(-1, 2, size=2 * num)
    rows = pl.DataFrame({"user": user, "item": item, "timestamp": hour * HOUR})
    events = rows[:num].with_columns(kind=np.where(rng.random(num) < 0.7, "view", "buy"))
    clicks = pl.Series("click", click[num:]).replace(-1, None)
    return events, rows[num:].with_columns(clicks, like=pl.Series(rng.integers(2, size=num)))


def log_of(tables: Tables, path: Path, as_events: str | None, **settings: Any) -> EventLog:
    columns = {"time_unit": "ms", "columns": COLUMNS, "impressions": tables[1], "as_events": as_events}
    return EventLog.from_frame(tables[0], path, **columns, **settings)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, EventLog]:
    """With and without events of impressions, in two segments, of which a third deletes some rows."""
    folder = tmp_path_factory.mktemp("passive")
    made = []
    for name, as_events in (("with", "click"), ("without", None)):
        for seed in (1, 2):  # the second segment follows the first one without being told
            tables = some_tables(seed)
            log_of(tables, folder / name, as_events if seed == 1 else None, append=seed > 1)
        forget_events(folder / name, some_tables(1)[0][:40:4].select("user", "item", "timestamp"))
        erase_users(folder / name, [3])
        made.append(EventLog.open(folder / name))
    return made[0], made[1]


def rows_of(log: EventLog) -> list[list[tuple]]:
    """(item, time, action) of each user's events."""
    names = np.array(log.actions)
    return [
        list(zip(events.item.tolist(), events.timestamp.tolist(), names[events.action], strict=True))
        for events in map(log.slice, range(log.num_users))
    ]


def test_each_known_label_is_an_event_after_those_of_its_time(tmp_path: Path) -> None:
    events, shown = some_tables(3)
    log = log_of((events, shown), tmp_path / "log", "click")
    assert log.actions == ["buy", "click", "no_click", "view"] and log.passive == [2]
    known = shown.filter(pl.col("click").is_not_null())
    kind = pl.when(pl.col("click") == 1).then(pl.lit("click")).otherwise(pl.lit("no_click"))
    both = pl.concat([events, known.select("user", "item", "timestamp", kind=kind)])
    want = both.sort("user", "timestamp", maintain_order=True)
    assert 300 < len(known) < len(shown) and log.num_events == len(want)
    items = log.items.ids(np.concatenate([log.slice(row).item for row in range(log.num_users)])).tolist()
    assert items == want["item"].to_list()
    assert [action for rows in rows_of(log) for *_, action in rows] == want["kind"].to_list()
    cases = impression_cases(log, 0, None)  # no question sees its own event, or others of its time
    for user, time, seen in zip(cases.user.tolist(), cases.timestamp.tolist(), cases.seen.tolist(), strict=True):
        assert seen == (log.slice(user).timestamp < time).sum()


def test_events_of_impressions_have_no_features(tmp_path: Path) -> None:
    events, shown = some_tables(7)
    surface = [None, "home", "search"]
    events = events.with_columns(surface=pl.Series([surface[n % 3] for n in range(len(events))]), price=pl.lit(2.5))
    log = log_of((events, shown), tmp_path / "log", "click", categories=["surface"], numbers=["price"])
    assert log.event_features["surface"] is not None
    for row in range(log.num_users):
        history = log.slice(row)
        is_shown = np.isin(history.action, [log.actions.index(name) for name in ("click", "no_click")])
        columns = history.features.columns
        assert (columns["surface"][is_shown] < 0).all() and np.isnan(columns["price"][is_shown]).all()
        assert (columns["surface"][~is_shown] >= 0).any() and (columns["price"][~is_shown] == 2.5).all()


def test_active_events_are_those_of_a_log_without_impressions_as_events(logs: tuple[EventLog, EventLog]) -> None:
    log, plain = logs
    assert plain.active is plain and log.active.active is log.active
    is_active = [[row for row in rows if row[2] not in ("click", "no_click")] for rows in rows_of(log)]
    assert is_active == rows_of(plain) and sum(map(len, rows_of(log))) > sum(map(len, is_active)) + 300
    clicked = [[row for row in rows if row[2] != "no_click"] for rows in rows_of(log)]
    assert rows_of(log.active) == clicked
    assert log.active.num_events == log.active.lengths.sum() == sum(map(len, clicked))
    counts = visible_counts(log, CUT)
    before = [sum(row[2] != "no_click" for row in rows[:n]) for rows, n in zip(rows_of(log), counts, strict=True)]
    assert log.active_counts(counts).tolist() == before == visible_counts(log.active, CUT).tolist()


def test_a_compacted_log_has_the_same_active_events(tmp_path: Path) -> None:
    for seed in (1, 2):
        log = log_of(some_tables(seed), tmp_path / "log", "click", append=seed > 1)
    want = rows_of(log.active)
    compact_log(tmp_path / "log")
    assert rows_of(EventLog.open(tmp_path / "log").active) == want


@pytest.fixture(scope="module")
def negatives(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, EventLog]:
    """As `logs`, without clicks, and other items are shown: the second log has all active events of the first."""
    events, shown = some_tables(4)
    tables = events, shown.with_columns(pl.col("item") + SHOWN, click=pl.lit(0))
    folder = tmp_path_factory.mktemp("negatives")
    return log_of(tables, folder / "with", "click"), log_of(tables, folder / "without", None)


def test_questions_and_their_labels_are_those_of_active_events(negatives: tuple[EventLog, EventLog]) -> None:
    log, plain = negatives
    with_, without = (
        next_item_cases(each, visible_counts(each, CUT), end=each.counts_before(900 * HOUR)) for each in negatives
    )
    assert len(without) > 10
    for name in ("user", "item", "now"):
        np.testing.assert_array_equal(getattr(with_, name), getattr(without, name))
    assert with_.seen.tolist() == log.counts_before(CUT)[with_.user].tolist()
    for length in ({"horizon_events": 5}, {"horizon_days": 4.0}):
        asked = [
            window_cases(each, visible_counts(each, CUT), None, now=CUT, min_seen=20, min_after=8, **length)  # type: ignore[arg-type]
            for each in (log, plain)
        ]
        assert len(asked[1]) > 5
        for name in ("user", "item", "is_new", "offsets"):
            np.testing.assert_array_equal(getattr(asked[0], name), getattr(asked[1], name))
        columns = np.arange(log.num_items)
        for own, other in zip(
            seen_columns(log, asked[0], columns), seen_columns(plain, asked[1], columns), strict=True
        ):
            np.testing.assert_array_equal(own, other)


def test_baselines_do_not_read_passive_events(negatives: tuple[EventLog, EventLog]) -> None:
    scores: list[list[np.ndarray]] = []
    for log in negatives:
        counts = visible_counts(log, CUT)
        cases, columns = next_item_cases(log, counts), np.arange(log.num_items)
        asked = counting_baselines(has_time=True, horizon_events=1)
        scores.append([fitted_scores(each, log, counts, columns)(cases) for each in asked])
    for with_, without in zip(*scores, strict=True):
        np.testing.assert_array_equal(with_, without)


def test_baselines_of_labels_do_not_read_passive_events(negatives: tuple[EventLog, EventLog]) -> None:
    data = DataConfig(split=Split.time, validation_from=str(CUT), test_from=str(850 * HOUR))
    asked = [impression_cases(log, 850 * HOUR, None) for log in negatives]
    assert (asked[0].seen > asked[1].seen).any()
    answers = [label_baselines(log, data, cases, trained=False) for log, cases in zip(negatives, asked, strict=True)]
    assert set(answers[0]) == {"item rate", "counters", "pooled vectors"}
    for name, answer in answers[0].items():
        np.testing.assert_array_equal(answer, answers[1][name])


@pytest.mark.parametrize("kind", ["next_weight", "window_weight"])
def test_training_asks_for_active_events_alone(negatives: tuple[EventLog, EventLog], kind: str) -> None:
    """Histories have the others too. Every active event is a next item once."""
    log = negatives[0]
    data = DataConfig(
        split=Split.time, validation_from=str(CUT), test_from=str(CUT), tokens_per_batch=64, label_spacing=4,
        num_negatives=8, anchor_spacing=3, horizon_events=6,
    )  # fmt: skip
    config = TrainConfig(data=data, optim=OptimConfig(**{"next_weight": 0.0, "task_weight": 0.0, kind: 1.0}))
    made = BatchSource(log, ModelReads(np.arange(log.num_items) + 1), config)
    labels, read, found = [], [], np.zeros(3)
    for batch in (made.batch(0, index) for index in range(made.num_batches(0))):
        label = batch.labels.item if batch.anchors is None else batch.anchors.item
        row = batch.rows.numpy()
        if (anchors := batch.anchors) is not None:
            found += len(anchors.item), (anchors.item >= 0).sum(), (anchors.next_item >= 0).sum()
        labels.append(row[label[label >= 0].numpy()])
        read.append(row[batch.events.item.numpy()])
    label, item = (log.items.ids(np.concatenate(rows) - 1) for rows in (labels, read))
    counts = visible_counts(log, CUT)
    num_active = log.active_counts(counts).sum()
    assert len(item) == counts.sum() and (item < SHOWN).sum() == num_active < len(item) - 100
    assert (label < SHOWN).all()
    if kind == "next_weight":
        assert len(label) == num_active
        return
    # Of 12 items, six random events have 4.9 on average; at the end of a history, fewer are left.
    assert 4 < found[1] / found[0] < 5 and found[2] > 0.95 * found[0]


@pytest.mark.parametrize("until", ["leave-last-out", "leave-last-2-out", "leave-last-20-percent-out", "all"])
def test_the_last_active_events_are_left_out(negatives: tuple[EventLog, EventLog], until: str) -> None:
    log, plain = negatives
    counts, of_plain = (visible_counts(each, until) for each in negatives)
    np.testing.assert_array_equal(log.active_counts(counts), of_plain)
    np.testing.assert_array_equal(next_item_cases(log, counts).item, next_item_cases(plain, of_plain).item)
    rows = np.array([4, 2, 4])
    np.testing.assert_array_equal(log.counts_before_active(of_plain[rows], rows), counts[rows])


def test_later_impressions_are_read_as_those_before(tmp_path: Path) -> None:
    events, shown = some_tables(1)
    log_of((events, shown.with_columns(click=pl.lit(1))), tmp_path / "log", "click")
    assert "no_click" in log_of(some_tables(2), tmp_path / "log", None, append=True).actions
    with pytest.raises(ConfigError, match="as_events=like: impressions that the log already has are events by click;"):
        log_of(some_tables(3), tmp_path / "log", "like", append=True)
    ordered = {"columns": SourceColumns(action="kind", labels=["click"], sequence="place"), "time_unit": "ms"}
    events, shown = (table.with_columns(timestamp=pl.lit(5)) for table in (events, shown))
    events = events.with_columns(place=pl.int_range(len(events), 0, -1))
    log = EventLog.from_frame(events, tmp_path / "ordered", impressions=shown, as_events="click", **ordered)  # type: ignore[arg-type]
    for rows in rows_of(log):
        is_made = [action in ("click", "no_click") for *_, action in rows]
        assert is_made == sorted(is_made) and any(is_made)


def test_what_is_counted_by_action(logs: tuple[EventLog, EventLog]) -> None:
    keys = [plan_run(TrainConfig(), log).model.counter_keys for log in logs]
    assert keys == [["item", "action", "item*action"], ["item"]]


def test_transitions_skip_what_was_only_shown(tmp_path: Path) -> None:
    events = pl.DataFrame({"user": [1] * 4, "item": [1, 2, 1, 2], "timestamp": [0, 2, 4, 6], "kind": ["view"] * 4})
    shown = pl.DataFrame(
        {"user": [1] * 4, "item": [3, 3, 3, 3], "timestamp": [1, 3, 5, 7], "click": [0] * 4, "like": [0] * 4}
    )
    log = log_of((events, shown), tmp_path / "log", "click")
    assert len(next_item_cases(log, np.array([7]))) == 0  # only an impression follows
    cases = next_item_cases(log, np.array([5]))
    assert log.items.ids(cases.item).tolist() == [2] and cases.seen.tolist() == [5]
    scores = fitted_scores(Transitions(), log, cases.seen, np.arange(3))(cases)
    assert log.items.ids(scores.argmax(1)).tolist() == [2]


def words(tmp_path: Path, **changes: str | None) -> list[str]:
    events, shown = some_tables(6)
    events.with_columns(stars=4.0).write_csv(tmp_path / "events.csv")
    shown.write_csv(tmp_path / "shown.csv")
    keys = {
        "out": str(tmp_path / "log"), "events.paths": f"[{tmp_path / 'events.csv'}]", "events.timestamp": "timestamp",
        "events.time_unit": "ms", "events.action": "kind", "impressions.paths": f"[{tmp_path / 'shown.csv'}]",
        "impressions.timestamp": "timestamp", "impressions.time_unit": "ms", "impressions.labels": "[click]",
        "impressions.as_events": "click", **changes,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items() if value is not None]


def test_files_give_the_log_of_frames(tmp_path: Path) -> None:
    report = prepare(compose_config(PrepareConfig, words(tmp_path)), parser=PARSER)
    made, (events, shown) = EventLog.open(tmp_path / "log"), some_tables(6)
    want = log_of((events, shown), tmp_path / "frame", "click")
    assert rows_of(made) == rows_of(want) and report.num_events == want.num_events and made.verify() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impressions.as_events": "like"}, "impressions.as_events=like: {}/shown.csv has only the labels: click"),
        ({"impressions.as_events": "again"}, "impressions.as_events: again is known only later; name another label"),
        ({"events.action": None}, "impressions.as_events: the events of {}/events.csv have no actions; name their col"),
        ({"events.rating": "stars"}, "impressions.as_events: impressions have no ratings, but events do; leave these"),
        ({"impressions.paths": None, "impressions.labels": None, "impressions.timestamp": None,
          "impressions.time_unit": None}, "impressions.as_events=click: needs files of events and of impressions;"),
        ({"impressions.from_events.min_rating": "4", "impressions.paths": None}, "impressions.as_events: makes events"),
    ],
)  # fmt: skip
def test_tables_that_lack_what_it_needs(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message.format(tmp_path))):
        prepare(compose_config(PrepareConfig, words(tmp_path, **changes)), parser=PARSER)
    assert not (tmp_path / "log").exists()


def test_a_filter_that_leaves_no_impression(tmp_path: Path) -> None:
    asked = words(tmp_path, **{"filter.min_item_events": "2"})
    some_tables(6)[1].with_columns(pl.col("item") + SHOWN).write_csv(tmp_path / "shown.csv")
    with pytest.raises(ConfigError, match="as_events=click: the filter leaves no impression; lower"):
        prepare(compose_config(PrepareConfig, asked), parser=PARSER)
