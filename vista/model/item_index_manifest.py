"""index.json of an item index: what it is, and the digests of its files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vista.config.choices import IndexKind
from vista.errors import ItemIndexError
from vista.files import read_limited
from vista.json_fields import TABLE, FieldRule, check_fields, hexadecimal, one_of, whole
from vista.model.model_description import FileEntry, checksum_of

FORMAT_VERSION = 1
MANIFEST_FILE, CHECK_FILE, FAISS_FILE = "index.json", "item_check.npy", "items.faiss"
MAX_BYTES = 1 << 16
"""Of index.json."""
_RULES = {
    "format_version": whole(),
    "kind": one_of(*(kind.value for kind in IndexKind)),
    "num_items": whole(),
    "dim": whole(least=1, most=1 << 20),
    "last_scale": FieldRule("a positive number", lambda value: type(value) is float and 0 < value < math.inf),
    "files": TABLE,
    "checksum": hexadecimal(16),
}


@dataclass(frozen=True, slots=True)
class ItemIndexManifest:
    """What an index is."""

    kind: IndexKind
    num_items: int
    """Items of the index, which come first in the model's vocabulary."""
    dim: int
    """Numbers per vector."""
    last_scale: float
    """What the last entry of the vectors was multiplied with."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """By name: those of the folder. Empty if the index is not saved."""

    def write(self, folder: Path) -> None:
        """Write index.json into a folder, with the entries of the other files in it."""
        files = {name: FileEntry.of(folder / name) for name in sorted(path.name for path in folder.iterdir())}
        fields = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind.value,
            "num_items": self.num_items,
            "dim": self.dim,
            "last_scale": self.last_scale,
            "files": {name: asdict(entry) for name, entry in files.items()},
        }
        text = json.dumps(fields | {"checksum": checksum_of(fields)}, indent=2)
        (folder / MANIFEST_FILE).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ItemIndexManifest:
        """Read index.json from a folder, and compare the other files with their digests.

        Raises:
            ItemIndexError: a file is missing or damaged, or the index is of another format.
        """
        try:
            fields = json.loads(read_limited(folder / MANIFEST_FILE, MAX_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable_index(folder, error) from error
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise ItemIndexError(
                f"{folder}: format {version}, but this version of vista reads {FORMAT_VERSION}; run `vista index "
                "model=…` again"
            )
        try:
            check_fields(fields, _RULES)
            if checksum_of(fields) != fields["checksum"]:
                raise ValueError("its checksum does not match; the file is damaged or was edited")
            kind, files = IndexKind(fields["kind"]), fields["files"]
            expected = {CHECK_FILE} if kind is IndexKind.flat else {CHECK_FILE, FAISS_FILE}
            if files.keys() != expected:
                raise ValueError(f"files: expected {', '.join(sorted(expected))}, got {', '.join(sorted(files))}")
            entries = {name: FileEntry.from_dict(entry) for name, entry in files.items()}
            for name, entry in entries.items():
                if FileEntry.of(folder / name) != entry:
                    raise ValueError(f"the content of {name} is not what was written")
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise unreadable_index(folder, error) from error
        return cls(kind, fields["num_items"], fields["dim"], fields["last_scale"], entries)

    @staticmethod
    def require_replaceable(folder: Path) -> None:
        """Require that a folder is an index, is empty, or does not exist.

        Raises:
            ItemIndexError: it holds something else, or is a file.
        """
        if not folder.exists():
            return
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file()):
            raise ItemIndexError(
                f"{folder}: is something other than an index, and would be replaced; name another folder with out=…"
            )


def unreadable_index(folder: Path, error: Exception) -> ItemIndexError:
    """The error for a folder whose files are missing or damaged."""
    return ItemIndexError(f"{folder}: no readable index ({error}); write it with `vista index model=…`")
