"""Exceptions that cross the public API are VistaErrors or documented; the command line never shows a traceback.

The hostile values are in `api_calls` and HOSTILE_VALUES.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import io
import math
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.generate_reference import API, MEMBERS
from tests.conftest import small_config, small_frame
from tests.faults import operations
from tests.faults.api_calls import API_CALLS
from tests.faults.harness import MAX_MESSAGE, UNTYPED, Trial, attempt, judge, promise, try_each
from tests.faults.nursery import Nursery, Say
from vista.cli.command_table import COMMANDS
from vista.cli.main import main
from vista.config.composition import ConfigKeys, to_yaml
from vista.errors import shortened, shown
from vista.log.event_log import EventLog
from vista.training.trainer import train

NOT_CALLED = {
    "slices arrays in memory, by the rules of NumPy": (
        *("Histories.slice", "Histories.select_users", "Histories.select", "Histories.at"),
        *("Column.recoded", "Column.select"),
        *("Tail.concatenated", "Tail.select", "Tail.of_user"),
        *("StoredBatch.expired", "StoredBatch.take", "StoredBatch.without"),
        *("StoredBatch.concatenated", "StoredBatch.spread"),
    ),
    "takes what only vista itself makes": (
        *("EventLog.event_sources", "EventLog.as_of", "EventLog.active_counts", "EventLog.is_active"),
        "EventLog.counts_before_active",
        *("RefreshOptions.require_only", "Explanation.why"),
        *("Manifest.spec", "Manifest.with_records", "Manifest.with_items"),
    ),
    "without arguments, from fields that were checked when the manifest was read (`test_crafted_fields`)": (
        *("Manifest.identity", "Manifest.counter_layout", "Manifest.tail_layout", "Manifest.user_layout"),
        *("Manifest.state_spec", "Manifest.without_states", "Manifest.to_bytes"),
    ),
    "without arguments, from what is open or in memory": (
        *("Scorer.in_service", "VistaModel.summarizer_id", "StoreReader.item_values"),
        *("Column.with_used_values", "Column.with_one_value"),
    ),
    "without arguments; it reads columns as `gather` does": ("EventLog.time_range",),
    "compares a number": ("EventLog.may_delete",),
    "allocates as many offsets as it is asked for": ("Tail.empty",),
    "the odd values are in files (`test_crafted_fields`)": ("Manifest.from_bytes", "Manifest.from_dict"),
}
"""Why functions need no hostile call -> the functions."""


def public_functions() -> dict[str, Callable[..., Any]]:
    """The functions and methods of the reference of the Python API, by name."""
    found: dict[str, Callable[..., Any]] = {}
    for one in (one for objects in API.values() for one in objects):
        if inspect.isfunction(one):
            found[one.__name__] = one
        elif inspect.isclass(one):
            members = MEMBERS.get(one, [name for name in vars(one) if not name.startswith("_")])
            functions = {name: own for name in members if _is_function(own := getattr(one, name))}
            found |= {f"{one.__name__}.{name}": function for name, function in functions.items()}
    return found


def _is_function(member: Any) -> bool:
    # `isroutine` also takes a `cached_property`.
    return inspect.isfunction(member) or inspect.ismethod(member)


def documented(function: Callable[..., Any]) -> tuple[type[Exception], ...]:
    """The built-in exceptions that the `Raises` of a docstring names, directly or as those of other `functions`."""
    names: set[str] = set()
    seen, left = set(), [function]
    while left:
        one = left.pop()
        seen.add(one.__qualname__)
        raises = (inspect.getdoc(one) or "").partition("Raises:")[2]
        names |= set(re.findall(r"\b[A-Z]\w*Error\b", raises))
        scope = vars(sys.modules[one.__module__])
        owner = scope.get(one.__qualname__.partition(".")[0])
        others = (getattr(owner, other, None) or scope.get(other) for other in re.findall(r"`(\w+)`", raises))
        left += [other for other in others if inspect.isroutine(other) and other.__qualname__ not in seen]
    return tuple(getattr(builtins, name) for name in sorted(names) if hasattr(builtins, name))


HOSTILE_CALLS = [(name, place) for name, one in API_CALLS.items() for place in range(len(one.values))]
random.Random(0).shuffle(HOSTILE_CALLS)
CALLS = 50
PACKAGES = {"items embed": "sentence_transformers", "items tokenize": "faiss", "index": "faiss"}
"""Packages of extras without which a command cannot succeed."""
LONG = ("serve", "explore", "export")
"""Commands that run until they are stopped, or longer than a repetition may."""
RUN = [command for command in COMMANDS if command not in LONG and find_spec(PACKAGES.get(command, "vista"))]
"""The commands that run here."""
ROUNDS = 30
COMMAND_BYTES = 4 << 30
"""Memory of a command. Ten epochs of a small training take more than 1 GiB, because torch keeps compiled products of
each shape; then it ends the process."""


def call_api(say: Say, world: str, scratch: str, numbers: list[int]) -> None:
    """Make some of HOSTILE_CALLS; says [outcome, text] of each."""

    def use(number: int, folder: Path) -> tuple[str, str]:
        name, place = HOSTILE_CALLS[number % len(HOSTILE_CALLS)]
        one, value = API_CALLS[name], API_CALLS[name].values[place]
        outcome, text, _ = attempt(lambda: one.call(folder, value), *documented(one.function))
        return outcome or "returned", f"{name} with {shown(value)}: {text}"

    try_each(say, world, scratch, numbers, use)


@promise(
    "Errors are typed or documented",
    fault="a hostile argument of a public function",
    full=CALLS * math.ceil(len(HOSTILE_CALLS) / CALLS),
    smoke=True,
    each=CALLS,
)
def test_hostile_arguments(trial: Trial, nursery: Nursery, world: Path) -> None:
    nursery.imports("torch._dynamo")  # Optimizers import it.
    judge(trial, nursery, call_api, world, trial.folder)


def test_every_public_function_gets_hostile_arguments() -> None:
    called = {one.function.__qualname__ for one in API_CALLS.values()}
    missing = {name for name, function in public_functions().items() if function.__qualname__ not in called}
    assert missing == set(chain(*NOT_CALLED.values())), "add calls to API_CALLS, or reasons to NOT_CALLED"


HOSTILE_VALUES = [
    *("", "-1", "0", "1", "nan", "inf", "-inf", "1e400", "1" * 5000, str(10**18), str(10**30), "1_0", "0x10", "null"),
    *("[", "[1,2", "{a:", "{a: 1}", "[" * 5000, "[null]", "[5,x]", "[]", "[,]", f"[{'9' * 5000}]", "[1.5]", "[a,a]"),
    *("${oc.env:HOME}", "${nowhere}", "${oc.decode:1}", "!!python/object:os.system x", "a=b=c", "@", "%", "\\", "\t"),
    *("x" * 100_000, "é", "\ud800", "a\0b", '"', "'", "~", "*", "&a", "true", "all", "cpu", "cuda:99", "0/0", "1/0"),
    *(".", "store/gen-1", "model", "log", "day.csv", "day.csv/x", "missing/at/all", f"0/{10**18}", "5000-01-01"),
    *("2024-13-45", "leave-last-0-out", f"leave-last-{10**30}-out"),
]
"""Paths stay in the working directory, a copy of the world: commands write to the paths that they are given."""
assert not [value for value in HOSTILE_VALUES if value.startswith("/") or ".." in value]
HOSTILE_WORDS = [
    *("--nope", "key", "=x", "a.b.c.d=1", "experiment=../../../etc/passwd", "model=x", "++x=1", "~seed", "--", "-"),
    *("--config=/dev/zero", "--config=", "--config=/nowhere", "--config", "--cfg", "--help", "x" * 100_000 + "=1"),
    "\0=1",
]


PLACES = "data=log model=model store=store device=cpu"
OF_COMMAND = {
    "simulate": "out=simulated num_users=6 events_per_user=20 num_items=40 num_topics=8 days=200 episode_events=10 "
    "session_events=5 impressions_per_user=10",
    "prepare": "out=made events.paths=[day.csv] events.timestamp=timestamp events.time_unit=ms",
    "train": "--config=train.yaml",
    "refresh": PLACES,
    "watch": f"{PLACES} folder=. events.timestamp=timestamp events.time_unit=ms once=true",
    "evaluate": f"{PLACES} store=test-store out=metrics.json",
    "runs": "folder=.",
    "runs compare": "runs=[featured,featured]",
    "sweep": "train_file=train.yaml folder=swept seed=1,2",
    "report": "run=featured out=report.html baselines=false",
    "compare": "a=[measured.json] b=[measured.json]",
    "plan": "out=plan.json",
    "doctor": "data=log model=model store=store out=doctor.json",
    "completion": "zsh",
    "score": "model=model store=store device=cpu users=[100]",
    "log forget": "data=log events=deletions.csv time_unit=ms",
    "log erase": "data=log users=[101]",
    "index": "model=model out=best.index",
    "items add": "model=featured/best items.paths=[new-items.csv]",
    "items embed": "items.paths=[titles.csv] items.item=product columns=[title] device=cpu out=embedded.parquet",
    "items tokenize": "vectors=vectors.parquet out=codes.parquet codes=4",
    "store erase": "store=store data=log users=[101]",
    "store get": "store=store model=model user=100",
    "store copy": "store=store to=copy",
    "store merge": "parts=[store] data=[log] model=model store=merged",
    "store export": "store=store out=exported.parquet",
    "store import": "file=given.parquet store=imported",
}
"""Words with which a command succeeds in a copy of the world, its working directory."""


def words_of(command: str) -> list[str]:
    return OF_COMMAND.get(command, "data=log" if command.startswith("log") else "store=store").split()


def make_world_of_commands(say: Say, folder: str) -> None:
    """Add the files that commands read to a copy of the world."""
    import polars as pl

    root = Path(folder)
    os.chdir(root)
    operations.export(root)
    (root / "exported.parquet").rename(root / "given.parquet")
    operations.refresh_full(root)  # a rollback needs two generations
    operations.refresh_full(root, "test-store", until="leave-last-out")
    code, errors = run_command(["evaluate", *words_of("evaluate"), "out=measured.json"])
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
    """Run all commands in turn, each with one hostile word; says [outcome, text] of each. In the first round, no word
    is hostile, and the commands must succeed."""
    signal.signal(signal.SIGALRM, interrupt)

    def use(number: int, folder: Path) -> tuple[str, str]:
        chance = random.Random(number)
        turn, command = number // len(RUN), RUN[number % len(RUN)]
        is_hostile, keys = turn > 0, list(ConfigKeys.of(COMMANDS[command].schema).keys)
        word = f"{keys[turn * len(keys) // ROUNDS]}={chance.choice(HOSTILE_VALUES)}"
        if chance.random() < 0.1:
            word = chance.choice(HOSTILE_WORDS)
        words = [*command.split(), *words_of(command), *([word] if is_hostile else [])]
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
        return f"exit code {code}" if fine and len(text) < MAX_MESSAGE else UNTYPED, told

    try_each(say, world, scratch, numbers, use, COMMAND_BYTES)


@promise(
    "Errors are typed or documented", fault="a hostile word on the command line", full=ROUNDS * len(RUN), each=len(RUN)
)
def test_hostile_words(trial: Trial, nursery: Nursery, world_of_commands: Path) -> None:
    # A child per word: what one command leaves in memory does not count against the next one's limit.
    judge(trial, nursery, call_commands, world_of_commands, trial.folder, alone=True)
