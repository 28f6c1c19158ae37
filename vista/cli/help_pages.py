"""Text of `vista --help` and `vista COMMAND --help`."""

from __future__ import annotations

from collections.abc import Mapping

from vista.cli.command_table import Command
from vista.config.composition import ConfigKeys, groups_of, options_of, value_text
from vista.errors import ConfigError, shown
from vista.text_table import hanging, two_columns

OPTIONS = (
    ("--cfg", "print the resolved configuration and exit"),
    ("--config FILE", "YAML file with the same keys, such as the output of --cfg; the command line overrides it"),
    ("--quiet", "show no progress bars"),
    ("--help", "print this text and exit"),
)


def overview(summaries: Mapping[str, str]) -> str:
    """The text of `vista --help`, with commands in the order in which they are typically used."""
    return "\n".join(
        [
            "Usage: vista COMMAND [KEY=VALUE ...]",
            "",
            hanging("Sequential recommendation from long user histories, with one small cached summary per user.", 0),
            "",
            "Commands, in the order of typical use:",
            two_columns(summaries.items(), 18),
            "",
            "Options:",
            two_columns(
                [("--version", "print the version"), ("COMMAND --help", "print its keys, groups, and examples")], 22
            ),
            "",
            "Example:",
            "  vista simulate out=data/simulated num_users=200",
            "  vista prepare out=data/log events.kind=simulated events.paths=[data/simulated]",
            "  vista train data.path=data/log run_dir=runs/first optim=quick",
            "  vista refresh data=data/log model=runs/first/best store=stores/first until=leave-last-out",
            "  vista evaluate data=data/log model=runs/first/best store=stores/first",
            "",
            hanging("Exit codes: 0 success, 1 error, 2 invalid command line or configuration, 130 interrupted.", 0),
        ]
    )


def group_help(group: str, summaries: Mapping[str, str]) -> str:
    """The text of `vista GROUP --help`: the commands of the group."""
    usage = hanging(f"Usage: vista {group} COMMAND [KEY=VALUE ...]", 4)
    more = hanging(f"vista {group} COMMAND --help lists the keys of a command.", 0)
    return "\n".join([usage, "", two_columns(summaries.items(), 18), "", more])


TITLES = {"experiment": "Experiments (complete runs by name)", "set": "Data sets (kind and filter by name)"}
"""Titles of groups."""


def command_help(name: str, command: Command, part: str = "") -> str:
    """The text of `vista COMMAND --help`: options, groups, keys, and examples.

    Args:
        name: of the command.
        command: what the table of commands says about it.
        part: "all" for every key with its type and docstring, or a section of keys or a group of options, such as
            "model". Empty means "all", or for a command with many keys one line for each of the most important ones.

    Raises:
        ConfigError: there is no such part.
    """
    keys, groups = ConfigKeys.of(command.schema), groups_of(name)
    sections = dict.fromkeys(section.partition(".")[0] for section in keys.sections)
    known = ["all", *dict.fromkeys([*sections, *(group.partition(".")[0] for group in groups)])]
    if part not in ("", *known):
        raise ConfigError(f"--help {shown(part)}: is not a part of this text; use one of {', '.join(known)}")
    first = command.first if not part else ()
    lines = []
    if part in ("", "all"):
        bare = f" [{command.positional.upper()} ...]" if command.positional else ""
        usage = f"Usage: vista {name}{bare} [KEY=VALUE ...]" + (" [GROUP=OPTION ...]" if groups else "")
        options = [*OPTIONS, *([("--help PART", f"print one of {', '.join(known)}")] if first else [])]
        lines += [hanging(f"{usage} [--config FILE] [--cfg] [--quiet]", 4), "", hanging(command.summary, 0), ""]
        lines += ["Options:", two_columns(options, 20), ""]
    if first:
        lines += [
            "Groups of options:",
            two_columns(((f"{one}=", ", ".join(options_of(one))) for one in groups), 20),
            "",
        ]
        short = ((f"{one}={value_text(keys.keys[one].default)}", keys.keys[one].summary) for one in first)
        lines += ["Keys and defaults:", two_columns(short, 34, cut=True)]
        lines += [hanging(f"  … and {len(keys.keys) - len(first)} more keys: vista {name} --help all", 4), ""]
    else:
        for group in [one for one in groups if part in ("", "all", one.partition(".")[0])]:
            title = TITLES.get(group, f"Group {group}")
            described = ((f"{group}={option}", doc) for option, doc in options_of(group).items())
            lines += [f"{title}:", two_columns(described, 34), ""]
        prefix = f"{part}." if part in sections else ""
        if prefix or part in ("", "all"):
            lines += [hanging("Keys and defaults (write a list as [a,b], and special characters 'in quotes'):", 0)]
            lines += [two_columns((row for row in _key_rows(keys) if row[0].startswith(prefix)), 34), ""]
    if part in ("", "all"):
        lines += ["Examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines).rstrip()


def _key_rows(listed: ConfigKeys) -> list[tuple[str, str]]:
    """One row per key. A section with the same schema as an earlier section takes a single row."""
    first_of_schema: dict[type, str] = {}
    repeated = {}
    for section in listed.sections.values():
        first = first_of_schema.setdefault(section.schema, section.name)
        if first != section.name:
            repeated[section.name] = f"the same keys as {first}" + ("; null unless one is set" * section.optional)
    rows = {}
    for key in listed.keys.values():
        section_name = key.name.rpartition(".")[0]
        if section_name in repeated:
            rows[f"{section_name}.KEY=VALUE"] = repeated[section_name]
        else:
            rows[f"{key.name}={value_text(key.default)}"] = f"{key.type_text}. {key.doc}" if key.doc else key.type_text
    return list(rows.items())
