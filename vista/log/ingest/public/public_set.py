"""What is known of a public data set: the forms of its files, and where to get them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vista.log.ingest.source_files import FileScan

# The names of the files of a public data set, and their columns.


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """A data set, or a format whose files have known names."""

    events: tuple[FileForm, ...]
    """Forms of the files of events. A folder is read in the first form that it has."""
    impressions: tuple[FileForm, ...] = ()
    """The same for impressions, in the same folders."""
    items: tuple[FileForm, ...] = ()
    """The same for item features."""
    users: tuple[FileForm, ...] = ()
    """The same for user features."""
    texts: tuple[str, ...] = ()
    """Columns in the files of item features that `vista items embed` joins to a text, unless `columns` names others."""
    marker: str = ""
    """Pattern of a file without which `auto` does not recognize a folder. If set, it recognizes no single file."""
    has_text_ids: bool = False
    """Whether ids are text, even if the first one is a number."""
    url: str = ""
    """Where to get the set; "" for a format."""

    def is_at(self, path: Path) -> bool:
        """Whether a folder, or else a file, is recognizably of this set."""
        if path.is_dir():
            has_events = any(form.files(path) for form in self.events)
            return has_events and (not self.marker or any(path.glob(self.marker)))
        return not self.marker and any(form.has(path) for form in self.events)

    def forms(self, table: str) -> tuple[FileForm, ...]:
        """Forms of the files of "events", "impressions", "items", or "users"."""
        return {"events": self.events, "impressions": self.impressions, "items": self.items, "users": self.users}[table]

    def form_of(self, file: Path, table: str) -> FileForm:
        """The form of a file; the first form of the table if the file has another name."""
        forms = self.forms(table)
        return next((form for form in forms if form.has(file)), forms[0])

    @property
    def remedy(self) -> str:
        """What to do about a file that lacks a column; "" if this is a format and not a data set."""
        return f"get the set from {self.url}, or name the columns with kind=table" if self.url else ""
