"""Indexes over item vectors: what they find, that builds repeat, and that damaged files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import run_python
from vista.arrays import Float32s
from vista.config.choices import IndexKind
from vista.errors import ItemIndexError, ItemIndexMismatchError
from vista.model import item_index
from vista.model.item_index import FLAT_ITEMS, ItemIndex, kind_for
from vista.model.item_index_manifest import MANIFEST_FILE, ItemIndexManifest
from vista.model.model_description import checksum_of

DIM, NUM_ITEMS = 17, 4000
KINDS = [kind.value for kind in IndexKind]


def unit_vectors(count: int, seed: int) -> Float32s:
    """Vectors whose spectrum falls as that of trained ones does."""
    drawn = np.random.default_rng(seed).normal(size=(count, DIM)) * np.arange(1, DIM + 1) ** -0.5
    vectors: Float32s = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return vectors


def table_of(vectors: Float32s) -> Tensor:
    return torch.cat([torch.zeros(1, vectors.shape[1]), torch.from_numpy(vectors)])


def expected(table: Tensor, user: Tensor, count: int, allowed: np.ndarray | None = None) -> list[int]:
    """The nearest rows by a full sort in float64."""
    scores = (table.double() @ user.double()).numpy()
    scores[0] = -np.inf
    if allowed is not None:
        scores[~allowed] = -np.inf
    return [row for row in np.argsort(-scores, kind="stable")[:count].tolist() if np.isfinite(scores[row])]


@pytest.fixture(scope="module")
def vectors() -> Float32s:
    return unit_vectors(NUM_ITEMS, 0)


@pytest.fixture(scope="module")
def table(vectors: Float32s) -> Tensor:
    return table_of(vectors)


@pytest.fixture(scope="module")
def users() -> Tensor:
    return torch.from_numpy(unit_vectors(20, 1))


@pytest.fixture(scope="module", params=KINDS)
def index(request: pytest.FixtureRequest, vectors: Float32s) -> ItemIndex:
    if request.param != "flat":
        pytest.importorskip("faiss")
    return ItemIndex.build(vectors, IndexKind(request.param))


def test_flat_is_exact(table: Tensor, vectors: Float32s, users: Tensor) -> None:
    index = ItemIndex.build(vectors, IndexKind.flat)
    for user in users:
        assert index.nearest(table, user, 30).tolist() == expected(table, user, 30)


def test_recall(index: ItemIndex, table: Tensor, users: Tensor) -> None:
    found = [np.isin(expected(table, user, 50), index.nearest(table, user, 50)).mean() for user in users]
    assert np.mean(found) == pytest.approx(index.recall(table, users.numpy(), 50), abs=0.002)
    assert np.mean(found) >= (1 if index.manifest.kind is IndexKind.flat else 0.95)


@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
def test_a_filter_leaves_as_many_as_are_asked_for(
    index: ItemIndex, table: Tensor, users: Tensor, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = np.random.default_rng(2).random(NUM_ITEMS + 1) < share
    allowed[0] = False
    for least in (0, NUM_ITEMS):  # by the index, or by comparing all that are allowed
        monkeypatch.setattr(index, "_least_searched", lambda least=least: least)
        shares = []
        for user in users:
            rows = index.nearest(table, user, 40, allowed)
            assert allowed[rows].all() and len(set(rows.tolist())) == 40
            shares.append(np.isin(expected(table, user, 40, allowed), rows).mean())
        assert np.mean(shares) >= (1 if least else 0.9)


def test_filters_that_allow_little_or_nothing(index: ItemIndex, table: Tensor, users: Tensor) -> None:
    allowed = np.zeros(NUM_ITEMS + 1, np.bool_)
    assert index.nearest(table, users[0], 10, allowed).tolist() == []
    allowed[[7, 3999]] = True
    assert index.nearest(table, users[0], 10, allowed).tolist() == expected(table, users[0], 2, allowed)


def test_more_than_all_items(index: ItemIndex, table: Tensor, users: Tensor) -> None:
    rows = index.nearest(table, users[0], 2 * NUM_ITEMS)
    assert len(rows) <= NUM_ITEMS and 0 not in rows and len(set(rows.tolist())) == len(rows)


def test_the_popularity_is_scaled(vectors: Float32s, users: Tensor) -> None:
    """The last entry of items is large, and that of users small, as with `model.popularity`."""
    pytest.importorskip("faiss")
    popularity = np.random.default_rng(3).normal(size=(NUM_ITEMS, 1)).astype(np.float32)
    table = table_of(np.concatenate([vectors, popularity], 1))
    queries = torch.cat([users, torch.full((len(users), 1), 0.05)], 1)
    for kind in (IndexKind.hnsw, IndexKind.ivfpq):
        index = ItemIndex.build(table[1:].numpy(), kind, last_scale=0.05)
        found = [np.isin(expected(table, user, 50), index.nearest(table, user, 50)).mean() for user in queries]
        assert np.mean(found) >= 0.9


def test_two_builds_have_the_same_bytes(index: ItemIndex, vectors: Float32s, tmp_path: Path) -> None:
    index.save(tmp_path / "one")
    ItemIndex.build(vectors, index.manifest.kind).save(tmp_path / "two")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("kind", [IndexKind.hnsw, IndexKind.ivfpq])
def test_items_that_are_added_in_parts_are_all_found(
    table: Tensor, vectors: Float32s, users: Tensor, monkeypatch: pytest.MonkeyPatch, kind: IndexKind
) -> None:
    pytest.importorskip("faiss")
    whole = ItemIndex.build(vectors, kind)
    monkeypatch.setattr(item_index, "ADDED_AT_ONCE", 999)
    parts = ItemIndex.build(vectors, kind)
    if kind is IndexKind.ivfpq:  # whose items do not depend on each other
        same = [np.isin(parts.nearest(table, user, 50), whole.nearest(table, user, 50)).mean() for user in users]
        assert np.mean(same) > 0.98
    found = [np.isin(expected(table, user, 50), parts.nearest(table, user, 50)).mean() for user in users]
    assert np.mean(found) > 0.9


def test_a_saved_index_finds_the_same(index: ItemIndex, table: Tensor, users: Tensor, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")  # replaces itself
    loaded = ItemIndex.load(tmp_path / "index")
    loaded.require(table, "index")
    for user in users:
        assert np.array_equal(loaded.nearest(table, user, 20), index.nearest(table, user, 20))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_later_items_are_found(index: ItemIndex, vectors: Float32s, users: Tensor) -> None:
    table = table_of(np.concatenate([vectors, users.numpy()]))
    index.require(table, "index")
    for number, user in enumerate(users):
        assert index.nearest(table, user, 5)[0] == NUM_ITEMS + 1 + number
        allowed = np.ones(len(table), np.bool_)
        allowed[NUM_ITEMS + 1 + number] = False
        assert NUM_ITEMS + 1 + number not in index.nearest(table, user, 5, allowed)


def test_another_model_is_refused_and_rounding_is_not(index: ItemIndex, vectors: Float32s) -> None:
    noise = np.random.default_rng(4).normal(size=vectors.shape).astype(np.float32)
    index.require(table_of(vectors + 1e-6 * noise), "best.index")
    message = r"best.index: belongs to another model, whose vectors differ in [34],"
    with pytest.raises(ItemIndexMismatchError, match=message):
        index.require(table_of(unit_vectors(NUM_ITEMS, 5)), "best.index")
    one = vectors.copy()
    one[77] = -one[77]
    with pytest.raises(ItemIndexMismatchError, match="differ in 1 of 4,000 items"):
        index.require(table_of(one), "best.index")
    for other in (vectors[:-1], vectors[:, :-1]):
        with pytest.raises(ItemIndexMismatchError, match="belongs to another model, of at least 4,000 items"):
            index.require(table_of(other), "best.index")


def test_no_items() -> None:
    for kind in IndexKind:
        index, table = ItemIndex.build(np.zeros((0, DIM), np.float32), kind), torch.zeros(1, DIM)
        index.require(table, "index")
        assert index.nearest(table, torch.ones(DIM), 10).tolist() == []
        assert index.recall(table, np.zeros((0, DIM), np.float32), 10) == 1


def test_an_empty_index_is_read_back(tmp_path: Path) -> None:
    ItemIndex.build(np.zeros((0, DIM), np.float32), IndexKind.hnsw).save(tmp_path / "index")
    assert ItemIndex.load(tmp_path / "index").num_items == 0


def test_damage_is_a_typed_error(index: ItemIndex, tmp_path: Path) -> None:
    """Every file truncated, emptied, removed, and with flipped bits."""
    folder, rng = tmp_path / "index", np.random.default_rng(6)
    index.save(folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        changes = [content[:-2], b"", content + b"\0"]
        for place in rng.integers(0, len(content), 20).tolist():
            flipped = content[place] ^ (1 << int(rng.integers(8)))
            changes.append(content[:place] + bytes([flipped]) + content[place + 1 :])
        for change in changes:
            path.write_bytes(change)
            with pytest.raises(ItemIndexError, match=r"no readable index|this version of vista reads"):
                ItemIndex.load(folder)
        path.unlink()
        with pytest.raises(ItemIndexError, match="no readable index"):
            ItemIndex.load(folder)
        path.write_bytes(content)
    ItemIndex.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 3999}, "holds"),
        ({"dim": 16}, "holds|index"),
        ({"kind": "tree"}, "kind"),
        ({"last_scale": 0.0}, "last_scale"),
        ({"files": {}}, "files"),
        ({"format_version": 2}, "format 2"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(
    vectors: Float32s, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    pytest.importorskip("faiss")
    ItemIndex.build(vectors, IndexKind.hnsw).save(tmp_path / "index")
    file = tmp_path / "index" / MANIFEST_FILE
    fields = json.loads(file.read_text()) | change
    file.write_text(json.dumps(fields | {"checksum": checksum_of(fields)}))
    with pytest.raises(ItemIndexError, match=message):
        ItemIndex.load(tmp_path / "index")


def test_a_failed_write_leaves_the_old_index(
    vectors: Float32s, table: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ItemIndex.build(vectors[:100], IndexKind.flat).save(tmp_path / "index")

    def full(manifest: ItemIndexManifest, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ItemIndexManifest, "write", full)
    with pytest.raises(ItemIndexError, match=r"could not be written .*No space left.*free space"):
        ItemIndex.build(vectors, IndexKind.flat).save(tmp_path / "index")
    assert ItemIndex.load(tmp_path / "index").num_items == 100
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


# In a process of its own: a forked child could wait for a lock of MKL that an ending thread held.
DIE_WHILE_WRITING = """
import os, sys
import numpy as np
from vista.config.choices import IndexKind
from vista.model.item_index import ItemIndex
from vista.model.item_index_manifest import ItemIndexManifest

