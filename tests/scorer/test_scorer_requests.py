"""Contents of requests: fresh tails, which act like a refresh, and everything that is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import DAY, ITEMS, START, USERS, Served, small_config, small_frame, tail_of
from vista.cli.index_command import run_index
from vista.cli.score_command import run_score
from vista.config import IndexConfig, ScoreConfig
from vista.config.choices import OnMissing
from vista.errors import (
    CheckpointError,
    ConfigError,
    ItemIndexError,
    RecordContentsError,
    StoreError,
    SummarizerMismatchError,
    UnknownUserError,
    UserKeyError,
)
from vista.log.event_log import EventLog
from vista.model.saved_parts import WEIGHTS_FILE
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.training.log_schema import schema_of
from vista.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture(scope="module")
def tail_only(event_log: EventLog) -> VistaModel:
    """A model without summary tokens, whose scores depend on the tail alone."""
    config = small_config(event_log, "unused", model__num_seeds=0)
    return VistaModel(config.model, schema_of(event_log, config), event_log.items, config.data).eval()


def _rows(log: EventLog, row: int, first: int) -> list[tuple[int, int, int]]:
    events = log.slice(row, first)
    return list(
        zip(log.items.ids(events.item).tolist(), events.timestamp.tolist(), events.action.tolist(), strict=True)
    )


class TestFreshTails:
    """A tail that the caller passes must act like one that a refresh has stored."""

    @pytest.mark.parametrize("until", ["leave-last-out", "leave-last-two-out", "long ago"])
    def test_a_fresh_tail_equals_a_refreshed_one(
        self, event_log: EventLog, tail_only: VistaModel, tmp_path: Path, until: str
    ) -> None:
        before = START + DAY if until == "long ago" else until
        refresh(tail_only, event_log, tmp_path / "now")
        refresh(tail_only, event_log, tmp_path / "old", until=before)
        users = event_log.users.ids(np.arange(event_log.num_users)).tolist()
        now = START + 500 * DAY
        with (
            Scorer.open(tail_only, tmp_path / "now") as refreshed,
            Scorer.open(tail_only, tmp_path / "old") as stale,
        ):
            expected = refreshed.score(users, ITEMS, now=now)
            assert np.abs(stale.score(users, ITEMS, now=now) - expected).max() > 0.1
            # The events since the refresh, the whole tail, and the whole history give the same scores.
            counts = stale.store.get_many(users).event_count
            newest = np.maximum(event_log.lengths - 6, 0)
            for first in (counts, newest, np.zeros_like(counts)):
                fresh = event_log.gather_ranges(np.arange(len(users)), first, event_log.lengths)
                ids = event_log.items.ids(fresh.item)
                tail = Tail(ids, fresh.timestamp, fresh.action, fresh.offsets)
                np.testing.assert_allclose(stale.score(users, ITEMS, now=now, tail=tail), expected, atol=1e-5)
            ranking = stale.rank(users[4], tail=tail_of([(users[4], _rows(event_log, 4, int(counts[4])))]), now=now)
            assert ranking.items.tolist() == refreshed.rank(users[4], now=now).items.tolist()

    def test_an_empty_tail_equals_no_tail(self, scorer: Scorer) -> None:
        expected = scorer.score(USERS, ITEMS)
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, tail=Tail.empty(5)), expected)
        lists: Any = Tail([], [], [], [0] * 6)  # type: ignore[arg-type]
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, tail=lists), expected)

    def test_events_that_are_stored_already_count_once(self, scorer: Scorer, event_log: EventLog) -> None:
        expected = scorer.score([104], ITEMS)
        stored = _rows(event_log, 4, 34)
        assert len(stored) == 6
        np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail_of([(104, stored)])), expected)
        np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail_of([(104, stored[::-1] * 2)])), expected)
        # Another action at the same time is another event.
        item, time, action = stored[-1]
        other = scorer.score([104], ITEMS, tail=tail_of([(104, [(item, time, 1 - action)])]))
        assert np.abs(other - expected).max() > 1e-3

    def test_events_older_than_the_stored_tail_change_nothing(self, scorer: Scorer, event_log: EventLog) -> None:
        tail = tail_of([(104, _rows(event_log, 4, 0)[:20])])
        np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail), scorer.score([104], ITEMS))

    def test_each_user_has_its_own_tail(self, scorer: Scorer) -> None:
        events = [(103, [(390, START + 900 * DAY, 1)]), (100, []), (115, [(0, START + 900 * DAY, 0)] * 2)]
        users = [user for user, _ in events]
        scores = scorer.score(users, ITEMS, tail=tail_of(events))
        for index, (user, rows) in enumerate(events):
            alone = scorer.score([user], ITEMS, tail=tail_of([(user, rows)]))[0]
            np.testing.assert_allclose(scores[index], alone, atol=2e-5)
        np.testing.assert_allclose(scores[1], scorer.score([100], ITEMS)[0], atol=2e-5)
        assert np.abs(scores[[0, 2]] - scorer.score([103, 115], ITEMS)).min(1).max() > 1e-4

    def test_an_event_with_an_unknown_item_counts(self, scorer: Scorer) -> None:
        scores = scorer.score([100], ITEMS, tail=tail_of([(100, [(777, START + 900 * DAY, 0)])]))
        assert np.isfinite(scores).all() and np.abs(scores - scorer.score([100], ITEMS)).max() > 1e-3

    def test_actions_by_name(self, scorer: Scorer) -> None:
        """They are encoded with the model that scores."""
        events = [(10, START + 900 * DAY, 1), (20, START + 901 * DAY, 0)]
        codes = tail_of([(100, events), (103, events[:1])])
        actions = scorer.model.schema.actions
        for names in ([actions[code] for code in codes.actions], np.array(actions)[codes.actions]):
            named = dataclasses.replace(codes, actions=names)  # type: ignore[arg-type]
            np.testing.assert_array_equal(
                scorer.score([100, 103], ITEMS, tail=named), scorer.score([100, 103], ITEMS, tail=codes)
            )
        for wrong in ("buy", None):
            tail: Any = dataclasses.replace(codes, actions=[*actions, wrong])
            with pytest.raises(ValueError, match=rf"tail\.actions: {wrong!r} is not one of .*\['click', 'like'\]"):
                scorer.score([100, 103], ITEMS, tail=tail)

    @pytest.mark.parametrize("policy", ["empty", "nan", "raise"])
    def test_an_unknown_action_is_refused_under_every_policy(self, served: Served, policy: str) -> None:
        """A wrong name is the caller's mistake, unlike data of one user that are impossible."""
        tail: Any = dataclasses.replace(
            tail_of([(100, [(10, START + 900 * DAY, 1)]), (103, [(20, START + 900 * DAY, 0)])]),
            actions=["buy", "click"],
        )
        with Scorer.open(served.model_dir, served.store, on_missing=policy) as scorer:
            with pytest.raises(ValueError, match=r"tail\.actions: 'buy' is not one of .*\['click', 'like'\]"):
                scorer.score([100, 103], ITEMS, tail=tail)
            assert scorer.stats().bad_users == 0

    def test_the_only_action_needs_no_name(self, tmp_path: Path) -> None:
        frame = {key: values for key, values in small_frame().items() if key not in ("action", "rating")}
        log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
        model = train(small_config(log, tmp_path / "run", optim__epochs=1), log)
        refresh(model, log, tmp_path / "store")
        events = tail_of([(100, [(10, START + 900 * DAY, 0)])])
        with Scorer.open(model, tmp_path / "store") as scorer:
            expected = scorer.score([100], ITEMS, tail=events)
            for actions in ([None], scorer.model.schema.actions[:1]):
                named: Any = dataclasses.replace(events, actions=actions)
                np.testing.assert_array_equal(scorer.score([100], ITEMS, tail=named), expected)

    def test_tails_of_tensors(self, scorer: Scorer) -> None:
        tail = tail_of([(100, [(10, START + 900 * DAY, 1)])])
        tensors: Any = Tail(*(torch.from_numpy(np.array(part)) for part in dataclasses.astuple(tail)[:4]))
        np.testing.assert_array_equal(scorer.score([100], ITEMS, tail=tensors), scorer.score([100], ITEMS, tail=tail))

    @pytest.mark.parametrize(
        ("part", "value", "error", "message"),
        [
            ("times", [np.nan, 2.0], TypeError, r"tail\.times: must hold integer milliseconds, got float64"),
            ("times", [1.0, 2.0], TypeError, r"tail\.times: must hold integer milliseconds, got float64"),
            ("times", [1], ValueError, r"tail\.times: holds 1 values for 2 items"),
            ("times", [[1, 2]], ValueError, r"tail\.times: must be one-dimensional, got shape \(1, 2\)"),
            ("items", [np.nan, 1.0], TypeError, r"tail\.items: .*integer ids, got float64"),
            ("items", ["a", "b"], TypeError, r"tail\.items: .*integer ids, got <U1"),
            ("items", [0], ValueError, r"tail\.times: holds 2 values for 1 items"),
            ("actions", [0.0, np.nan], TypeError, r"tail\.actions: must hold integers, got float64"),
            ("actions", [0, 2], ValueError, r"tail\.actions: codes must lie in \[0, 2\), got 2"),
            ("actions", [-1, 0], ValueError, r"tail\.actions: codes must lie in \[0, 2\), got -1"),
            ("actions", [0], ValueError, r"tail\.actions: holds 1 values for 2 items"),
            (
                "offsets",
                [0, 1],
                ValueError,
                r"tail\.offsets: must be 3 values that rise from 0 to 2, got 2 values that start with \[0, 1\]",
            ),
            ("offsets", [0, 2, 1], ValueError, r"tail\.offsets: must be 3 values that rise from 0 to 2"),
            ("offsets", [0, 3, 2], ValueError, r"tail\.offsets: must be 3 values that rise from 0 to 2"),
            ("offsets", [0.0, 1.0, 2.0], TypeError, r"tail\.offsets: must hold integers"),
        ],
    )
    def test_a_bad_tail_names_its_part(
        self, scorer: Scorer, part: str, value: Any, error: type[Exception], message: str
    ) -> None:
        good = tail_of([(100, [(10, START, 0)]), (103, [(20, START, 1)])])
        assert scorer.score([100, 103], ITEMS, tail=good).shape == (2, 6)
        with pytest.raises(error, match=message):
            scorer.score([100, 103], ITEMS, tail=dataclasses.replace(good, **{part: np.array(value)}))

    def test_times_that_are_not_in_milliseconds(self, scorer: Scorer) -> None:
        """Seconds would mean a time in 1970, and so events before the stored tail."""
        for time in (START // 1000, -5, 5_000_000_000_000):
            message = rf"{time} is not a Unix time in milliseconds"
            with pytest.raises(ValueError, match=r"tail\.times: " + message):
                scorer.score([100], ITEMS, tail=tail_of([(100, [(10, time, 0)])]))
            with pytest.raises(ValueError, match="now: " + message):
                scorer.score([100], ITEMS, now=time)

    def test_something_else_than_a_tail(self, scorer: Scorer) -> None:
        with pytest.raises(TypeError, match=r"tail: must be a Tail\(items, times, actions, offsets\), got a dict"):
            scorer.score([100], ITEMS, tail={"items": []})  # type: ignore[arg-type]


class TestBadRequests:
    @pytest.mark.parametrize(
        ("users", "candidates", "now", "error", "message"),
        [
            (103, ITEMS, None, TypeError, "users: must be a list or an array of ids, got 103"),
            ("abc", ITEMS, None, TypeError, "users: must be a list or an array of ids, got 'abc'"),
            (["abc"], ITEMS, None, UserKeyError, "user 'abc': the user ids of the store are of type int"),
            ([1.5], ITEMS, None, UserKeyError, "user id 1.5 is a float"),
            ([100], 10, None, ValueError, r"candidates: must be of shape \[C\] or \[B, C\], got \(\)"),
            ([100], [[[10]]], None, ValueError, r"candidates: must be of shape \[C\] or \[B, C\], got \(1, 1, 1\)"),
            ([100], [[10], [20]], None, ValueError, r"candidates: shape \(2, 1\) does not match 1 users"),
            ([100, 103], [[10], [20, 30]], None, ValueError, "candidates: the rows differ in length"),
            ([100], ["a"], None, TypeError, "integer ids, got str 'a'"),
            ([100], [1.0], None, TypeError, "integer ids, got float64"),
            ([100], (ITEMS, [0, 3]), None, ValueError, r"candidates: offsets must rise from 0 to 6, got 0 to 3"),
            (
                [100],
                (ITEMS, [0.0, 6.0]),
                None,
                ValueError,
                r"candidates: must be values \[N\] and integer offsets \[2\]",
            ),
            ([100], ([[1], [2]], [0, 2]), None, ValueError, r"candidates: must be values \[N\] and .*\(2, 1\)"),
            ([100, 103], (ITEMS, [0, 6]), None, ValueError, r"integer offsets \[3\], got values of shape \(6,\)"),
            ([100], ITEMS, 1.5e12, TypeError, "now: must hold integer milliseconds, got float64"),
            ([100], ITEMS, "2024-01-01", TypeError, "now: must hold integer milliseconds, got <U10"),
            (
                [100, 103],
                ITEMS,
                [START] * 3,
                ValueError,
                r"now: must be one time, or one for each of 2 users, .*\(3,\)",
            ),
        ],
    )
    def test_the_argument_is_named(
        self, scorer: Scorer, users: Any, candidates: Any, now: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            scorer.score(users, candidates, now=now)
        assert scorer.score([100], [10]).shape == (1, 1)

    def test_a_closed_scorer_raises(self, served: Served) -> None:
        scorer = Scorer.open(served.model, served.store)
        scorer.close()
        scorer.close()
        for call in (lambda: scorer.score([100], ITEMS), lambda: scorer.rank(100), scorer.reload):
            with pytest.raises(StoreError, match=f"the scorer of {served.store} is closed; open a new one"):
                call()

    def test_a_store_of_another_model_is_refused_and_both_are_named(
        self, served: Served, tail_only: VistaModel
    ) -> None:
        ids = (served.model.summarizer_id().hex(), tail_only.summarizer_id().hex())
        with pytest.raises(SummarizerMismatchError, match=f"summarizer {ids[0]}, but the model's is {ids[1]}"):
            Scorer.open(tail_only, served.store)

    def test_a_store_with_shorter_tails_is_refused(self, served: Served, tmp_path: Path) -> None:
        config = dataclasses.replace(served.model.config, tail_len=3)
        short = VistaModel(config, served.model.schema, served.model.items, served.model.data).eval()
        weights = {k: v for k, v in served.model.state_dict().items() if not k.startswith("target_attention")}
        short.load_state_dict(weights, strict=False)
        assert short.summarizer_id() == served.model.summarizer_id()
        refresh(short, served.log, tmp_path / "store")
        with pytest.raises(
            StoreError, match=r"store holds tails of 3 events, but the model reads 6; refresh the store"
        ):
            Scorer.open(served.model, tmp_path / "store")
        # A model that reads fewer events of each tail can share the store of one that reads more.
        with Scorer.open(short, served.store) as scorer, Scorer.open(short, tmp_path / "store") as own:
            np.testing.assert_allclose(scorer.score(USERS, ITEMS), own.score(USERS, ITEMS), atol=2e-5)
        refresh(served.model, served.log, tmp_path / "store")
        with Scorer.open(served.model, tmp_path / "store") as scorer:
            expected = scorer.score(USERS, ITEMS)
            refresh(short, served.log, tmp_path / "store")
            for _ in range(2):
                with pytest.raises(StoreError, match="tails of 3 events"):
                    scorer.reload()
                np.testing.assert_array_equal(scorer.score(USERS, ITEMS), expected)
                assert scorer.manifest.generation == 2 and scorer.stats().reloads == 0

    def test_the_store_is_checked_before_the_weights_are_read(self, served: Served, tmp_path: Path) -> None:
        """A service that waits for a refresh tries again and again, and must not read large files each time."""
        shutil.copytree(served.model_dir, tmp_path / "model")
        (tmp_path / "model" / WEIGHTS_FILE).unlink()
        refresh(served.model.with_tail(3), served.log, tmp_path / "store")
        with pytest.raises(RecordContentsError, match="holds tails of 3 events, but the model reads 6"):
            Scorer.open(tmp_path / "model", tmp_path / "store")
        with pytest.raises(CheckpointError):
            Scorer.open(tmp_path / "model", served.store)

    def test_folders_that_are_not_a_store_or_a_model(self, served: Served, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("hello")
        for place in ("absent", "empty", "file"):
            with pytest.raises(StoreError, match=place):
                Scorer.open(served.model, tmp_path / place)
            with pytest.raises(CheckpointError, match=rf"{place}: no readable model .*vista train"):
                Scorer.open(tmp_path / place, served.store)
        with pytest.raises(ConfigError, match="device=cuda:99: torch cannot use it here"):
            Scorer.open(served.model_dir, served.store, device="cuda:99")

    def test_a_truncated_store_is_refused(self, served: Served, tmp_path: Path) -> None:
        refresh(served.model, served.log, tmp_path / "store")
        (path,) = (tmp_path / "store").rglob("summary/data.mdb")
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(StoreError, match=r"data\.mdb"):
            Scorer.open(served.model, tmp_path / "store")

    def test_a_model_without_retrieval_head(self, impression_log: EventLog, tmp_path: Path) -> None:
        config = small_config(impression_log, tmp_path / "run", optim__next_weight=0.0, optim__epochs=1)
        model = train(config, impression_log)
        refresh(model, impression_log, tmp_path / "store")
        with Scorer.open(model, tmp_path / "store") as scorer:
            assert scorer.tasks == ["click", "like", "long_view"] and scorer.task == "click"
            user = next(scorer.store.keys())
            assert list(scorer.predict([user], scorer.model.items.ids([0]))) == scorer.tasks
            with pytest.raises(ValueError, match=r"no retrieval head; train it with optim\.next_weight above 0"):
                scorer.user_vectors([user])


class TestCommand:
    def settings(self, served: Served, **changes: Any) -> ScoreConfig:
        return ScoreConfig(model=str(served.model_dir), store=str(served.store), **changes)

    def test_scores_and_rankings_as_text(self, served: Served, scorer: Scorer) -> None:
        lines = run_score(self.settings(served, users=["103", "100"], candidates=["0", "390"])).splitlines()
        scores = scorer.score([103, 100], [0, 390])
        assert lines[0] == "task next, generation 1"
        assert lines[1] == f"user 103: 0 {scores[0, 0]:.4f}, 390 {scores[0, 1]:.4f}" and len(lines) == 3
        moment = {"now": "2024-05-01T12:00"}
        asked = run_score(self.settings(served, users=["103"], candidates=["0"], **moment)).splitlines()
        then = scorer.score([103], [0], now=1_714_564_800_000)[0, 0]
        assert asked[1] == f"user 103: 0 {then:.4f}"
        best = scorer.rank(103, top_k=2).items.tolist()
        words = run_score(self.settings(served, users=["103"], top_k=2)).splitlines()[1].split()
        assert [words[2], words[4]] == [str(item) for item in best]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, r"users: name at least one"),
            ({"users": ["nobody"]}, r"users: ids must be integers, as in the log, got nobody"),
            ({"users": ["100"], "candidates": ["x"]}, r"candidates: ids must be integers, as in the log, got x"),
            ({"users": ["100"], "candidates": [str(10**20)]}, r"candidates: ids must be integers, .*, got 1000"),
            ({"users": ["100"], "retrieve": True, "candidates": ["0"]}, "candidates: must be empty with retrieve=true"),
            ({"users": ["100"], "index": "items"}, "index: needs retrieve=true"),
            ({"users": ["100"], "now": "noon"}, r"time 'noon': write an ISO date or time"),
            (
                {"users": ["100"], "now": "1706140800"},
                r"now: 1706140800 is not a Unix time .* looks like seconds",
            ),
        ],
    )
    def test_bad_values_end_in_a_one_line_error(self, served: Served, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            run_score(self.settings(served, **changes))

    def test_candidates_of_an_index(self, served: Served, tmp_path: Path) -> None:
        model = shutil.copytree(served.model_dir, tmp_path / "best")
        asked = {"model": str(model), "store": str(served.store), "users": ["103", "100"], "top_k": 3}
        with pytest.raises(ItemIndexError, match=r"best\.index"):
            run_score(ScoreConfig(**asked, retrieve=True))
        run_index(IndexConfig(model=str(model)))
        lines = run_score(ScoreConfig(**asked, retrieve=True)).splitlines()
        assert lines == run_score(ScoreConfig(**asked, retrieve=True, index=f"{model}.index")).splitlines()
        with Scorer.open(model, served.store, index=f"{model}.index") as scorer:
            for line, ranking in zip(lines[1:], scorer.retrieve([103, 100], top_k=3), strict=True):
                assert re.findall(r"(\d+) -?\d+\.\d{4}", line) == [str(item) for item in ranking.items]

    def test_unknown_user_by_policy(self, served: Served) -> None:
        with pytest.raises(UnknownUserError, match=r"users \[999\] have no record"):
            run_score(self.settings(served, users=["999"], on_missing=OnMissing.error))
        assert run_score(self.settings(served, users=["999"], top_k=1)).count("user 999 (no record): ") == 1

    def test_unknown_items_are_marked(self, served: Served) -> None:
        line = run_score(self.settings(served, users=["100"], candidates=["0", "77777"])).splitlines()[1]
        assert ", 77777 (unknown) 0.0000" in line and "0 (unknown)," not in line
