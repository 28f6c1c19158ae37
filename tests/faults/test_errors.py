"""Exceptions that cross the public API are VistaErrors or documented; the command line never shows a traceback.

The hostile values are in `api_calls` and HOSTILE_VALUES.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import random
import shutil
import signal
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config, small_frame
from tests.faults import operations
from tests.faults.api_calls import API_CALLS, ApiCall
from tests.faults.harness import Trial, promise
from tests.faults.judging import MAX_MESSAGE, MAX_TEXT, UNTYPED, attempt, judge, outcomes
from tests.faults.nursery import Nursery, Say
from tests.faults.public_functions import NOT_CALLED, documented, public_functions
from tests.faults.test_mutations import MOST_BYTES, MOST_SECONDS, limit_resources
from vista.cli.command_table import COMMANDS
from vista.cli.main import main
from vista.config.config_keys import ConfigKeys, to_yaml
from vista.errors import shortened, shown
from vista.log.event_log import EventLog
from vista.training.trainer import train

HOSTILE_CALLS = [(name, place) for name, one in API_CALLS.items() for place in range(len(one.values))]
random.Random(0).shuffle(HOSTILE_CALLS)
CALLS = 50
PACKAGES = {"items embed": "sentence_transformers", "items tokenize": "faiss", "index": "faiss"}
"""Packages of extras without which a command cannot succeed."""
LONG = ("serve", "explore", "export")
"""Commands that run until they are stopped, or longer than a repetition may."""
RUN = [command for command in COMMANDS if command not in LONG and find_spec(PACKAGES.get(command, "vista"))]
"""The commands that run here."""
COMMAND_BYTES = 4 << 30
"""Memory of a command. Ten epochs of a small training take more than 1 GiB, because torch keeps compiled products of
each shape; then it ends the process."""


def copies(world: str, scratch: str, numbers: list[int], most_bytes: int = MOST_BYTES) -> Iterator[tuple[int, Path]]:
    """Each number with a copy of a world, which is the working directory meanwhile; with limited memory."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit_resources(most_bytes)
    for number in numbers:
        folder = Path(scratch, str(number))
        shutil.copytree(world, folder)
        os.chdir(folder)
        yield number, folder
        os.chdir(scratch)
        shutil.rmtree(folder)


def call_api(say: Say, world: str, scratch: str, numbers: list[int]) -> None:
    """Make some of HOSTILE_CALLS; says [outcome, text] of each."""
    for number, folder in copies(world, scratch, numbers):
        name, place = HOSTILE_CALLS[number % len(HOSTILE_CALLS)]
        one, value = API_CALLS[name], API_CALLS[name].values[place]
        signal.alarm(MOST_SECONDS)
        outcome, text = make_call(one, value, folder)
        signal.alarm(0)
        say([outcome, f"{name} with {shown(value)}: {text}"[:MAX_TEXT]])


def make_call(one: ApiCall, value: Any, folder: Path) -> tuple[str, str]:
    """Make a hostile call; returns the outcome, and a text if it breaks the promise."""
    outcome, text, _ = attempt(lambda: one.call(folder, value), *documented(one.function))
    return outcome or "returned", text


@promise(
    "Errors are typed or documented",
    fault="a hostile argument of a public function",
    judged=True,
    full=CALLS * math.ceil(len(HOSTILE_CALLS) / CALLS),
    short=CALLS,
    each=CALLS,
)
def test_hostile_arguments(trial: Trial, nursery: Nursery, world: Path) -> None:
    nursery.imports("torch._dynamo")  # Optimizers import it.
    judge(trial, outcomes(nursery, call_api, world, trial.folder, numbers=list(trial.numbers), timeout_s=300))


def test_every_public_function_gets_hostile_arguments() -> None:
    called = {one.function.__qualname__ for one in API_CALLS.values()}
    missing = {name for name, function in public_functions().items() if function.__qualname__ not in called}
    assert missing == NOT_CALLED.keys(), "add calls to API_CALLS, or reasons to NOT_CALLED"


def raises_two() -> None:
    """Do nothing.

    Raises:
        ConfigError, ValueError: sometimes.
        KeyError: as in `raises_one`.
    """


def raises_one() -> None:
    """Do nothing.

    Raises:
        TypeError: sometimes. Others as in `raises_two`.
    """


def test_documented_errors_are_read_from_docstrings() -> None:
    assert documented(main) == ()
    assert documented(raises_two) == (KeyError, TypeError, ValueError)


