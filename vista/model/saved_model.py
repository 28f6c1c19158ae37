"""The folder of a saved model: config.json, which also has the digests of all files, and what these files hold.

Reading one does not load torch (`vista.model.ranking_model.built` makes a model of what is read).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError

from vista.arrays import mapped_tensors
from vista.config import DataConfig
from vista.config.checks import Architecture, from_dict, to_dict
from vista.config.model_config import RankingConfig, model_config_of
from vista.errors import CheckpointError, LogFormatError
from vista.files import (
    TABLE,
    FieldRule,
    check_fields,
    checked_path,
    either,
    hexadecimal,
    old_name,
    one_of,
    open_file,
    read_limited,
    replaced_folder,
    whole,
)
from vista.log.vocabulary import Vocabulary
from vista.model.features import FEATURE_KEYS, FeatureSpec, RowFeatureReader, Schema
from vista.model.item_feature_table import FEATURES_FILE, ItemFeatureTable

if TYPE_CHECKING:
    from vista.model.ranking_model import RankingModel


FORMAT_VERSION = 16
CONFIG_FILE = "config.json"
REFERENCE_FILE = "reference.json"
"""What is normal in the training data (`vista.evaluation.reference`). Loading a model does not read it."""
INDEX_MANIFEST = "index.json"
"""In the folder of an index of items (`vista.model.item_index`), which this module need not load."""
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

    config: RankingConfig
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
        """Read config.json from a folder of `save_pretrained`. Raises CheckpointError if the folder has no config.json,
        or one that is damaged or of another format."""
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
                model_config_of(fields["model"]),
                _schema(fields["schema"]),
                from_dict(DataConfig, fields["data"]),
                fields["num_trained_items"],
                fields["summarizer_id"],
                files,
                fields["checksum"],
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: {error}; export the model again") from error

    def require(self, architecture: Architecture, folder: Path, kind: str) -> None:
        """Raise CheckpointError if a folder's model is of another architecture than the class `kind` needs."""
        if self.config.architecture is not architecture:
            raise CheckpointError(
                f"{folder}: holds a model of architecture {self.config.architecture.value}, but {kind} needs "
                f"{architecture.value}; name a model that was trained with model.kind={architecture.value}"
            )

    def check_files(self, folder: Path, *patterns: str) -> None:
        """Compare the files of a folder whose names match a pattern, such as `items.*`, with their entries. Raises
        CheckpointError if a file is missing, was not saved with the model, or has other content."""
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


def does_not_fit(folder: Path, error: object) -> CheckpointError:
    """The error for a folder whose weights are not those that its config.json describes."""
    return CheckpointError(
        f"{folder}/{WEIGHTS_FILE} does not fit its config.json: {error}; copy the model again, or export it again"
    )


# The large arrays of the models that one process serves: models with equal ones hold them once.
#
# Models that keep the item table of an earlier one are exported with the same table, the same vocabulary, and often the
# same retrieval vectors, but each in files of its own, which the system would keep in memory several times. So each
# array has a key that follows from its content. A model takes the array that is held under this key, if another model
# has it.

Table = TypeVar("Table")
Arrays = Mapping[str, NDArray[Any]]
MIN_BYTES = 1024
"""Smaller weights are not shared, because it would save nothing: a page of memory holds several of them."""


class _HeldTable:
    """An array that at least one model holds."""

    __slots__ = ("__weakref__", "num_bytes", "value")

    def __init__(self, value: Any, num_bytes: int) -> None:
        self.value = value
        self.num_bytes = num_bytes


_held: WeakValueDictionary[Hashable, _HeldTable] = WeakValueDictionary()
"""By key: what the models of this process hold. An entry lasts as long as the `SharedTables` that have it. Two threads
that open equal models at the same time may each keep their own."""


