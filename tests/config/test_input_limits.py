"""Huge, nested and self-referring configurations are refused with a typed error, in little time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vista.config import ModelConfig, PrepareConfig, RefreshConfig, ScoreConfig, StoreStatsConfig, TrainConfig
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.log.splits import parse_time, parse_until

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
    ("key", "most"),
    [
        ("dim", 65_535),
        ("num_seeds", 65_535),
        ("conv_width", 1024),
        ("history_limit", 2**31 - 1),
    ],
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
