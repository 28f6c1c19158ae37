"""Warm starts: what is matched by ID, resumption, frozen summarizers, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import small_config, small_frame
from tests.training.conftest import assert_served_as_validated, copies_of_run
from tests.training.test_trainer import assert_same_result
from tests.training.worlds import COLUMNS, FROZEN, NEW_ITEMS, Run, begun, features, kept_ids, more_events, warm_config
from vista.config.checks import Architecture, Codec, InitFreeze, Split
from vista.errors import ConfigError, LeakageError
from vista.log.event_log import EventLog
from vista.log.features import selected
from vista.model.registry import with_items
from vista.model.vista_model import STAGE1_WEIGHTS, VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.runs.tracking import MetricsWriter
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.training.trainer import Trainer, train
from vista.training.validation import Validation
from vista.training.warm_start import start_from_space


def test_the_same_log_gives_the_same_model(feature_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    config, base = earlier
    _, made = begun(warm_config(config, feature_log, tmp_path), feature_log)
    assert made.source.statistics is not None and made.source.transitions is not None
    assert made.model.transitions is not None
    made.model.item_statistics.copy_(torch.from_numpy(made.source.statistics.latest(1 + len(made.model.items))))
    made.model.transitions.copy_(made.source.transitions.table(1 + len(made.model.items)))
    weights, expected = made.model.state_dict(), base.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    validation = Validation(feature_log, made.model.rows_of(feature_log.items), config)
    assert validation(made.model) == validation(base)
    assert isinstance(made.model, VistaModel) and made.model.summarizer_id() == base.summarizer_id()


def test_items_keep_their_vectors_in_a_log_of_another_order(
    reordered_log: EventLog, earlier: Run, tmp_path: Path
) -> None:
    config, base = earlier
    _, made = begun(warm_config(config, reordered_log, tmp_path), reordered_log)
    model, ids = made.model.eval(), kept_ids(base)
    rows, old = torch.from_numpy(model.item_rows(ids)), torch.from_numpy(base.item_rows(ids))
    log_rows = reordered_log.items.rows(ids)
    assert -1 in log_rows and not np.all(np.diff(log_rows[log_rows >= 0]) > 0)
    with torch.no_grad():
        torch.testing.assert_close(model.item_vectors(rows), base.item_vectors(old), rtol=0, atol=1e-6)
        assert torch.equal(model.id_vectors(rows), base.id_vectors(old))
    assert model.num_trained_items == len(model.items) == len(ids) + len(NEW_ITEMS)
    assert (model.item_rows(NEW_ITEMS) > len(ids)).all()


def test_actions_are_matched_by_name(reordered_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    config, base = earlier
    model = begun(warm_config(config, reordered_log, tmp_path), reordered_log)[1].model
    assert base.schema.actions == ["click", "like"] and model.schema.actions == ["like", "buy", "click"]
    assert isinstance(model.encoder.action, torch.nn.Embedding) and isinstance(base.encoder.action, torch.nn.Embedding)
    assert torch.equal(model.encoder.action.weight[[2, 0]], base.encoder.action.weight)


def test_items_that_the_logs_table_lacks_keep_their_features(
    feature_log: EventLog, earlier: Run, tmp_path: Path
) -> None:
    """The model knows an item from a newer table than that of the log."""
    config, base = earlier
    added = with_items(base, [7777], selected(feature_log.item_features, np.array([4])))
    added.save_pretrained(tmp_path / "best")
    frame = more_events()
    frame["item"] = np.where(frame["item"] == 1000, 7777, frame["item"])
    shutil.copytree(feature_log.path, tmp_path / "log")
    later = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", columns=COLUMNS, append=True)
    config = warm_config(config, later, tmp_path / "run", init_from=str(tmp_path / "best"))
    warm, made = begun(config, later)
    row = torch.from_numpy(made.model.item_rows([7777]))
    assert made.model.features is not None and base.features is not None
    with torch.no_grad():
        torch.testing.assert_close(made.model.features(row), base.features(torch.tensor([5])), rtol=0, atol=1e-6)
        assert made.model.features(torch.from_numpy(made.model.item_rows([2000]))).abs().sum() > 0, "missing values"
    assert int(row) in warm.new_rows, "it has no ID embedding yet"


def test_added_items_that_the_log_lacks_are_their_features(feature_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    config, base = earlier
    added = with_items(base, [7777], selected(feature_log.item_features, np.array([4])))
    added.save_pretrained(tmp_path / "best")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    _, made = begun(warm_config(config, feature_log, run_dir, init_from=str(tmp_path / "best")), feature_log)
    made._start(MetricsWriter(run_dir))
    row = torch.from_numpy(made.model.item_rows([7777]))
    with torch.no_grad():
        assert not made.model.id_vectors(row).any()
        torch.testing.assert_close(made.model.item_vectors(row), added.item_vectors(row), rtol=0, atol=1e-6)


def test_baselines_start_warm_too(feature_log: EventLog, grown_log: EventLog, tmp_path: Path) -> None:
    changes = {"model__architecture": Architecture.hstu, "model__history_limit": 8}
    config = small_config(feature_log, tmp_path / "first", **changes)
    base = Trainer(config, feature_log).model
    base.save_pretrained(tmp_path / "first" / "best")
    config = warm_config(config, grown_log, tmp_path / "second")
    _, made = begun(config, grown_log)
    ids = base.items.ids(np.arange(len(base.items)))
    assert torch.equal(made.model.item_table[made.model.item_rows(ids)], base.item_table[base.item_rows(ids)])
    assert len(made.model.items) == len(ids) + len(NEW_ITEMS)


def test_spaces_of_new_items_fit_the_trained_vectors(grown_log: EventLog, tmp_path: Path) -> None:
    """If the trained vectors are those of the space, rotated and scaled, the new ones are rotated and scaled alike."""
    settings = {"model__ignore": ["item_features"], "model__pooled_dim": 8}
    made = Trainer(small_config(grown_log, tmp_path, **settings), grown_log)
    assert made.source.spaces is not None
    model, space = made.model, torch.from_numpy(made.source.spaces.of_all(1 + len(made.model.items)))
    model.item_space.copy_(space)
    rows = space.any(1).nonzero().squeeze(1)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    expected = 3 * F.pad(space[rows], (0, 8)) @ turn
    is_new = torch.arange(len(rows)) % 5 == 0
    with torch.no_grad():
        model.item_table[rows[~is_new]] = expected[~is_new]
    before = model.item_table.detach().clone()
    start_from_space(model, rows[is_new].numpy())
    torch.testing.assert_close(model.item_table[rows[is_new]], expected[is_new], rtol=1e-4, atol=1e-5)
    others = np.setdiff1d(np.arange(len(before)), rows[is_new].numpy())
    assert len(others) < len(before) and torch.equal(model.item_table[others], before[others])


def test_a_run_resumes_bit_identically(grown_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    changes = {**FROZEN, "checkpoint_every": 4, "optim__epochs": 1}
    with copies_of_run(tmp_path) as copies:
        train(warm_config(earlier[0], grown_log, tmp_path / "whole", **changes), grown_log, metrics_every=1)
    assert len(copies) > 2
    _, killed = copies[1]
    train(warm_config(earlier[0], grown_log, killed, **changes), grown_log, metrics_every=1)
    assert_same_result(killed, tmp_path / "whole")
    model = shutil.copytree(Path(earlier[0].run_dir) / "best", tmp_path / "best")
    VistaModel.from_pretrained(model).with_tail(5).save_pretrained(model)
    another = warm_config(earlier[0], grown_log, killed, init_from=str(model), **changes)
    with pytest.raises(ConfigError, match=r"a run with another .*init_from \(\w+ -> \w+\)"):
        train(replace(another, model=replace(another.model, tail_len=5)), grown_log)


def test_attention_starts_again_from_a_model_of_epoch_0(earlier: Run, grown_log: EventLog, tmp_path: Path) -> None:
    """Its outputs were 0. As they are scaled to length 1, their gradient would be without bounds."""
    model = VistaModel.from_pretrained(Path(earlier[0].run_dir) / "best")
    with model.wide_alone():
        model.save_pretrained(tmp_path / "epoch-0")
    config = warm_config(earlier[0], grown_log, tmp_path / "run", init_from=str(tmp_path / "epoch-0"), **FROZEN)
    scale = train(config, grown_log).state_dict()["target_attention.final_norm.weight"]
    assert scale.min() > 0.5 and scale.max() < 2


@pytest.fixture(scope="module")
def later(grown_log: EventLog, earlier: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the grown log with a frozen summarizer, and its model."""
    config = warm_config(earlier[0], grown_log, tmp_path_factory.mktemp("frozen") / "run", **FROZEN)
    return config, train(config, grown_log)


