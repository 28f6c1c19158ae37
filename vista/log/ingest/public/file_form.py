"""The names of the files of a public data set, and their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vista.log.ingest.file_scan import FileScan


@dataclass(frozen=True, slots=True)
class FileForm:
    """Files of one form.

    patterns: their names, with the last folders of the path if these tell them apart; columns: keys of SourceConfig, or
    of ItemTableConfig or UserTableConfig for features; read: how a file is read, if it is not simply a table with these
    columns. It gives canonical columns, or for features of items and users those that `columns` names, or if it names
    none, all that are features; read_named: the same, for events whose other columns can be features. It also takes the
    columns that the user names as features, canonical names to those of the file.
    """

    patterns: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Path], FileScan] | None = None
    read_named: Callable[[Path, Mapping[str, str]], FileScan] | None = None

    def files(self, folder: Path) -> list[Path]:
        """The files of this form in a folder."""
        return [file for pattern in self.patterns for file in folder.glob(pattern)]

    def has(self, file: Path) -> bool:
        """Whether a file with this path has this form."""
        return any(file.match(pattern) for pattern in self.patterns)


def first_form(forms: Iterable[FileForm], folder: Path) -> tuple[FileForm | None, list[Path]]:
    """The first form of which a folder has files, with these files."""
    for form in forms:
        if files := form.files(folder):
            return form, files
    return None, []
