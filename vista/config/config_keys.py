"""Configuration dataclasses as text: every key with its type, default, and docstring; YAML.

It reads the source of the modules that define the dataclasses, so it does not need Hydra. Help texts and error messages
of the command line are made from it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from vista.config.checks import to_dict, without_none

_PASSWORD = re.compile(r"^(rediss?:/+[^/:]*):.*(?=@)|^([a-z][a-z0-9+.-]*:/+[^/:@]*):[^/@]*(?=@)")
"""In the URL of a store or a server, what comes before the password, and the password."""
_SENTENCE = re.compile(r"(.+?[^.]\.)(\s+[A-Z`]|$)")


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A value that users can set."""

    name: str
    """Dotted name, as on the command line: model.num_seeds."""
    type_text: str
    """Type as shown to users: int, str or null, [float, ...], bidirectional|separable."""
    default: Any
    doc: str
    """Docstring of the field, or else of its enum; empty if both have none."""
    choices: tuple[str, ...] = ()
    """All accepted spellings of an enum's values."""

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        match = _SENTENCE.match(self.doc)
        return match[1] if match else self.doc

    @property
    def is_text(self) -> bool:
        """Whether it is a str or a list of str."""
        return self.type_text.removesuffix(" or null") in ("str", "[str, ...]")


@dataclass(frozen=True, slots=True)
class ConfigSection:
    """A dataclass within a dataclass: a group of keys with a common prefix."""

    name: str
    schema: type
    optional: bool
    """Whether it is null unless one of its keys is set."""


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """All keys and sections of a schema: its own fields in their order, then inherited ones."""

    keys: dict[str, ConfigKey]
    sections: dict[str, ConfigSection]

    @classmethod
    def of(cls, schema: type) -> ConfigKeys:
        """List the keys of a config dataclass, including nested ones with their prefix."""
        listed = cls({}, {})
        listed._add(schema, "")
        return listed

    def _add(self, schema: type, prefix: str) -> None:
        hints = get_type_hints(schema)
        docs = _docs_of_fields(schema)
        place = {name: number for number, name in enumerate(schema.__annotations__)}
        for field in sorted(dataclasses.fields(schema), key=lambda field: place.get(field.name, len(place))):
            name, inner, optional = prefix + field.name, *without_none(hints[field.name])
            if dataclasses.is_dataclass(inner):
                assert isinstance(inner, type)
                self.sections[name] = ConfigSection(name, inner, optional)
                self._add(inner, f"{name}.")
                continue
            is_enum = isinstance(inner, type) and issubclass(inner, Enum)
            choices = tuple(inner.__members__) if is_enum else ()
            self.keys[name] = ConfigKey(name, type_text(hints[field.name]), _default(field), docs[field.name], choices)

    def matches(self, name: str) -> list[str]:
        """Up to three names that a mistyped name may stand for, best first. The prefix may be missing."""
        names = list(self.keys) if "." in name else [*self.keys, *self.sections]
        matches = get_close_matches(name, names, n=3, cutoff=0.75)
        last = name.rpartition(".")[2]
        by_last: dict[str, list[str]] = {}
        for known in names:
            by_last.setdefault(known.rpartition(".")[2], []).append(known)
        for close in get_close_matches(last, by_last, n=3, cutoff=0.75):
            matches += by_last[close]
        return list(dict.fromkeys(matches))[:3]


def type_text(hint: Any) -> str:
    """A type as it is shown to users."""
    inner, optional = without_none(hint)
    if get_origin(inner) is list:
        text = f"[{type_text(get_args(inner)[0])}, ...]"
    elif issubclass(inner, Enum):
        text = "|".join(str(member.value) for member in inner)
    else:
        text = inner.__name__
    return f"{text} or null" if optional else text


def value_text(value: Any) -> str:
    """A value as users write it after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return f"[{','.join(value_text(item) for item in value)}]"
    return str(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _docs_of_body(body: list[ast.stmt]) -> dict[str, str]:
    """Docstrings that follow assignments, by the assigned name."""
    docs = {}
    for statement, following in itertools.pairwise(body):
        target = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]  # type: ignore[assignment]
        if (
            isinstance(target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[target.id] = " ".join(following.value.value.split())
    return docs


def _tree_of_module(schema: type) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[schema.__module__]))


def _docs_of_fields(schema: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):  # without object
        for statement in _tree_of_module(cls).body:
            if isinstance(statement, ast.ClassDef) and statement.name == cls.__name__:
                docs |= _docs_of_body(statement.body)
    return docs


def to_yaml(config: Any) -> str:
    """A config as YAML, from which `vista COMMAND --config FILE` makes an equal one, but without passwords in URLs."""
    text: str = yaml.safe_dump(_without_passwords(to_dict(config)), sort_keys=False, allow_unicode=True)
    return text


def flat_settings(config: Any) -> dict[str, Any]:
    """A configuration as one level of plain JSON values: {"model.dim": 64, …}; passwords in URLs are left out."""
    return flattened(_without_passwords(to_dict(config)))


def flattened(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _without_passwords(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_passwords(inner) for inner in value]
    return without_password(value) if isinstance(value, str) else value


def without_password(url: str) -> str:
    """A URL without the password in it; any other text as it is."""
    return _PASSWORD.sub(r"\1\2", url)
