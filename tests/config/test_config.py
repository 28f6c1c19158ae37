"""Configurations made in Python: names of choices are accepted; wrong types are refused, naming the key."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import yaml

from vista.cli.command_table import COMMANDS
from vista.config import (
    DataConfig,
    EvaluateConfig,
    FuxiLinearConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    RefreshConfig,
    ScoreConfig,
    SimulateConfig,
    TrainConfig,
    TwinConfig,
)
from vista.config.checks import (
    Architecture,
    Codec,
    Decay,
    Mixing,
    OnBadRows,
    Split,
    TableKind,
    TableOptimizer,
    TablePrecision,
    from_dict,
    to_dict,
)
from vista.config.composition import ConfigKeys, compose_config, to_yaml, value_text
from vista.config.model_config import CONFIGS, model_config_of
from vista.counters.counters import CounterSpec
from vista.errors import ConfigError, VistaError, shortened, shown, without_password


def test_words_are_choices() -> None:
    data = DataConfig(split="time", validation_from="2024-01-01", test_from="2024-02-01")  # type: ignore[arg-type]
    assert data.split is Split.time
    with pytest.raises(ConfigError, match=r"data\.validation_from: is required with data\.split=time"):
        DataConfig(split="time")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.test_from: only applies with data\.split=time; set that"):
        DataConfig(test_from="2024-02-01")
    assert ModelConfig(mixing="bidirectional").mixing is Mixing.bidirectional  # type: ignore[arg-type]
    decaying = ModelConfig(decay="position", decay_horizons=[0, 1, 2, 3])  # type: ignore[arg-type]
    assert decaying.decay is Decay.position
    for bad in (math.nan, -1.0):
        with pytest.raises(ConfigError, match=r"decay_horizons: needs one horizon >= 0 per head \(4\)"):
            ModelConfig(decay="position", decay_horizons=[0.0, bad, 1.0, 2.0])  # type: ignore[arg-type]
    assert RefreshConfig(codec="float32").codec is Codec.float32  # type: ignore[arg-type]
    assert PrepareConfig(on_bad_rows="raise").on_bad_rows is OnBadRows.error  # type: ignore[attr-defined, arg-type]


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (DataConfig, {"split": "random"}, r"data\.split: 'random' is not one of leave-last-out, time, share"),
        (EvaluateConfig, {"target": "window", "popularity": True}, r"popularity: only applies with target=next"),
        (DataConfig, {"test_share": 0.1}, r"data\.test_share: only applies with data\.split=share"),
        (
            DataConfig,
            {"split": "share", "test_share": 1, "validation_share": 0.1},
            r"data\.test_share: must lie in \(0, 1\), got 1",
        ),
        (
            DataConfig,
            {"split": "share", "test_share": 0.1, "validation_share": -0.1},
            r"data\.validation_share: must lie in \[0, 1\), got -0\.1",
        ),
        (
            DataConfig,
            {"split": "share", "test_share": 0.1, "validation_share": "0.1"},
            r"data\.validation_share: expected float, got '0\.1'",
        ),
        (
            DataConfig,
            {"split": "share", "test_share": 0.5, "validation_share": 0.5},
            r"data\.test_share: must leave events to train on, but both shares sum to 1",
        ),
        (OptimConfig, {"epochs": "2"}, r"optim\.epochs: expected int, got '2'"),
        (OptimConfig, {"epochs": True}, r"optim\.epochs: expected int, got True"),
        (ModelConfig, {"num_seeds": 65_535}, r"model\.num_seeds: a record would hold 65536 rows"),
        (ModelConfig, {"architecture": "sim"}, r"model\.architecture: expected vista, got sim; in .*SimConfig"),
        (ModelConfig, {"embedding_rows": -1}, r"model\.embedding_rows: must be at least 0, got -1"),
        (
            ModelConfig,
            {"embedding_rows": 9, "dim": 5, "num_heads": 1},
            r"model\.dim: must be a multiple of 2 with model\.embedding_rows, got 5",
        ),
        (OptimConfig, {"logq_strength": 1.5}, r"optim\.logq_strength: must lie in \[0, 1\], got 1\.5"),
        (
            TrainConfig,
            {"data": DataConfig(unknown_share=0.1), "model": TwinConfig()},
            r"data\.unknown_share: only applies to architectures that rank next items; leave it out",
        ),
        (TrainConfig, {"model": {"dim": 8}}, r"model: expected RankingConfig, got {'dim': 8}"),
        (RefreshConfig, {"incremental": True, "codec": "float16"}, r"codec: was set by the store's full refresh"),
        (RefreshConfig, {"incremental": True, "until": "leave-last-out"}, r"until: .*leave it out"),
        (SimulateConfig, {"start": "foo"}, r"start: .*write a date such as 2024-01-01"),
        (
            SimulateConfig,
            {"days": float("inf")},
            r"days: must lie in \[1.004, 36500\] with events_per_user=4000, got inf",
        ),
        (SimulateConfig, {"num_users": 10**18}, r"num_users: must be at most 1000000000, got 10{18}"),
        (
            SimulateConfig,
            {"num_users": 10**6},
            r"num_users: times events_per_user must be at most 1,000,000,000, got 4,",
        ),
    ],
)
def test_other_values_name_their_key(make: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**values)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_path_is_the_current_folder_by_mistake(command: str) -> None:
    """A shell makes `store=` of `store=$UNSET`."""
    for name, key in ConfigKeys.of(COMMANDS[command].schema).keys.items():
        names_path = key.type_text.startswith("str") and re.match(r"(\S+ )?(or \S+ )?(folder|file)\b", key.doc, re.I)
        if names_path and key.default != "":
            with pytest.raises(ConfigError, match=rf"{name}: must not be empty"):
                compose_config(COMMANDS[command].schema, [f"{name}="])


TIME = DataConfig(split=Split.time, validation_from="2024-01-01", test_from="2024-02-01")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim": OptimConfig(table_optimizer=TableOptimizer.rowwise_adagrad)},
            r"optim\.table_optimizer: .* set that, or optim\.table_optimizer=adam",
        ),
        (
            {"model": ModelConfig(table=TableKind.torchrec, table_precision=TablePrecision.float16)},
            r"model\.table_precision: .* set optim\.table_optimizer=rowwise_adagrad, or model\.table_precision=float32",
        ),
        ({"init_from": "runs/base/best"}, r"init_from: .* set model\.table=plain, or leave this out"),
        (
            {"base": "b", "store": "s", "data": TIME},
            r"base: .* set model\.table=plain, or leave this out",
        ),
    ],
)
def test_what_a_sharded_table_cannot_do(changes: dict[str, Any], message: str) -> None:
    sharded = {"model": ModelConfig(table=TableKind.torchrec)}
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**(changes if "optim" in changes else sharded | changes))


def test_numbers_become_plain_ones() -> None:
    optim = OptimConfig(epochs=np.int64(3), learning_rate=np.float32(0.5), table_rate=2)  # type: ignore[arg-type]
    assert [type(value) for value in (optim.epochs, optim.learning_rate, optim.table_rate)] == [int, float, float]
    assert from_dict(OptimConfig, to_dict(optim)) == optim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_counters": 0}, r"model\.num_counters: must be at least 1"),
        ({"num_counters": 65_536}, r"model\.num_counters: must be at most 65535"),
        ({"counter_days": [0.01]}, r"model\.counter_days: must be a list of numbers from 0\.0416667 to 36500"),
        ({"counter_events": [float("nan")]}, r"model\.counter_events: must be a list of numbers from 1 to 1e\+06"),
        ({"counter_days": [1.0] * 5, "counter_events": [2.0] * 4}, r"at most 8 time constants"),
    ],
)
def test_counters_that_cannot_be_counted_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{"counter_keys": ["item"], **changes})
    ModelConfig(**changes)  # the other keys matter only with counters


def test_all_counters_that_are_allowed_can_be_counted() -> None:
    for days, events in (([1 / 24, 36_500], [1, 1e6]), ([], []), ([30.0] * 8, [])):
        config = ModelConfig(counter_keys=["item"], num_counters=65_535, counter_days=days, counter_events=events)
        CounterSpec(keys=(config.num_counters,), days=tuple(config.counter_days), events=tuple(config.counter_events))


def test_fuxi_linear_splits_each_head_in_two() -> None:
    message = r"model\.num_heads: fuxi_linear needs model\.dim=24 to be a multiple of twice"
    with pytest.raises(ConfigError, match=message):
        FuxiLinearConfig(dim=24, num_heads=8, history_limit=5)
    FuxiLinearConfig(dim=24, num_heads=6, history_limit=5)


@pytest.mark.parametrize(
    ("store", "written"),
    [
        ("redis://:hunter2@host:6379/mine", "redis://@host:6379/mine"),
        ("rediss://me:hunter2@[::1]/mine?timeout_s=1", "rediss://me@[::1]/mine?timeout_s=1"),
        ("redis:/me:hunter2/@@host/mine", "redis:/me@host/mine"),  # Not a valid URL, but --cfg prints it.
        ("redis://host:6379/mine", "redis://host:6379/mine"),
        ("stores/mine:1@2", "stores/mine:1@2"),
        ("REDIS://u:hunter2@h/mine", "REDIS://u@h/mine"),
        ("redis://u: hunter2 @x@h/mine", "redis://u@h/mine"),
        ("postgresql://me:hun/ter2@h/db", "postgresql://me@h/db"),
        ("postgresql://me:hun@ter2@h/db", "postgresql://me@h/db"),
        ("postgresql://h/db?user=me&password=hunter2", "postgresql://h/db?user=me&password="),
        ("http://h/x?token=tok123&api_key=k1&page=2", "http://h/x?token=&api_key=&page=2"),
        ("https://h/db?Password=hunter2&user=me#a", "https://h/db?Password=&user=me#a"),
        ("https://host:8080/a@b", "https://host:8080/a@b"),
        ("https://me:hunter2@host:8080/a@b", "https://me@host:8080/a@b"),
    ],
)
def test_yaml_holds_no_passwords(store: str, written: str) -> None:
    assert yaml.safe_load(to_yaml(ScoreConfig(store=store)))["store"] == written


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cannot read 'store=REDIS://u:hunter2@h/x': why", "cannot read 'store=REDIS://u@h/x': why"),
        ("--store=redis://u:hun ter2@h/x is unknown", "--store=redis://u@h/x is unknown"),
        ("of redis://a:hunter2@h, https://b:hun/ter2@h/x", "of redis://a@h, https://b@h/x"),
        ("redis://host:6379/mine: write to me@here", "redis://host:6379/mine: write to me@here"),
        ("https://host: 404 for me@here", "https://host: 404 for me@here"),
    ],
)
def test_messages_hold_no_passwords(text: str, said: str) -> None:
    assert without_password(text) == said
    assert str(VistaError(text)) == said


@pytest.mark.parametrize("length", [0, 81, 83, 109])
def test_a_text_is_not_cut_where_the_note_of_the_cut_would_be_longer(length: int) -> None:
    assert shortened("x" * length, 80) == "x" * length
    assert shown("x" * (length - 2), 80) == repr("x" * (length - 2))


@pytest.mark.parametrize("length", [0, 40, 70, 100, 5000])
def test_values_are_shown_without_passwords(length: int) -> None:
    """Even if the @ after the password is in the part that is left out."""
    for text in (f"redis://u:{'hunter2' * 9}@h/" + "x" * length, "x" * length + f"redis://u:{'hunter2' * 9}@h/"):
        assert "hunter" not in shown(text) and ("characters left out" in shown(text)) == (length > 96)
    assert shown("x" * 1_000_000).endswith(f"[{1_000_002 - 80} characters left out] … {'x' * 39}'")


@pytest.mark.parametrize("unit", ["a.", "redis:/", "a:/a:1/", "a:/:@", "a:///:1@/", "redis://u:1/@ ", "&pwd", "@", "/"])
def test_passwords_are_left_out_in_linear_time(unit: str) -> None:
    for begin in ("", "redis://u:"):
        without_password(begin + unit * (1_000_000 // len(unit)) + "@")


@pytest.mark.parametrize("architecture", Architecture)
def test_each_architecture_has_keys_of_its_own(architecture: Architecture) -> None:
    """A key of another one is refused (two of them are tried), but left out if it comes from an experiment."""
    made = compose_config(TrainConfig, ["experiment=ml-1m", f"model.kind={architecture.value}"]).model
    assert type(made) is CONFIGS[architecture] and made.architecture is architecture
    assert model_config_of(to_dict(made)) == made
    keys = ConfigKeys.of(TrainConfig).keys
    foreign = [name for name, key in keys.items() if key.readers and architecture not in key.readers]
    assert all(not hasattr(made, name.removeprefix("model.")) or name in ANSWERED for name in foreign)
    for name in foreign[:2]:
        with pytest.raises(
            ConfigError, match=rf"{name}: is only for model.kind=.*, got model.kind={architecture.value}"
        ):
            compose_config(
                TrainConfig, [f"model.kind={architecture.value}", f"{name}={value_text(keys[name].default)}"]
            )


ANSWERED = ("model.counter_keys", "model.mixing", "model.decay")
"""Keys that code reads of any architecture."""
