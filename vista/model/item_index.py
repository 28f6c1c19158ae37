"""An index over the vectors of a model's items: the items with the largest inner products with a user vector.

A request for next items ranks by these inner products (`RankingModel.retrieval_items`), so an index finds what a scan
of all items would. The scores that it ranks by are exact, because they are computed from the model's own table.
Letters: V items of the model, N items of the index, M' width of retrieval vectors.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Float32s, Int
from vista.config.checks import IndexKind
from vista.errors import ItemIndexError, ItemIndexMismatchError
from vista.files import TABLE, check_fields, checked_path, hexadecimal, one_of, read_limited, replaced_folder, whole
from vista.model.codebooks import load_faiss, one_thread
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.model.saved_model import INDEX_MANIFEST, FileEntry, checksum_of
from vista.progress_bar import elapsed_time, progress_bar, ticking

# index.json of an item index: what it is, and the digests of its files.

FORMAT_VERSION = 2
MANIFEST_FILE, CHECK_FILE, FAISS_FILE = INDEX_MANIFEST, "item_check.npy", "items.faiss"
MAX_BYTES = 1 << 16
"""Of index.json."""
_RULES = {
    "format_version": whole(),
    "kind": one_of(*(kind.value for kind in IndexKind)),
    "num_items": whole(),
    "dim": whole(least=1, most=1 << 20),
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
            "files": {name: asdict(entry) for name, entry in files.items()},
        }
        text = json.dumps(fields | {"checksum": checksum_of(fields)}, indent=2)
        (folder / MANIFEST_FILE).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ItemIndexManifest:
        """Read index.json from a folder, and compare the other files with their digests. Raises ItemIndexError if a
        file is missing or damaged, or the index is of another format."""
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
        return cls(kind, fields["num_items"], fields["dim"], entries)

    @staticmethod
    def require_replaceable(folder: Path) -> None:
        """Require that a folder is an index, is empty, or does not exist. Raises ItemIndexError if it holds something
        else, or is a file."""
        if not folder.exists():
            return
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file()):
            raise ItemIndexError(
                f"{folder}: is something other than an index, and would be replaced; name another folder with out=…"
            )


def unreadable_index(folder: Path, error: Exception) -> ItemIndexError:
    """The error for a folder whose files are missing or damaged."""
    return ItemIndexError(f"{folder}: no readable index ({error}); write it with `vista index model=…`")


FLAT_ITEMS = 50_000
"""Most items for which `flat` is chosen. Beyond, `ivfpq` is as fast as `hnsw` at the same recall, is built in half the
time, and takes a tenth of the memory."""
NUM_LINKS, BUILD_EFFORT, SEARCH_EFFORT = 32, 80, 250
"""HNSW: links per node (twice as many on the lowest level), and the sizes of the lists of a build and of a search."""
POINTS_PER_LIST = 64
"""IVF-PQ: items per list that training reads. There are √N lists: at the same recall, more of them cost as much or more
time per search (docs/research-log.md)."""
PROBED_FACTOR, PROBED_POWER = 10.5, 0.4
"""IVF-PQ: of L lists, a search reads 10.5 L^0.4. Recall@100 is 0.967 among 10^5 items (105 of 316 lists), and 0.955
among 10^6 (167 of 1,000; docs/research-log.md)."""
NUM_COMPARED = 4
"""IVF-PQ: number of items that are found by their codes and compared exactly, per item that a search returns."""
ADDED_AT_ONCE = 1 << 16
"""Items between two steps of the progress bar of a build."""
SEED = 1234
TOLERANCE = 1e-4
"""Largest difference of inner products of unit vectors between processors."""


class ItemIndex:
    """The first N items of a model, and how to find the nearest of them. Thread-safe.

    Args:
        manifest: what the index is.
        check: float32 [N] from `_check_values`, which tells whether a table is the one that was indexed.
        index: of faiss; None if flat.
    """

    def __init__(self, manifest: ItemIndexManifest, check: Float32s, index: Any) -> None:
        self.manifest = manifest
        self.check = check
        self._index = index

    @property
    def num_items(self) -> int:
        """N."""
        return self.manifest.num_items

    @classmethod
    def build(cls, vectors: Float32s, kind: IndexKind | None = None) -> ItemIndex:
        """Build an index in memory, in one thread. The same vectors give the same index.

        Args:
            vectors: [N, M'] of the items, in the order of the vocabulary.
            kind: None chooses by N; without items, it is flat.

        Raises:
            MissingDependencyError: faiss is not installed, and the kind is not flat.
        """
        count, dim = vectors.shape
        kind = kind_for(count) if kind is None or not count else kind
        manifest = ItemIndexManifest(kind, count, dim)
        check = _check_values(torch.from_numpy(vectors)).numpy()
        if kind is IndexKind.flat:
            return cls(manifest, check, None)
        vectors = np.ascontiguousarray(vectors)
        return cls(manifest, check, (_hnsw if kind is IndexKind.hnsw else _ivfpq)(vectors))

    def save(self, folder: str | Path) -> None:
        """Write the index atomically; an index in the folder is replaced. Raises ItemIndexError if it cannot be
        written, or the folder holds something other than an index."""
        folder = checked_path(folder, ItemIndexError)
        ItemIndexManifest.require_replaceable(folder)
        try:
            with replaced_folder(folder) as partial:
                np.save(partial / CHECK_FILE, self.check, allow_pickle=False)
                if self._index is not None:
                    faiss = load_faiss()
                    faiss.write_index(self._index, str(partial / FAISS_FILE))
                self.manifest.write(partial)
        except (OSError, RuntimeError) as error:  # faiss raises a RuntimeError if the disk is full
            raise ItemIndexError(
                f"{folder}: the index could not be written ({error}); free space or correct the permissions, then try "
                "again"
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> ItemIndex:
        """Map the files of a folder of `save`, after comparing them with their digests.

        Raises:
            ItemIndexError: the folder is missing, damaged, or in another format.
            MissingDependencyError: faiss is not installed, and the kind is not flat.
        """
        folder = checked_path(folder, ItemIndexError)
        manifest = ItemIndexManifest.read(folder)
        try:
            check = np.load(folder / CHECK_FILE, allow_pickle=False)
            if check.shape != (manifest.num_items,) or check.dtype != np.float32:
                raise ValueError(f"{CHECK_FILE} holds {check.dtype} {check.shape}")
            index = None
            if FAISS_FILE in manifest.files:
                faiss = load_faiss()
                index = faiss.read_index(str(folder / FAISS_FILE), faiss.IO_FLAG_MMAP_IFC)
                if (index.ntotal, index.d) != (manifest.num_items, manifest.dim):
                    raise ValueError(f"{FAISS_FILE} holds {index.ntotal} vectors of {index.d} numbers")
        except (OSError, ValueError, RuntimeError) as error:
            raise unreadable_index(folder, error) from error
        return cls(manifest, check, index)

    def require(self, table: Tensor | Float32s, name: str) -> None:
        """Require that the index was built from the first rows of a model's table [1 + V, M'].

        Args:
            table: `ItemProjections.retrieval`.
            name: of the index, for the error.

        Raises:
            ItemIndexMismatchError: it was not.
        """
        table = torch.as_tensor(table)
        vectors = table[UNKNOWN_ITEM + 1 :][: self.num_items]
        if vectors.shape != (self.num_items, self.manifest.dim):
            raise ItemIndexMismatchError(
                f"{name}: belongs to another model, of at least {self.num_items:,} items with vectors of "
                f"{self.manifest.dim} numbers, not {len(table) - 1:,} with {table.shape[1]}; run `vista index model=…` "
                "for the model in service"
            )
        wrong = (_check_values(vectors) - torch.from_numpy(self.check).to(table.device)).abs() > TOLERANCE
        if wrong.any():
            raise ItemIndexMismatchError(
                f"{name}: belongs to another model, whose vectors differ in {int(wrong.sum()):,} of "
                f"{self.num_items:,} items; run `vista index model=…` for the model in service"
            )

    def nearest(
        self, table: Tensor | Float32s, user: Tensor | Float32s, count: int, allowed: NDArray[np.bool_] | None = None
    ) -> Int:
        """Model rows of the nearest items, at most `count`, best first; the result does not depend on other calls.

        Items of the table that the index lacks, because they were added to the model later, are all compared.

        Args:
            table: [1 + V, M'], which `require` accepts.
            user: [M'] a user vector.
            count: at least 1.
            allowed: bool [1 + V]: rows that may be returned; None allows all.
        """
        table = torch.as_tensor(table)
        user = torch.as_tensor(user, device=table.device)
        if self._index is None:
            if allowed is not None:
                return _best(table, user, torch.from_numpy(np.flatnonzero(allowed)), count)
            scores = torch.mv(table, user)
            scores[UNKNOWN_ITEM] = -math.inf
            rows: Int = scores.topk(min(count, len(scores) - 1)).indices.cpu().numpy()
            return rows
        later = np.arange(self.num_items + 1, len(table))
        if allowed is not None:
            later = later[allowed[later]]
            num_allowed = int(allowed[: self.num_items + 1].sum())
            if num_allowed <= max(count, self._least_searched()):
                return _best(table, user, torch.from_numpy(np.flatnonzero(allowed)), count)
        found = self._search(user.cpu().numpy()[None], count, allowed)
        return _best(table, user, torch.from_numpy(np.concatenate([found, later])), count)

    def _least_searched(self) -> int:
        """Number of allowed items up to which comparing all of them costs less than a search. A search must look at
        num_items / allowed times as many items as without a filter, to find as many allowed ones."""
        return int(math.sqrt(SEARCH_EFFORT * 20 * self.num_items))

    def _search(self, query: Float32s, count: int, allowed: NDArray[np.bool_] | None) -> Int:
        """Model rows of about the nearest `count` items (IVF-PQ: a few times as many) of a query [1, M']."""
        faiss = load_faiss()
        options: dict[str, Any] = {}
        effort = 1.0
        if allowed is not None:
            part = allowed[UNKNOWN_ITEM + 1 : self.num_items + 1]
            bits = np.packbits(part, bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(len(part), faiss.swig_ptr(bits))
            effort = len(part) / max(int(part.sum()), 1)
        if self.manifest.kind is IndexKind.hnsw:
            size = min(int(max(SEARCH_EFFORT, count) * effort), self.num_items)
            parameters = faiss.SearchParametersHNSW(efSearch=size, **options)
        else:
            num_lists = self._index.nlist
            probed = math.ceil(PROBED_FACTOR * num_lists**PROBED_POWER * effort)
            parameters = faiss.SearchParametersIVF(nprobe=min(probed, num_lists), **options)
            count *= NUM_COMPARED
        with one_thread(faiss):
            rows = self._index.search(query, min(count, self.num_items), params=parameters)[1][0]
        found: Int = rows[rows >= 0] + (UNKNOWN_ITEM + 1)
        return found

    def recall(self, table: Tensor | Float32s, queries: Float32s, count: int) -> float:
        """Share of the exact nearest `count` items of queries [Q, M'] that the index finds; 1 if it is exact."""
        shares = []
        exact = ItemIndex(self.manifest, self.check, None)
        for query in progress_bar(torch.from_numpy(queries), desc="recall", unit="query"):
            wanted = exact.nearest(table, query, count)
            shares.append(np.isin(wanted, self.nearest(table, query, count)).mean())
        return float(np.mean(shares)) if shares else 1.0


def kind_for(num_items: int) -> IndexKind:
    """The kind that suits a number of items."""
    return IndexKind.flat if num_items <= FLAT_ITEMS else IndexKind.ivfpq


def _best(table: Tensor, user: Tensor, rows: Tensor, count: int) -> Int:
    scores = torch.mv(table.index_select(0, rows.to(table.device)), user)
    best: Int = rows[scores.topk(min(count, len(rows))).indices.cpu()].numpy()
    return best


def _check_values(vectors: Tensor) -> Tensor:
    """float32 [N]: the products of vectors [N, M'] with a fixed vector of length 1, in which no two entries are alike.
    They tell vectors of different models apart, but not those that two processors compute."""
    direction = torch.arange(1, vectors.shape[1] + 1, dtype=torch.float64).sqrt().frac() - 0.5
    direction = (direction / direction.norm()).float().to(vectors.device)
    return torch.mv(vectors, direction)


def _hnsw(vectors: Float32s) -> Any:
    faiss = load_faiss()
    index = faiss.IndexHNSWFlat(vectors.shape[1], NUM_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_EFFORT
    with one_thread(faiss):
        _add(index, vectors)
    return index


def _ivfpq(vectors: Float32s) -> Any:
    faiss = load_faiss()
    count, dim = vectors.shape
    num_lists = max(1, min(math.isqrt(count), count // POINTS_PER_LIST))
    # 4 bits per number of the difference from the center of the list.
    index = faiss.index_factory(dim, f"IVF{num_lists},PQ{dim}x4fsr", faiss.METRIC_INNER_PRODUCT)
    for parameters in (index.cp, index.pq.cp):
        parameters.seed, parameters.min_points_per_centroid = SEED, 1
    sample = np.random.default_rng(SEED).permutation(count)[: max(POINTS_PER_LIST * num_lists, 16_384)]
    with one_thread(faiss):
        with elapsed_time("train the index"):
            index.train(vectors[np.sort(sample)])
        _add(index, vectors)
    return index


def _add(index: Any, vectors: Float32s) -> None:
    with progress_bar(total=len(vectors), desc="index", unit="item", unit_scale=True) as bar, ticking(bar):
        for low in range(0, len(vectors), ADDED_AT_ONCE):
            part = vectors[low : low + ADDED_AT_ONCE]
            index.add(part)
            bar.update(len(part))
