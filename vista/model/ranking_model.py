"""What every architecture has: an item table, an event encoder, losses, and files.

Callers pass in item vectors, so that training reads only the rows of a batch. Letters: R item rows of a batch, M model
dim, M' width of retrieval vectors, V items of the vocabulary; N rows and P hash functions of a unified table.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vista.arrays import Float32s, Floats
from vista.config import DataConfig, OptimConfig
from vista.config.checks import Architecture, TableKind
from vista.config.model_config import EMBEDDING_HASHES, NextItemConfig, RankingConfig
from vista.counters.keys import ItemKeys
from vista.errors import CheckpointError
from vista.examples.batch import Batch, BatchEvents
from vista.examples.item_spaces import Pooled
from vista.examples.item_statistics import num_statistics
from vista.examples.transitions import NUM_SUMS, TransitionTable
from vista.files import checked_path
from vista.log.features import Columns
from vista.log.histories import NUM_GAPS, ColumnValues, RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.feature_encoders import ItemFeatureEncoder, RowFeatureEncoder
from vista.model.features import EncodedRows, Recode, RowFeatureReader, Schema
from vista.model.item_feature_table import ItemFeatureTable, item_keys
from vista.model.layers import (
    AllocationLimit,
    CountedItemHead,
    EmbeddingFeature,
    HashedEmbedding,
    StatisticsTerm,
    drawn_table,
    gather,
    hashed_rows,
    read_together,
    restored,
    tables_from_file,
)
from vista.model.losses import Losses
from vista.model.saved_model import ROW_FEATURES, WEIGHTS_FILE, ModelDescription, SavedModel, does_not_fit, write_model
from vista.model.serving_model import NEXT_TASK as NEXT_TASK
from vista.model.serving_model import UNKNOWN_ITEM as UNKNOWN_ITEM
from vista.model.serving_model import Readings, rate_columns
from vista.model.summarizer import Stage1Config

if TYPE_CHECKING:
    from vista.model.sharded_table import ShardedTable

_SPARE_VALUES = 1 << 22
"""What building a small model may allocate in addition, such as temporary tensors: 16 MiB."""


class EventEncoder(nn.Module):
    """Sum of the embeddings of an event's fields. Fields that the log lacks are left out. Actions and gaps have tables
    of their own, or read `shared`, the table [1 + N, M / P] of all features."""

    def __init__(self, config: Stage1Config, shared: nn.Parameter | None = None) -> None:
        super().__init__()

        def embedding(feature: EmbeddingFeature, num_values: int) -> nn.Embedding | HashedEmbedding:
            if shared is None:
                return nn.Embedding(num_values, config.dim)
            return HashedEmbedding(shared, feature, num_values, EMBEDDING_HASHES, config.embedding_rows)

        num_actions = len(config.actions)
        self.action = embedding(EmbeddingFeature.action, num_actions) if num_actions > 1 else None
        self.gap = embedding(EmbeddingFeature.gap, NUM_GAPS) if config.has_gap else None
        self.rating_range = config.rating_range
        self.rating = None if config.rating_range is None else nn.Parameter(torch.zeros(config.dim))
        features = config.event_features
        self.features = RowFeatureEncoder(features, config.dim) if features else None
        for table in (self.action, self.gap):
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.02)
        if self.rating is not None:
            nn.init.normal_(self.rating, std=0.02)

    def forward(
        self,
        item_vectors: Tensor,
        action: Tensor,
        gap: Tensor | None,
        rating: Tensor | None = None,
        features: EncodedRows | None = None,
    ) -> Tensor:
        """Embed events.

        Args:
            item_vectors: [..., M] vectors of the events' items.
            action: int64 [...].
            gap: int64 [...] buckets of `gap_bucket`; None leaves times out.
            rating: float32 [...], NaN if an event has none; None leaves ratings out.
            features: of the events, in all columns or the first ones; None leaves features out.

        Returns:
            [..., M].
        """
        x = item_vectors
        if self.action is not None:
            x = x + self.action(action)
        if self.gap is not None and gap is not None:
            x = x + self.gap(gap)
        if self.rating is not None and self.rating_range is not None and rating is not None:
            low, high = self.rating_range
            centered = (rating - (low + high) / 2) * (2 / (high - low) if low < high else 0.0)
            x = x + torch.nan_to_num(centered, nan=0.0).unsqueeze(-1).to(x.dtype) * self.rating
        if self.features is not None and features is not None:
            x = x + self.features(features)
        return x

    @property
    def hashed(self) -> list[HashedEmbedding]:
        """The embeddings that read `shared`."""
        return [table for table in (self.action, self.gap) if isinstance(table, HashedEmbedding)]

    def check_batch(self, features: EncodedRows | None) -> None:
        """Refuse a batch without the features that the encoder reads, since it would train without them silently.

        Args:
            features: of the batch's events.

        Raises:
            ValueError: if they lack features.
        """
        if self.features is not None and features is None:
            raise ValueError(
                "the batch has no features of events, which the model reads; give BatchSource encode_events"
            )

    def gap_vectors(self, gap: Tensor | None) -> Tensor | None:
        """[..., M] embeddings of request gaps int64 [...]; None if the model uses no times."""
        return None if self.gap is None or gap is None else self.gap(gap)


class RankingModel(nn.Module, Readings):
    """Base of VISTA and its baselines: all that the trainer knows about a model. `vista.model.registry` loads saved
    models of any architecture."""

    architecture: ClassVar[Architecture]
    """Of the models that the class builds."""
    user_parts: ClassVar[int] = 1
    """Number of vectors of width M that encode a user's features."""
    id_mask: Tensor | None
    """[1 + V] 0 for items with only features, else 1; None unless a table of shared rows (unified) has features."""
    config: RankingConfig
    item_statistics: Tensor
    """[1 + V, Z] of each model row as of the end of the training part (`ItemStatistics`). Only with `counted`, or
    with pooled vectors and tasks."""
    item_space: Tensor
    """float32 [1 + V, r] of all users (`ItemSpaces`), 0 for items that stage 1 was not trained on. Only with pooled
    vectors."""
    item_space_weights: Tensor | None
    """float32 [1 + V, A] of events in sums over the item space, by their action; None if all weigh the same."""
    item_rates: Tensor
    """float32 [1 + V, num_tasks] of all users (`ItemRates`). Only with pooled vectors and tasks."""
    transition_items: Tensor
    """int32 [1 + V, N] of `transitions`."""
    transition_weights: Tensor
    """float32 [1 + V, N]."""

    def __init__(self, config: RankingConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__()
        self.config = config
        self.schema = schema
        self.stage1 = Stage1Config.of(config, schema)
        """What summaries depend on, and of baselines, what event embeddings depend on."""
        self.items = items
        self.num_trained_items = len(items)
        self.data = data
        """How the training data were split, which decides what evaluation may use."""
        unified, retrieval = config.embedding_rows > 0, schema.has_retrieval
        self.sharded_table = self._drawn_shards()
        """The table whose rows of this rank `item_table` holds; None for a plain one, as exported models have."""
        sharded = self.sharded_table
        self.item_table = nn.Parameter(drawn_table(self.table_shape)) if sharded is None else sharded.weight
        """[1 + V, M], one row per item; or [1 + N, M / P], shared by items, actions, and gaps. Row 0 belongs to the
        unknown item. `id_vectors` reads either kind."""
        self.register_buffer("id_mask", torch.ones(1 + len(items)) if unified and schema.item_features else None)
        self.features = ItemFeatureEncoder(schema.item_features, config.dim) if schema.item_features else None
        self.encoder = EventEncoder(self.stage1, self.item_table if unified else None)
        columns, of_users = schema.request_features, schema.user_features
        self.request_encoder = RowFeatureEncoder(columns, config.dim) if columns else None
        self.user_encoder = RowFeatureEncoder(of_users, self.user_parts * config.dim) if of_users else None
        self.event_features: RowFeatureReader | None = None
        """How features of events are read, set before the first use; None for a model without them."""
        self.request_features: RowFeatureReader | None = None
        self.user_features: RowFeatureReader | None = None
        self.item_keys: ItemKeys | None = None
        """What events are counted as; the categories of items are set with their features. None without counters."""
        self.counted: CountedItemHead | None = None
        """Scores items that the user had before; None without counters, or if no items are ranked."""
        self.statistics: StatisticsTerm | None = None
        """Lets the scores of other items follow the items' statistics and the user's pooled vectors; None without
        both, or if no items are ranked."""
        width = num_sums = 0
        num_pooled = len(Pooled) if config.space_dim else 0
        if num_pooled:
            self.register_buffer("item_space", torch.zeros(1 + len(items), config.space_dim))
            has_weights = schema.residual_task is not None
            weights = torch.zeros(1 + len(items), len(schema.actions)) if has_weights else None
            self.register_buffer("item_space_weights", weights)
        if num_pooled and schema.tasks:
            self.register_buffer("item_rates", torch.zeros(1 + len(items), len(schema.tasks)))
            self._register_statistics()
        if (spec := self.stage1.counters) is not None:
            self.item_keys = item_keys(spec, schema, None, 1 + len(items))
            if isinstance(config, NextItemConfig) and retrieval:
                num_codes, width = spec.num_fields * spec.num_columns, num_statistics(has_time=schema.has_time)
                num_sums = NUM_SUMS if config.num_transitions else 0
                inputs = width + num_sums + num_pooled
                self.counted = CountedItemHead(num_codes, config.dim, inputs, config.counted_dropout)
                self._register_statistics()
                if num_sums:
                    shape = 1 + len(items), config.num_transitions
                    self.register_buffer("transition_items", torch.zeros(shape, dtype=torch.int32))
                    self.register_buffer("transition_weights", torch.zeros(shape))
        if retrieval and width + num_pooled:
            self.statistics = StatisticsTerm(config.dim, width, num_sums=num_sums, num_pooled=num_pooled)

    def _register_statistics(self) -> None:
        width = num_statistics(has_time=self.schema.has_time)
        self.register_buffer("item_statistics", torch.zeros(1 + len(self.items), width))

    def _drawn_shards(self) -> ShardedTable | None:
        """The item table, divided among the ranks of the job; None for a plain one."""
        if self.config.table is not TableKind.torchrec:
            return None
        from vista.model.sharded_table import ShardedTable  # needs an extra

        return ShardedTable.drawn(self.table_shape, self.config.table_precision)

    def item_vectors(self, rows: Tensor) -> Tensor:
        """[..., M] vectors of model rows int64 [...]; 0 for the unknown item."""
        return self.with_features(self.id_vectors(rows), rows)

    def with_features(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """The sum of `id_vectors` [..., M] and the features of model rows int64 [...]."""
        return vectors if self.features is None else vectors + self.features(rows)

    def id_vectors(self, rows: Tensor) -> Tensor:
        """[..., M] of model rows int64 [...], without their features; 0, with no gradient, for the unknown item. The
        table's gradient is sparse. A sharded table is read by all ranks together, in the same order."""
        config, sharded = self.config, self.sharded_table
        if not config.embedding_rows:
            if sharded is None:
                return F.embedding(rows, self.item_table, padding_idx=UNKNOWN_ITEM, sparse=True)
            return sharded.read(rows).masked_fill((rows == UNKNOWN_ITEM).unsqueeze(-1), 0.0)
        hashed = hashed_rows(rows, EmbeddingFeature.item, EMBEDDING_HASHES, config.embedding_rows)
        hashed.masked_fill_((rows == UNKNOWN_ITEM).unsqueeze(-1), UNKNOWN_ITEM)
        if sharded is None:
            vectors = gather(self.item_table, hashed)
        else:
            vectors = read_together(sharded.read, hashed, self.encoder.hashed)
        return vectors if self.id_mask is None else vectors * self.id_mask[rows].unsqueeze(-1)

    def request_vectors(self, gap: Tensor | None, rows: EncodedRows | None) -> Tensor | None:
        """[..., M] vectors of requests, which are added to their candidates; None if the model reads nothing of them.

        Args:
            gap: int64 [...] log buckets of the time from the newest event to the request; None without times.
            rows: features of the requests [...]; None for a model that reads none.
        """
        vectors = self.encoder.gap_vectors(gap)
        if self.request_encoder is None:
            return vectors
        features: Tensor = self.request_encoder(rows)
        return features if vectors is None else vectors + features

    def catalog_vectors(self) -> Tensor:
        """[V, M] vectors of the vocabulary's items, in the order of its rows (without the unknown item)."""
        return self.item_vectors(torch.arange(UNKNOWN_ITEM + 1, len(self.items) + 1, device=self.device))

    def retrieval_items(self, vectors: Tensor, rows: Tensor) -> Tensor:
        """What user vectors are multiplied with: [N, M'], unit vectors, then T s of the vectors s of the item space,
        T z of the statistics z, and 0 for each sum over transitions, as far as the model has them.

        Args:
            vectors: [N, M] item vectors.
            rows: int64 [N] their model rows.
        """
        parts = [F.normalize(vectors, dim=-1)]
        if self.config.space_dim:
            parts.append(self.temperature * self.item_space[rows])
        if self.counted is not None:
            parts.append(self.temperature * self.item_statistics[rows])
        return F.pad(torch.cat(parts, -1), (0, 0 if self.statistics is None else self.statistics.num_sums))

    @property
    def reads_item_values(self) -> bool:
        """Whether the model was trained with statistics of items: without anchors and tasks, training reads none."""
        return "item_statistics" in self._buffers and bool(self.item_statistics.any())

    def with_item_values(self, statistics: Float32s, rates: Float32s, labels: list[str]) -> Self:
        """The same model with other statistics and label rates of items, if it was trained with rates; it shares
        everything else.

        Args:
            statistics: float32 [1 + V, Z].
            rates: float32 [1 + V, T].
            labels: names of the T rates. If they lack a task of the model, it keeps the rates that it has.
        """
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        new = {"item_statistics": statistics}
        if (columns := rate_columns(self.schema.tasks, labels, self._buffers.get("item_rates"))) is not None:
            new["item_rates"] = rates[:, columns]
        for name, values in new.items():
            other._buffers[name] = torch.from_numpy(np.array(values, order="C")).to(self.device)
        return other

    def training_items(self, batch: Batch, vectors: Tensor) -> Tensor:
        """What losses multiply user vectors with: [R, …] of the items `batch.rows`, from their vectors [R, M].

        As `retrieval_items`, but with the vectors of all folds' spaces side by side, and without the statistics, which
        depend on the question.
        """
        unit = F.normalize(vectors, dim=-1)
        return unit if batch.spaces is None else torch.cat([unit, self.temperature * batch.spaces], -1)

    def retrieval_users(self, outputs: Tensor, pooled: Tensor | None = None) -> Tensor:
        """User vectors [..., M'] of outputs [..., M]: unit vectors, then the weighted sum of the pooled vectors, and
        weights of the statistics and of the sums over transitions, as far as the model has them.

        Their inner products with `retrieval_items`, divided by the temperature, are the scores of items that are not
        counted, less those of the sums (`transition_scores`).

        Args:
            pooled: float32 [..., J, r] of the requests, or [..., J, FOLDS * r] in training; None for a model without.
        """
        unit = F.normalize(outputs, dim=-1)
        return unit if self.statistics is None else self.statistics(unit, pooled)

    @property
    def transitions(self) -> TransitionTable | None:
        """The followers of the items; None for a model that reads none."""
        if self.statistics is None or not self.statistics.num_sums:
            return None
        return TransitionTable(self.transition_items, self.transition_weights)

    @property
    def feature_table(self) -> ItemFeatureTable | None:
        """The encoded features of the items; None for a model without features."""
        return None if self.features is None else self.features.table

    def take_catalog(self, other: RankingModel) -> None:
        """Take what is not a weight of a model with the same vocabulary: features, and the number of trained items."""
        for name in ROW_FEATURES:
            setattr(self, name, getattr(other, name))
        self.set_item_features(other.feature_table)
        self.num_trained_items = other.num_trained_items

    def set_item_features(self, table: ItemFeatureTable | None) -> None:
        """Set the encoded features of the items of the vocabulary; None for a model without features. Raises
        RuntimeError if they do not fit the model."""
        if self.features is not None:
            assert table is not None
            self.features.set_table(table, 1 + len(self.items))
        if (spec := self.counter_spec) is not None:
            self.item_keys = item_keys(spec, self.schema, table, 1 + len(self.items))

    def rows_with_features(self) -> NDArray[np.bool_] | None:
        """bool [1 + V]: model rows with a value in at least one column; None for a model without features."""
        return None if self.features is None else self.features.rows_with_values()

    @torch.no_grad()
    def zero_id_embeddings(self, rows: NDArray[np.int64]) -> None:
        """Zero the ID embeddings of model rows int64 [N], so that only features remain."""
        if self.id_mask is not None:
            self.id_mask[torch.from_numpy(rows).to(self.device)] = 0.0
        else:
            self.write_id_vectors(rows, torch.zeros(len(rows), self.item_table.shape[1]))

    @torch.no_grad()
    def write_id_vectors(self, rows: NDArray[np.int64], vectors: Tensor) -> None:
        """Replace rows int64 [N] of a table with one row per item by vectors [N, M]."""
        if self.sharded_table is not None:
            self.sharded_table.write_rows(torch.from_numpy(rows), vectors)
        else:
            self.item_table[torch.from_numpy(rows).to(self.device)] = vectors.to(self.item_table)

    @staticmethod
    def shown_vectors(events: BatchEvents, item_vectors: Tensor) -> Tensor:
        """[T, M] vectors of the items of a batch's events; 0 for items that training shows as unknown."""
        vectors = item_vectors[events.item]
        return vectors if events.hidden is None else vectors.masked_fill(events.hidden.unsqueeze(-1), 0.0)

    def losses(self, batch: Batch, item_vectors: Tensor, optim: OptimConfig) -> Losses:
        """All losses of one batch.

        Args:
            batch: from `vista.examples.batch_source`.
            item_vectors: [R, M] of the items `batch.rows`.
        """
        raise NotImplementedError

    def anchor_users(self, batch: Batch, item_vectors: Tensor) -> Tensor:
        """[NA, M'] user vectors of a batch's anchors, as in `losses`. Only with the retrieval head."""
        raise NotImplementedError

    def read_item_table(self, features: Columns) -> None:
        """Read item properties from the features of the model's items when training starts. Most models need none.
        Raises ConfigError if the features lack them."""

    def description(self) -> ModelDescription:
        """What config.json says about the model."""
        return ModelDescription(self.config, self.schema, self.data, self.num_trained_items)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        card: str | None = None,
        reference: str | None = None,
        weights_file: Path | None = None,
    ) -> None:
        """Write config.json, model.safetensors, the item vocabulary and, if given, a card as README.md, atomically.

        Args:
            folder: a model in it is replaced.
            reference: content of reference.json (`vista.evaluation.reference`).
            weights_file: a file on the same disk that already has the weights, and becomes model.safetensors.

        Raises:
            CheckpointError: if they cannot be written, for example because the disk is full, or if the folder holds
                something other than a model.
        """
        path = checked_path(folder, CheckpointError)
        write_model(self, path, card=card, reference=reference, weights_file=weights_file)

    def task_outputs(self) -> list[nn.Linear]:
        """The layers whose outputs add up to the logits of labeled tasks; only the first has a bias."""
        raise NotImplementedError

    @contextmanager
    def calibrated(self, calibration: Floats) -> Iterator[None]:
        """In this block, the logits of labeled tasks are scaled and shifted. `calibration`: float64 [num_tasks, 2]
        slope and shift of each task (`fit_calibration`); empty changes nothing."""
        layers = self.task_outputs() if len(calibration) else []
        slope, shift = torch.from_numpy(calibration).to(self.device).unbind(1)
        with restored(weight for layer in layers for weight in layer.parameters()):
            with torch.no_grad():
                for layer in layers:
                    layer.weight.copy_(layer.weight * slope[:, None])
                for layer in layers[:1]:
                    layer.bias.copy_(layer.bias * slope + shift)
            yield

    def save_serving_tables(self, folder: Path) -> None:
        """Write the tables that serving reads alongside the weights. Baselines have none."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read a folder of `save_pretrained`, in eval mode. No code from the folder is executed.

        Raises:
            CheckpointError: if the folder is missing, damaged, of another format, or of another architecture; if its
                config.json asks for a larger model than its weights are; or if a weight is not finite.
        """
        ModelDescription.read(Path(folder)).require(cls.architecture, Path(folder), cls.__name__)
        return cls.built(SavedModel.read(Path(folder))).to(device).eval()

    @classmethod
    def built(cls, saved: SavedModel) -> Self:
        """A model of what was read from its folder, whose arrays are its weights. Raises CheckpointError if its
        config.json asks for another model than its weights are, or for a larger one."""
        num_values = sum(weight.size for weight in saved.weights.values())
        described = saved.description
        too_large = CheckpointError(
            f"{saved.folder}/{WEIGHTS_FILE} does not fit its config.json, which asks for far more than its "
            f"{num_values} values; export the model again"
        )
        try:
            # The drawn weights are replaced at once, so the caller's random state must not advance.
            limit = AllocationLimit(4 * num_values + _SPARE_VALUES, too_large)
            with torch.random.fork_rng(devices=[]), limit, tables_from_file():
                model = cls(described.config, described.schema, saved.items, described.data)
            model.take_weights({name: torch.from_numpy(weight) for name, weight in saved.weights.items()})
            if (transitions := model.transitions) is not None:
                transitions.check()
            model.set_item_features(saved.features)
        except RuntimeError as error:
            raise does_not_fit(saved.folder, error) from error
        for name, reader in saved.readers.items():
            setattr(model, name, reader)
        model.num_trained_items = described.num_trained_items
        return model

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take all weights by name, as they are: a table stays mapped from its file, shared by all processes. Raises
        RuntimeError if they do not fit the model."""
        self.load_state_dict(weights, assign=True)
        for embedding in self.encoder.hashed:
            embedding.set_table(self.item_table)

    def rows_of(self, items: Vocabulary) -> NDArray[np.int64]:
        """Model rows int64 [len(items)] of all items of a log's vocabulary, in its order."""
        return self.item_rows(items.ids(np.arange(len(items))))

    def event_recoder(self, values: ColumnValues) -> Recode:
        """Features of a log's events with the model's codes; empty for a model that reads none. `values`:
        `EventLog.event_features` of the log."""
        if self.event_features is None:
            return lambda features, num_rows: RowFeatures({})
        return self.event_features.recoder(values)

    def encoded_events(self, features: RowFeatures, num_events: int) -> EncodedRows | None:
        """What `encoder` reads of features of T events with the model's codes; None for a model that reads none."""
        if self.event_features is None:
            return None
        encoded = self.event_features.encode(features, num_events)
        return encoded.apply(lambda part: torch.from_numpy(part).to(self.device))

    @property
    def retrieval_dim(self) -> int:
        """M', the width of user and item vectors of the retrieval head."""
        if (term := self.statistics) is None:
            return self.config.dim
        return self.config.dim + self.config.space_dim + term.weight.out_features - term.num_pooled

    def replicated(self) -> Iterator[Tensor]:
        """Parameters and buffers that all ranks hold: all but a sharded table."""
        sharded = None if self.sharded_table is None else self.item_table
        return (t for t in (*self.parameters(), *self.buffers()) if t is not sharded)

    @property
    def table_shape(self) -> torch.Size:
        """Shape of the whole item table, of which `item_table` may have only some rows."""
        rows, dim = self.config.embedding_rows, self.config.dim
        return torch.Size((1 + rows, dim // EMBEDDING_HASHES) if rows else (1 + len(self.items), dim))

    @property
    def device(self) -> torch.device:
        return self.item_table.device
