"""One column of the features of users that the records of a generation hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vista.json_fields import check_fields, either, hexadecimal, one_of, text, whole
from vista.store.format.tail_column import MAX_VALUES, TailColumn


@dataclass(frozen=True, slots=True)
class UserColumn(TailColumn):
    """A category or a number, stored once per user as a `TailColumn` is once per event.

    The summarizer that a generation names says nothing about features of users, so the column itself says which values
    its codes stand for.
    """

    values: str = ""
    """SHA-256 of the values of a category (`Vocabulary.digest`); "" for a number."""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size, "values": self.values}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> UserColumn:
        rules = {
            "name": text(),
            "size": either(whole(1, MAX_VALUES), one_of(None)),
            "values": either(hexadecimal(64), one_of("")),
        }
        check_fields(fields, rules)
        return cls(fields["name"], fields["size"], fields["values"])
