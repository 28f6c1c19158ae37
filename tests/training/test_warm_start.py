"""Warm starts: what is matched by id, and resumption."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import small_config
from tests.training.test_trainer import assert_same_result
from tests.training.warm_logs import (
    COLUMNS,
    NEW_ITEMS,
    Run,
    begun,
    kept_ids,
    more_events,
    saved_moments,
    warm_config,
)
from vista.config.choices import Architecture, InitFreeze, ItemStart
from vista.errors import ConfigError
from vista.examples.item_factors import item_factors
from vista.log.event_log import EventLog
from vista.model.added_items import with_items
from vista.model.vista_model import VistaModel
from vista.training import run_state
from vista.training.item_start import start_from_factors
from vista.training.metrics_writer import MetricsWriter
from vista.training.trainer import Trainer, train, train_model
from vista.training.validation import Validation


def test_the_same_log_gives_the_same_model(feature_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    config, base = earlier
    _, made = begun(warm_config(config, feature_log, tmp_path), feature_log)
    made.model.set_item_frequency(made.source.frequency)
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


def test_features_keep_their_meaning(reordered_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    config, base = earlier
    _, made = begun(warm_config(config, reordered_log, tmp_path), reordered_log)
    before, after = base.schema.item_features, made.model.schema.item_features
    assert [column.name for column in after] == ["brand", "tags", "price", "text", "color"]
    assert after[2:4] == before[2:4] and after[0].size == before[0].size + 1
    assert made.model.features is not None and made.model.feature_table is not None
    assert made.model.feature_table.values["brand"].rows(["brand 9"]).tolist() == [before[0].size]
    new = made.model.features.values[1 + before[0].size]
    assert not new.any(), "a new value starts at 0"
    assert not made.model.features.values[-3:].any(), "and so does a new column"
    made.model.save_pretrained(tmp_path / "saved")
    loaded = VistaModel.from_pretrained(tmp_path / "saved")
    assert loaded.feature_table is not None
    for name, values in made.model.feature_table.values.items():
        assert loaded.feature_table.values[name].digest() == values.digest(), name


def test_actions_and_moments_are_matched_by_name(reordered_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    config, base = earlier
    warm, made = begun(warm_config(config, reordered_log, tmp_path), reordered_log)
    warm.start_optimizers(made.optimizers)
    model, moments, ids = made.model, saved_moments(config), kept_ids(base)
    assert base.schema.actions == ["click", "like"] and model.schema.actions == ["like", "buy", "click"]
    assert isinstance(model.encoder.action, torch.nn.Embedding) and isinstance(base.encoder.action, torch.nn.Embedding)
    assert torch.equal(model.encoder.action.weight[[2, 0]], base.encoder.action.weight)
    state = made.optimizers.dense.state[model.encoder.action.weight]
    assert torch.equal(state["exp_avg"][[2, 0]], moments["encoder.action.weight"]["exp_avg"])
    assert state["exp_avg"].any() and not state["exp_avg"][1].any()
    state, rows = made.optimizers.table.state[model.item_table], model.item_rows(ids)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key][rows], moments["item_table"][key][base.item_rows(ids)])
        assert not state[key][model.item_rows(NEW_ITEMS)].any()
    assert state["step"] == moments["item_table"]["step"] > 0
    assert model.features is not None
    values = made.optimizers.table.state[model.features.values]["exp_avg"]
    brands = base.schema.item_features[0].num_rows
    assert torch.equal(values[:brands], moments["features.values"]["exp_avg"][:brands])
    assert not values[brands].any() and not values[-3:].any()


def test_without_a_checkpoint_the_optimizers_start_empty(
    feature_log: EventLog, earlier: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = earlier
    copied = shutil.copytree(Path(config.run_dir) / "best", tmp_path / "best")
    warm, made = begun(warm_config(config, feature_log, tmp_path / "run", init_from=str(copied)), feature_log)
    with caplog.at_level("INFO", logger="vista"):
        warm.start_optimizers(made.optimizers)
    assert not made.optimizers.dense.state and "start without moments" in caplog.text


def test_items_that_the_logs_table_lacks_keep_their_features(
    feature_log: EventLog, earlier: Run, tmp_path: Path
) -> None:
    """The model knows an item from a newer table than that of the log."""
    config, base = earlier
    assert feature_log.item_features is not None
    added = with_items(base, [7777], feature_log.item_features.select(np.array([4])))
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
    assert feature_log.item_features is not None
    added = with_items(base, [7777], feature_log.item_features.select(np.array([4])))
    added.save_pretrained(tmp_path / "best")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    _, made = begun(warm_config(config, feature_log, run_dir, init_from=str(tmp_path / "best")), feature_log)
    made._start(MetricsWriter(run_dir))
    row = torch.from_numpy(made.model.item_rows([7777]))
    with torch.no_grad():
        assert not made.model.id_vectors(row).any()
        torch.testing.assert_close(made.model.item_vectors(row), added.item_vectors(row), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", [Architecture.sasrec, Architecture.hstu])
def test_baselines_start_warm_too(
    feature_log: EventLog, grown_log: EventLog, tmp_path: Path, architecture: Architecture
) -> None:
    config = small_config(
        feature_log, tmp_path / "first", model__architecture=architecture, model__history_limit=8, optim__epochs=1
    )
    base = train_model(config, feature_log)
    config = warm_config(config, grown_log, tmp_path / "second")
    _, made = begun(config, grown_log)
    ids = base.items.ids(np.arange(len(base.items)))
    assert torch.equal(made.model.item_table[made.model.item_rows(ids)], base.item_table[base.item_rows(ids)])
    assert len(train_model(config, grown_log).items) == len(ids) + len(NEW_ITEMS)


def test_factors_of_new_items_fit_the_trained_vectors(grown_log: EventLog, tmp_path: Path) -> None:
    """If the trained vectors are factors, rotated and scaled, the new ones are rotated and scaled alike."""
    made = Trainer(small_config(grown_log, tmp_path, model__use_item_features=False), grown_log)
    counts = made.source.counts
    rows, vectors = item_factors(grown_log, made.model.rows_of(grown_log.items), counts, 16, seed=1)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    expected = 3 * torch.from_numpy(vectors) @ turn
    new = rows[::5]
    is_new = np.isin(rows, new)
    with torch.no_grad():
        made.model.item_table[torch.from_numpy(rows[~is_new])] = expected[~is_new]
    before = made.model.item_table.detach().clone()
    start_from_factors(made.model, grown_log, counts, 1, new)
    torch.testing.assert_close(made.model.item_table[torch.from_numpy(new)], expected[is_new], rtol=1e-4, atol=1e-5)
    others = np.setdiff1d(np.arange(len(before)), new)
    assert torch.equal(made.model.item_table[torch.from_numpy(others)], before[torch.from_numpy(others)])


@pytest.mark.parametrize("freeze", list(InitFreeze))
def test_a_run_resumes_bit_identically(
    grown_log: EventLog,
    earlier: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    freeze: InitFreeze,
) -> None:
    save, killed = run_state.save_checkpoint, []

    def copied(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        killed.append(shutil.copytree(folder.parent, tmp_path / f"killed-{len(killed)}"))

    changes = {
        "init_freeze": freeze,
        "checkpoint_every": 4,
        "optim__epochs": 1,
        "model__item_start": ItemStart.factors,
    }
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_checkpoint", copied)
        train(warm_config(earlier[0], grown_log, tmp_path / "whole", **changes), grown_log, metrics_every=1)
    assert len(killed) > 2
    train(warm_config(earlier[0], grown_log, killed[1], **changes), grown_log, metrics_every=1)
    assert_same_result(killed[1], tmp_path / "whole")
    model = shutil.copytree(Path(earlier[0].run_dir) / "best", tmp_path / "best")
    VistaModel.from_pretrained(model).with_tail(5).save_pretrained(model)
    another = warm_config(earlier[0], grown_log, killed[1], init_from=str(model), **changes)
    with pytest.raises(ConfigError, match=r"a run with another .*init_from \(\w+ -> \w+\)"):
        train(replace(another, model=replace(another.model, tail_len=5)), grown_log)
