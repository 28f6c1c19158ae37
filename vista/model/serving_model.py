"""What requests read of a model, as arrays: computing scores by the C++ library needs no torch.

B users, T packed events, L tail length, N rows, S seeds, M model dim, M' width of retrieval vectors, V items of the
vocabulary, Z statistics of an item, r dimensions of the item space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, map_array
from vista.config import DataConfig
from vista.config.checks import from_dict, to_dict
from vista.config.model_config import ModelConfig, RankingConfig
from vista.counters.counters import CounterSpec
from vista.counters.keys import ItemKeys
from vista.errors import AdapterError, CheckpointError, LogFormatError
from vista.examples.item_spaces import Pooled
from vista.examples.item_statistics import NUM_RECENT
from vista.files import TABLE, check_fields, hexadecimal, list_of, one_of, read_limited, replace_file, text
from vista.log.histories import UNKNOWN_GAP, RowColumn, RowFeatures, gap_bucket
from vista.log.vocabulary import Ids, Vocabulary
from vista.model.features import EncodedRows, RowFeatureReader, Schema
from vista.model.item_feature_table import ItemFeatureTable, item_keys
from vista.model.saved_model import SavedModel, SharedTables, checksum_of, does_not_fit

if TYPE_CHECKING:
    from vista.model.vista_model import VistaModel

NEXT_TASK = "next"
"""Name of the retrieval head's scores among those of the labeled tasks."""
UNKNOWN_ITEM = 0
"""Model row of items that the vocabulary lacks; vocabulary row r is model row r + 1."""
EMPTY_FILE = "empty_summary.npy"
"""float32 [S, M]."""


class Readings:
    """What a model reads of logs and requests: its vocabulary, fields, and features. It needs no weights."""

    config: RankingConfig
    schema: Schema
    items: Vocabulary
    """The model's own item vocabulary."""
    num_trained_items: int
    """Items that stage 1 was trained on. Later ones are unknown in histories (`history_rows`)."""
    event_features: RowFeatureReader | None
    """How features of events are read; None for a model without them."""
    request_features: RowFeatureReader | None
    user_features: RowFeatureReader | None
    item_keys: ItemKeys | None
    """What events are counted as. None without counters."""

    def item_rows(self, ids: Ids) -> Int:
        """Model rows int64 [N] of raw item ids; UNKNOWN_ITEM for ids that the vocabulary lacks."""
        return self.items.rows(ids) + 1

    def history_rows(self, rows: Int) -> Int:
        """Model rows [N] as histories have them: items that stage 1 was not trained on are unknown there. So what a
        store holds depends only on what `summarizer_id` covers."""
        return np.where(rows > self.num_trained_items, UNKNOWN_ITEM, rows)

    @property
    def tail_features(self) -> RowFeatureReader | None:
        """How stage 2 reads features of events; None if it reads none."""
        count, events = self.schema.num_tail_features, self.event_features
        return events.first(count) if events is not None and count else None

    @property
    def counter_spec(self) -> CounterSpec | None:
        """What the counters of users count; None for a model without counters."""
        return None if self.item_keys is None else self.item_keys.spec

    @property
    def has_gap(self) -> bool:
        """Whether event embeddings have the gap to the previous event."""
        return self.config.reads("times") and self.schema.has_time

    @property
    def has_retrieval(self) -> bool:
        """Whether the retrieval head was trained."""
        return self.schema.has_retrieval

    @property
    def temperature(self) -> float:
        """Divides inner products of users and items."""
        return self.config.softmax_temperature


