"""Settings that are null are resolved from the log; time limits; learning rates; the average of weights."""

from __future__ import annotations

import importlib.util
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Served, model_config, small_config
from tests.training.test_trainer import metrics
from vista.config import DataConfig, DinConfig, ModelConfig, OptimConfig, SimConfig, SourceColumns, TrainConfig
from vista.config.checks import Mixing, Split, TableKind, planned
from vista.config.composition import compose_config
from vista.errors import ConfigError, MissingDependencyError
from vista.examples.batch import Batch
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.training import run_plan
from vista.training.optimizers import RECENCY, WeightAverage
from vista.training.run_plan import plan_run, warn_of_few_steps
from vista.training.trainer import RESERVE, Trainer, train

PLANNED = {
    "data.exclude_seen": False,
    "data.tokens_per_batch": 512,
    "data.num_negatives": 40,
    "optim.epochs": 30,
    "optim.warmup_steps": 1,
    "model.counter_keys": ["item"],
    "model.temperature": 0.3,
    "optim.window_weight": 1.0,
    "optim.next_weight": 1.0,
}
"""What the small log resolves to."""


def value_of(config: TrainConfig, key: str) -> Any:
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


def log_with(num_events: int) -> EventLog:
    """Stands in for a log of this size, with 5,000 items; each user has 100 events, of which training sees 98."""

    class Sized:
        lengths = np.full(num_events // 98, 100)
        num_items, has_time, impressions = 5000, False, None
        active = property(lambda self: self)
        counts_before_active = staticmethod(lambda number: number)

    return Sized()  # type: ignore[return-value]


def test_null_settings_follow_the_log(event_log: EventLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vista")
    config = TrainConfig()
    resolved = plan_run(config, event_log)
    assert {key: value_of(resolved, key) for key in PLANNED} == PLANNED
    assert all(value_of(config, key) is None for key in PLANNED)
    repeats, line = caplog.messages
    assert repeats.startswith("data.exclude_seen=false: ")
    assert line.startswith("settings from the log: model.counter_keys=[item] (next items)")
    weights = "optim.window_weight=1, optim.next_weight=1 (data.split=leave-last-out)"
    assert f"model.temperature=0.3, {weights}, data.tokens_per_batch=512 (" in line
    assert line.count("=") + repeats.count("=") == len(PLANNED) + 1
    assert plan_run(resolved, event_log) == resolved and len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.exclude_seen", True),
        ("data.tokens_per_batch", 77),
        ("data.num_negatives", 5),
        ("optim.epochs", 0),
        ("optim.warmup_steps", 0),
        ("model.counter_keys", []),
        ("model.temperature", 0.05),
        ("optim.window_weight", 0.0),
        ("optim.next_weight", 0.0),
    ],
)
def test_explicit_settings_win(event_log: EventLog, key: str, value: Any) -> None:
    config = TrainConfig()
    group, _, name = key.partition(".")
    setattr(getattr(config, group), name, value)
    assert value_of(plan_run(config, event_log), key) == value


def test_counters_are_for_all_that_rank_items(event_log: EventLog, served_tasks: Served) -> None:
    def plan(config: TrainConfig, log: EventLog = event_log) -> tuple[Any, ...]:
        found = plan_run(config, log)
        model = found.model
        return model.counter_keys, model.temperature, found.optim.window_weight

    off, on, once = ([], 0.05, 0.0), (["item"], 0.3, 1.0), DataConfig(exclude_seen=True)
    assert plan(TrainConfig(data=once)) == (["item"], 0.05, 0.0)
    assert plan(TrainConfig(data=once, optim=OptimConfig(window_weight=1))) == on
    assert plan(TrainConfig(data=once, model=model_config("sasrec", history_limit=9))) == off
    assert plan(TrainConfig(optim=OptimConfig(next_weight=0, window_weight=0))) == off  # ranks no items
    assert plan(TrainConfig(optim=OptimConfig(next_weight=0))) == on  # windows only
    assert not plan_run(TrainConfig(model=SimConfig()), event_log).model.counter_keys  # ranks candidates only
    assert plan(TrainConfig(model=ModelConfig(mixing=Mixing.bidirectional))) == on
    assert plan(TrainConfig(model=ModelConfig(num_seeds=0))) == on
    tasks = replace(
        served_tasks.config, model=ModelConfig(), data=replace(served_tasks.config.data, exclude_seen=False)
    )
    assert plan(tasks, served_tasks.log)[:2] == on[:2]  # labeled impressions, and items
    labels_alone = replace(tasks, optim=OptimConfig(next_weight=0))
    assert plan(labels_alone, served_tasks.log) == (["item", "action", "item*action"], 0.3, 0.0)
    labels_alone.data.exclude_seen = True
    assert plan(tasks, served_tasks.log) == off  # the same data
    assert plan(labels_alone, served_tasks.log) == (["item", "action"], 0.3, 0.0)


