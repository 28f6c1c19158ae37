"""The generated reference pages hold all that the code has, and what they quote is in the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import vista
from docs.generate_reference import MEMBERS, error_classes, main, reference_pages, unit_of
from vista import errors
from vista.cli.command_table import COMMANDS
from vista.config.composition import ConfigKeys, conf_dir, group_dir, groups_of, options_of, value_text

PAGES = reference_pages()
NO_UNIT_IN_MODEL = ("dim", "pooled_dim", "transitions", "dropout", "temperature")
NO_UNIT_IN_DATA = ("staleness_share", "unknown_share", "validation_share", "test_share")
NO_UNIT_IN_OPTIM = (
    *("learning_rate", "table_rate", "logq_strength", "reward_temperature"),
    *("next_weight", "window_weight", "task_weight", "reconstruction_weight"),
)
NO_UNIT_IN_PLAN = ("replicas",)


def test_the_pages_can_be_read_without_the_site(tmp_path: Path) -> None:
    main(str(tmp_path))
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")} == set(PAGES)
    assert (tmp_path / "reference" / "errors.md").read_text() == PAGES["reference/errors.md"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_key_is_documented(name: str) -> None:
    cli, config = PAGES["reference/cli.md"], PAGES["reference/config.md"]
    section = cli.split(f"\n## vista {name}\n")[1].split("\n## ")[0]
    assert all(f"\n{example}\n" in section for example in COMMANDS[name].examples)
    section = config.split(f"\n## {name}\n")[1].split("\n## ")[0]
    keys = ConfigKeys.of(COMMANDS[name].schema)
    for key in keys.keys.values():
        row = re.search(rf"^\| `{re.escape(key.name)}` \| (.+) \| (.+) \| `(.*)` \| (.+) \|$", section, flags=re.M)
        if row is None:  # a section of the same schema as an earlier one
            own = section.split(f"\n### {name} {key.name.rpartition('.')[0]}\n")[1]
            assert re.match(r"\nThe same keys as `\w+`\.", own), key.name
        else:
            assert row[3] == value_text(key.default) and row[2] == unit_of(key) and row[4].strip()


def test_every_number_has_a_unit_or_none_on_purpose() -> None:
    keys = [key for command in COMMANDS.values() for key in ConfigKeys.of(command.schema).keys.values()]
    numbers = [key for key in keys if re.search(r"\b(int|float)\b", key.type_text) and not key.choices]
    without = {key.name for key in numbers if unit_of(key) == "–"}
    assert without == {f"model.{name}" for name in NO_UNIT_IN_MODEL} | {f"data.{name}" for name in NO_UNIT_IN_DATA} | {
        *(f"optim.{name}" for name in NO_UNIT_IN_OPTIM),
        *("seed", "generation", "to", "port", "trials", "workers", *NO_UNIT_IN_PLAN),
        *("learning_rate", "rounds", "new_users", "new_items", "satiation"),
        "impressions.from_events.min_rating",
    }
    units = {key.name: unit_of(key) for key in keys}
    assert units["poll_s"] == "s" and units["days"] == "days" and units["model.tail_len"] == "events"
    assert units["model.decay_horizons"] == "days or events" and units["now"] == "UTC, or ms since 1970"
    assert units["device"] == "–"


def test_every_option_of_conf_is_documented() -> None:
    groups = [*groups_of("train"), *groups_of("prepare")]
    options = [(group, option) for group in groups for option in options_of(group)]
    assert len(options) == len(list(conf_dir().glob("*/*.yaml")))
    for group, option in options:
        text = PAGES["reference/config.md"].split(f"**`{group}={option}`**: ")[1]
        comment, block = text.split("\n\n```yaml\n")[:2]
        assert comment.strip()
        settings = (group_dir(group) / f"{option}.yaml").read_text().strip().splitlines()
        assert f"\n{settings[-1]}\n" in f"\n{block}".split("```")[0]


def test_the_python_api_has_all_public_names() -> None:
    directives = re.findall(r"^::: (\S+)$", PAGES["reference/api.md"], flags=re.M)
    assert len(directives) == len(set(directives))
    documented = {path.rpartition(".")[2] for path in directives}
    assert documented >= {*vista.__all__, "Tail", "refresh", "ModelConfig", "DataConfig", "OptimConfig"}
    for one, members in MEMBERS.items():
        assert all(getattr(one, member).__doc__ for member in members)


def test_every_error_has_a_remedy() -> None:
    public = {name for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, Exception)}
    assert {one.__name__ for one in error_classes()} == public
    page = PAGES["reference/errors.md"]
    for one in error_classes():
        doc = inspect.getdoc(one)
        assert doc is not None and doc.count("\n\nRemedy: ") == 1, one
        assert page.split(f"\n## {one.__name__}\n")[1].split("\n## ")[0].count("**Remedy:** ") == 1


def test_quoted_messages_are_those_of_the_code() -> None:
    """A list item of an error's docstring begins with parts of messages."""
    items = [
        item for one in error_classes() for item in re.findall(r"^- (.+?): ", inspect.getdoc(one) or "", flags=re.M)
    ]
    quoted = [message for item in items for message in re.findall(r"`([^`]+)`", item)]
    assert len(quoted) > 5
    sources = [path for path in (Path(vista.__file__).parent).rglob("*.py") if path.name != "errors.py"]
    code = "".join(path.read_text() for path in sources)
    assert [message for message in quoted if message not in code] == []
