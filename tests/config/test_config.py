"""Configurations made in Python: names of choices are accepted; wrong types are refused, naming the key. Huge,
nested and self-referring configurations are refused with a typed error, in little time and memory. The file of
`vista serve models=…`, and what is refused in it."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
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
    ServeConfig,
    SimulateConfig,
    StoreStatsConfig,
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
from vista.config.serve_config import ModelsFile, ServedModel
from vista.counters.counters import CounterSpec
from vista.errors import ConfigError, VistaError, shortened, shown, without_password
from vista.log.splits import parse_time, parse_until


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
        ({"base": "b", "store": "s", "data": TIME}, r"base: .* set model\.table=plain, or leave this out"),
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
        without_password(begin + unit * (200_000 // len(unit)) + "@")


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


MOST_SECONDS = 2.0
"""CPU time of a refusal. Most take a few milliseconds."""


@pytest.fixture
def refused() -> Callable[[Callable[[], object], str], None]:
    """Call, and require a ConfigError of few characters with a text in it, in little time."""
    compose_config(StoreStatsConfig)  # loads Hydra

    def check(call: Callable[[], object], message: str) -> None:
        began = time.process_time()
        with pytest.raises(ConfigError) as caught:
            call()
        assert time.process_time() - began < MOST_SECONDS
        assert message in str(caught.value) and len(str(caught.value)) < 5_000

    return check


Refused = Callable[[Callable[[], object], str], None]
NINE = ",".join(["1"] * 9)
BOMB = f"a0: &a0 [{NINE}]\n" + "".join(
    f"a{step}: &a{step} [{','.join([f'*a{step - 1}'] * 9)}]\n" for step in range(1, 9)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{step}: &a{step} [*a{step - 1}]\n" for step in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 5: more than 10000 values or 50 levels, counting each alias"),
        (CHAIN, "line 48: more than 10000 values or 50 levels"),
        ("model: &m\n  dim: *m\n", "line 2: *m contains itself"),
        ("a: " + "[" * 20_000, "more than 10000 values or 50 levels"),
        ("".join("  " * level + "a:\n" for level in range(400)), "line 49: more than 10000 values or 50 levels"),
        ("a: [" + "1," * 300_000 + "]", "more than 10000 values"),
        ("a: *b", "undefined alias"),
        ("model: {dim: " + "1" * 10_000 + "}\n", "invalid YAML: Exceeds the limit (4300 digits)"),
        ("model: {dim: 0x" + "f" * 10_000 + "}\n", "model.dim: holds an integer of more than 64 bits"),
        ("seed: " + "1" + ":59" * 266_000 + "\n", "line 1: a number in base 60 has 798001 characters, but at most 100"),
        ("run_dir: '" + "x" * (1 << 20) + "'\n", "bytes, but at most 1048576 are read"),
        ("run_dir: ${oc.env:HOME}\n", "run_dir: configurations may not call the resolver oc.env; write the value"),
        ("run_dir: ${data.path}${data.path}\n", "run_dir: at most one reference such as ${run_dir} is possible, got 2"),
    ],
)
def test_files(tmp_path: Path, refused: Refused, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    refused(lambda: compose_config(TrainConfig, config_file=file), message)


def test_files_that_are_no_regular_files(tmp_path: Path, refused: Refused) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        refused(lambda name=name: compose_config(TrainConfig, config_file=tmp_path / name), "is not a regular file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(lambda: compose_config(TrainConfig, config_file=tmp_path / "binary"), "invalid YAML")


@pytest.mark.nightly
def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    users = [str(number) for number in range(9_990)]
    (tmp_path / "users.yaml").write_text(f"store: s\nusers: [{', '.join(users)}]\n")
    assert compose_config(ScoreConfig, config_file=tmp_path / "users.yaml").users == users


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("store=${oc.env:HOME}", "store: configurations may not call the resolver oc.env"),
        ("store='${a.${oc.env:HOME}}'", "store: configurations may not call the resolver oc.env"),
        ("store=${store}", "Recursive interpolation"),
        ("store=" + "[" * 20_000, "more than 4096 values or 50 levels; put them in a --config file"),
        ("store=[" + "1," * 4_097 + "1]", "more than 4096 values or 50 levels"),
        ("store=" + "1" * 5_000, "cannot read 'store=1"),
        ("store=" + "x" * 200_000, "has 200006 characters, but at most 131072 are read"),
    ],
)
def test_words(refused: Refused, word: str, message: str) -> None:
    refused(lambda: compose_config(StoreStatsConfig, [word]), message)


def test_a_reference_to_another_key_is_allowed() -> None:
    assert compose_config(TrainConfig, ["run_dir=${data.path}/run", "data.path=here"]).run_dir == "here/run"
    nested = ["events={paths: ['${oc.env:HOME}']}"]
    with pytest.raises(ConfigError, match=r"events\.paths: configurations may not call the resolver oc\.env"):
        compose_config(PrepareConfig, nested)


@pytest.mark.parametrize(
    ("key", "most"), [("dim", 65_535), ("num_seeds", 65_535), ("conv_width", 1024), ("history_limit", 2**31 - 1)]
)
def test_sizes_of_models(refused: Refused, key: str, most: int) -> None:
    others = {"dim": {"num_heads": 1}, "num_seeds": {"pooled_dim": 0}}.get(key, {})
    assert getattr(ModelConfig(**{key: most}, **others), key) == most  # type: ignore[arg-type]
    for value in (most + 1, 10**18, 10**400):
        refused(lambda value=value: ModelConfig(**{key: value}), f"model.{key}: must be at most {most}, got ")


def test_threads_and_times(refused: Refused) -> None:
    assert RefreshConfig(num_threads=1024).num_threads == 1024
    refused(lambda: compose_config(RefreshConfig, ["num_threads=1000000000"]), "num_threads: must be at most 1024")
    for text in ("1" * 19, "1" * 5_000, f"leave-last-{10**30}-out", f"2024-05-01-less-{10**30}", 10**30, -(10**18)):
        refused(lambda text=text: parse_until(text), "until=" if isinstance(text, str) else "has more than 18 digits")
    refused(lambda: parse_time("9" * 19), "milliseconds of at most 18 digits")
    assert parse_time("9" * 18) == 10**18 - 1 and parse_until("leave-last-999-out").held_out == 999


MODELS = "models:\n  control: {model: runs/a/best, store: stores/a}\n  larger: {model: runs/b/best, store: stores/b}\n"


def read(folder: Path, text: str) -> ModelsFile:
    path = folder / "models.yaml"
    path.write_text(text)
    return ModelsFile.read(str(path))


def test_all_keys(tmp_path: Path) -> None:
    file = read(
        tmp_path,
        """