@dataclass(eq=False)
class ServingModel(Readings):
    """A model in service, whose weights do not change."""

    config: ModelConfig
    schema: Schema
    items: Vocabulary
    num_trained_items: int
    event_features: RowFeatureReader | None
    request_features: RowFeatureReader | None
    user_features: RowFeatureReader | None
    feature_table: ItemFeatureTable | None
    """Features of the items; None without any."""
    weights: Mapping[str, NDArray[Any]]
    """By name in `VistaModel.state_dict`."""
    empty: Float32s
    """[1, S, M] summary of an empty history, which is also that of unknown users."""
    summarizer_id: bytes
    """`VistaModel.summarizer_id`."""
    make: Callable[[], VistaModel]
    """Builds the model for torch, in eval mode on its device, with the item values that it was trained with."""
    tables: SharedTables = field(default_factory=lambda: SharedTables(is_shared=False))
    """The large arrays that were read from files."""
    item_values: tuple[Float32s, Float32s, list[str]] | None = None
    """Those that replace them: arguments of `VistaModel.with_item_values`."""
    item_keys: ItemKeys | None = field(init=False)

    def __post_init__(self) -> None:
        spec = CounterSpec.of(self.config, has_time=self.schema.has_time, actions=self.schema.actions)
        count = 1 + len(self.items)
        self.item_keys = None if spec is None else item_keys(spec, self.schema, self.feature_table, count)

    @classmethod
    def of(cls, model: VistaModel, empty: Float32s) -> ServingModel:
        """A model in memory, whose weights are views if it is on the CPU. `empty`: as the field."""
        # On another device, the C++ library does not compute scores, and requests read some tables of items alone.
        state, read = (
            model.state_dict(),
            ("item_space", "item_space_weights", "item_statistics", "item_rates", "transition_items"),
        )
        weights = {n: w.detach().cpu().numpy() for n, w in state.items() if w.device.type == "cpu" or n in read}
        return cls(
            model.config,
            model.schema,
            model.items,
            model.num_trained_items,
            model.event_features,
            model.request_features,
            model.user_features,
            model.feature_table,
            weights,
            empty,
            model.summarizer_id(),
            lambda: model,
        )

    @classmethod
    def load(cls, saved: SavedModel, tables: SharedTables, make: Callable[[], VistaModel]) -> ServingModel:
        """What was read from a folder of `save_pretrained`.

        Args:
            tables: of the model; make: as the field.

        Raises:
            CheckpointError: the summary of an empty history is missing or damaged, or the weights are of another model.
        """
        described = saved.description
        described.check_files(saved.folder, EMPTY_FILE)
        config, file, num_rows = described.config, saved.folder / EMPTY_FILE, 1 + len(saved.items)
        assert isinstance(config, ModelConfig)
        if described.summarizer_id is None:
            raise does_not_fit(saved.folder, "it names no summarizer")
        try:
            empty = np.array(map_array(file, "export the model again"))
        except LogFormatError as error:
            raise CheckpointError(str(error)) from error
        shape = config.num_seeds, config.dim
        if empty.shape != shape or empty.dtype != np.float32:
            raise CheckpointError(f"{file}: must hold float32 {list(shape)}; export the model again")
        by_item = [name for name in saved.weights if name.startswith(("item_s", "item_r", "transition_"))]
        if short := [name for name in by_item if saved.weights[name].shape[:1] != (num_rows,)]:
            raise does_not_fit(saved.folder, f"{short[0]} is not of {len(saved.items)} items")
        columns = described.schema.item_features
        sizes = sum(column.num_rows for column in columns), sum(column.num_dense for column in columns)
        if saved.features is not None and not saved.features.fits(num_rows, *sizes):
            raise does_not_fit(saved.folder, "the features of the items do not fit the model")
        followers = saved.weights.get("transition_items", np.zeros((1, 1), np.int32))
        if followers.dtype != np.int32 or followers.min() < 0 or followers.max() >= num_rows:
            raise does_not_fit(saved.folder, f"transitions must be rows below {num_rows}, as int32")
        try:
            return cls(
                config,
                described.schema,
                saved.items,
                described.num_trained_items,
                saved.readers["event_features"],
                saved.readers["request_features"],
                saved.readers["user_features"],
                saved.features,
                saved.weights,
                empty[None],
                bytes.fromhex(described.summarizer_id),
                make,
                tables,
            )
        except RuntimeError as error:
            raise does_not_fit(saved.folder, error) from error

    @cached_property
    def vista_model(self) -> VistaModel:
        """The model for torch, which loads torch; with the item values in service."""
        model = self.make()
        return model if self.item_values is None else model.with_item_values(*self.item_values)

    @property
    def num_adapted(self) -> int:
        """Number of values of an adapter."""
        of_head = sum(self.stage2[name].size for name in ADAPTED_BIASES if name in self.stage2)
        return self.config.num_target_layers * self.config.dim + len(self.schema.tasks) + of_head

    @cached_property
    def stage2(self) -> dict[str, NDArray[Any]]:
        """The weights of stage 2 and the heads by name, sorted, also of a model that is not on the CPU."""
        weights = self.weights
        if "request" not in weights:
            weights = {name: weight.cpu().numpy() for name, weight in self.vista_model.state_dict().items()}
        return {name: weights[name] for name in sorted(weights) if name.startswith(STAGE2_WEIGHTS)}

    @cached_property
    def stage2_id(self) -> str:
        """SHA-256 of what an adapter depends on, in hex: the summarizer, and the weights of stage 2 and the heads.
        Later items, and newer values of items, do not change it."""
        digest = hashlib.sha256(json.dumps([self.summarizer_id.hex(), self.schema.tasks]).encode())
        for name, weight in self.stage2.items():
            digest.update(f"{name}{weight.shape}".encode() + np.ascontiguousarray(weight).tobytes())
        return digest.hexdigest()

    @property
    def statistics_columns(self) -> slice:
        """Where the vectors of `RankingModel.retrieval_items` hold the statistics; empty for a model without them."""
        begin = self.config.dim + self.config.space_dim
        counted = self.item_keys is not None and self.has_retrieval
        return slice(begin, begin + (self.weights["item_statistics"].shape[1] if counted else 0))

    @property
    def reads_item_values(self) -> bool:
        """Whether the model was trained with statistics of items: without anchors and tasks, training reads none."""
        return "item_statistics" in self.weights and bool(self.weights["item_statistics"].any())

    def with_item_values(self, statistics: Float32s, rates: Float32s, labels: list[str]) -> ServingModel:
        """The same with other item values; arguments as of `RankingModel.with_item_values`."""
        new = {"item_statistics": np.ascontiguousarray(statistics)}
        if (columns := rate_columns(self.schema.tasks, labels, self.weights.get("item_rates"))) is not None:
            new["item_rates"] = np.ascontiguousarray(rates[:, columns])
        return replace(self, weights={**self.weights, **new}, item_values=(statistics, rates, labels))