def digest_of(model: VistaModel, log: EventLog, store: Path) -> tuple[bytes, str]:
    """What a full refresh writes: the summarizer's id, and the digest of all records."""
    refresh(model, log, store, options=RefreshOptions(codec=Codec.float32), created_at=0)
    with StoreReader.open(store, summarizer_id=model.summarizer_id()) as reader:
        return model.summarizer_id(), reader.manifest.records_digest


def test_only_stage_2_and_new_items_train(earlier: Run, later: Run, grown_log: EventLog) -> None:
    base, model = earlier[1], later[1]
    assert model.summarizer_id() == base.summarizer_id()
    before, after = base.state_dict(), model.state_dict()
    count = 1 + base.num_trained_items
    assert torch.equal(after["item_table"][:count], before["item_table"])
    _, made = begun(replace(later[0], run_dir=f"{later[0].run_dir}-again"), grown_log)
    start = made.model.state_dict()
    assert (after["item_table"][count:] != start["item_table"][count:]).any(1).all()
    assert before["item_space"].any()
    assert torch.equal(after["item_space"][:count], before["item_space"]) and not after["item_space"][count:].any()
    per_item = {"item_table", "item_space", "item_statistics", "transition_items", "transition_weights"}
    for name in before.keys() - per_item:
        assert torch.equal(after[name], before[name]) == name.startswith(STAGE1_WEIGHTS), name