models:
  control: {model: runs/a/best, store: stores/a}
  larger: {model: runs/b/best, store: stores/b, index: runs/b/index, task: click}
split: {control: 0.9, larger: 0.1}
experiment: spring
""",
    )
    assert list(file.models) == ["control", "larger"]
    assert file.models["control"] == ServedModel(model="runs/a/best", store="stores/a")
    assert file.models["larger"].task == "click" and file.models["larger"].index == "runs/b/index"
    plain = read(tmp_path, MODELS)
    assert plain.split == {}
    # Without a name, an experiment is called after its variants.
    assert read(tmp_path, MODELS + "split: {control: 1, larger: 0}").experiment == "control,larger"
    assert (file.split, file.experiment) == ({"control": 0.9, "larger": 0.1}, "spring")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {}", "must name 1 to 64 models"),
        (MODELS + "experiment: 7", "experiment: must be text"),
        (MODELS + "split: {control: 0.9, larger: 0.2}", "yaml: split: the shares must sum to 1, but sum to 1.1"),
        (MODELS + "split: {control: 0.9, other: 0.1}", "split: 'other' is not one of the models, control, larger"),
        (MODELS + "split: {control: 1.5, larger: -0.5}", r"split.control: must lie in \[0, 1\], got 1.5"),
        (MODELS + "splits: {control: 1}", "unknown key splits; the keys are models, split, experiment"),
        ("models: {a: {model: runs/a}}", "models.a: needs store"),
        ("models: {a: {model: 7, store: stores/a}}", "models.a.model: expected str, got 7"),
        ("models: {'a b': {model: runs/a, store: stores/a}}", "models.a b: a name has at most 64 letters"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models=.*nowhere.yaml: No such file"):
        ModelsFile.read(str(tmp_path / "nowhere.yaml"))


def test_keys_of_one_model_are_refused_with_a_file() -> None:
    with pytest.raises(ConfigError, match=r"store: only applies without models=models.yaml"):
        ServeConfig(models="models.yaml", store="stores/mine")
