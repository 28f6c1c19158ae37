"""Evaluation from store and scorer: hand-computed ranks, direct recomputation, leakage checks, and the result file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Served, candidate_inputs, pooled_of, small_config, small_frame
from tests.evaluation.conftest import evaluated
from vista.config import EvaluateConfig, SourceColumns
from vista.config.checks import Codec, Split
from vista.errors import ConfigError, LeakageError
from vista.evaluation.evaluate import evaluate, evaluate_scorer
from vista.evaluation.protocol import LAST_RANK, impression_metrics
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model import inference
from vista.model.serving_model import pad_tail
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training.log_schema import schema_of
from vista.training.trainer import Trainer, train


def plain_ranks(scorer: Scorer, log: EventLog, seen: np.ndarray, exclude_seen: bool) -> list[int]:
    """Ranks from the scorer's public methods, one user and one list at a time."""
    ranks = []
    catalog, _ = scorer.item_vectors()
    for row in np.flatnonzero(seen < log.lengths).tolist():
        history = log.slice(row)
        ids = log.items.ids(history.item).tolist()
        label, before = ids[seen[row]], set(ids[: seen[row]])
        now = int(history.timestamp[seen[row]]) if log.has_time else None
        user = log.users.ids([row])[0]
        scores = dict(zip(catalog.tolist(), scorer.score([user], catalog, now=now)[0].tolist(), strict=True))
        others = [item for item in scores if item != label and not (exclude_seen and item in before)]
        ranks.append(sum(scores[item] > scores[label] for item in others))
    return ranks


def plain_ranks_from(served: Served, seen: np.ndarray, summarized: np.ndarray) -> list[int]:
    """Ranks from the model, one user at a time; summaries cover the first `summarized` events."""
    log, model, ranks = served.log, served.model, []
    rows = model.rows_of(log.items)
    for user in np.flatnonzero(seen < log.lengths).tolist():
        whole = log.gather(np.array([user]), log.lengths[[user]])
        whole = dataclasses.replace(whole, item=rows[whole.item].astype(np.int32))
        before, known = whole.slice(0, 0, int(seen[user])), whole.slice(0, 0, int(summarized[user]))
        last = before.slice(0, -model.config.tail_len)
        tail = pad_tail(model, last.item, last.timestamp, last.action, last.offsets)
        context = inference.request_context(model, inference.summarize(model, known), tail)
        now = whole.timestamp[seen[user]][None] if log.has_time else None
        pooled = pooled_of(model, whole.item, int(summarized[user]), int(seen[user]))
        vector = inference.user_vectors(model, context, inference.request_gap(model, now, tail), pooled)
        scores = (vector @ inference.item_vectors(model).t())[0].numpy()
        label = int(whole.item[seen[user]]) - 1
        others = np.setdiff1d(np.arange(len(scores)), [*(before.item - 1), label])
        ranks.append(int((scores[others] > scores[label]).sum()))
    return ranks


