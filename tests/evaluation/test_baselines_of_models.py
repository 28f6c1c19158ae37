"""Baselines in the harness: trained or fitted to counts, and given only the events before each label."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tests.conftest import Served, model_config, small_config
from vista.config import DataConfig, EvaluateConfig, ItemTableConfig, PrepareConfig, SourceColumns, TrainConfig
from vista.config.checks import Split
from vista.errors import ConfigError
from vista.evaluation.answers import RawHistoryAnswers
from vista.evaluation.cases import EarlierEvents, impression_cases, next_item_cases, with_tasks
from vista.evaluation.evaluate import evaluate, evaluate_model
from vista.evaluation.label_baselines import EarlierLabels, LabelFeatures, label_baselines
from vista.examples.batch_source import BatchSource, ModelReads
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.ingest.prepare import prepare
from vista.log.splits import split_until, visible_counts
from vista.model.baselines.candidate_models import SIM
from vista.model.baselines.history_model import HistoryModel
from vista.model.baselines.sequence_models import SequenceModel
from vista.model.inference import item_vectors
from vista.model.registry import load_model
from vista.training.trainer import Trainer, train, train_model

LIMIT = 9


def baseline_config(log: EventLog, folder: Path, name: str, **changes: object) -> TrainConfig:
    model = model_config(name, dim=16, num_heads=2, history_limit=LIMIT, tail_len=6, dropout=0.1)
    return small_config(log, folder / name, model=model, **{"optim__epochs": 1} | changes)


def before(log: EventLog, rows: np.ndarray, user: int, seen: int) -> Histories:
    """The first `seen` events of one user, items as model rows."""
    history = log.gather(np.array([user]), np.array([seen]))
    return Histories(
        rows[history.item].astype(np.int32), history.timestamp, history.action, history.rating, history.offsets
    )


def test_ranks_come_from_the_history_before_the_label(event_log: EventLog, tmp_path: Path) -> None:
    model = train_model(baseline_config(event_log, tmp_path, "hstu"), event_log)
    assert isinstance(model, SequenceModel)
    evaluation = evaluate_model(model, event_log, EvaluateConfig(top_k=[10]))
    rows = model.rows_of(event_log.items)
    seen, items, expected = visible_counts(event_log, "leave-last-out"), item_vectors(model), []
    for user in np.flatnonzero(seen < event_log.lengths).tolist():
        history = before(event_log, rows, user, int(seen[user]))
        label = event_log.slice(user, int(seen[user]), int(seen[user]) + 1)
        vector = model.user_vectors(history, np.asarray(label.timestamp) if event_log.has_time else None)[0]
        scores = (items @ vector).numpy()
        target = int(rows[label.item[0]]) - 1
        others = np.setdiff1d(np.arange(len(scores)), [*(history.item - 1), target])
        expected.append(int((scores[others] > scores[target]).sum()))
    assert evaluation.ranks is not None and evaluation.ranks.tolist() == expected
    run = evaluate(
        EvaluateConfig(
            data=str(event_log.path),
            model=str(tmp_path / "hstu" / "best"),
            store=str(tmp_path / "there is none"),
            out=str(tmp_path / "metrics.json"),
            top_k=[10],
        )
    )
    assert run.metrics == evaluation.metrics
    assert json.loads((tmp_path / "metrics.json").read_text())["codec"] == "none"


def test_probabilities_come_from_the_history_before_the_request(served_tasks: Served, tmp_path: Path) -> None:
    log = served_tasks.log
    model = Trainer(baseline_config(log, tmp_path, "hstu", data=served_tasks.config.data), log).model.eval()
    assert isinstance(model, SequenceModel)
    evaluation = evaluate_model(model, log, EvaluateConfig())
    assert evaluation.impressions is not None and evaluation.probabilities is not None
    rows = model.rows_of(log.items)
    cases = evaluation.impressions
    for n in range(0, len(cases.user), 5):
        history = before(log, rows, int(cases.user[n]), int(cases.seen[n]))
        candidate = torch.from_numpy(rows[cases.item[n : n + 1]][None])
        logits = model.candidate_logits(history, candidate, cases.timestamp[n : n + 1])
        np.testing.assert_allclose(evaluation.probabilities[n], logits[0, 0].sigmoid().numpy(), rtol=1e-4, atol=1e-6)


def test_tasks_are_matched_by_name(served_tasks: Served, tmp_path: Path) -> None:
    """Another log may have the model's tasks in another order, or not all of them."""
    log = served_tasks.log
    model = Trainer(baseline_config(log, tmp_path, "din", data=served_tasks.config.data), log).model.eval()
    assert isinstance(model, HistoryModel)
    evaluation = evaluate_model(model, log, EvaluateConfig())
    cases, whole = evaluation.impressions, evaluation.probabilities
    assert cases is not None and whole is not None and cases.tasks == ["click", "like", "long_view"]
    answers = RawHistoryAnswers(model, log, model.rows_of(log.items))
    turned = replace(cases, tasks=cases.tasks[::-1], label=cases.label[:, ::-1], mask=cases.mask[:, ::-1])
    np.testing.assert_array_equal(answers.probabilities(turned), whole[:, ::-1])
    np.testing.assert_array_equal(answers.probabilities(with_tasks(cases, ["like"])), whole[:, 1:2])


