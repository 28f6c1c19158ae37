"""How a model reads features of rows: of events, requests, and users, and the columns that it reads of items."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.config.checks import require
from vista.errors import shown
from vista.log.features import Column
from vista.log.histories import ColumnValues, RowColumn, RowFeatures
from vista.log.vocabulary import Ids, Vocabulary

MAX_BUCKETS = 32
MAX_ABS_SCORE = 5.0
"""Standardized numbers are clipped here."""
KINDS = ("category", "number", "vector")


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """One column. A number has an embedding per bucket, and adds its standardized value along one direction."""

    name: str
    kind: str
    """category, number, or vector."""
    size: int
    """Number of distinct values, of rows that hashed values share, of buckets, or of entries of a vector."""
    bounds: list[float] = field(default_factory=list)
    """Of a number: ascending upper bounds of all buckets but the last, [size - 1]."""
    mean: float = 0.0
    scale: float = 1.0
    """Of a number: mean and standard deviation. Of a vector: 0, and the root mean square of its length."""
    hashed: bool = False
    """Of a category: whether its values share `size` rows by their hash (`HashedVocabulary`)."""

    def __post_init__(self) -> None:
        require(type(self.name) is str and self.name != "", "schema", "a feature's name must be a non-empty string")
        where = f"schema: feature {self.name}"
        require(self.kind in KINDS, where, f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        require(type(self.size) is int and self.size > 0, where, f"size must be at least 1, got {self.size!r}")
        require(type(self.bounds) is list, where, "bounds must be a list")
        numbers = (self.mean, self.scale, *self.bounds)
        finite = all(type(number) is float and math.isfinite(number) for number in numbers)
        require(finite and self.scale > 0, where, "mean, scale, and bounds must be finite floats, and scale positive")
        buckets = self.size - 1 if self.kind == "number" else 0
        require(len(self.bounds) == buckets, where, "a number needs size - 1 bounds; other kinds take none")
        require(all(low < high for low, high in pairwise(self.bounds)), where, "bounds must ascend")
        is_valid = type(self.hashed) is bool and (self.kind == "category" or not self.hashed)
        require(is_valid, where, "hashed must be true or false, and only a category can be hashed")

    @property
    def num_rows(self) -> int:
        """Rows of the embedding: one per value or bucket, and one for rows without a value."""
        return 1 + (0 if self.kind == "vector" else self.size)

    @property
    def num_dense(self) -> int:
        """Entries of the dense input."""
        return {"category": 0, "number": 1, "vector": self.size}[self.kind]

    def entries(self, data: NDArray[Any]) -> Int:
        """Rows of the embedding, from the column's first one on, of codes or numbers [N]: 0 where they are missing."""
        if self.kind == "category":
            return data.astype(np.int64) + 1
        buckets = np.searchsorted(self.bounds, data.astype(np.float64)) + 1
        buckets[np.isnan(data)] = 0
        return buckets

    def fill_dense(self, out: Float32s, data: NDArray[Any]) -> None:
        """Write the dense inputs of numbers [N] or vectors [N, D] into `out` [N, num_dense]; 0 if they are missing."""
        if self.kind == "vector":
            np.divide(data, np.float32(self.scale), out=out)
            np.nan_to_num(out, copy=False, nan=0.0)
        else:
            score = (data.astype(np.float64) - self.mean) / self.scale
            score[np.isnan(score)] = 0.0
            out[:, 0] = np.minimum(np.maximum(score, -MAX_ABS_SCORE), MAX_ABS_SCORE)

    @classmethod
    def of(cls, name: str, column: Column) -> FeatureSpec:
        """How to read a column, measured on its rows."""
        if column.values is not None:
            return cls(name, column.kind, max(column.size, 1), hashed=isinstance(column.values, HashedVocabulary))
        known = column.data[column.is_known].astype(np.float64)
        if column.kind == "vector":
            length = math.sqrt(np.square(known).sum(1).mean()) if len(known) else 0.0
            return cls(name, column.kind, column.size, scale=length or 1.0)
        if not len(known):
            return cls(name, column.kind, 1)
        bounds = np.unique(np.quantile(known, np.arange(1, MAX_BUCKETS) / MAX_BUCKETS, method="inverted_cdf"))
        bounds = bounds[bounds < known.max()]  # the last bucket is not empty
        scale = float(known.std())
        return cls(name, column.kind, len(bounds) + 1, bounds.tolist(), float(known.mean()), scale or 1.0)


