"""What is known of a public data set: the forms of its files, and where to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vista.log.ingest.public.file_form import FileForm


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
        return {
            "events": self.events,
            "impressions": self.impressions,
            "items": self.items,
            "users": self.users,
        }[table]

    def form_of(self, file: Path, table: str) -> FileForm:
        """The form of a file; the first form of the table if the file has another name."""
        forms = self.forms(table)
        return next((form for form in forms if form.has(file)), forms[0])

    @property
    def remedy(self) -> str:
        """What to do about a file that lacks a column; "" if this is a format and not a data set."""
        return f"get the set from {self.url}, or name the columns with kind=table" if self.url else ""