def test_models_that_only_rank_draw_no_negatives(served_tasks: Served, tmp_path: Path) -> None:
    log = served_tasks.log
    for name, drawn in (("din", False), ("sasrec", True)):
        config = baseline_config(log, tmp_path, name, data=served_tasks.config.data)
        batch = BatchSource(log, ModelReads(np.arange(log.num_items) + 1), config).batch(0, 0)
        assert (len(batch.negatives.item) > 0) is drawn
        read = {*batch.events.item.tolist(), *batch.impressions.item[batch.impressions.mask.any(-1)].tolist()}
        assert drawn or set(range(len(batch.rows))) - {0} <= read | set(batch.labels.item.flatten().tolist())


def test_hard_search_keeps_its_categories(served_tasks: Served, tmp_path: Path) -> None:
    """They are read when training starts. The saved model does not need the log."""
    path = Path(shutil.copytree(served_tasks.log.path, tmp_path / "log"))
    kinds = np.arange(served_tasks.log.num_items) % 3
    items = {"item": served_tasks.log.items.ids(np.arange(len(kinds))), "kind": kinds}
    table = ItemTableConfig(paths=[str(tmp_path / "items.parquet")], categories=["kind"])
    pl.DataFrame(items).write_parquet(table.paths[0])
    prepare(PrepareConfig(out=str(path), append=True, items=table))
    log = EventLog.open(path)
    config = baseline_config(log, tmp_path, "sim", data=replace(served_tasks.config.data, path=str(path)))
    config.model = replace(config.model, search_category="kind", ignore=["item_features"])
    model = train_model(config, log)
    again = load_model(tmp_path / "sim" / "best")
    for each in (model, again):
        assert isinstance(each, SIM) and each.category is not None
        rows = each.rows_of(log.items)
        codes = each.category[rows].numpy()
        assert np.array_equal(codes == codes[0], kinds == kinds[0]) and len(set(codes)) == 3 and codes.min() == 1
        assert each.category[0] == 0
    assert isinstance(again, SIM) and isinstance(model, SIM)
    assert evaluate_model(again, log, EvaluateConfig()).metrics == evaluate_model(model, log, EvaluateConfig()).metrics
    assert train_model(config, log).state_dict()["category"].equal(again.category), (
        "the checkpoint of a finished run has them"
    )


@pytest.mark.parametrize("name", ["sasrec", "fuxi_linear"])
def test_the_state_after_a_full_history_is_trained(event_log: EventLog, tmp_path: Path, name: str) -> None:
    """Most requests read it. A chunk holds one more event than is encoded, as a label."""
    assert event_log.lengths.max() > LIMIT + 3
    trainer = Trainer(baseline_config(event_log, tmp_path, name), event_log)
    model, source = trainer.model, trainer.source
    for epoch in range(3):
        for index in range(source.num_batches(epoch)):
            batch = source.batch(epoch, index)
            assert int(batch.events.offsets.diff().max()) <= LIMIT + 1
            loss = model.losses(batch, model.item_vectors(batch.rows), trainer.config.optim).total
            torch.autograd.backward(loss)
    assert isinstance(model, SequenceModel) and model.position.grad is not None
    assert bool(model.position.grad.any(1).all())