HOSTILE_VALUES = [
    *("", "-1", "0", "1", "nan", "inf", "-inf", "1e400", "1" * 5000, str(10**18), str(10**30), "1_0", "0x10", "null"),
    *("[", "[1,2", "{a:", "{a: 1}", "[" * 5000, "[null]", "[5,x]", "[]", "[,]", f"[{'9' * 5000}]", "[1.5]", "[a,a]"),
    *("${oc.env:HOME}", "${nowhere}", "${oc.decode:1}", "!!python/object:os.system x", "a=b=c", "@", "%", "\\", "\t"),
    *("x" * 100_000, "é", "\ud800", "a\0b", '"', "'", "~", "*", "&a", "true", "all", "cpu", "cuda:99", "0/0", "1/0"),
    *(".", "store/gen-1", "model", "log", "day.csv", "day.csv/x", "missing/at/all", f"0/{10**18}", "5000-01-01"),
    *("2024-13-45", "leave-last-0-out", f"leave-last-{10**30}-out"),
]
"""Paths stay in the working directory, a copy of the world: commands write to the paths that they are given."""
HOSTILE_WORDS = [
    *(
        "--nope",
        "key",
        "=x",
        "a.b.c.d=1",
        "experiment=../../../etc/passwd",
        "model=x",
        "--config=/dev/zero",
        "--config=",
    ),
    *("--config=/nowhere", "--config", "--cfg", "--help", "--", "-", "++x=1", "~seed", "x" * 100_000 + "=1", "\0=1"),
]


def test_hostile_paths_stay_in_the_working_directory() -> None:
    assert not [value for value in HOSTILE_VALUES if value.startswith("/") or ".." in value]


def words_of(command: str, folder: Path) -> list[str]:
    """Words with which a command succeeds in a copy of the world."""
    log, model, store = (f"{folder}/{name}" for name in ("log", "model", "store"))
    places = [f"data={log}", f"model={model}", f"store={store}", "device=cpu", "progress=false"]
    match command:
        case "simulate":
            small = (
                "num_users=6",
                "events_per_user=20",
                "num_items=40",
                "num_topics=8",
                "days=200",
                "episode_events=10",
            )
            return [f"out={folder}/simulated", *small, "session_events=5", "impressions_per_user=10"]
        case "prepare":
            columns = ("events.timestamp=timestamp", "events.time_unit=ms", "progress=false")
            return [f"out={folder}/made", f"events.paths=[{folder}/day.csv]", *columns]
        case "train":
            return [f"--config={folder}/train.yaml"]
        case "refresh":
            return places
        case "watch":
            return [*places, f"folder={folder}", "events.timestamp=timestamp", "events.time_unit=ms", "once=true"]
        case "evaluate":
            return [*places, f"store={folder}/test-store", f"out={folder}/metrics.json"]
        case "runs":
            return [f"folder={folder}"]
        case "runs compare":
            return [f"runs=[{folder}/featured,{folder}/featured]"]
        case "sweep":
            return [f"train_file={folder}/train.yaml", f"folder={folder}/swept", "seed=1,2"]
        case "report":
            return [f"run={folder}/featured", f"out={folder}/report.html", "baselines=false", "progress=false"]
        case "compare":
            return [f"a=[{folder}/measured.json]", f"b=[{folder}/measured.json]"]
        case "plan":
            return [f"out={folder}/plan.json"]
        case "doctor":
            return [*places[:3], f"out={folder}/doctor.json"]
        case "completion":
            return ["zsh"]
        case "score":
            return [*places[1:4], "users=[100]"]
        case "log forget":
            return [places[0], f"events={folder}/deletions.csv", "time_unit=ms"]
        case "log erase":
            return [places[0], "users=[101]"]
        case "index":
            return [places[1], f"out={folder}/best.index"]
        case "items add":
            return [f"model={folder}/featured/best", f"items.paths=[{folder}/new-items.csv]"]
        case "items embed":
            columns = ("items.item=product", "columns=[title]", "device=cpu", "progress=false")
            return [f"items.paths=[{folder}/titles.csv]", *columns, f"out={folder}/embedded.parquet"]
        case "items tokenize":
            return [f"vectors={folder}/vectors.parquet", f"out={folder}/codes.parquet", "codes=4"]
        case "store erase":
            return [places[2], places[0], "users=[101]"]
        case "store get":
            return [places[2], places[1], "user=100"]
        case "store copy":
            return [places[2], f"to={folder}/copy"]
        case "store export":
            return [places[2], f"out={folder}/exported.parquet"]
        case "store import":
            return [f"file={folder}/given.parquet", f"store={folder}/imported"]
    return [places[0] if command.startswith("log") else places[2]]