def test_stores_stay_valid_and_exact(
    earlier: Run, later: Run, grown_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a log with events of the new items, both models write the same records, bit for bit. The stores are compared
    without statistics of items, as the earlier model knows fewer items."""
    monkeypatch.setattr("vista.refresh.full.item_values", lambda *_: None)
    assert digest_of(later[1], grown_log, tmp_path / "new") == digest_of(earlier[1], grown_log, tmp_path / "old")
    folders = [Path(config.run_dir) / "best" for config in (earlier[0], later[0])]
    users = grown_log.users.ids(np.arange(grown_log.num_users)).tolist()
    scores = []
    for store in ("old", "new"):
        with Scorer.open(folders[1], tmp_path / store) as scorer:
            scores.append(scorer.score(users, NEW_ITEMS))
    np.testing.assert_array_equal(scores[0], scores[1])
    assert len(np.unique(scores[0])) == scores[0].size, "new items have scores of their own"


def test_validation_is_what_the_scorer_reaches(earlier: Run, later: Run, grown_log: EventLog, tmp_path: Path) -> None:
    assert_served_as_validated(*later, grown_log, tmp_path / "store", summarizer=earlier[1])


def test_histories_show_new_items_as_unknown_and_labels_do_not(
    earlier: Run, grown_log: EventLog, tmp_path: Path
) -> None:
    config, base = earlier
    _, made = begun(warm_config(config, grown_log, tmp_path, **FROZEN), grown_log)
    seen = 0
    for index in range(made.source.num_batches(0)):
        batch = made.source.batch(0, index)
        rows, anchors = batch.rows, batch.anchors
        is_new = rows[batch.events.item] > base.num_trained_items
        assert batch.events.hidden is not None and torch.equal(batch.events.hidden, is_new)
        assert anchors is not None and anchors.counters is not None
        counted = anchors.counters.item
        assert not (rows[counted[counted >= 0]] > base.num_trained_items).any()
        label = anchors.next_item
        seen += int((rows[label[label >= 0]] > base.num_trained_items).sum())
    assert seen > 5


def test_a_second_start_continues_new_items(earlier: Run, later: Run, grown_log: EventLog, tmp_path: Path) -> None:
    config, model = later
    frozen, made = begun(warm_config(config, grown_log, tmp_path / "frozen", **FROZEN), grown_log)
    assert torch.equal(made.model.item_table, model.item_table) and not len(frozen.new_rows)
    assert made.model.num_trained_items == earlier[1].num_trained_items
    _, made = begun(warm_config(config, grown_log, tmp_path / "all", init_freeze=InitFreeze.none), grown_log)
    assert torch.equal(made.model.item_table, model.item_table)
    assert made.model.num_trained_items == len(model.items)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dim": 8}, r"these differ: model\.dim \(16 -> 8\); set model\.dim=16"),
        ({"model__num_seeds": 2, "model__tail_len": 5}, r"model\.tail_len \(6 -> 5\), model\.num_seeds \(3 -> 2\)"),
        ({"model__ignore": ["item_features"]}, r"set model\.ignore=\[\]"),
    ],
)
def test_another_shape(
    feature_log: EventLog, earlier: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(warm_config(earlier[0], feature_log, tmp_path / "run", **changes), feature_log)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "a", "store": "b", "data__split": Split.time}, "^init_from: training starts from `base`"),
        ({"init_from": None, **FROZEN}, "^init_freeze: only applies with init_from"),
        ({"model__architecture": Architecture.hstu, "model__history_limit": 8, **FROZEN}, "a baseline has no summ"),
        ({"model__embedding_rows": 8, **FROZEN}, "items share the rows of a hashed table"),
    ],
)
def test_settings_that_contradict_each_other(
    feature_log: EventLog, earlier: Run, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = warm_config(earlier[0], feature_log, tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        replace(config)


def test_a_log_that_lacks_a_feature(feature_log: EventLog, event_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model reads the feature 'brand', which the log lacks; append a table"):
        train(warm_config(earlier[0], event_log, tmp_path / "run"), event_log)
    frame = small_frame()
    table = features(np.unique(frame["item"]))
    table["text"] = [row[:2] for row in table["text"]]
    path = tmp_path / "log"
    short = EventLog.from_frame(frame, path, time_unit="ms", columns=COLUMNS, items=table)
    with pytest.raises(ConfigError, match=r"the feature 'text' is a vector of 2, but was a vector of 3"):
        train(warm_config(earlier[0], short, tmp_path / "run"), short)


def test_a_log_of_other_ids_or_without_times(order_log: EventLog, event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(order_log, tmp_path / "first")
    Trainer(config, order_log).model.save_pretrained(tmp_path / "first" / "best")
    with pytest.raises(ConfigError, match=r"its item ids are str, but those of .* are int"):
        train(warm_config(config, event_log, tmp_path / "second"), event_log)
    frame = small_frame()
    named = {"user": frame["user"], "item": [f"i{item}" for item in frame["item"]], "timestamp": frame["timestamp"]}
    timed = EventLog.from_frame(named, tmp_path / "log", time_unit="ms")
    with pytest.raises(ConfigError, match=r"has times, but the log of init_from=.* has no times"):
        train(warm_config(config, timed, tmp_path / "second"), timed)


def test_new_actions_of_a_frozen_summarizer(reordered_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the actions of .* are \['like', 'buy', 'click'\], but summaries know"):
        train(warm_config(earlier[0], reordered_log, tmp_path, **FROZEN), reordered_log)


def test_a_model_in_the_run_folder(feature_log: EventLog, earlier: Run) -> None:
    with pytest.raises(ConfigError, match="holds the model of init_from, which this run would replace"):
        train(warm_config(earlier[0], feature_log, Path(earlier[0].run_dir)), feature_log)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"validation_from": "2020-10-01", "test_from": "2020-10-20"}, "trained on events until leave-last-two-out"),
        ({"validation_share": 0.1, "test_share": 0.1}, "but this run holds out what comes after leave-last-20-percent"),
    ],
)
def test_a_model_that_may_know_the_labels(
    feature_log: EventLog, earlier: Run, tmp_path: Path, split: dict[str, Any], message: str
) -> None:
    kind = Split.time if "test_from" in split else Split.share
    config = warm_config(earlier[0], feature_log, tmp_path)
    with pytest.raises(LeakageError, match=message):
        train(replace(config, data=replace(config.data, split=kind, **split)), feature_log)


def test_a_model_of_later_labels(event_log: EventLog, tmp_path: Path) -> None:
    def dated(day: int) -> dict[str, Any]:
        return {"split": Split.time, "validation_from": f"2020-10-{day}", "test_from": "2020-10-25"}

    config = small_config(event_log, tmp_path / "first")
    config = replace(config, data=replace(config.data, **dated(10)))
    Trainer(config, event_log).model.save_pretrained(tmp_path / "first" / "best")
    warm = warm_config(config, event_log, tmp_path / "second")
    begun(replace(warm, data=replace(warm.data, **dated(12))), event_log)
    with pytest.raises(LeakageError, match=r"was trained on events until \d+, but this run holds out"):
        train(replace(warm, data=replace(warm.data, **dated(10) | {"validation_from": "2020-10-09"})), event_log)


def test_fine_tuning_by_rewards_keeps_records(earlier: Run, later: Run, grown_log: EventLog, tmp_path: Path) -> None:
    """Stage 1 is frozen unless init_freeze says otherwise. The rewards change stage 2."""
    config, plain = later
    optim = replace(config.optim, reward="rating")
    tuned = train(replace(config, init_freeze=None, optim=optim, run_dir=str(tmp_path / "run")), grown_log)
    assert digest_of(tuned, grown_log, tmp_path / "after") == digest_of(earlier[1], grown_log, tmp_path / "before")
    assert any(
        not torch.equal(mine, theirs) for mine, theirs in zip(tuned.parameters(), plain.parameters(), strict=True)
    )


def test_equal_weights_train_the_same_bits_as_none(later: Run, grown_log: EventLog, tmp_path: Path) -> None:
    """At so high a temperature, all weights are 1."""
    config, plain = later
    optim = replace(config.optim, reward="rating", reward_temperature=1e30)
    weighted = train(replace(config, optim=optim, run_dir=str(tmp_path / "run")), grown_log).state_dict()
    assert all(torch.equal(weighted[name], value) for name, value in plain.state_dict().items())