ItemIndexManifest.write = lambda manifest, partial: os._exit(9)
ItemIndex.build(np.load(sys.argv[2]), IndexKind.flat).save(sys.argv[1])
"""


def test_a_killed_write_leaves_the_old_index_and_is_repeated(vectors: Float32s, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    ItemIndex.build(vectors[:100], IndexKind.flat).save(folder)
    np.save(tmp_path / "vectors.npy", vectors)
    died = run_python(DIE_WHILE_WRITING, str(folder), str(tmp_path / "vectors.npy"))
    (tmp_path / "vectors.npy").unlink()
    assert died.returncode == 9, died.stderr
    assert len(list(tmp_path.iterdir())) == 2  # the index, and what the process left
    assert ItemIndex.load(folder).num_items == 100
    ItemIndex.build(vectors, IndexKind.flat).save(folder)
    assert ItemIndex.load(folder).num_items == NUM_ITEMS
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_other_folders_and_files_are_not_replaced(vectors: Float32s, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for name in ("model", "file"):
        with pytest.raises(ItemIndexError, match="something other than an index"):
            ItemIndex.build(vectors, IndexKind.flat).save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    ItemIndex.build(vectors, IndexKind.flat).save(tmp_path / "empty")


def test_the_kind_follows_the_number_of_items() -> None:
    assert kind_for(0) is kind_for(FLAT_ITEMS) is IndexKind.flat
    assert kind_for(FLAT_ITEMS + 1) is kind_for(10**8) is IndexKind.ivfpq