# What a model may read of a log, and what it is trained to predict.

MAX_ACTIONS = 256
"""Codes of actions are uint8."""
MAX_TASKS = 64
MAX_NAME_BYTES = 500
FEATURE_KEYS = ("item_features", "event_features", "request_features", "user_features")
"""Fields of Schema that list columns of features."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The fields and tasks of the log that a model was trained on."""

    actions: list[str]
    has_time: bool
    rating_range: tuple[float, float] | None
    """Smallest and largest rating; None if ratings are not used."""
    tasks: list[str]
    """Labeled tasks that were trained."""
    has_retrieval: bool = True
    """Whether the retrieval head was trained on next items."""
    item_features: list[FeatureSpec] = field(default_factory=list)
    """Columns of item features that are part of item vectors."""
    event_features: list[FeatureSpec] = field(default_factory=list)
    """Categories and numbers that are part of event embeddings in stage 1, and in baselines."""
    num_tail_features: int = 0
    """How many of `event_features`, counted from the first, stage 2 reads too, and the tails of records hold."""
    request_features: list[FeatureSpec] = field(default_factory=list)
    """Categories and numbers of requests, which labeled tasks read."""
    user_features: list[FeatureSpec] = field(default_factory=list)
    """Categories and numbers of users, which stage 2 and the retrieval head read."""
    has_decoder: bool = False
    """Whether summaries were trained to be decoded (`optim.reconstruction_weight`)."""
    examined_tasks: list[str] = field(default_factory=list)
    """Tasks whose scores are probabilities for items that users look at (`optim.examined_tasks`)."""
    residual_task: str | None = None
    """The task whose labels the item space is made of (`LabelResiduals`); None for a space of events."""

    def __post_init__(self) -> None:
        for key, most in (("actions", MAX_ACTIONS), ("tasks", MAX_TASKS), ("examined_tasks", MAX_TASKS)):
            names = getattr(self, key)
            require(
                type(names) is list and all(type(name) is str for name in names), f"schema.{key}", "must list texts"
            )
            require(len(names) <= most, f"schema.{key}", f"at most {most} are possible, got {len(names)}")
            require(
                all(len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES for name in names),
                f"schema.{key}",
                f"a name has at most {MAX_NAME_BYTES} bytes",
            )
        if self.residual_task is not None:
            require(type(self.residual_task) is str, "schema.residual_task", "must be a text or null")
        for key in FEATURE_KEYS:
            features = getattr(self, key)
            require(
                type(features) is list and all(type(feature) is FeatureSpec for feature in features),
                f"schema.{key}",
                "must list columns",
            )
            names = [feature.name for feature in features]
            require(len(set(names)) == len(names), f"schema.{key}", "column names must be unique")
        require(
            type(self.num_tail_features) is int and 0 <= self.num_tail_features <= len(self.event_features),
            "schema.num_tail_features",
            f"must lie in 0 … {len(self.event_features)}, got {self.num_tail_features!r}",
        )
        for key in ("has_time", "has_retrieval", "has_decoder"):
            require(type(getattr(self, key)) is bool, f"schema.{key}", "must be true or false")
        if self.rating_range is not None:
            ratings = self.rating_range
            require(
                type(ratings) is tuple
                and len(ratings) == 2
                and all(type(rating) in (int, float) and math.isfinite(rating) for rating in ratings),
                "schema.rating_range",
                "must be two finite numbers",
            )

    @property
    def tail_features(self) -> list[FeatureSpec]:
        """The `event_features` that stage 2 reads too."""
        return self.event_features[: self.num_tail_features]

    @property
    def tail_sizes(self) -> dict[str, int | None]:
        """Their number of distinct values by name; None for a number."""
        return {column.name: column.size if column.kind == "category" else None for column in self.tail_features}