def make_world_of_commands(say: Say, folder: str) -> None:
    """Add the files that commands read to a copy of the world."""
    import polars as pl

    root = Path(folder)
    operations.export(root)
    (root / "exported.parquet").rename(root / "given.parquet")
    operations.refresh_full(root)  # a rollback needs two generations
    operations.refresh_full(root, "test-store", until="leave-last-out")
    code, errors = run_command(["evaluate", *words_of("evaluate", root), f"out={root}/measured.json"])
    assert code == 0, errors
    pl.DataFrame(operations.later_frame()).write_csv(root / "day.csv")
    pl.DataFrame(operations.first_event()).write_csv(root / "deletions.csv")
    config = small_config(operations.log_of(root), "unused", optim__epochs=1)
    (root / "train.yaml").write_text(to_yaml(config))

    frame = small_frame()
    items = np.unique(frame["item"])
    features = {"item": items, "brand": [f"brand {item % 7}" for item in items]}
    log = EventLog.from_frame(frame, root / "featured-log", time_unit="ms", items=features)
    train(small_config(log, root / "featured", optim__epochs=1), log)
    pl.DataFrame({"item": [7000, 7001], "brand": ["brand 3", "brand 9"]}).write_csv(root / "new-items.csv")
    pl.DataFrame({"product": [1, 2], "title": ["milk", "bread"]}).write_csv(root / "titles.csv")
    vectors = np.random.default_rng(0).normal(size=(9, 2)).tolist()
    pl.DataFrame({"item": range(9), "text": vectors}).write_parquet(root / "vectors.parquet")


@pytest.fixture(scope="module")
def world_of_commands(nursery: Nursery, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with all files that commands read."""
    folder = tmp_path_factory.mktemp("commands") / "world"
    shutil.copytree(world, folder)
    nursery.imports("torch._dynamo")  # Optimizers import it.
    nursery.call(make_world_of_commands, folder)
    return folder


def run_command(words: list[str]) -> tuple[int | None, str]:
    """Run a command line; returns its exit code and what it wrote to stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main(words)
    return code, errors.getvalue()


def interrupt(*_: object) -> None:
    """Interrupt as Ctrl-C does: whether a command runs for long is not judged here."""
    raise KeyboardInterrupt


def call_commands(say: Say, world: str, scratch: str, numbers: list[int]) -> None:
    """Run all commands in turn, each with one hostile word; says [outcome, text] of each.

    In the first round, no word is hostile, and the commands must succeed.
    """
    signal.signal(signal.SIGALRM, interrupt)
    for number, folder in copies(world, scratch, numbers, COMMAND_BYTES):
        chance = random.Random(number)
        command, is_hostile = RUN[number % len(RUN)], number >= len(RUN)
        word = f"{chance.choice(list(ConfigKeys.of(COMMANDS[command].schema).keys))}={chance.choice(HOSTILE_VALUES)}"
        if chance.random() < 0.1:
            word = chance.choice(HOSTILE_WORDS)
        words = [*command.split(), *words_of(command, folder), *([word] if is_hostile else [])]
        if command in PACKAGES and not is_hostile:
            import_module(PACKAGES[command])  # Takes seconds, which do not count.
        signal.alarm(3 if is_hostile else 120)  # The latter also import what they need, and must succeed.
        code: int | None = None
        try:
            code, text = run_command(words)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        fine = code in ((0, 1, 2, 130) if is_hostile else (0,)) and "Traceback" not in text
        told = f"{command} with {shown(word)}: exit code {code}, {shortened(text, 300)}"
        say([f"exit code {code}" if fine and len(text) < MAX_MESSAGE else UNTYPED, told])


@promise(
    "Errors are typed or documented",
    fault="a hostile word on the command line",
    judged=True,
    full=200 * len(RUN),
    short=2 * len(RUN),
    each=len(RUN),
)
def test_hostile_words(trial: Trial, nursery: Nursery, world_of_commands: Path) -> None:
    # A child per word: what one command leaves in memory does not count against the next one's limit.
    of_words = (
        outcomes(nursery, call_commands, world_of_commands, trial.folder, numbers=[number], timeout_s=300)
        for number in trial.numbers
    )
    judge(trial, chain.from_iterable(of_words))
