"""The command line: `vista COMMAND [KEY=VALUE ...]`, where a command is one word, or two (`vista log stats`).

Exit codes: 0 done; 1 an error of vista's own; 2 the command line or the configuration was refused; 130 interrupted.
Each failure is one line on stderr; anything unforeseen keeps its traceback. A command imports only what it runs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from vista import __version__, config
from vista.errors import ConfigError, VistaError


def _simulate(settings: config.SimulateConfig) -> object:
    from vista.simulation.simulate import simulate

    return simulate(settings)


def _prepare(settings: config.PrepareConfig) -> object:
    from vista.log.ingest.prepare import prepare

    return prepare(settings)


def _train(settings: config.TrainConfig) -> object:
    from vista.device import keep_freed_memory
    from vista.log.event_log import EventLog
    from vista.training.trainer import train_model

    keep_freed_memory()
    train_model(settings, EventLog.open(settings.data.path))
    return None


def _refresh(settings: config.RefreshConfig) -> object:
    from vista.cli.refresh_commands import refresh_command

    return refresh_command(settings)


def _watch(settings: config.WatchConfig) -> object:
    from vista.cli.refresh_commands import watch_command

    return watch_command(settings)


def _evaluate(settings: config.EvaluateConfig) -> object:
    from vista.evaluation.evaluate import evaluate

    return evaluate(settings)


def _score(settings: config.ScoreConfig) -> object:
    from vista.cli.score_command import score_command

    return score_command(settings)


def _log_forget(settings: config.LogForgetConfig) -> object:
    from vista.cli.log_commands import log_forget

    return log_forget(settings)


def _log_erase(settings: config.LogEraseConfig) -> object:
    from vista.cli.log_commands import log_erase

    return log_erase(settings)


def _log_compact(settings: config.LogCompactConfig) -> object:
    from vista.cli.log_commands import log_compact

    return log_compact(settings)


def _log_stats(settings: config.LogStatsConfig) -> object:
    from vista.cli.log_commands import log_stats

    return log_stats(settings)


def _of_store(name: str) -> Callable[[Any], object]:
    """A function of vista.cli.store_commands, imported when it is called."""
    return lambda settings: getattr(import_module("vista.cli.store_commands"), name)(settings)


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its config, what it does in a line, and how it is used."""

    schema: type
    run: Callable[[Any], object]
    """Returns a report to print, or None."""
    summary: str
    examples: tuple[str, ...]
    resumes: bool = False
    """The same command goes on where an interrupted one stopped."""