class SharedTables:
    """The large arrays of one model. They must not change.

    Args:
        is_shared: whether other models may have them too: those on the CPU. Others are copies that belong to one model.
    """

    def __init__(self, *, is_shared: bool) -> None:
        self._is_shared = is_shared
        self._own: list[_HeldTable] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return total_bytes([self])

    def bytes_of_others(self, others: Iterable[SharedTables]) -> int:
        """Bytes of the arrays that other models hold too."""
        elsewhere = {id(table) for other in others if other is not self for table in other._own}
        return sum(table.num_bytes for table in self._own if id(table) in elsewhere)

    def take(self, key: Hashable, num_bytes: int, make: Callable[[], Table]) -> Table:
        """The array that is held under a key, or else a new one, which later models get.

        Args:
            key: the same only for equal arrays.
            num_bytes: of the array.
            make: returns a new one.
        """
        held = _held.get(key) if self._is_shared else None
        if held is None:
            value = make()
            held = _HeldTable(value if self._is_shared else None, num_bytes)
            self._own.append(held)
            if self._is_shared:
                _held[key] = held
            return value
        self._own.append(held)
        return cast(Table, held.value)

    def take_files(self, files: dict[str, FileEntry], patterns: tuple[str, ...], make: Callable[[], Table]) -> Table:
        """What is read from the files whose names match a pattern, as of `take`.

        Args:
            files: of a model, by name. Their content has been compared with these entries.
            patterns: such as `items.*`.
            make: reads them.
        """
        used = {name: files[name] for name in sorted(files) if any(fnmatchcase(name, one) for one in patterns)}
        return self.take(tuple(used.items()), sum(entry.bytes for entry in used.values()), make)

    def take_arrays(self, arrays: Arrays, map_again: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
        """Arrays by name, with those that other models hold in their place; small ones as they are.

        Args:
            arrays: mapped from one file.
            map_again: the same from another mapping.
        """
        keys = {name: _key_of(array) for name, array in arrays.items() if array.nbytes >= MIN_BYTES}
        if self._is_shared and any(key in _held for key in keys.values()):
            # What has been read of the first mapping would stay in memory as long as one array is in it.
            arrays = map_again()
        return {
            name: self.take(keys[name], array.nbytes, partial(_same, array)) if name in keys else array
            for name, array in arrays.items()
        }


def total_bytes(models: Iterable[SharedTables]) -> int:
    """Bytes of the arrays of several models, each counted once."""
    return sum(table.num_bytes for table in {id(table): table for one in models for table in one._own}.values())


def _key_of(array: NDArray[Any]) -> Hashable:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return array.shape, array.dtype.str, xxhash.xxh3_128_digest(content.data)


def _same(array: NDArray[Any]) -> NDArray[Any]:
    return array


# The files of a saved model: weights, vocabulary, features.

WEIGHTS_FILE = "model.safetensors"
ROW_FEATURES = "event_features", "request_features", "user_features"
"""Attributes of a model with readers of features, and fields of its schema with their columns."""


def _read_weights(file: Path, tables: SharedTables | None) -> dict[str, NDArray[Any]]:
    """Map the weights of a file by name, float32, and rows as they are."""
    weights = _full_precision(mapped_tensors(file))
    for name, weight in weights.items():
        if weight.dtype == np.float32 and weight.size and not (np.isfinite(weight.min()) and np.isfinite(weight.max())):
            raise CheckpointError(
                f"{file}: {name} is not finite; export an earlier checkpoint, or train the model again"
            )
    return weights if tables is None else tables.take_arrays(weights, lambda: _full_precision(mapped_tensors(file)))


def _full_precision(weights: Arrays) -> dict[str, NDArray[Any]]:
    return {
        name: weight.astype(np.float32, copy=False) if weight.dtype.kind == "f" else weight
        for name, weight in weights.items()
    }


def check_is_model(folder: Path) -> None:
    """Raise CheckpointError if a folder, or its `old_name`, holds something other than a model, which would be lost."""
    for path in (folder, old_name(folder)):
        if path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{path}: holds something other than a model, and would be replaced; name another folder, or "
                "remove this one"
            )


def write_model(
    model: RankingModel, folder: Path, *, card: str | None, reference: str | None, weights_file: Path | None
) -> None:
    """Write the folder of `RankingModel.save_pretrained`."""
    from safetensors.torch import save_file  # Reading a folder does not need torch.

    try:
        check_is_model(folder)
        with replaced_folder(folder) as partial:
            if weights_file is None:
                weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
                save_file(weights, partial / WEIGHTS_FILE)
            else:
                weights_file.rename(partial / WEIGHTS_FILE)
            model.items.save(partial, "items")
            if model.feature_table is not None:
                model.feature_table.save(partial)
            for name in ROW_FEATURES:
                if (reader := getattr(model, name)) is not None:
                    reader.save(partial, name.removesuffix("_features"))
            model.save_serving_tables(partial)
            model.description().write(partial)
            for name, content in (("README.md", card), (REFERENCE_FILE, reference)):
                if content is not None:
                    (partial / name).write_text(content, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the model could not be written ({error}); free space or correct the permissions, then try again"
        ) from error


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What the files of a model hold."""

    folder: Path
    """Where it was read from, for errors."""
    description: ModelDescription
    weights: dict[str, NDArray[Any]]
    """By name, mapped: float32, and rows as int32."""
    items: Vocabulary
    features: ItemFeatureTable | None
    """Of the items; None without columns."""
    readers: dict[str, RowFeatureReader | None]
    """By name in ROW_FEATURES."""

    @classmethod
    def read(cls, folder: Path, tables: SharedTables | None = None) -> SavedModel:
        """Read a folder of `RankingModel.save_pretrained`.

        Args:
            tables: gets the large arrays, and gives those that other models hold; only for a model that does not
                change. None reads all.

        Raises:
            CheckpointError: as `RankingModel.from_pretrained`.
        """
        saved = ModelDescription.read(folder)
        columns = saved.schema.item_features
        try:
            items_files, features_files = ("items.*",), (FEATURES_FILE, "item_values_*")
            saved.check_files(folder, WEIGHTS_FILE, *items_files, FEATURES_FILE, "*_values_*")
            weights = _read_weights(folder / WEIGHTS_FILE, tables)
            tables = SharedTables(is_shared=False) if tables is None else tables
            items = tables.take_files(saved.files, items_files, lambda: Vocabulary.load(folder, "items"))
            features = None
            if columns:
                features = tables.take_files(
                    saved.files, features_files, lambda: ItemFeatureTable.load(folder, columns)
                )
            readers = {
                name: RowFeatureReader.load(folder, name.removesuffix("_features"), getattr(saved.schema, name))
                for name in ROW_FEATURES
            }
        except (OSError, ValueError, SafetensorError, LogFormatError) as error:
            raise unreadable_model(folder, error) from error
        if saved.num_trained_items > len(items):
            raise does_not_fit(folder, f"it knows {len(items)} items, but was trained on {saved.num_trained_items}")
        return cls(folder, saved, weights, items, features, readers)
