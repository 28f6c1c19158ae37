"""config.json of a saved model: what to build before the weights are loaded, and the digests of all files."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash

from vista.config import DataConfig, ModelConfig
from vista.config.checks import from_dict, to_dict
from vista.errors import CheckpointError
from vista.files import checked_path, open_file, read_limited
from vista.json_fields import TABLE, FieldRule, check_fields, either, hexadecimal, one_of, whole
from vista.model.feature_spec import FeatureSpec
from vista.model.schema import FEATURE_KEYS, Schema

FORMAT_VERSION = 7
CONFIG_FILE = "config.json"
MAX_BYTES = 16 << 20
"""Of config.json."""
_FILE_NAME = re.compile(r"[a-z][a-z0-9_.]*\.(npy|safetensors)")
_RULES = {
    "format_version": whole(),
    "model": TABLE,
    "schema": TABLE,
    "data": TABLE,
    "num_trained_items": whole(),
    "summarizer_id": either(one_of(None), hexadecimal(64)),
    "files": FieldRule(
        "a table of files",
        lambda value: type(value) is dict and all(_FILE_NAME.fullmatch(name) is not None for name in value),
    ),
    "checksum": hexadecimal(16),
}
_FILE_RULES = {"bytes": whole(), "xxh3": hexadecimal(16)}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file of a model holds: its size, and the XXH3-64 of its content as 16 hex digits."""

    bytes: int
    xxh3: str

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> FileEntry:
        """The entry that JSON holds. Raises ValueError or TypeError."""
        check_fields(fields, _FILE_RULES)
        return cls(**fields)

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Read a regular file. Raises OSError."""
        digest = xxhash.xxh3_64()
        with open(open_file(path), "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                digest.update(block)
            return cls(file.tell(), digest.hexdigest())


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Sizes of a model, what it was trained on, and how the training data were split."""

    config: ModelConfig
    schema: Schema
    data: DataConfig
    num_trained_items: int
    """Items that stage 1 was trained on, which come first in the model's vocabulary."""
    summarizer_id: str | None = None
    """64 hex digits; None for a baseline."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """By name: those of the folder that loading needs. Empty if the model is not saved."""
    checksum: str | None = None
    """16 hex digits that identify this export, because they also cover `files`. None if the model is not saved."""

    def write(self, folder: Path) -> None:
        """Write config.json into a folder, with the entries of its .npy and .safetensors files."""
        files = {path.name: FileEntry.of(path) for path in folder.iterdir() if _FILE_NAME.fullmatch(path.name)}
        fields = {
            "format_version": FORMAT_VERSION,
            "model": to_dict(self.config),
            "schema": asdict(self.schema),
            "data": to_dict(self.data),
            "num_trained_items": self.num_trained_items,
            "summarizer_id": self.summarizer_id,
            "files": {name: asdict(files[name]) for name in sorted(files)},
        }
        text = json.dumps(fields | {"checksum": checksum_of(fields)}, indent=2)
        (folder / CONFIG_FILE).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ModelDescription:
        """Read config.json from a folder of `save_pretrained`.

        Raises:
            CheckpointError: if the folder has no config.json, or one that is damaged or of another format.
        """
        path = checked_path(folder, CheckpointError) / CONFIG_FILE
        if not path.exists() and (folder / "best" / CONFIG_FILE).exists():
            raise CheckpointError(f"{folder}: is a run folder; its model is {folder / 'best'}")
        try:
            fields = json.loads(read_limited(path, MAX_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable_model(folder, error) from error
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}: format {version}, but this version of vista reads {FORMAT_VERSION}; export the model again"
            )
        try:
            check_fields(fields, _RULES)
            if checksum_of(fields) != fields["checksum"]:
                raise ValueError("its checksum does not match; the file is damaged or was edited")
            files = {name: FileEntry.from_dict(entry) for name, entry in fields["files"].items()}
            return cls(
                from_dict(ModelConfig, fields["model"]),
                _schema(fields["schema"]),
                from_dict(DataConfig, fields["data"]),
                fields["num_trained_items"],
                fields["summarizer_id"],
                files,
                fields["checksum"],
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {error}; export the model again") from error

    def check_files(self, folder: Path, *patterns: str) -> None:
        """Compare the files of a folder whose names match a pattern, such as `items.*`, with their entries.

        Raises:
            CheckpointError: if a file is missing, was not saved with the model, or has other content.
        """
        names = {*self.files, *(path.name for path in folder.iterdir())}
        for name in sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)):
            path = folder / name
            if name not in self.files:
                raise CheckpointError(f"{path}: does not belong to the model; remove it, or export the model again")
            try:
                size, entry = path.stat().st_size, self.files[name]
                actual = FileEntry.of(path) if size == entry.bytes else None
            except OSError as error:
                raise unreadable_model(folder, error) from error
            if actual is None:
                raise CheckpointError(
                    f"{path}: holds {size} bytes instead of {entry.bytes}; copy the model again, or export it again"
                )
            if actual != entry:
                raise CheckpointError(
                    f"{path}: its content is not what was exported (XXH3 {actual.xxh3} instead of {entry.xxh3}); copy "
                    "the model again, or export it again"
                )


def checksum_of(fields: dict[str, Any]) -> str:
    """XXH3-64 of the fields of config.json except the checksum, as JSON with sorted keys and no spaces; in hex."""
    covered = {name: value for name, value in fields.items() if name != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(covered, sort_keys=True, separators=(",", ":")).encode())


def _schema(fields: dict[str, Any]) -> Schema:
    ratings = fields.get("rating_range")
    if isinstance(ratings, list):
        fields = fields | {"rating_range": tuple(ratings)}
    for key in FEATURE_KEYS:
        if isinstance(features := fields.get(key), list):
            fields = fields | {key: [FeatureSpec(**feature) for feature in features]}
    return Schema(**fields)


def unreadable_model(folder: Path, error: Exception) -> CheckpointError:
    """The error for a folder whose files are missing or damaged."""
    return CheckpointError(
        f"{folder}: no readable model ({error}); train one with `vista train run_dir=…`, which writes <run_dir>/best"
    )