# A vocabulary that is a hash function: any number of texts share a fixed number of rows.
#
# Saved models rely on which text reads which row, so the hash function never changes: XXH3-64 (seed 0) of the text's
# UTF-8, modulo the number of rows.


class HashedVocabulary(Vocabulary):
    """Values of a category that share `num_rows` rows. Every text has a row, except "", which is missing."""

    __slots__ = ("_num_rows",)

    def __init__(self, num_rows: int) -> None:
        """
        Args:
            num_rows: at least 1.
        """
        super().__init__("str", np.empty(0, np.uint8), np.zeros(1, np.int64))
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __repr__(self) -> str:
        return f"HashedVocabulary({self._num_rows} rows)"

    def __reduce__(self) -> tuple[Any, ...]:
        return HashedVocabulary, (self._num_rows,)

    def rows(self, ids: Ids) -> NDArray[np.int64]:
        """Rows int64 [N] of texts; -1 for "". Raises AttributeError if a value is not text."""
        hashed, count = xxhash.xxh3_64_intdigest, self._num_rows
        return np.fromiter((hashed(text.encode()) % count if text else -1 for text in ids), np.int64, len(ids))  # type: ignore[union-attr]

    def ids(self, rows: Any) -> NDArray[Any]:
        """What stands for the texts of rows: their number, since the texts are not kept."""
        out = np.empty(len(index := np.atleast_1d(rows)), object)
        out[:] = [f"row {row} of {self._num_rows}" for row in index.tolist()]
        return out

    def extended(self, new_ids: Ids) -> Vocabulary:
        """This vocabulary, since all texts have a row."""
        return self

    def save(self, folder: Any, name: str) -> list[Path]:
        """Nothing is written: the number of rows is in the model's schema."""
        return []

    def digest(self) -> str:
        return hashlib.sha256(f"vista-hashed-vocabulary {self._num_rows}\n".encode()).hexdigest()


def load_values(folder: Path, name: str, column: FeatureSpec) -> Vocabulary:
    """The values of a category that were saved under `name`. Raises LogFormatError if a file is missing or damaged, and
    ValueError if they do not fit the column."""
    if column.hashed:
        return HashedVocabulary(column.size)
    values = Vocabulary.load(folder, name)
    if values.kind != "str" or len(values) > column.size:
        raise ValueError(f"{name} must hold at most {column.size} texts")
    return values


# How a model reads features of rows: of events, of requests, or of users.
#
# N rows, C columns, F dense inputs.

Recode: TypeAlias = Callable[[RowFeatures, int], RowFeatures]
"""From features of N rows of a log to the same features with a model's codes."""
_VALUES_FILE = "{}_values_{}"


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """What a `RowFeatureEncoder` reads of N rows: NumPy arrays, or in a batch of training, tensors. N may be several
    axes."""

    entry: Any
    """int64 [N, C] rows of the encoder's embedding, one per column."""
    dense: Any
    """float32 [N, F] standardized numbers, 0 where they are missing."""

    def __len__(self) -> int:
        return len(self.entry)

    def select(self, rows: Any) -> EncodedRows:
        """Rows at an index into the first axis."""
        return EncodedRows(self.entry[rows], self.dense[rows])

    def reshape(self, *shape: int) -> EncodedRows:
        """The rows with other leading axes instead of N."""
        return self.apply(lambda part: part.reshape(*shape, part.shape[-1]))

    def apply(self, function: Callable[[Any], Any]) -> EncodedRows:
        """What a function makes of each of the two parts."""
        return EncodedRows(function(self.entry), function(self.dense))

    def joined(self, other: EncodedRows) -> EncodedRows:
        """These rows, then others, of arrays."""
        return EncodedRows(np.concatenate([self.entry, other.entry]), np.concatenate([self.dense, other.dense]))