# Adapters: what fits a model in service to another surface, country, or task, in files of a few kilobytes.

STAGE2_WEIGHTS = (
    "target_attention.",
    "request",
    "user_encoder.",
    "task_head.",
    "candidate_head.",
    "counted.",
    "statistics.",
)
"""Prefixes of the names of the weights of stage 2 and the heads."""
ADAPTED_BIASES = "candidate_head.network.0.bias", "candidate_head.network.2.bias"
ADAPTER_SUFFIX = ".adapter"
ADAPTER_FORMAT = {"format": "vista-adapter", "version": 2}
_MAX_ADAPTER_BYTES = 16 << 20
_ADAPTER_RULES = {
    **{name: one_of(value) for name, value in ADAPTER_FORMAT.items()},
    "base": hexadecimal(64),
    "data": TABLE,
    "examined_tasks": list_of(text()),
    "checksum": hexadecimal(16),
}


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What `vista adapt` trains."""

    values: Float32s
    """What is added: [M] to query tokens after each layer of stage 2, [num_tasks] to the bias of the task head, and to
    each of ADAPTED_BIASES that the model has."""
    base: str
    """`ServingModel.stage2_id` of the model that it belongs to."""
    data: DataConfig
    """How its training data were split, which decides what evaluation may use."""
    examined_tasks: list[str]
    """Tasks whose scores are probabilities for items that users look at, in place of those of the model's schema."""

    def write(self, path: str | Path) -> None:
        """Write the file (docs/reference/file-formats.md), atomically. Raises OSError."""
        payload = self.values.astype("<f4").tobytes()
        own = {"base": self.base, "data": to_dict(self.data), "examined_tasks": self.examined_tasks}
        fields: dict[str, Any] = {**ADAPTER_FORMAT, **own}
        head = json.dumps(fields | {"checksum": _checksum(fields, payload)}, separators=(",", ":"))
        replace_file(Path(path), head.encode() + b"\n" + payload)

    @classmethod
    def read(cls, path: str | Path, model: ServingModel) -> Adapter:
        """Read the file of an adapter of a model.

        Raises:
            AdapterError: it is missing, damaged, of another format, or of another model.
        """
        try:
            head, _, payload = read_limited(Path(path), _MAX_ADAPTER_BYTES).partition(b"\n")
            fields = json.loads(head)
            check_fields(fields, _ADAPTER_RULES)
            if _checksum(fields, payload) != fields["checksum"]:
                raise ValueError("its checksum does not match; the file is damaged or was cut off")
            values, data = np.array(np.frombuffer(payload, "<f4")), from_dict(DataConfig, fields["data"])
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise AdapterError(f"{path}: is not a readable adapter ({error}); copy it again") from error
        if fields["base"] != model.stage2_id:
            raise AdapterError(
                f"{path}: was trained for another model ({fields['base'][:12]}, but this one is "
                f"{model.stage2_id[:12]}); train it again with `vista adapt base=…`"
            )
        if values.shape != (model.num_adapted,) or not np.isfinite(values).all():
            raise AdapterError(f"{path}: must hold {model.num_adapted} finite numbers; train it again")
        return cls(values, fields["base"], data, fields["examined_tasks"])


def _checksum(fields: Mapping[str, Any], payload: bytes) -> str:
    """XXH3-64 of the checksum of the other fields, in hex, and what follows them."""
    return xxhash.xxh3_64_hexdigest(checksum_of(dict(fields)).encode() + payload)


def input_scale(num_statistics: int, num_rates: int) -> list[float]:
    """Factors of what labeled tasks read alongside pooled vectors, which bring typical inputs near 0 ± 1: cosines,
    statistics, and rates (`VistaModel.candidate_inputs`)."""
    return [4.0] * len(Pooled) + [1.0] * num_statistics + [4.0] * num_rates


