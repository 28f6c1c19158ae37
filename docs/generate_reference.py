"""Generates the reference pages that follow from the code: command line, configuration, Python API, errors.

The site's build calls `reference_pages`; the pages are not files of docs/. `python -m docs.generate_reference FOLDER`
writes them into a folder, to read them without the site.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import vista
from vista import errors, refresh, scorer, store
from vista.cli.command_table import COMMANDS
from vista.cli.help_pages import OPTIONS
from vista.config.composition import ConfigKey, ConfigKeys, group_dir, groups_of, options_of, value_text
from vista.config.model_config import ModelConfig
from vista.config.train_config import DataConfig, OptimConfig
from vista.log.features import Column
from vista.log.histories import Histories

API: dict[str, tuple[object, ...]] = {
    "Event log": (vista.EventLog, Histories, Column),
    "Training": (vista.train, vista.TrainConfig, ModelConfig, DataConfig, OptimConfig),
    "Model": (vista.VistaModel,),
    "Refresh": (
        refresh.refresh,
        refresh.refresh_incremental,
        refresh.RefreshOptions,
        refresh.RefreshReport,
        refresh.forget,
        refresh.erase,
        refresh.merge,
    ),
    "Scorer": (
        vista.Scorer,
        scorer.Tail,
        scorer.CandidateSet,
        scorer.Ranking,
        scorer.Explanation,
        scorer.AnswerSource,
        scorer.ScorerStats,
    ),
    "Store": (vista.StoreReader, store.StoredBatch, store.Manifest),
}
"""What the page of the Python API documents, by heading."""
MEMBERS: dict[object, list[str]] = {
    # Configuration has a page of its own, with the meaning of every key.
    **{one: [] for one in (vista.TrainConfig, ModelConfig, DataConfig, OptimConfig)},
    # The other methods are for training and the scorer.
    vista.VistaModel: ["from_pretrained", "save_pretrained", "with_tail", "summarizer_id"],
}
"""Members to document, where it is not all public ones."""
UNIT_OF_SUFFIX = {
    "_mb_per_s": "MB per s",
    "_gbit_per_s": "Gbit per s",
    "_per_s": "per s",
    "_per_day": "per day",
    "_s": "s",
    "_ms": "ms",
    "_us": "µs",
    "_ns": "ns",
    "_hours": "hours",
    "_bytes": "bytes",
    "_gb": "GB",
    "_tb": "TB",
}
"""Units that the end of a key's name says, the longest end first."""
MOST_WORDS_OF_CELL = 24
_COUNTED = re.compile(
    r"(?:\b[Nn]umber of|\bin) (?:[\w'-]+ ){0,4}?((?:actor|candidate|code|connection|core|cut|day|epoch|event|function|"
    r"head|impression|interest|item|layer|level|message|minute|negative|pair|position|question|request|row|step|text|"
    r"thread|token|topic|user|validation|value|window)s)\b"
)
"""How the docstring of a number says its unit: "Number of newest events", "Mean length, in events"."""


def reference_pages() -> dict[str, str]:
    """The text of every generated page, by its path below docs/."""
    return {
        "reference/cli.md": cli_page(),
        "reference/config.md": config_page(),
        "reference/api.md": api_page(),
        "reference/errors.md": errors_page(),
    }


def cli_page() -> str:
    """All commands, from the table COMMANDS."""
    parts = [
        "# Command line",
        "A command takes its settings as `KEY=VALUE` words. [Configuration](config.md) documents every key.",
        _fence("vista COMMAND [KEY=VALUE ...] [GROUP=OPTION ...] [--config FILE] [--cfg] [--quiet]", "text"),
        "Options of every command:",
        _table(("Option", "Effect"), ((f"`{option}`", _text(effect)) for option, effect in OPTIONS)),
        "`vista --version` prints the version. `vista --help` lists the commands.",
        "Exit codes: 0 for success, 1 for an error, 2 for a refused configuration, 130 for an interrupted command.",
    ]
    for name, command in COMMANDS.items():
        keys = ConfigKeys.of(command.schema)
        top = [f"`{key}`" for key in keys.keys if "." not in key]
        groups = [f"`{section}.*`" for section in keys.sections]
        parts += [f"## vista {name}", _text(command.summary)]
        if command.resumes:
            parts.append("If the command is interrupted, rerun it to resume.")
        parts += [
            "Examples:",
            _fence("\n".join(command.examples), "bash"),
            f"[Keys](config.md#{_slug(name)}): {', '.join([*top, *groups])}.",
        ]
    return _page(parts)


def config_page() -> str:
    """Every configuration key of every command, then the options of conf/."""
    parts = [
        "# Configuration",
        "Every command takes `KEY=VALUE` words, for example `vista train model.num_seeds=32 optim.epochs=5`. "
        "A list is written `[a,b]`, and `null` means no value. Put a value with special characters in quotes: "
        "`\"key='a=b'\"`. An unknown key or a value of the wrong type stops the command before it does anything.",
        "Values come from three places, and later ones win: the defaults below, the YAML file of `--config FILE`, and "
        "the words on the command line. `--cfg` prints the resolved configuration as YAML that `--config` can read.",
        "`vista prepare` and `vista train` also take `GROUP=OPTION` words, which set several keys at once: see "
        "[groups and experiments](#groups-and-experiments).",
    ]
    for name, command in COMMANDS.items():
        parts += [f"## {name}", _text(command.summary), *_key_tables(ConfigKeys.of(command.schema), name)]
    parts += ["## Groups and experiments", *_groups("prepare"), *_groups("train")]
    return _page(parts)


