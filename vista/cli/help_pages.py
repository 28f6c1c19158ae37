"""Text of `vista --help` and `vista COMMAND --help`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vista.config.composition import groups_of, options_of
from vista.config.config_keys import ConfigKeys, value_text
from vista.text_table import hanging, two_columns

OPTIONS = (
    ("--cfg", "print the resolved configuration and exit"),
    ("--config FILE", "YAML file with the same keys, such as the output of --cfg; the command line overrides it"),
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


def command_help(name: str, summary: str, schema: type, examples: Sequence[str]) -> str:
    """The text of `vista COMMAND --help`: options, groups, experiments, all keys, and examples."""
    groups = groups_of(name)
    usage = f"Usage: vista {name} [KEY=VALUE ...]" + (" [GROUP=OPTION ...]" if groups else "")
    parts = [
        hanging(f"{usage} [--config FILE] [--cfg]", 4),
        "",
        hanging(summary, 0),
        "",
        "Options:",
        two_columns(OPTIONS, 20),
    ]
    for group in groups:
        title = TITLES.get(group, f"Group {group}")
        options = options_of(group).items()
        parts += ["", f"{title}:", two_columns(((f"{group}={option}", doc) for option, doc in options), 34)]
    parts += ["", hanging("Keys and defaults (write a list as [a,b], and special characters 'in quotes'):", 0)]
    parts += [two_columns(_key_rows(ConfigKeys.of(schema)), 34)]
    parts += ["", "Examples:", *(f"  {example}" for example in examples)]
    return "\n".join(parts)


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