def test_categories_and_actions_are_counted_where_labels_are_trained(tmp_path: Path) -> None:
    n = np.arange(400)
    events = {"user": n % 10, "item": n % 40, "timestamp": n, "action": np.array(["right", "wrong"])[n // 7 % 2]}
    shown = {"user": n % 10, "item": n % 40, "timestamp": n, "correct": n // 7 % 2 == 0}
    of_items = np.arange(40)
    items = {
        "item": of_items,
        "name": [f"problem {i}" for i in of_items],  # as many values as items
        "topics": [["a"], ["a", "b"]] * 20,  # several per item
        **{
            name: (of_items % 5).astype(str) for name in ("action", "weekday", "a*b")
        },  # as keys, they are other counters
        "skill": [f"skill {i % 5}" for i in of_items],
        "difficulty": of_items / 40,
    }
    log = EventLog.from_frame(
        events,
        tmp_path / "log",
        time_unit="s",
        columns=SourceColumns(action="action", labels=["correct"]),
        impressions=shown,
        items=items,
    )

    def keys(*, ignore: tuple[str, ...] = (), **weights: float) -> list[str] | None:
        config = TrainConfig(model=ModelConfig(ignore=[*ignore]), optim=OptimConfig(**weights))
        return plan_run(config, log).model.counter_keys

    assert keys() == ["item", "skill"]
    by_action = ["action", "skill*action", "item*action"]
    assert keys(next_weight=0) == keys(next_weight=0, window_weight=0) == ["item", "skill", *by_action]
    assert keys(next_weight=0, ignore=("item_features",)) == ["item", "action", "item*action"]
    assert keys(task_weight=0) == ["item"]

    rewarded = OptimConfig(next_weight=0, reward="right")
    with pytest.raises(ConfigError, match=r"^optim\.reward: weights the labels of next items and windows"):
        plan_run(TrainConfig(optim=rewarded), log)  # labels alone


def test_next_items_are_trained_where_validation_asks_for_them(event_log: EventLog) -> None:
    share = DataConfig(split=Split.share, validation_share=0.1, test_share=0.1)

    def weight(
        data: DataConfig, weights: OptimConfig | None = None, counter_keys: list[str] | None = None
    ) -> float | None:
        config = TrainConfig(data=data, optim=weights or OptimConfig(), model=ModelConfig(counter_keys=counter_keys))
        return plan_run(config, event_log).optim.next_weight

    assert weight(DataConfig()) == 1  # one event per user
    assert weight(share) == 0
    assert weight(replace(share, exclude_seen=True)) == weight(share, counter_keys=[]) == 1  # no windows
    assert weight(share, OptimConfig(window_weight=0)) == 1  # no windows
    assert weight(share, OptimConfig(next_weight=0.2)) == 0.2


@pytest.mark.parametrize(
    ("num_events", "once", "tokens", "epochs", "warmup"),
    [
        (100_000, True, 512, 30, 49),
        (10**6, True, 2048, 20, 100),
        (10**7, True, 8192, 8, 100),
        (10**8, True, 8192, 1, 100),
        (50_000, False, 512, 30, 25),
        (10**6, False, 4096, 30, 62),
    ],
)
def test_batches_and_epochs_follow_the_number_of_events(
    num_events: int, once: bool, tokens: int, epochs: int, warmup: int
) -> None:
    def planned(**optim: Any) -> TrainConfig:
        data, model = DataConfig(exclude_seen=once), ModelConfig(counter_keys=["item"])
        return plan_run(TrainConfig(data=data, model=model, optim=OptimConfig(**optim)), log_with(num_events))

    config = planned()
    assert (config.data.tokens_per_batch, config.optim.epochs, config.optim.warmup_steps) == (tokens, epochs, warmup)
    assert config.data.num_negatives == 4096
    assert planned(epochs=7).optim.epochs == 7
    timed = planned(minutes=10).optim
    assert (timed.epochs, timed.warmup_steps) == (None, warmup), "time ends this run, and not a number of steps"


def test_item_vectors_learn_slowly_from_few_labels(event_log: EventLog, served_tasks: Served) -> None:
    def rate(log: EventLog, config: TrainConfig, **model: Any) -> float | None:
        return plan_run(replace(config, model=replace(ModelConfig(), **model)), log).optim.table_rate

    tasks = replace(served_tasks.config, optim=OptimConfig(next_weight=0, window_weight=0))
    assert rate(served_tasks.log, tasks) == 0.1
    assert rate(served_tasks.log, tasks, pooled_dim=0) == 1  # which has everything to learn
    assert rate(served_tasks.log, replace(tasks, optim=OptimConfig(window_weight=0))) == 1  # next items too
    assert rate(served_tasks.log, replace(tasks, optim=replace(tasks.optim, table_rate=1.0))) == 1
    assert rate(event_log, TrainConfig()) == 1
    with pytest.MonkeyPatch.context() as patch:
        events = int(visible_counts(served_tasks.log, split_until(tasks.data, "train")).sum())
        for events_per_item, slow in ((0.99, False), (1.01, True)):
            patch.setattr(run_plan, "RARE_EVENTS", events_per_item * events / served_tasks.log.num_items)
            assert rate(served_tasks.log, tasks) == (0.1 if slow else 1)
    din = plan_run(replace(tasks, model=DinConfig(history_limit=9), optim=OptimConfig()), served_tasks.log)
    assert din.optim.table_rate == 1


@pytest.mark.parametrize(
    ("optim", "steps", "warns"),
    [
        (OptimConfig(epochs=1, warmup_steps=4), 19, "raise optim.epochs"),
        (OptimConfig(epochs=1, warmup_steps=4), 20, ""),
        (OptimConfig(epochs=1, warmup_steps=15), 29, "29 steps, of which 15 were warm-up"),
        (OptimConfig(epochs=1, warmup_steps=15), 30, ""),
        (OptimConfig(epochs=0, warmup_steps=15), 0, ""),
        (OptimConfig(minutes=1, epochs=2, warmup_steps=4), 19, "raise optim.epochs or optim.minutes"),
    ],
)
def test_short_runs_warn(optim: OptimConfig, steps: int, warns: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_few_steps(optim, steps)
    assert len(caplog.messages) == bool(warns) and re.search(warns, "".join(caplog.messages))


def test_a_downstream_run_counts_the_labels_after_its_store(served_tasks: Served) -> None:
    base = served_tasks.config
    config = replace(base, base="best", store="store", optim=OptimConfig(), model=ModelConfig())
    config = replace(config, data=replace(base.data, tokens_per_batch=16))
    whole, late = (plan_run(config, served_tasks.log, since) for since in (0, int(base.data.validation_from or 0) - 1))
    assert planned(late.optim.warmup_steps, "") < planned(whole.optim.warmup_steps, "")


def test_the_run_folder_has_the_resolved_settings(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, optim__warmup_steps=None, optim__epochs=1)
    train(config, event_log)
    written = compose_config(TrainConfig, config_file=tmp_path / "config.yaml")
    assert written == plan_run(config, event_log) != config
    assert "settings from the log: optim.warmup_steps=" in (tmp_path / "train.log").read_text()


def test_a_null_setting_that_was_not_resolved_is_refused() -> None:
    assert planned(3, "data.num_negatives") == 3
    with pytest.raises(ConfigError, match=r"data\.num_negatives: is null, .*call plan_run"):
        planned(DataConfig().num_negatives, "data.num_negatives")


def test_a_sharded_table_refuses_the_exact_softmax(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path / "run", model__table=TableKind.torchrec, data__num_negatives=40)
    with pytest.raises(ConfigError, match=r"data\.num_negatives: 40 of the log's 40 items make an exact softmax"):
        plan_run(config, event_log)
    plan_run(replace(config, data=replace(config.data, num_negatives=39)), event_log)
    plan_run(replace(config, model=replace(config.model, table=TableKind.plain)), event_log)


@pytest.mark.skipif(importlib.util.find_spec("torchrec") is not None, reason="TorchRec is installed")
def test_a_missing_torchrec_is_named(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path / "run", model__table=TableKind.torchrec)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[torchrec\]'"):
        train(config, event_log)


def test_time_ends_a_run_after_a_validation(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"optim__epochs": None, "optim__minutes": 1.0}
    config = small_config(event_log, tmp_path, **changes)
    made = Trainer(config, event_log, began=time.perf_counter() - 20)
    assert not made._time_is_up() and 0.3 < made._share_done(10) < 0.4
    made.progress.validation_seconds = 60 * (1 - RESERVE) - 20
    assert made._time_is_up(), "the last validation takes time too"
    step = Trainer._step

    def slow_at_7(trainer: Trainer, batch: Batch) -> dict[str, float]:
        trainer.progress.seconds += 60 * (trainer.progress.step == 6)
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "_step", slow_at_7)
    train(config, event_log, metrics_every=1)
    rows = metrics(tmp_path)
    assert rows[-1]["step"] == 7 and "validation" in rows[-1] and (tmp_path / "best" / "README.md").is_file()
    assert rows[-1]["seconds"] > 60
    assert {row["learning_rate"] for row in rows[4:-1] if "loss" in row} == {5e-3}, "it does not depend on the time"
    assert "the run had only 7 steps" in (tmp_path / "train.log").read_text()
    train(config, event_log)  # nothing is left to do
    assert metrics(tmp_path) == rows


def test_a_run_without_time_for_another_validation_ends_after_the_last_one(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Trainer._validate_average

    def slow(trainer: Trainer, *arguments: Any) -> None:
        validate(trainer, *arguments)
        trainer.progress.validation_seconds = 60.0

    monkeypatch.setattr(Trainer, "_validate_average", slow)
    train(small_config(event_log, tmp_path, optim__epochs=None, optim__minutes=1.0), event_log)
    assert [row["epoch"] for row in metrics(tmp_path) if "validation" in row] == [1]


def test_a_run_with_both_limits_ends_after_its_epochs(event_log: EventLog, tmp_path: Path) -> None:
    train(small_config(event_log, tmp_path, optim__epochs=3, optim__minutes=10.0), event_log)
    assert metrics(tmp_path)[-1]["epoch"] == 3


def test_the_average_is_that_of_the_newest_part(event_log: EventLog, tmp_path: Path) -> None:
    weights = {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.float16)}
    average, rows = WeightAverage(weights), torch.randn(200, 7, dtype=torch.float64)
    shares = np.zeros(len(rows))
    for k, row in enumerate(rows):
        weights["a"].copy_(row[:3])
        weights["b"].copy_(row[3:].view(2, 2))
        average.add()
        shares *= 1 - (RECENCY + 1) / (k + 1 + RECENCY)
        shares[k] = (RECENCY + 1) / (k + 1 + RECENCY)
    assert shares.sum() == pytest.approx(1) and shares[-50:].sum() > 0.9, "about the last ninth counts"
    expected = torch.from_numpy(shares) @ rows
    torch.testing.assert_close(average.values["a"].double(), expected[:3], rtol=0, atol=1e-5)
    half = torch.from_numpy(shares) @ rows[:, 3:].half().double()
    torch.testing.assert_close(average.values["b"].double().flatten(), half, rtol=0, atol=1e-5)
    own = {name: weight.clone() for name, weight in weights.items()}
    with average.applied():
        assert torch.equal(weights["a"], average.values["a"]) and not torch.equal(weights["a"], own["a"])
    assert all(torch.equal(weights[name], own[name]) for name in own)


def after_an_epoch(log: EventLog, folder: Path, table_rate: float) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A trainer after one epoch, and the weights that it started from."""
    folder.mkdir(exist_ok=True)
    made = Trainer(small_config(log, folder, optim__table_rate=table_rate, optim__epochs=1), log)
    start = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.run()
    return made, start


def test_a_table_rate_of_zero_keeps_the_table(event_log: EventLog, tmp_path: Path) -> None:
    made, start = after_an_epoch(event_log, tmp_path, 0.0)
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, start[name])}
    assert "item_table" not in changed and len(changed) > 10
    assert not made.optimizers.table.state


def test_the_table_learns_at_its_own_rate(event_log: EventLog, tmp_path: Path) -> None:
    moved = {}
    for rate in (1.0, 0.1):
        made, start = after_an_epoch(event_log, tmp_path / str(rate), rate)
        assert made.optimizers.schedule(0, 4) == pytest.approx(5e-3 / 4)
        network = made.optimizers.schedule(100, 4)
        assert network == 5e-3
        rates = {group["lr"] for group in made.optimizers.dense.param_groups}
        assert rates == {network}, "after epoch 0, heads learn as fast as the rest"
        assert [group["lr"] for group in made.optimizers.table.param_groups] == [network * rate]
        moved[rate] = float((made.model.item_table.detach() - start["item_table"]).abs().mean())
    assert 0 < 5 * moved[0.1] < moved[1.0] < 20 * moved[0.1]