def require_known(names: Iterable[str], known: Collection[str], where: str = "") -> None:
    """Raise a ValueError, which begins with `where`, for the first feature that a model does not read."""
    for name in names:
        if name not in known:
            raise ValueError(f"{where}{shown(name)} is not one of this model's features, {list(known)}")


class RowFeatureReader:
    """The columns that a model reads, and the values that it knows. Its codes are rows of its own values, because a log
    may have more. Values that it does not know are missing."""

    def __init__(self, columns: Sequence[FeatureSpec], values: ColumnValues) -> None:
        """
        Args:
            columns: categories and numbers.
            values: of these columns, as the model knows them.

        Raises:
            ValueError: if the values do not fit the columns.
        """
        for column in columns:
            known = values[column.name]
            has_texts = known is not None and known.kind == "str" and len(known) <= column.size
            if column.kind == "vector" or not (known is None if column.kind == "number" else has_texts):
                raise ValueError(f"the values of {column.name!r} do not fit a {column.kind} of size {column.size}")
        self.columns = list(columns)
        self.values = {column.name: values[column.name] for column in columns}

    @classmethod
    def of(cls, features: RowFeatures, values: ColumnValues) -> RowFeatureReader:
        """All columns of a log, measured on the rows that training may see."""
        nothing = np.empty(0, np.int32)  # Only the values of a category count.
        given = {name: Column(features.columns.get(name, nothing), known) for name, known in values.items()}
        return cls([FeatureSpec.of(name, column) for name, column in given.items()], values)

    def _codes_of(self, values: ColumnValues) -> dict[str, NDArray[np.int32]]:
        """By category: the model's code of each of a log's values, int32 [V + 1]; -1 if it is unknown, and at the end.
        Columns that the log lacks are left out."""
        codes = {}
        for name, known in self.values.items():
            given = values.get(name)
            if known is not None and given is not None:
                rows = known.rows(given.ids(np.arange(len(given))).tolist())
                codes[name] = np.append(rows, -1).astype(np.int32)
        return codes

    def recoder(self, values: ColumnValues) -> Recode:
        """Gives features of N rows of a log with these values the model's codes. Columns that it lacks are missing."""
        codes = self._codes_of(values)
        return lambda features, num_rows: self._recoded(features, codes, num_rows)

    def _recoded(self, features: RowFeatures, codes: Mapping[str, NDArray[np.int32]], num_rows: int) -> RowFeatures:
        given = features.columns
        out = dict(RowFeatures.missing(self.values, num_rows).columns)
        for name, known in self.values.items():
            if name in codes and name in given:
                out[name] = codes[name][given[name]]  # -1 reads the last entry
            elif known is None and name in given:
                out[name] = given[name].astype(np.float32)
        return RowFeatures(out)

    def parse(self, given: Mapping[str, Any], num_rows: int) -> RowFeatures:
        """Features that a caller names by their values. Columns and values that are not given are missing.

        Args:
            given: by name of a column: N values each, texts, integers or booleans for a category, floats for a number;
                None or NaN where a value is missing.
            num_rows: N.

        Raises:
            ValueError: if a column is unknown, has another length, or holds something other than its kind of values.
        """
        require_known(given, self.values)
        out: dict[str, RowColumn] = {}
        for name, known in self.values.items():
            if name not in given:
                out |= RowFeatures.missing({name: known}, num_rows).columns
                continue
            values = given[name]
            if len(values) != num_rows:
                raise ValueError(f"{name!r} has {len(values)} values, but {num_rows} are needed")
            out[name] = _numbers(name, values) if known is None else _codes(name, values, known)
        return RowFeatures(out)

    def digests(self) -> list[tuple[str, int | None, str]]:
        """Per column: its name, and the size of a category with the digest of its values, or None and "" for a number.
        Readers with the same digests have the same codes."""
        return [
            (column.name, None if known is None else column.size, "" if known is None else known.digest())
            for column, known in zip(self.columns, self.values.values(), strict=True)
        ]

    def first(self, count: int) -> RowFeatureReader:
        """The reader of the first columns, whose entries are the same rows of the encoder's embedding."""
        return RowFeatureReader(self.columns[:count], self.values)

    def encode(self, features: RowFeatures, num_rows: int) -> EncodedRows:
        """What the encoder reads of N rows with the model's codes. Columns that are not given are missing."""
        entry = np.empty((num_rows, len(self.columns)), np.int64)
        dense = np.zeros((num_rows, sum(column.num_dense for column in self.columns)), np.float32)
        first = place = 0
        for index, column in enumerate(self.columns):
            given, next_place = features.columns.get(column.name), place + column.num_dense
            entry[:, index] = first if given is None else first + column.entries(given)
            if given is not None and column.num_dense:
                column.fill_dense(dense[:, place:next_place], given)
            first, place = first + column.num_rows, next_place
        return EncodedRows(entry, dense)

    def with_values(self, rows: EncodedRows, given: Mapping[str, Any]) -> EncodedRows:
        """The same N rows, with other values in the columns that a caller names; arguments and errors as in `parse`."""
        num_rows, place = len(rows), 0
        new = self.encode(self.parse(given, num_rows), num_rows)
        entry, dense = rows.entry.copy(), rows.dense.copy()
        for index, column in enumerate(self.columns):
            if column.name in given:
                own = slice(place, place + column.num_dense)
                entry[:, index], dense[:, own] = new.entry[:, index], new.dense[:, own]
            place += column.num_dense
        return EncodedRows(entry, dense)

    def missing(self, num_rows: int) -> EncodedRows:
        """What the encoder reads of N rows without values."""
        return self.encode(RowFeatures.missing(self.values, num_rows), num_rows)

    def save(self, folder: Path, name: str) -> None:
        """Write the values of categories into a folder, in files whose names begin with `name`. Raises OSError."""
        for number, known in enumerate(self.values.values()):
            if known is not None:
                known.save(folder, _VALUES_FILE.format(name, number))

    @classmethod
    def load(cls, folder: Path, name: str, columns: Sequence[FeatureSpec]) -> RowFeatureReader | None:
        """Read the files of `save`; None without columns. Raises OSError or LogFormatError if a file is missing or
        damaged, and ValueError if the values do not fit the columns."""
        values: dict[str, Vocabulary | None] = {}
        for number, column in enumerate(columns):
            file = _VALUES_FILE.format(name, number)
            values[column.name] = load_values(folder, file, column) if column.kind == "category" else None
        return cls(columns, values) if columns else None