def _key_tables(listed: ConfigKeys, command: str) -> Iterator[str]:
    """A table of a command's own keys and one per section; a section of a schema that came before is named only."""
    yield _key_table([key for key in listed.keys.values() if "." not in key.name])
    first_of_schema: dict[type, str] = {}
    for section in listed.sections.values():
        yield f"### {command} {section.name}"
        first = first_of_schema.setdefault(section.schema, section.name)
        if first != section.name:
            unless = " It is null unless one of its keys is set." if section.optional else ""
            yield f"The same keys as `{first}`.{unless}"
        else:
            yield _text(inspect.cleandoc(section.schema.__doc__ or ""))
            yield _key_table([key for key in listed.keys.values() if key.name.rpartition(".")[0] == section.name])


def _key_table(keys: list[ConfigKey]) -> str:
    """A table of keys, and below it what is too long for a cell."""
    rows, notes = list[tuple[str, ...]](), list[str]()
    for key in keys:
        sentences, fit = re.split(r"(?<=\.)\s+", _text(key.doc)), 0
        while fit < len(sentences) and len(" ".join(sentences[: fit + 1]).split()) <= MOST_WORDS_OF_CELL:
            fit += 1
        meaning = " ".join(sentences[:fit]) or "See below."
        rows.append((f"`{key.name}`", _type(key), unit_of(key), f"`{value_text(key.default)}`", meaning))
        if fit < len(sentences):
            notes.append(f"- `{key.name}`: {' '.join(sentences[fit:])}")
    table = _table(("Key", "Type", "Unit", "Default", "Meaning"), iter(rows))
    return "\n\n".join([table, "\n".join(notes)] if notes else [table])


def unit_of(key: ConfigKey) -> str:
    """The unit of a number or a time, by the name of its key or else by its docstring; – if it has none."""
    if re.search(r"\b(int|float)\b", key.type_text) and not key.choices:
        for suffix, unit in UNIT_OF_SUFFIX.items():
            if key.name.endswith(suffix):
                return unit
        return " or ".join(dict.fromkeys(_COUNTED.findall(key.doc.partition(". ")[0]))) or "–"
    if "(UTC)" in key.doc:
        return "UTC, or ms since 1970" if "milliseconds" in key.doc else "UTC"
    return "–"


def _type(key: ConfigKey) -> str:
    if not key.choices:
        return _text(key.type_text)
    return ", ".join(f"`{choice}`" for choice in re.split(r"\|| or ", key.type_text))


def _groups(command: str) -> Iterator[str]:
    for group in groups_of(command):
        yield f"### {group}"
        for option, comment in options_of(group).items():
            text = (group_dir(group) / f"{option}.yaml").read_text(encoding="utf-8")
            body = re.sub(r"\A(#.*\n)*", "", text).strip()  # the comments at the top are shown as text
            yield f"**`{group}={option}`**: {_text(comment)}"
            yield _fence(body, "yaml")


def api_page() -> str:
    """Directives of mkdocstrings, which reads signatures and docstrings from the source."""
    parts = [
        "# Python API",
        f"`from vista import {', '.join(vista.__all__)}` imports the main names. Importing `vista` is cheap: each name "
        "is loaded when it is first used. The fields of the config classes are the keys of [the configuration]"
        "(config.md#train). [Errors](errors.md) lists the exceptions.",
        "`[B, C]` is the shape of an array: B users, C candidates, T events of all users one after another, V items, K "
        "summary tokens, M values per vector. Times are int64 milliseconds since 1970 (UTC).",
    ]
    for heading, objects in API.items():
        parts.append(f"## {heading}")
        parts += [_directive(one) for one in objects]
    return _page(parts)


def _directive(one: object) -> str:
    """What mkdocstrings replaces by the documentation of a class or function."""
    assert inspect.isclass(one) or inspect.isfunction(one), one
    directive = f"::: {one.__module__}.{one.__qualname__}"
    if one in MEMBERS:
        directive += f"\n    options:\n      inherited_members: true\n      members: {MEMBERS[one]}"
    return directive


def error_classes() -> list[type[errors.VistaError]]:
    """The public errors in the order of `vista.errors`."""
    return [
        one
        for name, one in vars(errors).items()
        if inspect.isclass(one) and issubclass(one, errors.VistaError) and not name.startswith("_")
    ]


def errors_page() -> str:
    """Every error class with its bases and docstring, which says when it is raised and what to do."""
    parts = [
        "# Errors",
        "vista raises these errors on purpose. All of them derive from `VistaError`, in `vista.errors`. Each message "
        "says what is wrong, where, and what to do. The command line prints it as one line that begins with `error:`.",
    ]
    for one in error_classes():
        doc = inspect.cleandoc(one.__doc__ or "")
        bases = ", ".join(
            f"[`{base.__name__}`](#{_slug(base.__name__)})" if base in error_classes() else f"`{base.__name__}`"
            for base in one.__bases__
        )
        parts += [f"## {one.__name__}", f"Derives from {bases}.", doc.replace("Remedy:", "**Remedy:**")]
    return _page(parts)


def _page(parts: list[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _fence(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def _text(text: str) -> str:
    """Plain text, with `code`, as Markdown of one line."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([*|<_\[\]])", r"\\\1", part) for part in parts)


def main(folder: str) -> None:
    """Write the pages into a folder."""
    for name, text in reference_pages().items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
