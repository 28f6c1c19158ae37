"""What a shell completes after `vista`: commands, their keys, and the values of keys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vista.cli.command_table import COMMANDS, Command
from vista.config.composition import groups_of, options_of
from vista.config.config_keys import ConfigKey, ConfigKeys
from vista.installation import __version__

OPTIONS = ("--cfg", "--config", "--help")
"""Options of every command; a file follows --config."""
_PATH = re.compile(r"\b([Ff]olders?|[Ff]iles?|[Pp]aths?)\b")


@dataclass(frozen=True, slots=True)
class CompletedKey:
    """A key or a group of a command."""

    name: str
    values: tuple[str, ...]
    """All values, if there are few; otherwise none."""
    is_path: bool
    """Whether the value is a file or a folder, or a list of them."""
    summary: str
    """First sentence of its docstring."""

    @property
    def words(self) -> tuple[str, ...]:
        """What scripts hold of its values: these, `<path>` for files, or nothing."""
        return self.values or ("<path>",) * self.is_path


@dataclass(frozen=True, slots=True)
class CompletedCommand:
    """A command: its summary, the words that it takes besides keys, and its keys."""

    summary: str
    words: tuple[str, ...]
    keys: list[CompletedKey]


@dataclass(frozen=True, slots=True)
class CompletionTable:
    """All that the scripts of the shells hold."""

    version: str
    commands: dict[str, CompletedCommand]

    @classmethod
    def of_commands(cls) -> CompletionTable:
        """The table of all commands of `vista`."""
        return cls(__version__, {name: _completed(name, command) for name, command in COMMANDS.items()})

    def first_words(self) -> dict[str, str]:
        """First words of commands, with the summary of the command or the names of the group's commands."""
        words: dict[str, str] = {}
        for name, command in self.commands.items():
            first, _, second = name.partition(" ")
            if second:
                words[first] = f"{words[first]}, {second}" if first in words else second
            else:
                words[first] = command.summary
        return words

    def second_words(self) -> dict[str, dict[str, str]]:
        """By the first word of a group: the second words, with the summaries of their commands."""
        groups: dict[str, dict[str, str]] = {}
        for name, command in self.commands.items():
            first, _, second = name.partition(" ")
            if second:
                groups.setdefault(first, {})[second] = command.summary
        return groups


def _completed(name: str, command: Command) -> CompletedCommand:
    keys = ConfigKeys.of(command.schema).keys
    groups = [
        CompletedKey(group, tuple(options_of(group)), False, f"Options of the group {group}")
        for group in groups_of(name)
    ]
    own = [CompletedKey(key.name, _values(key), _is_path(key), key.summary) for key in keys.values()]
    bare = _values(keys[command.positional]) if command.positional else ()
    return CompletedCommand(command.summary, (*bare, *OPTIONS), [*groups, *own])


def _values(key: ConfigKey) -> tuple[str, ...]:
    plain = key.type_text.removesuffix(" or null")
    null = ("null",) if plain != key.type_text else ()
    if key.choices:
        return (*plain.split("|"), *null)
    return ("true", "false", *null) if plain == "bool" else ()


def _is_path(key: ConfigKey) -> bool:
    return key.is_text and _PATH.search(key.doc) is not None