COMMANDS: dict[str, Command] = {
    "simulate": Command(
        config.SimulateConfig,
        _simulate,
        "Make a lifelong log with labelled impressions, as source files for prepare.",
        (
            "vista simulate out=data/simulated",
            "vista simulate out=data/large num_users=2000 events_per_user=20000",
            "vista simulate seed=2 impressions_per_user=500",
        ),
    ),
    "prepare": Command(
        config.PrepareConfig,
        _prepare,
        "Turn source tables (Parquet, CSV, MovieLens, ...) into an EventLog, or append to one.",
        (
            "vista prepare out=data/ml-1m events.kind=auto events.paths=[path/to/ml-1m]",
            "vista prepare out=data/mine events.paths=[clicks.csv] events.user=customer events.item=product "
            "events.timestamp=time events.time_unit=s",
            "vista prepare out=data/mine events.paths=[new.csv] append=true on_bad_rows=quarantine --config mine.yaml",
        ),
    ),
    "train": Command(
        config.TrainConfig,
        _train,
        "Train a model on an EventLog; the best one is exported to <run_dir>/best.",
        (
            "vista train data.path=data/mine run_dir=runs/mine",
            "vista train experiment=ml-1m model.num_seeds=32",
            "vista train model=bidirectional optim=quick optim.learning_rate=1e-3 --cfg",
        ),
        resumes=True,
    ),
    "refresh": Command(
        config.RefreshConfig,
        _refresh,
        "Write users' summaries into the store: all of them, or what is new.",
        (
            "vista refresh data=data/mine model=runs/mine/best store=stores/mine",
            "vista refresh data=data/mine model=runs/mine/best store=stores/mine incremental=true",
            "vista refresh data=data/ml-1m model=runs/ml-1m/best store=stores/ml-1m until=leave-last-out",
            "vista refresh store=stores/exact codec=float32",
        ),
        resumes=True,
    ),
    "watch": Command(
        config.WatchConfig,
        _watch,
        "Append files as they arrive in a folder, and keep the store up to date.",
        (
            "vista watch folder=incoming data=data/mine model=runs/mine/best store=stores/mine events.timestamp=time "
            "events.time_unit=s",
            "vista watch data=data/mine model=runs/mine/best store=stores/mine once=true",
        ),
        resumes=True,
    ),
    "evaluate": Command(
        config.EvaluateConfig,
        _evaluate,
        "Measure quality as served: summaries from the store, scores from the scorer.",
        (
            "vista evaluate data=data/ml-1m model=runs/ml-1m/best store=stores/ml-1m",
            "vista evaluate split=validation top_k=[10,100]",
            "vista evaluate out=metrics.json",
        ),
    ),
    "score": Command(
        config.ScoreConfig,
        _score,
        "Score candidates for users, or rank the whole catalogue.",
        (
            "vista score model=runs/ml-1m/best store=stores/ml-1m users=[1,2] top_k=20",
            "vista score users=[1] candidates=[1193,661,914]",
            "vista score users=[nobody] on_missing=raise",
        ),
    ),
    "store erase": Command(
        config.StoreEraseConfig,
        _of_store("store_erase"),
        "Erase users: readers miss them at once, and no later refresh brings them back.",
        ("vista store erase store=stores/mine users=[101] data=data/mine",),
    ),
    "log forget": Command(
        config.LogForgetConfig,
        _log_forget,
        "Delete single events from an EventLog, all that a file names or none.",
        (
            "vista log forget data=data/mine events=deletions.csv time_unit=s",
            "vista log forget data=data/mine events=deletions.parquet",
        ),
    ),
    "log erase": Command(
        config.LogEraseConfig,
        _log_erase,
        "Delete all events and impressions of users from an EventLog.",
        ("vista log erase data=data/mine users=[101,102]",),
    ),
    "log compact": Command(
        config.LogCompactConfig,
        _log_compact,
        "Make one segment of an EventLog's many; what was deleted leaves the disk.",
        ("vista log compact data=data/mine",),
    ),
    "log stats": Command(
        config.LogStatsConfig,
        _log_stats,
        "Say what an EventLog holds: segments, users, events, deletions, bytes, times.",
        ("vista log stats data=data/mine",),
    ),
    "store stats": Command(
        config.StoreStatsConfig,
        _of_store("store_stats_command"),
        "Say what a store holds: generations, which is served, records, bytes, age, readers.",
        ("vista store stats store=stores/mine",),
    ),
    "store verify": Command(
        config.StoreVerifyConfig,
        _of_store("store_verify"),
        "Check a store's files and every record; exit code 1 and the first problems if there are any.",
        ("vista store verify store=stores/mine",),
    ),
    "store get": Command(
        config.StoreGetConfig,
        _of_store("store_get"),
        "Print one user's record: what it has seen, its tail, its summary's norms.",
        ("vista store get store=stores/mine user=42 model=runs/mine/best",),
    ),
    "store rollback": Command(
        config.StoreRollbackConfig,
        _of_store("store_rollback"),
        "Serve a kept generation again, after checking it.",
        ("vista store rollback store=stores/mine", "vista store rollback store=stores/mine to=7"),
    ),
    "store compact": Command(
        config.StoreCompactConfig,
        _of_store("store_compact"),
        "Write the served generation anew, so that no file holds what was removed; older generations go.",
        ("vista store compact store=stores/mine",),
    ),
    "store copy": Command(
        config.StoreCopyConfig,
        _of_store("store_copy"),
        "Bring a generation to the folder of a serving host, verify it there, then serve it.",
        (
            "vista store copy store=stores/mine to=/srv/stores/mine",
            "vista store copy store=stores/mine to=/srv/stores/mine publish=false",
        ),
        resumes=True,
    ),
    "store export": Command(
        config.StoreExportConfig,
        _of_store("store_export"),
        "Write the served generation to a Parquet file: readable columns, and the records bit for bit.",
        ("vista store export store=stores/mine out=summaries.parquet",),
    ),
    "store import": Command(
        config.StoreImportConfig,
        _of_store("store_import"),
        "Publish an exported Parquet file as a new generation of a store.",
        ("vista store import file=summaries.parquet store=stores/other",),
    ),
}
"""By name, of one word or two; two-word commands that share the first word are a group."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        words = [word for word in message.split() if word.startswith("--") and "=" in word]
        hint = f"; keys are written without dashes: {words[0].lstrip('-')}" if words else ""
        raise ConfigError(f"{message}{hint}")


def _run_command(name: str, words: Sequence[str]) -> None:
    command = COMMANDS[name]
    parser = _Parser(prog=f"vista {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args(words)
    if arguments.help:
        from vista.cli.help import command_help

        print(command_help(name, command.summary, command.schema, command.examples))
        return
    from vista.config.composition import compose_config

    settings: Any = compose_config(command.schema, arguments.overrides, config_file=arguments.config)
    if arguments.cfg:
        from vista.config.config_keys import to_yaml

        print(to_yaml(settings), end="")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    report = command.run(settings)
    if report is not None:
        print(report)


def _command_name(words: Sequence[str]) -> str | None:
    """The command that a command line begins with."""
    return next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)


def _dispatch(words: Sequence[str]) -> int:
    name = _command_name(words)
    if name is not None:
        _run_command(name, words[len(name.split()) :])
        return 0
    first, second = [*words[:2], None, None][:2]
    if first in ("--version", "-V"):
        print(f"vista {__version__}")
        return 0
    if first in (None, "--help", "-h", "help"):
        from vista.cli.help import overview

        print(overview({name: command.summary for name, command in COMMANDS.items()}))
        return 2 if first is None else 0
    group = {name: command.summary for name, command in COMMANDS.items() if name.startswith(f"{first} ")}
    if group and second in (None, "--help", "-h", "help"):
        from vista.cli.help import group_help

        print(group_help(first, group))
        return 2 if second is None else 0
    unknown, known = (f"{first} {second}", group) if group else (first, COMMANDS)
    close = get_close_matches(unknown, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"unknown command '{unknown}'{hint} Commands: {', '.join(known)}; vista --help tells more")


def _fail(message: str, code: int) -> int:
    print(" ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: words after `vista`; None takes the process's own.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _fail(f"error: {error}", 2)
    except VistaError as error:
        return _fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        name = _command_name(words)
        resumes = name is not None and COMMANDS[name].resumes
        return _fail("interrupted" + ("; the same command goes on from here" if resumes else ""), 130)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