class TestNextItems:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_hand_computed(self, tmp_path: Path, sign: float) -> None:
        """A model that ranks items in one order, 50, 40, 30, 20, 10 by the angle of their vectors, or in reverse."""
        histories = {1: [10, 20, 50, 30], 2: [40, 50, 40, 40], 3: [10, 10, 10], 4: [50, 40], 5: [30, 30, 20, 50]}
        user = np.repeat(list(histories), [len(items) for items in histories.values()])
        items = np.concatenate(list(histories.values()))
        frame = {"user": user, "item": items, "timestamp": 1_600_000_000 + np.arange(len(user))}
        log = EventLog.from_frame(frame, tmp_path / "log", time_unit="s")
        config = small_config(log, "unused")
        torch.manual_seed(0)  # other seeds may give a user vector so near the edge that the request's time flips it
        model = VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()
        with torch.no_grad():
            model.item_table.zero_()
            model.item_table[1:, 0] = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
            model.item_table[1:, 1] = 1 - model.item_table[1:, 0]
            model.target_attention.final_norm.weight.zero_()
            model.target_attention.final_norm.weight[0] = sign
        refresh(model, log, tmp_path / "store", until="leave-last-out")
        with Scorer.open(model, tmp_path / "store") as scorer:
            # Users whose vector points the other way rank in reverse.
            forward = scorer.user_vectors([1, 2, 3, 5])[:, 0] > 0
            for exclude, up, down in ((True, [1, 0, 4, 0], [0, 3, 0, 2]), (False, [2, 1, 4, 0], [2, 3, 0, 4])):
                scorer.model.data.exclude_seen = exclude
                evaluation = evaluate_scorer(scorer, log, EvaluateConfig(top_k=[1, 2, 5]))
                ranks = np.where(forward, up, down).tolist()
                # Labels: 30 (seen 10 20 50), 40 (seen 40 50), 10 (seen 10), 50 (seen 20 30); user 4 is too short.
                # A label that was seen stays in.
                assert evaluation.ranks is not None and evaluation.ranks.tolist() == ranks and evaluation.num_cases == 4
                for k in (1, 2, 5):
                    assert evaluation.metrics[f"hr@{k}"] == pytest.approx(sum(rank < k for rank in ranks) / 4)
                    gains = [1 / math.log2(rank + 2) for rank in ranks if rank < k]
                    assert evaluation.metrics[f"ndcg@{k}"] == pytest.approx(sum(gains) / 4)

    @pytest.mark.parametrize(("exclude_seen", "users_per_batch"), [(True, 3), (False, 512)])
    def test_ranks_equal_those_of_the_scorers_lists(
        self, served: Served, exclude_seen: bool, users_per_batch: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(served.model.data, "exclude_seen", exclude_seen)
        monkeypatch.setattr("vista.evaluation.protocol.USERS_PER_BATCH", users_per_batch)
        with Scorer.open(served.model, served.test_store) as scorer:
            evaluation = evaluate_scorer(scorer, served.log, EvaluateConfig(top_k=[10]))
            expected = plain_ranks(scorer, served.log, visible_counts(served.log, "leave-last-out"), exclude_seen)
        assert evaluation.ranks is not None and evaluation.ranks.tolist() == expected
        assert evaluation.num_cases == 14 == len(expected)
        assert evaluation.metrics["hr@10"] == pytest.approx(np.mean(np.array(expected) < 10))

    def test_without_times_and_with_string_ids(self, served_order: Served) -> None:
        log = served_order.log
        with Scorer.open(served_order.model, served_order.store) as scorer:
            evaluation = evaluate_scorer(scorer, log, EvaluateConfig())
            expected = plain_ranks(scorer, log, visible_counts(log, "leave-last-out"), True)
        assert evaluation.ranks is not None and evaluation.ranks.tolist() == expected

    def test_items_that_the_model_does_not_know_are_in_no_list(self, served: Served, tmp_path: Path) -> None:
        frame = small_frame()
        last = np.flatnonzero(np.append(frame["user"][1:] != frame["user"][:-1], True))
        frame["item"][last[[0, 4]]] = 7777
        log = EventLog.from_frame(
            frame, tmp_path / "log", time_unit="ms", columns=SourceColumns(action="action", rating="rating")
        )
        refresh(served.model, log, tmp_path / "store", until="leave-last-out")
        evaluation = evaluated(served.model, tmp_path / "store", log)
        assert evaluation.ranks is not None and (evaluation.ranks == LAST_RANK).sum() == 2


def summary_inputs(model: VistaModel, log: EventLog, row: int, start: int, stop: int) -> Any:
    history = log.slice(row, start, stop)
    return dataclasses.replace(history, item=model.item_rows(log.items.ids(history.item)).astype(np.int32))


def direct_probabilities(given: Served, summarized: np.ndarray) -> tuple[np.ndarray, ...]:
    """Probabilities, labels, masks and users of all test impressions; summaries cover `summarized` events."""
    model, log, data = given.model, given.log, given.config.data
    table = log.impressions
    assert table is not None and data.test_from is not None
    probabilities, labels, masks, users = [], [], [], []
    for row in range(log.num_users):
        times = np.asarray(log.slice(row).timestamp)
        summary = inference.summarize(model, summary_inputs(model, log, row, 0, int(summarized[row])))
        for index in range(table.offsets[row], table.offsets[row + 1]):
            now = int(table.timestamp[index])
            if now < int(data.test_from):
                continue
            seen = int((times < now).sum())
            tail = summary_inputs(model, log, row, max(seen - 6, 0), seen)
            padded = pad_tail(model, tail.item, tail.timestamp, tail.action, tail.offsets)
            context = inference.request_context(model, summary, padded)
            gap = inference.request_gap(model, np.array([now]), padded)
            item = model.item_rows(log.items.ids([table.item[index]]))
            candidates = torch.from_numpy(item)[None]
            pooled = pooled_of(model, model.rows_of(log.items)[log.slice(row).item], int(summarized[row]), seen)
            inputs = candidate_inputs(model, pooled, candidates)
            logits = inference.candidate_logits(model, context, gap, candidates, inputs=inputs)
            probabilities.append(logits[0, 0].sigmoid().numpy())
            labels.append(table.label[index])
            masks.append(table.mask[index])
            users.append(row)
    return np.array(probabilities), np.array(labels), np.array(masks), np.array(users)


class TestImpressions:
    def test_probabilities_and_metrics_against_a_direct_computation(
        self, served_tasks: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:

        monkeypatch.setattr("vista.evaluation.evaluate.USERS_PER_BATCH", 7)
        model, log, data = served_tasks.model, served_tasks.log, served_tasks.config.data
        evaluation = evaluated(model, served_tasks.test_store, log)
        assert evaluation.probabilities is not None and data.test_from is not None
        direct, label, mask, user = direct_probabilities(served_tasks, log.counts_before(int(data.test_from)))
        assert len(direct) > 50
        np.testing.assert_allclose(evaluation.probabilities, direct, atol=1e-4)
        cases = evaluation.impressions
        assert cases is not None and np.array_equal(cases.user, user) and np.array_equal(cases.mask, mask == 1)
        assert np.array_equal(cases.label[cases.mask], label[cases.mask])
        expected = impression_metrics(cases, evaluation.probabilities)
        assert len(expected) == 4 * len(model.schema.tasks) and expected.items() <= evaluation.metrics.items()
        assert evaluation.num_cases == len(direct) + len(evaluation.ranks)  # type: ignore[arg-type]

    def test_impressions_at_one_time_are_one_request(
        self, served_tasks: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, asked = Scorer.predict, []

        def counted(scorer: Scorer, users: Any, *rest: Any, **more: Any) -> dict[str, Any]:
            asked.append(len(users))
            return whole(scorer, users, *rest, **more)

        monkeypatch.setattr(Scorer, "predict", counted)
        monkeypatch.setattr("vista.evaluation.evaluate.USERS_PER_BATCH", 7)
        cases = evaluated(served_tasks.model, served_tasks.test_store, served_tasks.log).impressions
        assert cases is not None
        requests = len(set(zip(cases.user.tolist(), cases.timestamp.tolist(), strict=True)))
        assert sum(asked) == requests < len(cases.user) and max(asked) == 7

    def test_tasks_that_the_model_lacks_are_left_out(self, served_tasks: Served, tmp_path: Path) -> None:
        log = served_tasks.log
        model = VistaModel(
            served_tasks.model.config,
            dataclasses.replace(served_tasks.model.schema, tasks=["like"]),
            log.items,
            served_tasks.model.data,
        ).eval()
        refresh(model, log, tmp_path / "store", until=split_until(model.data, "test"))
        evaluation = evaluated(model, tmp_path / "store", log)
        assert {name for name in evaluation.metrics if "/" in name} == {
            f"{name}/like" for name in ("auc", "gauc", "ne", "calibration")
        }


def test_seen_items_stay_in_if_training_kept_them(served: Served, tmp_path: Path) -> None:
    """In the validation during training, and in every evaluation."""
    config = small_config(served.log, tmp_path / "run", data__exclude_seen=False, optim__epochs=1)
    model = train(config, served.log)
    (line,) = [row for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "validation" in row]
    refresh(
        model, served.log, tmp_path / "store", until="leave-last-two-out", options=RefreshOptions(codec=Codec.float32)
    )
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as scorer:
        kept = evaluate_scorer(scorer, served.log, EvaluateConfig(split="validation", top_k=[10]))
        scorer.model.data.exclude_seen = True
        left_out = evaluate_scorer(scorer, served.log, EvaluateConfig(split="validation", top_k=[10]))
    assert kept.ranks is not None and left_out.ranks is not None and (left_out.ranks < kept.ranks).any()
    assert line["validation"] == pytest.approx(kept.metrics, abs=1e-4)


def test_the_model_keeps_what_its_training_decided_about_seen_items(served: Served, tmp_path: Path) -> None:
    """In this log, users return to items. A log of later events cannot change the question."""
    config = small_config(served.log, tmp_path / "run", data__exclude_seen=None)
    assert Trainer(config, served.log).model.data.exclude_seen is False


class TestLeakage:
    def test_a_store_that_covers_all_events_is_refused(self, served: Served, served_tasks: Served) -> None:
        with pytest.raises(
            LeakageError, match=r"until=all, but the test labels .* `vista refresh until=leave-last-out`"
        ):
            evaluated(served.model, served.store, served.log)
        test_from = served_tasks.config.data.test_from
        with pytest.raises(LeakageError, match=f"until=all, but the test labels .* `vista refresh until={test_from}`"):
            evaluated(served_tasks.model, served_tasks.store, served_tasks.log)

    @pytest.mark.parametrize("kind", ["served", "served_tasks"])
    def test_a_test_store_is_refused_for_validation(self, kind: str, request: pytest.FixtureRequest) -> None:
        given: Served = request.getfixturevalue(kind)
        with pytest.raises(LeakageError, match="the validation"):
            evaluated(given.model, given.test_store, given.log, split="validation")

    def test_summaries_of_a_given_staleness(self, served: Served, tmp_path: Path) -> None:
        """They lack three events before each label, which the tail has. Any other staleness is refused."""
        refresh(
            served.model,
            served.log,
            tmp_path / "old",
            until="leave-last-4-out",
            options=RefreshOptions(codec=Codec.float32),
        )
        seen = visible_counts(served.log, "leave-last-out")
        with Scorer.open(served.model, served.test_store) as fresh, Scorer.open(served.model, tmp_path / "old") as old:
            expected = plain_ranks_from(served, seen, np.maximum(seen - 3, 0))
            aged = evaluate_scorer(old, served.log, EvaluateConfig(staleness=3))
            assert aged.ranks is not None and aged.ranks.tolist() == expected
            current = evaluate_scorer(fresh, served.log, EvaluateConfig()).ranks
            assert current is not None and aged.ranks.tolist() != current.tolist()
            with pytest.raises(ConfigError, match="until=leave-last-5-out"):
                evaluate_scorer(old, served.log, EvaluateConfig(staleness=4))
            with pytest.raises(ConfigError, match="labels of this model begin after until=leave-last-out; "):
                evaluate_scorer(old, served.log, EvaluateConfig())

    def test_summaries_of_a_given_staleness_with_a_split_in_time(self, served_tasks: Served, tmp_path: Path) -> None:
        """They lack three events before the test begins. The tail has them."""
        test_from = split_until(served_tasks.config.data, "test").before
        until = f"{test_from}-less-3"
        report = refresh(
            served_tasks.model,
            served_tasks.log,
            tmp_path / "old",
            until=until,
            options=RefreshOptions(codec=Codec.float32),
        )
        counts = visible_counts(served_tasks.log, until)
        assert counts.tolist() == np.maximum(served_tasks.log.counts_before(test_from) - 3, 0).tolist()
        model, log = served_tasks.model, served_tasks.log
        with Scorer.open(model, served_tasks.test_store) as fresh, Scorer.open(model, tmp_path / "old") as old:
            stored = old.store.get_many(log.users.ids(np.arange(log.num_users)))
            assert stored.event_count[stored.found].tolist() == counts[stored.found].tolist(), report
            aged, current = (
                evaluate_scorer(old, log, EvaluateConfig(staleness=3)),
                evaluate_scorer(fresh, log, EvaluateConfig()),
            )
            direct = direct_probabilities(served_tasks, counts)[0]
            assert aged.probabilities is not None and current.probabilities is not None
            np.testing.assert_allclose(aged.probabilities, direct, atol=1e-4)
            assert np.abs(aged.probabilities - current.probabilities).max() > 1e-3
            with pytest.raises(ConfigError, match=f"and staleness=4 asks for until={test_from}-less-4"):
                evaluate_scorer(old, log, EvaluateConfig(staleness=4))

    @pytest.mark.parametrize("kind", ["served", "served_tasks"])
    def test_a_store_of_an_earlier_split_is_refused(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        given: Served = request.getfixturevalue(kind)
        refresh(given.model, given.log, tmp_path / "store", until=split_until(given.config.data, "validation"))
        with pytest.raises(ConfigError, match="was refreshed"):
            evaluated(given.model, tmp_path / "store", given.log)

    def test_a_record_that_covers_the_label_is_refused_by_its_count(self, served: Served, tmp_path: Path) -> None:
        """The store was refreshed from a log with one more event of a user, so that leave-last-out shows the label."""
        frame = small_frame()
        more = {name: np.append(values, values[-1:]) for name, values in frame.items()}
        more["timestamp"][-1] += 1  # of the last user, 115
        log = EventLog.from_frame(
            more, tmp_path / "log", time_unit="ms", columns=SourceColumns(action="action", rating="rating")
        )
        refresh(served.model, log, tmp_path / "store", until="leave-last-out")
        with Scorer.open(served.model, tmp_path / "store") as scorer:
            assert evaluate_scorer(scorer, log, EvaluateConfig()).num_cases == 14
            with pytest.raises(LeakageError, match=r"user 115: the record .* covers 28 events, but only 27 lie before"):
                evaluate_scorer(scorer, served.log, EvaluateConfig())

    def test_a_record_that_covers_the_label_is_refused_by_its_time(
        self, served_tasks: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        until = split_until(served_tasks.config.data, "test")
        with monkeypatch.context() as patch:  # a store whose records hold more than its manifest says
            patch.setattr("vista.refresh.full.visible_counts", lambda log, limit: log.lengths)
            refresh(served_tasks.model, served_tasks.log, tmp_path / "store", until=until)
        model = served_tasks.model
        schema = dataclasses.replace(model.schema, has_retrieval=False)  # so that impressions come first
        tasks_only = VistaModel(model.config, schema, model.items, model.data).eval()
        kept = {name: own for name, own in model.state_dict().items() if not name.startswith("statistics")}
        tasks_only.load_state_dict(kept)
        for asked in (model, tasks_only):
            with pytest.raises(LeakageError, match="lie before the"):
                evaluated(asked, tmp_path / "store", served_tasks.log)


class TestRefusals:
    def test_a_log_without_cases(self, served: Served, tmp_path: Path) -> None:
        frame = {"user": [1, 1, 2], "item": [0, 10, 20], "timestamp": [1, 2, 3], "action": ["click", "like", "like"]}
        log = EventLog.from_frame(frame, tmp_path / "log", time_unit="s", columns=SourceColumns(action="action"))
        refresh(served.model, log, tmp_path / "store", until="leave-last-out")
        with pytest.raises(ConfigError, match="no test case"):
            evaluated(served.model, tmp_path / "store", log)

    def test_a_log_that_the_model_would_misread(self, served: Served, tmp_path: Path) -> None:
        frame = {**small_frame(), "action": np.array(["buy"] * 233)}
        log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", columns=SourceColumns(action="action"))
        with pytest.raises(ConfigError, match="its actions are"):
            evaluated(served.model, served.test_store, log)


class TestResults:
    def settings(self, served: Served, tmp_path: Path, **changes: Any) -> EvaluateConfig:
        settings: dict[str, Any] = {
            "data": str(served.log.path),
            "model": str(served.model_dir),
            "store": str(served.test_store),
            "out": str(tmp_path / "metrics.json"),
            "num_threads": 1,
            "top_k": [1, 10],
        }
        return EvaluateConfig(**{**settings, **changes})

    def written(self, tmp_path: Path) -> dict[str, Any]:
        return json.loads((tmp_path / "metrics.json").read_text())

    def test_the_file_holds_settings_and_metrics(self, served: Served, tmp_path: Path) -> None:
        result = evaluate(self.settings(served, tmp_path))
        assert result.per_user is not None
        assert {name: values.mean() for name, values in result.per_user.values.items()} == pytest.approx(result.metrics)
        assert list(result.metrics) == ["hr@1", "ndcg@1", "hr@10", "ndcg@10"]
        assert self.written(tmp_path) == {
            "data": str(served.log.path),
            "model": str(served.model_dir),
            "split": "test",
            "top_k": [1, 10],
            "staleness": 0,
            "target": "next",
            "exclude_seen": True,
            "codec": "float32",
            "adapter": None,
            "metrics": result.metrics,
            "standard_errors": pytest.approx(
                {name: np.std(value, ddof=1) / math.sqrt(14) for name, value in result.per_user.values.items()}
            ),
            "num_cases": 14,
            "seconds": result.seconds,
        }
        result = evaluate(self.settings(served, tmp_path, popularity=True))
        metrics = self.written(tmp_path)["metrics"]  # the file is replaced
        assert {"gini@1", "coverage@1", "popularity/score", "ndcg@1/decile-1"} < metrics.keys()
        assert "gini@1" not in str(result) and "decile  items  labels  recommended" in str(result)

    def test_without_out_nothing_is_written(self, served: Served, tmp_path: Path) -> None:
        result = evaluate(self.settings(served, tmp_path, out=None))
        assert list(tmp_path.iterdir()) == []
        text = str(result)
        assert text.startswith("14 cases in ") and f"  ndcg@10              {result.metrics['ndcg@10']:.4f}" in text

    def test_undefined_metrics_are_null(self, tmp_path: Path) -> None:
        """Each user always clicks or never does, so there is an AUC over all users but none within a user."""
        frame = small_frame()
        users = np.unique(frame["user"])
        late = int(frame["timestamp"].max())
        shown = {
            "user": np.repeat(users, 2),
            "item": np.tile([0, 10], len(users)),
            "timestamp": late - 1000 + np.arange(2 * len(users)),
            "click": np.repeat(users % 2, 2),
        }
        log = EventLog.from_frame(
            frame,
            tmp_path / "log",
            time_unit="ms",
            columns=SourceColumns(action="action", labels=["click"]),
            impressions=shown,
        )
        config = small_config(
            log,
            tmp_path / "run",
            data__validation_from=str(late - 2000),
            data__test_from=str(late - 1000),
            data__split=Split.time,
        )
        model = Trainer(config, log).model.eval()
        assert isinstance(model, VistaModel)
        model.save_pretrained(tmp_path / "run" / "best")
        refresh(model, log, tmp_path / "store", until=int(late - 1000))
        settings = self.settings(
            Served(log, config, model, tmp_path / "run" / "best", *[tmp_path / "store"] * 3), tmp_path
        )
        result = evaluate(settings)
        assert math.isnan(result.metrics["gauc/click"]) and "gauc/click           nan" in str(result)
        metrics = self.written(tmp_path)["metrics"]
        assert metrics["gauc/click"] is None and 0 <= metrics["auc/click"] <= 1

    def test_a_file_that_cannot_be_written_is_refused_at_the_start(
        self, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setattr("vista.evaluation.evaluate.evaluate_scorer", lambda *_, **__: pytest.fail("evaluated"))
        with pytest.raises(ConfigError, match=r"out=.*: cannot be written"):
            evaluate(self.settings(served, tmp_path, out=str(tmp_path / "file" / "metrics.json")))
        with pytest.raises(ConfigError, match=r"out=.*: is not a regular file; name a file"):
            evaluate(self.settings(served, tmp_path, out=str(tmp_path)))