def test_a_baseline_has_no_summaries(event_log: EventLog, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train it with train_model"):
        train(baseline_config(event_log, tmp_path, "sasrec"), event_log)


def test_a_batch_of_cases_equals_one_case_at_a_time(served_tasks: Served, tmp_path: Path) -> None:
    log = served_tasks.log
    model = Trainer(baseline_config(log, tmp_path, "sasrec", data=served_tasks.config.data), log).model.eval()
    assert isinstance(model, SequenceModel)
    rows = model.rows_of(log.items)
    together, alone = (RawHistoryAnswers(model, log, rows, events_per_batch=count) for count in (1 << 16, 1))
    cases = next_item_cases(log, visible_counts(log, split_until(model.data, "test")))
    np.testing.assert_allclose(together.catalog_scores(cases), alone.catalog_scores(cases), atol=2e-5)
    shown = impression_cases(log, int(str(served_tasks.config.data.test_from)), None)
    np.testing.assert_allclose(together.probabilities(shown), alone.probabilities(shown), atol=1e-6)


NUM_USERS, NUM_EVENTS = 60, 60
START = 1_700_000_000_000
DATA = DataConfig(split=Split.time, validation_from=str(START + 3_500_000), test_from=str(START + 4_000_000))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """Users have events of one of two halves of 20 items each, and click on items of their half only."""
    return make_log(tmp_path_factory.mktemp("halves") / "log", seed=0)


def make_log(folder: Path, seed: int) -> EventLog:
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(NUM_USERS), NUM_EVENTS)
    half = user % 2
    time = START + 50_000 * np.tile(np.arange(NUM_EVENTS), NUM_USERS)
    shown = rng.integers(0, 40, len(user))
    click = (shown // 20 == half) & (rng.random(len(user)) < 0.9)
    return EventLog.from_frame(
        {"user": user, "item": 20 * half + rng.integers(0, 20, len(user)), "timestamp": time},
        folder,
        time_unit="ms",
        impressions={"user": user, "item": shown, "timestamp": time + 2_000_000, "click": click.astype(int)},
        columns=SourceColumns(labels=["click"]),
    )


def test_they_learn_what_they_can_know(log: EventLog) -> None:
    from sklearn.metrics import roc_auc_score

    cases = impression_cases(log, START + 4_000_000, None)
    found = label_baselines(log, DATA, cases, trained=False)
    assert list(found) == ["item rate", "counters", "pooled vectors"]
    aucs = {name: roc_auc_score(cases.label[:, 0], values[:, 0]) for name, values in found.items()}
    assert all(
        values.shape == cases.label.shape and (values > 0).all() and (values < 1).all() for values in found.values()
    )
    assert 0.4 < aucs["item rate"] < 0.6, "every item is clicked by one half of the users"
    assert aucs["counters"] > 0.85 and aucs["pooled vectors"] > 0.9
    learned = label_baselines(log, DATA, cases, trained=True)
    assert list(learned)[3:] == ["item and user rates", "label trees", "pooled label vectors"]
    aucs = {name: roc_auc_score(cases.label[:, 0], values[:, 0]) for name, values in learned.items()}
    assert 0.4 < aucs["item and user rates"] < 0.6 and aucs["label trees"] > 0.85
    assert aucs["pooled label vectors"] > 0.9
    products = LabelFeatures(log, DATA, "click").products(cases)
    assert roc_auc_score(cases.label[:, 0], products[:, 0]) > 0.9, "users like the items of one half"


def test_held_out_labels_change_nothing(log: EventLog, tmp_path: Path) -> None:
    """Not those of other users, nor later ones of the same user; earlier ones of the same user are known."""
    table = log.impressions
    assert table is not None
    asked = START + 4_500_000
    label = np.asarray(table.label)[:, 0]
    user = np.repeat(np.arange(log.num_users), np.diff(table.offsets))
    time = np.asarray(table.timestamp)

    def answers(change: np.ndarray, name: str) -> dict[str, np.ndarray]:
        """Of the impressions at one time, where some labels of the log are other ones."""
        rows = {"user": log.users.ids(user), "item": log.items.ids(np.asarray(table.item)), "timestamp": time}
        events = log.gather(np.arange(log.num_users), log.lengths)
        changed = EventLog.from_frame(
            {
                "user": log.users.ids(events.owner),
                "item": log.items.ids(np.asarray(events.item)),
                "timestamp": events.timestamp,
            },
            tmp_path / name,
            time_unit="ms",
            impressions=rows | {"click": np.where(change, 1 - label, label)},
            columns=SourceColumns(labels=["click"]),
        )
        return label_baselines(changed, DATA, impression_cases(changed, asked, asked + 1), trained=True)

    one = answers(np.zeros(len(time), np.bool_), "same")
    later = answers(time >= asked, "later")
    assert all(np.array_equal(one[name], later[name]) for name in one)
    of_others = answers((time >= START + 3_500_000) & (user % 2 == 1), "others")
    even = impression_cases(log, asked, asked + 1).user % 2 == 0
    assert all(np.array_equal(one[name][even], of_others[name][even]) for name in one)
    assert not np.array_equal(one["label trees"][~even], of_others["label trees"][~even])


def test_labels_that_are_not_known_yet_change_nothing(tmp_path: Path) -> None:
    """A label `again` is only known some time after its impression, of the same user too."""
    rng, asked, wait = np.random.default_rng(0), START + 4_500_000, 300_000
    user = np.repeat(np.arange(NUM_USERS), NUM_EVENTS)
    time = START + 50_000 * np.tile(np.arange(NUM_EVENTS), NUM_USERS) + 2_000_000
    item, label = rng.integers(0, 40, len(user)), rng.integers(0, 2, len(user))

    def answers(since: int, end: int, name: str) -> dict[str, np.ndarray]:
        """What is read for the impressions at one time, if the labels of those in [since, end) are other ones."""
        log = EventLog.from_frame(
            {
                "user": np.append(user, 0),
                "item": np.append(item, 0),
                "timestamp": np.append(time - 2_000_000, time.max() + wait),
            },
            tmp_path / name,
            time_unit="ms",
            impressions={
                "user": user,
                "item": item,
                "timestamp": time,
                "again": np.where((time >= since) & (time < end), 1 - label, label),
            },
            columns=SourceColumns(labels=["again"]),
        )
        cases, features = impression_cases(log, asked, asked + 1), LabelFeatures(log, DATA, "again")
        learned = {"rates": features.rates, "label counters": features.counters, "products": features.products}
        return {name: read(cases) for name, read in learned.items()} | label_baselines(log, DATA, cases, trained=False)

    one, unknown = answers(0, 0, "same"), answers(asked - wait, asked, "unknown")
    assert all(np.array_equal(one[name], unknown[name]) for name in one)
    cut = START + 3_500_000  # where the statistics of all users end
    later = answers(cut - wait, asked, "later")
    assert np.array_equal(one["item rate"], later["item rate"])
    assert not any(np.array_equal(one[name], later[name]) for name in ("rates", "label counters", "products"))


def test_earlier_labels_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    group, time, label = rng.integers(0, 4, 60), rng.integers(0, 20, 60), rng.integers(0, 2, 60).astype(float)
    asked_group, asked_time = rng.integers(-1, 6, 40), rng.integers(0, 22, 40)
    found = EarlierLabels.of(group, time, label, asked_group, asked_time, (3,))
    order = np.argsort(time, kind="stable")
    for n in range(40):
        own = [m for m in order if group[m] == asked_group[n] and time[m] < asked_time[n]]
        assert found.count[n] == len(own) and found.total[n] == label[own].sum()
        assert found.recent[3][0][n] == min(len(own), 3)
        assert found.age[n] == (asked_time[n] - time[own[-1]] if own else np.inf)
        if len({*time[own[-4:]]}) == len(own[-4:]):  # the last three are known
            assert found.recent[3][1][n] == label[own[-3:]].sum()
    assert found.rate(0.25, 4).tolist() == ((found.total + 1) / (found.count + 4)).tolist()


def test_nothing_is_fitted_without_earlier_labels(log: EventLog) -> None:
    early = dataclasses.replace(DATA, validation_from=str(START + 1000), test_from=str(START + 1000))
    cases = impression_cases(log, START + 1000, None)
    assert label_baselines(log, early, cases, trained=True) == {}


def questions(log: EventLog, num: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    user = rng.integers(0, log.num_users, num)
    return user, rng.integers(0, log.lengths[user] + 1), rng.integers(0, log.num_items, num)


def test_counts_and_ages_are_those_of_a_loop(impression_log: EventLog) -> None:
    log, last = impression_log, (3, 20)
    group = np.arange(log.num_items) % 7
    group[::11] = -1  # items without a category
    user, seen, item = questions(log)
    found = EarlierEvents.of(log, group, user, seen, item, last)
    num_with, num_without = 0, 0
    for n in range(len(user)):
        history = group[log.slice(int(user[n])).item[: seen[n]]]
        wanted = group[item[n]]
        places = np.flatnonzero(history == wanted) if wanted >= 0 else np.zeros(0, int)
        assert found.count[n] == len(places)
        assert found.newest_age[n] == (seen[n] - 1 - places[-1] if len(places) else -1)
        for k in last:
            assert found.recent[k][n] == (places >= seen[n] - k).sum()
        num_with, num_without = num_with + bool(len(places)), num_without + (not len(places))
    assert num_with > 50 and num_without > 50


def test_later_events_do_not_count(event_log: EventLog) -> None:
    user, seen, item = questions(event_log)
    same = np.arange(event_log.num_items)
    none = EarlierEvents.of(event_log, same, user, seen * 0, item)
    assert (none.count == 0).all() and (none.newest_age == -1).all()
