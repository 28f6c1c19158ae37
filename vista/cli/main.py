"""The command line: `vista COMMAND [KEY=VALUE ...]`, where a command is one word or two (`vista log stats`).

Exit codes: 0 success; 1 an error that vista raises on purpose, or one of a file; 2 an invalid command line or
configuration; 130 interrupted. Each of these errors is one line on stderr; unexpected errors keep their traceback. The
commands are listed in command_table.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import TracebackType
from typing import Any, NoReturn

from vista.cli.command_table import COMMANDS
from vista.errors import ConfigError, LogFormatter, VistaError, key_word, log_to_stderr, shortened, without_password
from vista.installation import __version__, install_command

CORE_MODULES = ("hydra", "lmdb", "numpy", "omegaconf", "packaging", "safetensors", "torch", "tqdm", "xxhash", "yaml")
"""Modules of packages that are always installed with vista."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        words = [word for word in message.split() if word.startswith("--") and "=" in word]
        hint = f"; keys are written without dashes: {words[0].lstrip('-')}" if words else ""
        raise ConfigError(f"{message}{hint}")


def _run_command(name: str, words: Sequence[str]) -> None:
    command = COMMANDS[name]
    parser = _Parser(prog=f"vista {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="PART")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_intermixed_args(words)
    if arguments.help is not None:
        from vista.cli.help_pages import command_help

        print(command_help(name, command, "" if "=" in arguments.help else arguments.help))
        return
    from vista.config.composition import ConfigKeys, compose_config
    from vista.progress_bar import progress_shown

    words, rest = arguments.overrides, []
    if command.positional:
        words, bare = [word for word in words if "=" in word], [word for word in words if "=" not in word]
        if ConfigKeys.of(command.schema).keys[command.positional].default == [] and bare:
            words.insert(0, key_word(command.positional, bare))
        else:
            words = [*(f"{command.positional}={word}" for word in bare), *words]
    if command.rest is not None:
        own: Any = command.schema
        rest = [word for word in words if word.partition("=")[0] not in own.__dataclass_fields__]
        words = [word for word in words if word not in rest]
    settings: Any = compose_config(command.schema, words, config_file=arguments.config)
    if command.rest is not None:
        setattr(settings, command.rest, getattr(settings, command.rest) + rest)
    if arguments.cfg:
        from vista.config.composition import to_yaml

        print(to_yaml(settings), end="")
        return
    # Of a torchrun job, only the first process reports.
    log_to_stderr(logging.ERROR if _rank() else logging.INFO)
    with progress_shown(not _rank() and not arguments.quiet):
        report = command.run(settings)
    if report is not None and not _rank():
        print(report)


def _command_name(words: Sequence[str]) -> str | None:
    """The command at the start of a command line; None if there is none."""
    return next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)


def _dispatch(words: Sequence[str]) -> int:
    if list(words[:2]) == ["completion", "--words"]:
        from vista.cli.completion import candidates

        print(candidates(words[2:] or [""]))
        return 0
    name = _command_name(words)
    if name is not None:
        _run_command(name, words[len(name.split()) :])
        return 0
    first, second = [*words[:2], None, None][:2]
    if first in ("--version", "-V", "version"):
        print(f"vista {__version__}")
        return 0
    if first in (None, "--help", "-h", "help"):
        from vista.cli.help_pages import overview

        print(overview({name: command.summary for name, command in COMMANDS.items()}))
        return 2 if first is None else 0
    group = {name: command.summary for name, command in COMMANDS.items() if name.startswith(f"{first} ")}
    if group and second in (None, "--help", "-h", "help"):
        from vista.cli.help_pages import group_help

        print(group_help(first, group))
        return 2 if second is None else 0
    unknown, known = (f"{first} {second}", group) if group else (first, COMMANDS)
    close = ["score"] if unknown == "rank" else get_close_matches(unknown, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(f"unknown command '{unknown}'{hint} Commands: {', '.join(known)}; see vista --help")


def _fail(message: str, code: int) -> int:
    rank = _rank()
    name = "" if rank is None else f"rank {rank}: "
    print(name + " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    return code


def _show_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(LogFormatter().formatException((kind, error, trace)), file=sys.stderr)


def _rank() -> int | None:
    """Number of this process among those that torchrun has started; None without torchrun."""
    is_several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1"
    return int(os.environ["RANK"]) if is_several else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. `argv`: words after `vista`; None uses those of the process."""
    sys.excepthook = _show_unexpected
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _fail(f"error: {error}", 2)
    except VistaError as error:
        return _fail(f"error: {error}", 1)
    except ModuleNotFoundError as error:
        if error.name not in CORE_MODULES:
            raise
        return _fail(f"error: {error.name} is not installed; install vista again: {install_command()}", 1)
    except KeyboardInterrupt:
        name = _command_name(words)
        resumes = name is not None and COMMANDS[name].resumes
        return _fail("interrupted" + ("; rerun the command to resume" if resumes else ""), 130)
    except BrokenPipeError:  # the reader of our output, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # such as a name that is too long for the file system
        if error.filename is None:
            raise
        name = shortened(without_password(str(error.filename)), 200)
        return _fail(f"error: {name}: {error.strerror}; check the path and the disk", 1)


if __name__ == "__main__":
    sys.exit(main())
