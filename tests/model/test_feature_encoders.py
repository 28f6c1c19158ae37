"""Vectors of features of items and of rows, against a plain reading in float64, and their tables and readers."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.arrays import offsets_of
from vista.errors import ConfigError
from vista.log.features import Column, Columns, selected
from vista.log.histories import RowFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.feature_encoders import ItemFeatureEncoder, RowFeatureEncoder
from vista.model.features import MAX_ABS_SCORE, FeatureSpec, HashedVocabulary, RowFeatureReader
from vista.model.item_feature_table import ItemFeatureTable

DIM, NUM_ITEMS, WIDTH = 6, 9, 3
GENRES = ["comedy", "drama", "war"]


def category(values: list[list[int]]) -> Column:
    """A column of GENRES, by codes per item."""
    counts = np.array([len(codes) for codes in values], np.int64)
    codes = np.array([code for item in values for code in sorted(item)], np.int32)
    return Column(codes, Vocabulary.from_ids(GENRES), offsets_of(counts))


@st.composite
def drawn_item_features(draw: st.DrawFn) -> Columns:
    codes = st.lists(st.integers(0, len(GENRES) - 1), max_size=3, unique=True)
    number = st.one_of(st.just(math.nan), st.floats(-1e6, 1e6, width=32))
    vector = st.one_of(st.just([math.nan] * WIDTH), st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3))
    n = NUM_ITEMS
    columns = {
        "genres": category(draw(st.lists(codes, min_size=n, max_size=n))),
        "price": Column(np.array(draw(st.lists(number, min_size=n, max_size=n)), np.float32)),
        "text": Column(np.array(draw(st.lists(vector, min_size=n, max_size=n)), np.float32)),
    }
    names = draw(st.lists(st.sampled_from(list(columns)), min_size=1, unique=True))
    return {name: columns[name] for name in names}


def encoder_of(features: Columns, seed: int = 0) -> tuple[ItemFeatureEncoder, list[FeatureSpec]]:
    """A float64 encoder with drawn weights."""
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    made = ItemFeatureEncoder(columns, DIM).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    made.set_table(ItemFeatureTable.of(features, columns), 1 + NUM_ITEMS)
    return made, columns


def plain_vector(features: Columns, columns: list[FeatureSpec], encoder: ItemFeatureEncoder, item: int) -> np.ndarray:
    """The vector of an item, one value after the other."""
    values = encoder.values.detach().numpy()
    dense = np.zeros((0, DIM)) if encoder.dense is None else encoder.dense.detach().numpy()
    out, first, place = np.zeros(DIM), 0, 0
    for column in columns:
        given = features[column.name]
        if given.kind == "category":
            codes = given.data[given.offsets[item] : given.offsets[item + 1]]
            out += values[first + 1 + codes].mean(0) if len(codes) else values[first]
        elif given.kind == "number":
            number = float(given.data[item])
            if math.isnan(number):
                out += values[first]
            else:
                out += values[first + 1 + sum(number > bound for bound in column.bounds)]
                score = np.float32(np.clip((number - column.mean) / column.scale, -MAX_ABS_SCORE, MAX_ABS_SCORE))
                out += score * dense[place]
        else:
            vector = given.data[item].astype(np.float64)
            if math.isnan(vector[0]):
                out += values[first]
            else:
                out += vector / column.scale @ dense[place : place + WIDTH]
        first, place = first + column.num_rows, place + column.num_dense
    return out


@settings(max_examples=25, deadline=None)
@given(features=drawn_item_features(), rows=st.lists(st.integers(0, NUM_ITEMS), max_size=12))
def test_vectors_are_those_of_a_plain_reading(features: Columns, rows: list[int]) -> None:
    encoder, columns = encoder_of(features)
    asked = torch.tensor(rows, dtype=torch.int64)
    out = encoder(asked).detach().numpy()
    assert out.shape == (len(rows), DIM)
    expected = [plain_vector(features, columns, encoder, row - 1) if row else np.zeros(DIM) for row in rows]
    np.testing.assert_allclose(out, np.array(expected).reshape(-1, DIM), rtol=1e-6, atol=1e-5)
    with torch.inference_mode():
        np.testing.assert_allclose(encoder.eval()(asked).numpy(), out, rtol=1e-6, atol=1e-9)
    known = [any(column.is_known[item] for column in features.values()) for item in range(NUM_ITEMS)]
    assert encoder.rows_with_values().tolist() == [False, *known]


def test_rows_of_any_shape() -> None:
    encoder, _ = encoder_of({"price": Column(np.arange(NUM_ITEMS, dtype=np.float32))})
    rows = torch.arange(1 + NUM_ITEMS).view(2, 5)
    assert torch.equal(encoder(rows), encoder(rows.flatten()).view(2, 5, DIM))
    assert encoder(rows[:0]).shape == (0, 5, DIM)


def test_the_gradient_of_the_embeddings_is_sparse_and_right() -> None:
    features = {"genres": category([[0, 2], [1], [], [0], [1, 2], [2], [], [0, 1, 2], [1]])}
    encoder, _ = encoder_of(features)
    encoder(torch.tensor([1, 1, 3])).sum().backward()  # items 0, 0, and 2
    gradient = encoder.values.grad
    assert gradient is not None and gradient.is_sparse
    expected = np.zeros((4, DIM))  # missing, comedy, drama, war
    expected[0], expected[1], expected[3] = 1, 1, 1
    np.testing.assert_allclose(gradient.to_dense().numpy(), expected)


def test_numbers_have_buckets_of_equal_size() -> None:
    feature = FeatureSpec.of("price", Column(np.arange(6400, dtype=np.float32)))
    bucket = np.searchsorted(np.array(feature.bounds), np.arange(6400), side="left")
    assert feature.size == 32 and np.ptp(np.bincount(bucket)) <= 2
    few = FeatureSpec.of("price", Column(np.array([3] * 60 + [7] * 4 + [np.nan], np.float32)))
    assert (few.bounds, few.size) == ([3.0], 2)
    same = FeatureSpec.of("price", Column(np.full(5, 2, np.float32)))
    assert (same.bounds, same.size, same.mean, same.scale) == ([], 1, 2, 1)
    assert FeatureSpec.of("price", Column(np.full(5, np.nan, np.float32))).size == 1


def test_vectors_are_scaled_to_length_one() -> None:
    vectors = np.array([[3, 4], [np.nan, np.nan], [0, 5]], np.float32)
    assert FeatureSpec.of("text", Column(vectors)) == FeatureSpec("text", "vector", 2, scale=5.0)
    assert FeatureSpec.of("text", Column(np.zeros((2, 4), np.float32))).scale == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "colour"}, "kind must be one of"),
        ({"size": 0}, "size must be at least 1"),
        ({"scale": 0.0}, "mean, scale, and bounds must be finite"),
        ({"mean": 10**400}, "mean, scale, and bounds must be finite"),
        ({"bounds": 5}, "bounds must be a list"),
        ({"bounds": [1.0]}, "other kinds take none"),
        ({"kind": "number", "size": 3, "bounds": [2.0, 1.0]}, "bounds must ascend"),
        ({"name": ""}, "a feature's name must be a non-empty string"),
        ({"kind": "number", "size": 3, "bounds": [1.0]}, "a number needs size - 1 bounds"),
    ],
)
def test_impossible_columns_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureSpec(**{"name": "x", "kind": "category", "size": 2} | change)  # type: ignore[arg-type]


def test_a_saved_table_is_the_same(tmp_path: Path) -> None:
    features = {"genres": category([[0, 2], [], [1]]), "price": Column(np.float32([1, np.nan, 3]))}
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    table = ItemFeatureTable.of(features, columns)
    table.save(tmp_path)
    loaded = ItemFeatureTable.load(tmp_path, columns)
    assert table.content(4) == loaded.content(4) and table.content(3) != table.content(4)
    assert loaded.values["genres"].ids([0, 1, 2]).tolist() == GENRES
    assert table.offsets.tolist() == [0, 0, 3, 5, 7] and table.dense.shape == (4, 1)


def test_the_keys_of_a_category_do_not_depend_on_the_other_columns() -> None:
    brand = [[1], [], [0], [2], [2], [], [0], [1], [2]]
    features = {
        "genres": category([[0, 2], [1], [], [0], [1, 2], [2], [], [0, 1, 2], [1]]),
        "price": Column(np.arange(NUM_ITEMS, dtype=np.float32)),
        "brand": category(brand),
        "text": Column(np.ones((NUM_ITEMS, 2), np.float32)),
        "topic": category(brand[::-1]),
    }
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    table = ItemFeatureTable.of(features, columns)
    keys = [0, *(values[0] + 1 if values else 0 for values in brand)]
    assert table.category_keys(columns, "brand").tolist() == keys
    assert table.category_keys(columns, "topic").tolist() == [0, *keys[:0:-1]]
    for name in ("price", "text", "color"):
        with pytest.raises(RuntimeError, match=f"'{name}', which the model counts, is not a category of its items"):
            table.category_keys(columns, name)


def test_a_table_of_another_model_is_refused() -> None:
    features = {"genres": category([[2]] * NUM_ITEMS)}
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    table = ItemFeatureTable.of(features, columns)
    with pytest.raises(RuntimeError, match="do not fit the model"):
        ItemFeatureEncoder(columns, DIM).set_table(table, NUM_ITEMS)
    with pytest.raises(RuntimeError, match="do not fit the model"):
        ItemFeatureEncoder([FeatureSpec("genres", "category", 1)], DIM).set_table(table, 1 + NUM_ITEMS)
    with pytest.raises(RuntimeError, match="do not fit the model"):
        ItemFeatureEncoder([*columns, FeatureSpec("text", "vector", 2)], DIM).set_table(table, 1 + NUM_ITEMS)


@settings(max_examples=20, deadline=None)
@given(features=drawn_item_features(), stop=st.integers(0, NUM_ITEMS))
def test_a_table_grows_item_by_item(features: Columns, stop: int) -> None:
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    whole = ItemFeatureTable.of(features, columns)
    first, rest = (selected(features, rows) for rows in np.split(np.arange(NUM_ITEMS), [stop]))
    grown = ItemFeatureTable.of(first, columns).extended(rest, columns)
    assert grown.content(1 + NUM_ITEMS) == whole.content(1 + NUM_ITEMS)


def test_unseen_values_are_missing() -> None:
    known = {"genres": category([[0, 2], [1]])}
    columns = [FeatureSpec.of("genres", known["genres"])]
    others = Column(np.int32([0, 0, 1]), Vocabulary.from_ids(["anime", "war"]), np.array([0, 1, 3]))
    grown = ItemFeatureTable.of(known, columns).extended({"genres": others}, columns)
    missing, war = 0, 1 + GENRES.index("war")
    assert grown.entry.tolist()[3:] == [missing, war] and grown.weight.tolist()[3:] == [1, 1]


def test_vectors_of_inference_follow_the_weights() -> None:
    encoder, _ = encoder_of({"genres": category([[0, 2], [1], [], [0], [1, 2], [2], [], [0, 1, 2], [1]])})
    rows = torch.arange(1 + NUM_ITEMS)
    with torch.inference_mode():
        before = encoder.eval()(rows)
        assert torch.equal(encoder(rows[3:5]), before[3:5])
    with torch.no_grad():
        encoder.values += 1
        assert not torch.equal(encoder(rows), before) and not encoder(rows)[0].any()
    with torch.no_grad():
        encoder.train()(rows)
    assert encoder(rows).requires_grad


@pytest.mark.parametrize("values", [[1, 2, 3], ["a", "b", "c", "d"]], ids=str)
def test_damaged_values_are_refused(tmp_path: Path, values: list[Any]) -> None:
    features = {"genres": category([[0, 2], [], [1]])}
    columns = [FeatureSpec.of(name, column) for name, column in features.items()]
    table = ItemFeatureTable.of(features, columns)
    table.save(tmp_path)
    (tmp_path / "item_values_0.offsets.npy").unlink()
    Vocabulary.from_ids(values).save(tmp_path, "item_values_0")
    with pytest.raises(ValueError, match="must hold"):
        ItemFeatureTable.load(tmp_path, columns)


DEVICES = ["desktop", "phone", "tv"]
VALUES = {"device": Vocabulary.from_ids(DEVICES), "seconds": None}


def features_of(device: list[int], seconds: list[float]) -> RowFeatures:
    return RowFeatures({"device": np.array(device, np.int32), "seconds": np.array(seconds, np.float32)})


drawn_rows = st.lists(
    st.tuples(st.integers(-1, 2), st.one_of(st.just(math.nan), st.floats(-1e6, 1e6, width=32))), min_size=1, max_size=20
)


def drawn_encoder(reader: RowFeatureReader) -> RowFeatureEncoder:
    """A float64 encoder with drawn weights."""
    made, generator = RowFeatureEncoder(reader.columns, DIM).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return made


@given(drawn_rows)
@settings(max_examples=25, deadline=None)
def test_vectors_equal_a_plain_reading(rows: list[tuple[int, float]]) -> None:
    features = features_of(*map(list, zip(*rows, strict=True)))
    reader = RowFeatureReader.of(features, VALUES)
    encoder = drawn_encoder(reader)
    encoded = reader.encode(features, len(rows))
    found = encoder(encoded).detach().numpy()
    values, seconds = encoder.values.detach().numpy(), reader.columns[1]
    for index, (code, number) in enumerate(rows):
        expected = values[1 + code].copy()
        first = 1 + len(DEVICES)
        if math.isnan(number):
            expected += values[first]
        else:
            expected += values[first + 1 + sum(number > bound for bound in seconds.bounds)]
            score = np.clip((number - seconds.mean) / seconds.scale, -MAX_ABS_SCORE, MAX_ABS_SCORE)
            assert encoder.dense is not None
            expected += np.float32(score) * encoder.dense.detach().numpy()[0]
        np.testing.assert_allclose(found[index], expected, rtol=1e-12, atol=1e-12)


def test_features_change_nothing_before_training() -> None:
    features = features_of([0, -1], [1.0, math.nan])
    reader = RowFeatureReader.of(features, VALUES)
    encoded = reader.encode(features, 2)
    made = RowFeatureEncoder(reader.columns, DIM)
    assert not made(encoded).any()


def test_unknown_values_and_columns_that_are_not_given_are_missing() -> None:
    reader = RowFeatureReader.of(features_of([0], [1.0]), VALUES)
    parsed = reader.parse({"device": ["watch", None, math.nan]}, 3)
    assert parsed.columns["device"].tolist() == [-1, -1, -1]
    assert np.isnan(parsed.columns["seconds"]).all()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"devise": ["tv"]}, "'devise' is not one of this model's features"),
        ({"device": ["tv", "tv"]}, "'device' has 2 values, but 1 are needed"),
        ({"device": [1.5]}, "'device' is a category and needs texts, integers, or booleans, got 1.5"),
        ({"seconds": ["soon"]}, "'seconds' needs numbers"),
        ({"seconds": [1e300]}, "'seconds': value number 0 is infinite, or too large"),
        ({"seconds": [10**400]}, "'seconds' needs numbers"),
        ({"seconds": [[1.0]]}, "'seconds' needs numbers, one per row"),
    ],
)
def test_values_that_are_refused(given: dict[str, Any], problem: str) -> None:
    reader = RowFeatureReader.of(features_of([0], [1.0]), VALUES)
    with pytest.raises(ValueError, match=problem):
        reader.parse(given, 1)


def test_a_log_with_other_codes_reads_the_same() -> None:
    reader = RowFeatureReader.of(features_of([0], [1.0]), VALUES)
    grown = {"seconds": None, "device": Vocabulary.from_ids(["watch", *reversed(DEVICES)])}
    log = RowFeatures({"device": np.array([0, 1, 2, 3, -1], np.int32), "seconds": np.zeros(5, np.float32)})
    kept = grown["device"]
    assert kept is not None
    names = [*kept.ids(range(4)), None]
    expected = [-1 if name in (None, "watch") else DEVICES.index(name) for name in names]
    assert reader.recoder(grown)(log, 5).columns["device"].tolist() == expected
    assert np.isnan(reader.recoder({})(RowFeatures({}), 2).columns["seconds"]).all()


def test_a_saved_reader_reads_the_same(tmp_path: Path) -> None:
    features = features_of([2, -1, 1], [1.0, 7.0, math.nan])
    reader = RowFeatureReader.of(features, VALUES)
    reader.save(tmp_path, "event")
    loaded = RowFeatureReader.load(tmp_path, "event", reader.columns)
    assert loaded is not None
    for expected, found in zip(reader.columns, loaded.columns, strict=True):
        assert expected == found
    assert (loaded.encode(features, 3).entry == reader.encode(features, 3).entry).all()
    with pytest.raises(ValueError, match="do not fit"):
        RowFeatureReader(reader.columns[:1], {"device": None})
    Vocabulary.from_ids([1, 2]).save(tmp_path, "event_values_0")
    (tmp_path / "event_values_0.offsets.npy").unlink()
    with pytest.raises(ValueError, match="event_values_0 must hold at most 3 texts"):
        RowFeatureReader.load(tmp_path, "event", reader.columns)


URL = FeatureSpec("url", "category", 1000, hashed=True)


def test_rows_never_change() -> None:
    """Saved models rely on them."""
    assert HashedVocabulary(1000).rows(["a", "b", "naïve", "a", ""]).tolist() == [719, 615, 928, 719, -1]
    assert HashedVocabulary(7).rows(["a", "b"]).tolist() == [1, 4]


def test_it_is_a_vocabulary_that_does_not_grow(tmp_path: Path) -> None:
    values = HashedVocabulary(1000)
    assert values.extended(["new"]) is values and values.save(tmp_path, "x") == [] == list(tmp_path.iterdir())
    copied = pickle.loads(pickle.dumps(values))
    assert copied.rows(["a"]) == values.rows(["a"]) and copied.digest() == values.digest()
    assert values.digest() != HashedVocabulary(1001).digest() and len(values.digest()) == 64
    assert values.ids(np.array([3, 4])).tolist() == ["row 3 of 1000", "row 4 of 1000"]


def test_a_reader_reads_logs_and_callers_alike(tmp_path: Path) -> None:
    reader = RowFeatureReader.of(RowFeatures({}), {"url": HashedVocabulary(1000)})
    assert reader.columns == [URL]
    of_log = {"url": Vocabulary.from_ids(["x", "y", "z"])}
    rows = reader.recoder(of_log)(RowFeatures({"url": np.array([2, 0, -1], np.int32)}), 3)
    given = reader.parse({"url": ["z", "x", None]}, 3)
    np.testing.assert_array_equal(rows.columns["url"], given.columns["url"])
    assert given.columns["url"][2] == -1 and (given.columns["url"][:2] >= 0).all()
    assert reader.parse({"url": ["never seen"]}, 1).columns["url"][0] >= 0
    reader.save(tmp_path, "request")
    loaded = RowFeatureReader.load(tmp_path, "request", [URL])
    assert loaded is not None and loaded.digests() == reader.digests()


def test_an_item_table_reads_hashed_values(tmp_path: Path) -> None:
    texts = Vocabulary.from_ids(["p", "q", "r"])
    columns = Column(np.array([0, 2, 1], np.int32), texts, np.array([0, 2, 2, 3]))
    table = ItemFeatureTable.of({"url": columns}, [URL])
    expected = 1 + HashedVocabulary(1000).rows(["p", "r", "q"])
    assert table.entry.tolist() == [*sorted(expected[:2].tolist()), 0, expected[2]]
    assert table.weight.tolist() == [0.5, 0.5, 1.0, 1.0] and table.fits(4, URL.num_rows, 0)
    new = Column(np.array([0], np.int32), Vocabulary.from_ids(["new"]), np.array([0, 1]))
    grown = table.extended({"url": new}, [URL])
    assert grown.entry[-1] == 1 + HashedVocabulary(1000).rows(["new"])[0]
    grown.save(tmp_path)
    assert ItemFeatureTable.load(tmp_path, [URL]).entry.tolist() == grown.entry.tolist()


def test_only_categories_can_be_hashed() -> None:
    with pytest.raises(ValueError, match="only a category can be hashed"):
        FeatureSpec("price", "number", 1, hashed=True)