RowReaders: TypeAlias = Mapping[str, RowFeatureReader]
"""By field of Schema that lists columns of rows, such as "event_features", if it lists any."""


def log_encoder(
    reader: RowFeatureReader | None, values: ColumnValues
) -> Callable[[RowFeatures, int], EncodedRows | None]:
    """`encode` for N rows of a log, whose codes may differ from the model's; without a reader, it gives None. `values`:
    of the log."""
    if reader is None:
        return lambda features, num_rows: None
    recode = reader.recoder(values)
    return lambda features, num_rows: reader.encode(recode(features, num_rows), num_rows)


def _numbers(name: str, values: Any) -> Float32s:
    try:
        numbers = np.array(values, np.float64)  # None becomes NaN
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name!r} needs numbers: {error}") from error
    if numbers.ndim != 1:
        raise ValueError(f"{name!r} needs numbers, one per row")
    with np.errstate(over="ignore"):
        rounded = numbers.astype(np.float32)
    if np.isinf(rounded).any():
        raise ValueError(f"{name!r}: value number {int(np.isinf(rounded).argmax())} is infinite, or too large")
    return rounded


def _codes(name: str, values: Any, known: Vocabulary) -> NDArray[np.int32]:
    # Empty text is missing too, so that no known value is empty.
    return known.rows([_text(name, value) or "" for value in values]).astype(np.int32)


def _text(name: str, value: Any) -> str | None:
    """A value of a category as logs hold it: text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):  # how pandas marks a missing value
        return None
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    raise ValueError(f"{name!r} is a category and needs texts, integers, or booleans, got {shown(value)}")