def rate_columns(tasks: list[str], labels: list[str], held: Any) -> list[int] | None:
    """Columns of label rates that a model reads in place of those that it was trained with; None if it keeps these.

    Args:
        labels: names of the columns.
        held: [1 + V, T] of the model, an array or a tensor; None without rates.
    """
    if held is None or not set(tasks) <= set(labels) or not held.any():
        return None
    return [labels.index(task) for task in tasks]


# Tails of requests: the newest events of users, right-aligned.


@dataclass(frozen=True, slots=True)
class PaddedTail:
    """The newest events of B users, oldest first, right-aligned."""

    item: Int
    """int64 [B, L] model rows."""
    action: Int
    """int64 [B, L]."""
    gap: Int
    """int64 [B, L] log buckets of the time since the event before; unknown for the first event."""
    valid: NDArray[np.bool_]
    """bool [B, L]: False in the padding."""
    last_time: Int
    """int64 [B] ms of the newest event; arbitrary if there is none."""
    features: EncodedRows | None = None
    """[B, L] of the events; arbitrary in the padding. None for a model whose stage 2 reads none."""

    def select(self, users: slice | Int) -> PaddedTail:
        """The tails of some users, or of all in another order."""
        return PaddedTail(
            self.item[users],
            self.action[users],
            self.gap[users],
            self.valid[users],
            self.last_time[users],
            None if self.features is None else self.features.select(users),
        )


def pad_tail(
    model: VistaModel | ServingModel,
    item: NDArray[Any],
    time: Int,
    action: NDArray[Any],
    offsets: Int,
    features: Mapping[str, RowColumn] | None = None,
) -> PaddedTail:
    """Right-align the newest events of packed histories, at most `tail_len` per user.

    Args:
        item: [T] model rows.
        time: int64 [T] ms.
        action: [T].
        offsets: int64 [B+1].
        features: by name of a column, [T] with the model's codes; columns that are not given are missing.
    """
    length = model.config.tail_len
    index = offsets[1:, None] - length + np.arange(length)
    valid = index >= offsets[:-1, None]
    is_full = np.count_nonzero(valid) == valid.size  # as most tails are; then nothing is padded
    index = index if is_full else np.where(valid, index, 0)
    reader = model.tail_features
    encoded = None if reader is None else reader.encode(RowFeatures(features or {}), len(item))
    if len(item) == 0:
        zeros = np.zeros(index.shape, np.int64)
        if encoded is not None:
            encoded = encoded.apply(lambda part: np.zeros((*index.shape, part.shape[1]), part.dtype))
        return PaddedTail(zeros, zeros, zeros, valid, np.zeros(len(index), np.int64), encoded)
    times = time[index]
    gap = np.zeros(index.shape, np.int64)
    if model.has_gap:
        known = gap_bucket(times[:, 1:] - times[:, :-1])
        gap[:, 1:] = known if is_full else np.where(valid[:, 1:] & valid[:, :-1], known, UNKNOWN_GAP)

    def padded(values: NDArray[Any]) -> Int:
        return (values[index] if is_full else np.where(valid, values[index], 0)).astype(np.int64)

    return PaddedTail(
        padded(item),
        padded(action),
        gap,
        valid,
        time[np.maximum(offsets[1:] - 1, 0)],
        None if encoded is None else encoded.select(index),
    )


def gap_buckets(model: VistaModel | ServingModel, now: Int | None, tail: PaddedTail) -> Int | None:
    """int64 [B] log buckets of the time from the tail's newest event to the request; None if times are not used. `now`:
    int64 [B] ms of the requests. The bucket is UNKNOWN_GAP without it, and for an empty tail."""
    if not model.has_gap:
        return None
    if now is None:
        return np.zeros(len(tail.last_time), np.int64)
    return np.where(tail.valid.any(1), gap_bucket(now - tail.last_time), UNKNOWN_GAP)


def newest_first(tail: Int) -> Int:
    """int64 [B, J] the newest items, where 0 pads, of tails int64 [B, L], right-aligned."""
    return tail[:, ::-1][:, :NUM_RECENT].copy()  # torch takes no negative strides, also of one event


def follower_rows(model: ServingModel, tail: Int) -> list[Int]:
    """Sorted model rows of the followers of each user's newest items; none for a model without transitions. `tail`:
    int64 [B, L] model rows of the newest events, right-aligned; 0 pads."""
    if (table := model.weights.get("transition_items")) is None:
        return [np.zeros(0, np.int64)] * len(tail)
    return [np.setdiff1d(of_user, [UNKNOWN_ITEM]) for of_user in table[newest_first(tail)].astype(np.int64)]
