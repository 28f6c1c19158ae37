"""The simulation: its files, its invariants, and the proof that old events matter."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vista.config import SimulateConfig
from vista.errors import ConfigError, DataError
from vista.simulation.simulate import (
    area_under_curve,
    generate,
    normalized_entropy,
    oracle_metrics,
    predict_from_window,
    simulate,
)
from vista.simulation.streams import (
    ACTIONS,
    NUM_PERIODS,
    SimulatedLog,
    TopicIndex,
    make_catalog,
    period,
    period_of,
    split_times,
)
from vista.simulation.worlds import LOGITS, ShareWorld, affinity, recent_match

pl = pytest.importorskip("polars")

TASKS = ShareWorld.tasks
SMALL = SimulateConfig(num_users=12, events_per_user=900, num_items=300, impressions_per_user=50, seed=3)


@pytest.fixture(scope="module")
def small() -> SimulatedLog:
    return generate(SMALL)


@pytest.fixture(scope="module")
def standard() -> SimulatedLog:
    """The size that the demo trains on."""
    return generate(SimulateConfig(num_users=300, events_per_user=3000))


def _columns(log: SimulatedLog) -> dict[str, np.ndarray]:
    names = [name for name in log.__dataclass_fields__ if name not in ("config", "catalog")]
    return {name: getattr(log, name) for name in names}


def test_same_seed_same_bytes_on_disk(tmp_path: Path) -> None:
    for run in ("one", "two"):
        simulate(replace(SMALL, out=str(tmp_path / run)))
    for name in ("events.parquet", "impressions.parquet", "items.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_new_items_have_no_events_before_they_appear() -> None:
    log = generate(replace(SMALL, new_items=0.5))
    birth = log.catalog.birth
    assert 0.4 < (birth > 0).mean() < 0.6 and (birth[log.catalog.topic == 0] == 0).all()
    for item, time in ((log.item, log.timestamp), (log.impression_item, log.impression_timestamp)):
        assert (birth[item] <= period_of(log.config, time)).all()
    late = birth > NUM_PERIODS // 2
    assert late[log.item].any(), "new items get events"


class TestEvents:
    def test_lengths_add_up(self, small: SimulatedLog) -> None:
        lengths = np.diff(small.offsets)
        assert lengths.sum() == small.num_events == len(small.timestamp) == len(small.action) == 12 * 900
        assert lengths.min() >= 1 and lengths.std() > 100

    def test_histories_fill_the_period_in_sessions(self, standard: SimulatedLog) -> None:
        begin, end = period(standard.config)
        first, last = standard.timestamp[standard.offsets[:-1]], standard.timestamp[standard.offsets[1:] - 1]
        assert (first < begin + 0.06 * (end - begin)).all()
        assert (last > end - 0.02 * (end - begin)).all()
        gaps = np.delete(np.diff(standard.timestamp), standard.offsets[1:-1] - 1)
        assert np.median(gaps) < 60_000, "most gaps lie within a session"
        assert 0.02 < (gaps > 1_800_000).mean() < 0.06, "about one event in twenty starts a session"

    def test_every_action_and_item_popularity_drifts(self, standard: SimulatedLog) -> None:
        assert np.bincount(standard.action, minlength=len(ACTIONS)).min() > 10_000
        begin, end = period(standard.config)
        part = (standard.timestamp - begin) * NUM_PERIODS // (end - begin)
        counts = [
            np.bincount(standard.item[part == index], minlength=standard.config.num_items)
            for index in (6, 7, NUM_PERIODS - 2)
        ]
        near, far = (np.corrcoef(counts[0], other)[0, 1] for other in counts[1:])
        assert near > 0.5 and far < near - 0.2

    def test_popularity_within_a_topic_is_steep(self, standard: SimulatedLog) -> None:
        ranked = standard.catalog.ranked[0]
        start = standard.catalog.topic_start
        begin, end = period(standard.config)
        early = standard.item[standard.timestamp < begin + (end - begin) // NUM_PERIODS]
        counts = np.bincount(early, minlength=standard.config.num_items)[ranked]
        heads, tails = counts[start[:-1]].sum(), counts[start[:-1] + 49].sum()
        assert heads > 15 * tails

    def test_slow_interests_return_after_long_absence(self, standard: SimulatedLog) -> None:
        user = int(np.argmax(np.diff(standard.offsets)))
        topics = standard.catalog.topic[standard.item[standard.offsets[user] : standard.offsets[user + 1]]]
        absences = []
        for topic in range(standard.config.num_topics):
            places = np.flatnonzero(topics == topic)
            if len(places) > 0.08 * len(topics):
                absences.append(np.diff(places).max())
        assert len(absences) >= 3, "a few topics fill a history"
        assert np.median(absences) > 800


class TestImpressions:
    def test_probabilities_follow_the_documented_formula(self, small: SimulatedLog) -> None:
        """Recomputed from the events by plain Python; only the table of coefficients is shared."""
        topics = small.catalog.topic
        for row in range(0, len(small.impression_item), 17):
            user, seen = small.impression_user[row], small.impression_position[row]
            history = topics[small.item[small.offsets[user] : small.offsets[user] + seen]].tolist()
            wanted = topics[small.impression_item[row]]
            share = history.count(wanted) / (len(history) + 20)
            long_term = np.log(1 + share / 0.02) / np.log(1 + 0.15 / 0.02)
            recent = np.log(1 + history[-32:].count(wanted)) / np.log(33)
            quality = small.catalog.quality[small.impression_item[row]]
            logits = LOGITS @ np.array([1.0, long_term, recent, quality])
            np.testing.assert_allclose(small.probability[row], 1 / (1 + np.exp(-logits)), rtol=1e-5)
            age = history[::-1].index(wanted) if wanted in history else -1
            assert small.decisive_age[row] == age

    def test_candidates_are_balanced(self, standard: SimulatedLog) -> None:
        late = standard.impression_timestamp >= split_times(standard.config)[1]
        age = standard.decisive_age[late]
        assert 0.2 < (age > 200).mean() < 0.5, "dormant interests and old passing topics"
        assert (age > 1000).mean() > 0.05
        assert 0.1 < (age == -1).mean() < 0.3
        assert (age == 0).mean() > 0.1

    def test_the_split_in_time_has_enough_of_everything(self, standard: SimulatedLog) -> None:
        validation_from, test_from = split_times(standard.config)
        times = standard.impression_timestamp
        assert (times >= test_from).mean() > 0.1 and ((times >= validation_from) & (times < test_from)).mean() > 0.1
        assert np.isin(np.arange(300), standard.impression_user[times >= test_from]).mean() > 0.95


@pytest.fixture(scope="module")
def rows(standard: SimulatedLog) -> dict[str, tuple[float, float]]:
    """AUC and NE of the click by predictor."""
    return {row.predictor: (row.auc, row.ne) for row in oracle_metrics(standard)}


@pytest.mark.research
class TestOldEventsMatter:
    """How much a model of the whole history can gain over one of the last 200 events."""

    def test_the_oracle_is_far_ahead_of_the_last_200(self, rows: dict[str, tuple[float, float]]) -> None:
        assert 0.82 < rows["oracle"][0] < 0.88
        assert 0.65 < rows["last 200"][0] < 0.73
        assert rows["oracle"][0] - rows["last 200"][0] > 0.12
        assert rows["last 200"][1] - rows["oracle"][1] > 0.15

    def test_the_whole_history_is_as_good_as_the_oracle(self, rows: dict[str, tuple[float, float]]) -> None:
        assert rows["whole history"] == pytest.approx(rows["oracle"], abs=0.003)


class TestOracleParts:
    def test_auc_by_hand(self) -> None:
        labels = np.array([True, False, True, False])
        assert area_under_curve(labels, np.array([0.9, 0.8, 0.7, 0.1])) == 0.75
        assert area_under_curve(labels, np.array([0.5, 0.5, 0.7, 0.1])) == 0.875
        assert np.isnan(area_under_curve(labels[:1], np.array([0.3])))

    def test_entropy_of_the_base_rate_is_one(self) -> None:
        labels = np.array([True, False, False, False])
        assert normalized_entropy(labels, np.full(4, 0.25)) == pytest.approx(1)
        assert normalized_entropy(labels, np.array([0.9, 0.1, 0.1, 0.1])) == pytest.approx(
            -np.log(0.9) / -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
        )

    def test_topic_index_against_a_loop(self) -> None:
        rng = np.random.default_rng(0)
        topics = rng.integers(0, 5, 200).astype(np.uint8)
        start = rng.integers(0, 200, 300)
        stop = rng.integers(start, 201)
        wanted = rng.integers(0, 7, 300)
        index = TopicIndex(topics)
        counts, ages = index.count(wanted, start, stop), index.age(wanted, start, stop)
        for row in range(300):
            part = topics[start[row] : stop[row]].tolist()
            assert counts[row] == part.count(wanted[row])
            assert ages[row] == (part[::-1].index(wanted[row]) if wanted[row] in part else -1)

    def test_transformations(self) -> None:
        assert affinity(np.array([0]), np.array([500]))[0] == 0
        assert affinity(np.array([150]), np.array([980]))[0] == pytest.approx(1)
        assert recent_match(np.array([0, 32])) == pytest.approx([0, 1])

    def test_topics_are_of_equal_size(self) -> None:
        catalog = make_catalog(replace(SMALL, num_items=333), np.random.SeedSequence(0))
        sizes = np.bincount(catalog.topic, minlength=32)
        assert sizes.max() - sizes.min() <= 1
        for row in catalog.ranked:
            np.testing.assert_array_equal(np.sort(row), np.arange(333))
            np.testing.assert_array_equal(catalog.topic[row], np.sort(catalog.topic))

    def test_bad_arguments(self, small: SimulatedLog) -> None:
        early = small.impression_timestamp < split_times(SMALL)[1]
        late = {name: values[~early] for name, values in _columns(small).items() if len(values) == len(early)}
        with pytest.raises(ValueError, match="no impression precedes the test part"):
            oracle_metrics(replace(small, **late))
        with pytest.raises(ValueError, match="two users"):
            alone = generate(replace(SMALL, num_users=1))
            predict_from_window(alone, 32, alone.impression_user == 0)

    def test_too_few_users_to_measure_leave_existing_files_unchanged(self, tmp_path: Path) -> None:
        (tmp_path / "simulation.json").write_text("mine")
        config = replace(SMALL, out=str(tmp_path), reference=True, num_users=1, impressions_per_user=4)
        with pytest.raises(ConfigError, match=r"reference=true: .*, or leave it out"):
            simulate(config)
        assert (tmp_path / "simulation.json").read_text() == "mine"


class TestFiles:
    def test_all_files_and_new_folders_are_durable_when_it_returns(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, fsync, synced = tmp_path / "new" / "sim", os.fsync, []

        def note(descriptor: int) -> None:
            synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", note)
        simulate(replace(SMALL, out=str(out)))
        partial = {out / f".{name}.parquet.{os.getpid()}.tmp" for name in ("events", "impressions", "items")}
        assert partial <= set(synced)
        assert {tmp_path, tmp_path / "new", out} <= set(synced)
        assert synced[-2].name.startswith(".simulation.json.") and synced[-1] == out

    def test_links_in_place_of_temporary_files_are_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "victim").write_bytes(b"kept")
        (tmp_path / f".events.parquet.{os.getpid()}.tmp").symlink_to("victim")
        simulate(replace(SMALL, out=str(tmp_path)))
        assert (tmp_path / "victim").read_bytes() == b"kept"
        assert not (tmp_path / "events.parquet").is_symlink()

    def test_layout(self, tmp_path: Path, small: SimulatedLog) -> None:
        report = simulate(replace(SMALL, out=str(tmp_path)))
        events = pl.read_parquet(tmp_path / "events.parquet")
        assert events.columns == ["user", "item", "timestamp", "action"]
        assert events.dtypes == [pl.Int64, pl.Int64, pl.Int64, pl.String]
        np.testing.assert_array_equal(events["timestamp"].to_numpy(), small.timestamp)
        np.testing.assert_array_equal(events["item"].to_numpy(), small.item + 1)
        assert events["action"].to_list() == [ACTIONS[code] for code in small.action]
        shown = pl.read_parquet(tmp_path / "impressions.parquet")
        probabilities = [f"{task}_probability" for task in TASKS]
        assert shown.columns == ["user", "item", "timestamp", *TASKS, *probabilities, "decisive_age"]
        assert shown["like"].null_count() == shown["long_view"].null_count() == (shown["click"] == 0).sum() > 0
        assert shown["click"].null_count() == sum(shown[name].null_count() for name in probabilities) == 0
        np.testing.assert_array_equal(shown["decisive_age"].to_numpy(), small.decisive_age)
        items = pl.read_parquet(tmp_path / "items.parquet")
        assert items["item"].to_list() == list(range(1, 301))
        np.testing.assert_array_equal(items["topic"].to_numpy(), small.catalog.topic)
        assert (report.num_users, report.num_events, report.num_impressions) == (12, events.height, shown.height)
        assert "M events/s" in str(report) and "oracle" not in str(report)
        names = ["events.parquet", "impressions.parquet", "items.parquet", "simulation.json"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names

    def test_reference_metrics_on_request(self, tmp_path: Path, small: SimulatedLog) -> None:
        report = simulate(replace(SMALL, out=str(tmp_path), reference=True))
        assert report.reference == tuple(oracle_metrics(small, tasks=TASKS))
        assert f"{report.reference[0].auc:.4f}" in str(report)

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"file/sim.*cannot be written"):
            simulate(replace(SMALL, out=str(tmp_path / "file" / "sim")))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_users", 0),
        ("num_topics", 257),
        ("world", "weather"),
        ("num_items", 31),
        ("max_interests", 32),
        ("max_interests", 0),
        ("days", 0.5),
    ],
)
def test_bad_configs_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        replace(SimulateConfig(), **{key: value})
