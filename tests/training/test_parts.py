"""What holds for every part of a model that reads features: of items, of events, of requests, and of users.

A model learns them, does without them, resumes, starts warm, and trains downstream, and is served as it was validated.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conftest import copies_of_run
from tests.training.test_trainer import assert_same_result
from tests.training.worlds import (
    END,
    HOUR,
    MIDDLE,
    NEW_ITEM,
    NUM_ITEMS,
    NUM_USERS,
    PARTS,
    TEST,
    VALIDATION,
    Frame,
    Part,
    Run,
    begun,
    feature_config,
    feature_frame,
    frames,
    ids,
    log_of,
    of_architecture,
)
from vista.cli.main import main
from vista.config import EvaluateConfig, TrainConfig
from vista.config.checks import Architecture, Codec, InitFreeze
from vista.errors import ConfigError
from vista.evaluation.answers import RawHistoryAnswers
from vista.evaluation.cases import ImpressionCases, impression_cases
from vista.evaluation.evaluate import evaluate_model, evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.features import selected
from vista.log.splits import split_until, visible_counts
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.registry import load_model, with_items
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.training import warm_start
from vista.training.log_schema import encoded_features, event_reader, schema_of
from vista.training.trainer import Trainer, train, train_model
from vista.training.validation import Validation
from vista.training.warm_start import training_vectors

EXACT = RefreshOptions(codec=Codec.float32)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return log_of(frames(), tmp_path_factory.mktemp("features") / "log")


@pytest.fixture(scope="module")
def recoded(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The same log, with values in the test part that sort first, so that all others have other codes."""
    tables = frames()
    for name, column in (("events", "surface"), ("impressions", "device")):
        tables[name][column][-1] = "a"
    tables["users"] = {name: np.append(column, column[-1:]) for name, column in tables["users"].items()}
    tables["users"]["user"][-1] = tables["impressions"]["user"][-1] = NUM_USERS + 1
    tables["users"]["region"][-1] = "a"
    recoded = log_of(tables, tmp_path_factory.mktemp("recoded") / "log")
    codes = (
        recoded.event_features["surface"],
        recoded.request_features["device"],
        recoded.user_features["region"].values,
    )
    assert [ids(values)[:2] for values in codes] == [["a", "app"], ["a", "desktop"], ["a", "north"]]
    return recoded


@pytest.fixture(scope="module")
def copies() -> list[tuple[int, Path]]:
    """Filled by `run`."""
    return []


@pytest.fixture(scope="module")
def run(log: EventLog, copies: list[tuple[int, Path]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that reads all features, and its model."""
    folder = tmp_path_factory.mktemp("run")
    config = feature_config(log, folder / "run", checkpoint_every=2, optim__epochs=2)
    config.optim.validate_every = 1
    with copies_of_run(folder) as made:
        model = train(config, log, metrics_every=1)
    copies += made
    return config, model


def only(cases: ImpressionCases, n: int) -> ImpressionCases:
    """One of the impressions, with no other of its request."""
    each = ("user", "seen", "item", "timestamp", "label", "mask")
    probability = None if cases.probability is None else cases.probability[n : n + 1]
    parts = {name: getattr(cases, name)[n : n + 1] for name in each}
    return replace(cases, **parts, probability=probability, features=cases.features.select(slice(n, n + 1)))


@contextmanager
def negated(weight: torch.Tensor) -> Iterator[None]:
    with torch.no_grad():
        weight.neg_()
        yield
        weight.neg_()


OFTEN = (Architecture.vista, Architecture.hstu, Architecture.sim)
"""One of each kind; the others read features by the same code."""


@pytest.mark.parametrize(
    "architecture", [pytest.param(each, marks=() if each in OFTEN else pytest.mark.nightly) for each in Architecture]
)
def test_every_model_learns_every_part(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    model = train_model(feature_config(log, tmp_path / "run", **of_architecture(architecture)), log)
    for name, part in PARTS.items():
        columns = getattr(model.schema, part.schema)
        if name == "events" and architecture.ranks_only:
            continue  # their event encoder is tested with its architecture
        assert tuple((one.name, one.kind) for one in columns) == part.columns
        encoder = part.encoder(model)
        assert encoder.values.any() and encoder.dense.any(), name
        if name != "items":
            assert getattr(model, part.schema).columns == columns
    rows = torch.arange(1 + len(model.items))
    expected = encoded_features(log, model.items, model.schema)
    assert model.features is not None and model.features.table is not None and expected is not None
    assert model.features.table.content(len(rows)) == expected.content(len(rows))
    vectors = model.eval().item_vectors(rows)
    assert not vectors[0].any()
    torch.testing.assert_close(vectors, model.id_vectors(rows) + model.features(rows))
    if isinstance(model, HistoryModel):
        asked = EvaluateConfig(split="validation")
        before = evaluate_model(model, log, asked).metrics
        loaded = load_model(tmp_path / "run" / "best")
        assert isinstance(loaded, HistoryModel) and evaluate_model(loaded, log, asked).metrics == before
        cases = impression_cases(log, VALIDATION, TEST)
        answers = RawHistoryAnswers(model, log, model.rows_of(log.items), events_per_batch=300)
        together = answers.probabilities(cases)
        for n in range(0, len(cases.user), 37):
            np.testing.assert_allclose(answers.probabilities(only(cases, n))[0], together[n], atol=1e-6)
        for name, part in PARTS.items():
            with negated(part.encoder(model).values):
                assert evaluate_model(model, log, asked).metrics["ne/click"] != before["ne/click"], name


def test_features_that_decide_labels_predict_them(log: EventLog, tmp_path: Path) -> None:
    """Regions of users decide clicks, and devices of requests likes."""
    config = feature_config(log, tmp_path, optim__epochs=6)
    model = train(config, log)
    measured = Validation(log, model.rows_of(log.items), config)(model)
    assert min(measured["auc/click"], measured["auc/like"]) > 0.8, measured
    card = (tmp_path / "best" / "README.md").read_text()
    assert "Labeled tasks read features of requests: `device`, `hour`. Pass them (`request`)." in card


@pytest.mark.parametrize("names", [[*PARTS], *(pytest.param([name], marks=pytest.mark.nightly) for name in PARTS)])
def test_without_features_nothing_changes(log: EventLog, tmp_path: Path, names: list[str]) -> None:
    lacking = log_of(frames(), tmp_path / "log", without=names)
    off = train(feature_config(log, tmp_path / "off", model__ignore=[PARTS[name].schema for name in names]), log)
    plain = train(feature_config(lacking, tmp_path / "plain"), lacking)
    assert all(PARTS[name].encoder(off) is None and not getattr(off.schema, PARTS[name].schema) for name in names)
    for (key, one), other in zip(off.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_a_run_without_tasks_reads_no_features_of_requests(log: EventLog, tmp_path: Path) -> None:
    made = Trainer(feature_config(log, tmp_path, optim__task_weight=0.0), log)
    assert made.model.schema.request_features == [] and made.source.batch(0, 0).impressions.features is None


@pytest.mark.parametrize("hidden", [True, False])
def test_training_knows_no_value_of_hidden_rows(log: EventLog, tmp_path: Path, hidden: bool) -> None:
    """Neither categories that only they have, nor the distribution of their numbers."""
    tables, changed = frames(), 0
    for name, category, number in (("events", "surface", "dwell"), ("impressions", "device", "hour")):
        table = tables[name]
        rows = (table["timestamp"] >= VALIDATION) == hidden
        changed += rows.sum()
        table[category] = ["zeppelin" if row else value for row, value in zip(rows, table[category], strict=True)]
        table[number] = np.where(rows, 1000.0, table[number])
    users = tables["users"]
    rows = (users["user"] == NUM_USERS) == hidden  # the only user without events that training may see
    users["region"], users["age"] = np.where(rows, "east", users["region"]), np.where(rows, 200.0, users["age"])
    other = log_of(tables, tmp_path / "log")
    found, expected = (Trainer(feature_config(one, tmp_path / "run"), one).model for one in (other, log))
    assert changed > 500 and other.user_features["region"].values is not None
    for name in ("events", "impressions", "users"):
        part = PARTS[name]
        is_equal = getattr(found.schema, part.schema) == getattr(expected.schema, part.schema)
        is_same = getattr(found, part.schema).digests() == getattr(expected, part.schema).digests()
        assert is_equal == is_same == hidden, name
    assert ids(found.event_features.values["surface"])[-1] == ("web" if hidden else "zeppelin")  # type: ignore[union-attr]
    assert len(ids(other.event_features["surface"])) == 4 if hidden else 1
    codes = other.event_features["surface"].rows(["zeppelin", "web"]).astype(np.int32)  # type: ignore[union-attr]
    recode = found.event_recoder(other.event_features)
    given = type(other.gather(np.arange(1)).features)({"surface": codes})
    assert recode(given, 2).columns["surface"].tolist() == ([-1, 2] if hidden else [0, -1])


def test_numbers_are_measured_on_events_that_training_sees(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = feature_config(log, tmp_path / "run", model__tail_features=["dwell"])
    reader, num_tail = event_reader(log, config)
    assert reader is not None
    assert [column.name for column in reader.columns] == ["dwell", "surface"] and num_tail == 1
    counts = visible_counts(log, split_until(config.data, "train"))
    dwell = log.gather(np.arange(log.num_users), counts).features.columns["dwell"]
    known = dwell[~np.isnan(dwell)].astype(np.float64)
    assert reader.columns[0].mean == pytest.approx(known.mean()) and reader.columns[0].scale == pytest.approx(
        known.std()
    )
    monkeypatch.setattr("vista.training.log_schema.MEASURED_ROWS", 50)
    sample = dwell[:: -(-int(counts.sum()) // 50)]
    reader, _ = event_reader(log, config)
    assert reader is not None and reader.columns[0].mean == pytest.approx(np.nanmean(sample.astype(np.float64)))


def test_items_without_training_events_are_their_features(log: EventLog, run: Run) -> None:
    _, model = run
    counts = visible_counts(log, VALIDATION)
    seen = np.unique(log.gather(np.arange(log.num_users), counts).item).astype(np.int64)
    unseen = np.setdiff1d(np.arange(log.num_items), seen)
    assert log.items.ids(unseen).tolist() == [NEW_ITEM]
    assert not model.item_table[torch.from_numpy(unseen + 1)].any()
    assert model.item_table[torch.from_numpy(seen + 1)].any(1).all()


def test_items_without_events_and_features_are_no_negatives(tmp_path: Path) -> None:
    tables = frames()
    table = tables["items"] = feature_frame(np.append(np.arange(NUM_ITEMS), [NEW_ITEM - 1, NEW_ITEM]))
    tables["events"]["item"][-2] = NEW_ITEM - 1
    for name, missing in (("brand", None), ("price", np.nan), ("tags", []), ("text", None)):
        table[name] = list(table[name])
        table[name][-1] = missing
    log = log_of(tables, tmp_path / "log")
    made = Trainer(feature_config(log, tmp_path, data__num_negatives=100), log)
    count = log.num_items
    assert made.source.batch(0, 0).negatives.item.numel() == count - 1
    known = made.model.rows_with_features()
    assert known is not None and known.tolist() == [False, *[True] * (count - 1), False]


def test_dropped_ids_leave_the_features(log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "ID_DROPOUT", 0.99)
    made = Trainer(feature_config(log, tmp_path), log)
    batch, model = made.source.batch(0, 0), made.model
    assert model.features is not None
    with torch.no_grad():
        for weight in model.features.parameters():
            weight.normal_()
    features = model.features(batch.rows)
    torch.manual_seed(0)
    dropped = training_vectors(model.train(), batch)
    assert (dropped == features).all(1).float().mean() > 0.8
    assert torch.equal(training_vectors(model.eval(), batch), model.item_vectors(batch.rows))


def test_columns_of_tails_that_cannot_be_read_are_refused(log: EventLog, tmp_path: Path) -> None:
    for changes, message in (
        ({"tail_features": ["plan"]}, r"model.tail_features: 'plan' is not a feature .* has: surface, dwell"),
        (
            {"tail_features": ["dwell"], "ignore": ["event_features"]},
            r"model.tail_features: 'dwell' is not a feature of events that the model reads",
        ),
    ):
        config = feature_config(log, tmp_path, **{f"model__{name}": value for name, value in changes.items()})
        with pytest.raises(ConfigError, match=message):
            event_reader(log, config)


def drawn(model: RankingModel) -> VistaModel:
    """Weights by which everything that a model reads matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        model.item_table[0] = 0
    assert isinstance(model, VistaModel)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_seeds": 0, "counter_keys": ["item"], "tail_features": ["dwell"]},
        {
            "hashed_features": ["brand:4", "surface:5", "device:6", "region:7"],
            "embedding_rows": 24,
            "tail_features": [],
        },
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
def test_serving_predicts_what_validation_predicts(
    log: EventLog, recoded: EventLog, run: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Validation reads the log, and the scorer records and values by name. Codes of a log may differ from a model's."""
    config = feature_config(log, tmp_path / "run", **{f"model__{name}": value for name, value in changes.items()})
    drawn(Trainer(config, log).model).save_pretrained(tmp_path / "best")
    model = VistaModel.from_pretrained(tmp_path / "best")
    validation = Validation(log, model.rows_of(log.items), config)
    measured = validation(model)
    assert {"ndcg@10", "auc/click", "ne/click", "auc/like"} <= measured.keys()
    assert Validation(recoded, model.rows_of(recoded.items), config)(model) == measured
    until, asked = split_until(config.data, "validation"), EvaluateConfig(split="validation")
    served = []
    for one, store in ((log, "store"), (recoded, "recoded"))[: 1 if changes else 2]:
        refresh(model, one, tmp_path / store, until=until, options=EXACT)
        with Scorer.open(tmp_path / "best", tmp_path / store) as scorer:
            served += [evaluate_scorer(scorer, given, asked).metrics for given in (log, recoded)]
    assert all(metrics == served[0] for metrics in served)
    for name, value in measured.items():
        assert served[0][name] == pytest.approx(value, abs=1e-5), name
    for name, part in PARTS.items():
        if name != "events" or changes.get("tail_features") != []:
            with negated(part.encoder(model).values):
                assert validation(model)["ne/click"] != measured["ne/click"], name


def test_the_summarizers_id_covers_the_features_of_items(run: Run) -> None:
    config, model = run
    loaded = VistaModel.from_pretrained(Path(config.run_dir) / "best")
    assert loaded.features is not None and loaded.features.table is not None
    loaded.features.table.dense = np.roll(loaded.features.table.dense, 1, 0)
    assert loaded.summarizer_id() != model.summarizer_id()


def test_a_run_resumes_bit_identically(log: EventLog, run: Run, copies: list[tuple[int, Path]]) -> None:
    config, _ = run
    last, _ = copies[-1]
    step, run_dir = copies[len(copies) // 2]
    assert len(copies) > 3 and step < last
    train(replace(config, run_dir=str(run_dir)), log, metrics_every=1)
    assert_same_result(run_dir, Path(config.run_dir))


def later_tables() -> dict[str, Frame]:
    """What is appended to the log: new users, values, and columns. New values sort in front of the known ones."""
    tables, rng = frames(), np.random.default_rng(5)
    for name in ("events", "impressions"):
        kept = np.arange(0, len(tables[name]["user"]), 2)
        tables[name] = {
            column: np.asarray(values, dtype=object)[kept].tolist() for column, values in tables[name].items()
        }
        tables[name] |= {column: np.array(tables[name][column]) for column in ("user", "item", "timestamp")}
        tables[name]["user"] += 8
        tables[name]["timestamp"] += END - tables[name]["timestamp"].min()
    tables["events"]["surface"] = ["a watch" if name == "tv" else name for name in tables["events"]["surface"]]
    tables["events"]["dwell"] = np.full(len(tables["events"]["user"]), 1000.0)
    tables["events"]["item"][::5] = 950
    shown = tables["impressions"]
    shown |= {name: np.array(shown[name], np.float64) for name in ("hour", *("click", "like"))}
    shown |= {name: shown[name].astype(int) for name in ("click", "like")}
    shown["device"] = ["a car" if name == "tv" else name for name in shown["device"]]
    shown["app"] = rng.choice(["news", "mail"], len(shown["user"])).tolist()
    tables["items"] = feature_frame(np.array([950])) | {"brand": ["a brand"], "tags": [["a tag"]], "price": [1e6]}
    tables["users"] = {"user": [0, 2, NUM_USERS + 2], "region": ["a", "a", "north"], "plan": ["gold"] * 3}
    return tables


@pytest.fixture(scope="module")
def grown(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return log_of(later_tables(), shutil.copytree(log.path, tmp_path_factory.mktemp("grown") / "log"), append=True)


def assert_kept(part: Part, before: RankingModel, after: RankingModel, *, grows: bool) -> None:
    """Known values and columns keep their weights, and those of new ones are 0."""
    old, new = part.encoder(before), part.encoder(after)
    columns, grown = getattr(before.schema, part.schema), getattr(after.schema, part.schema)
    assert [column.name for column in grown][: len(columns)] == part.names
    assert (grown[0].size > columns[0].size) == grows
    first, place, dense = 0, 0, 0
    for column, now in zip(columns, grown, strict=False):
        assert column.kind == "category" or column == now, "numbers are standardized as before"
        assert torch.equal(new.values[place : place + column.num_rows], old.values[first : first + column.num_rows])
        assert not new.values[place + column.num_rows : place + now.num_rows].any(), "a new value starts at 0"
        first, place, dense = first + column.num_rows, place + now.num_rows, dense + column.num_dense
    assert not new.values[place:].any() and torch.equal(new.dense[:dense], old.dense)


@pytest.mark.parametrize("freeze", InitFreeze)
def test_a_warm_start_matches_values_by_name(
    log: EventLog, grown: EventLog, run: Run, tmp_path: Path, freeze: InitFreeze
) -> None:
    """With a frozen summarizer, values that its records name stay: others are missing, and its stores stay valid."""
    config, base = run
    warm_config = replace(
        config,
        data=replace(
            config.data,
            path=str(grown.path),
            tokens_per_batch=512,
            validation_from=str(END + HOUR * 400),
            test_from=str(END + HOUR * 500),
        ),
        init_from=str(Path(config.run_dir) / "best"),
        init_freeze=freeze,
        optim=replace(config.optim, epochs=1, validate_every=0),
        run_dir=str(tmp_path / "run"),
    )
    is_frozen = freeze is InitFreeze.summarizer
    _, made = begun(warm_config, grown)
    for name, part in PARTS.items():
        assert_kept(part, base, made.model, grows=name == "impressions" or not is_frozen)
    assert isinstance(made.model, VistaModel)
    for model in (made.model, train(warm_config, grown)):
        assert (
            model.request_features is not None and model.event_features is not None and model.user_features is not None
        )
        assert ids(model.request_features.values["device"]) == ["desktop", "phone", "tv", "a car"]
        assert ids(model.event_features.values["surface"]) == ["app", "tv", "web", *([] if is_frozen else ["a watch"])]
        assert ids(model.user_features.values["region"]) == ["north", "south", *([] if is_frozen else ["a"])]
        assert list(model.request_features.values) == ["device", "hour", "app"]
        assert list(model.user_features.values) == ["region", "age", *([] if is_frozen else ["plan"])]
        if is_frozen:
            assert model.summarizer_id() == base.summarizer_id()
    request = {"device": ["phone", "tv", None], "hour": [1.0, 20.0, None]}
    vectors = [
        one.request_encoder(one.request_features.encode(one.request_features.parse(request, 3), 3))
        for one in (base, made.model)
        if one.request_features is not None
    ]
    torch.testing.assert_close(vectors[0], vectors[1])
    if is_frozen:
        digests = []
        for one in (base, model):
            refresh(one, grown, tmp_path / str(len(digests)), options=EXACT, created_at=0)
            with StoreReader.open(tmp_path / str(len(digests)), summarizer_id=base.summarizer_id()) as reader:
                digests.append(reader.manifest.records_digest)
        assert digests[0] == digests[1]
        with Scorer.open(model, tmp_path / "0") as scorer:
            assert np.isfinite(scorer.score([0, 1, NUM_USERS + 2], [3, 950])).all()


@pytest.fixture(scope="module")
def base(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, VistaModel, Path]:
    """A model whose stage 2 reads one column of events, and none of requests; and a store of its early summaries."""
    folder = tmp_path_factory.mktemp("base")
    changes = {"model__tail_features": ["surface"], "model__ignore": ["request_features"]}
    config = feature_config(log, folder / "run", **changes)
    model = train(config, log)
    refresh(model, log, folder / "store", until=MIDDLE)
    return config, model, folder / "store"


def downstream_config(base: tuple[TrainConfig, VistaModel, Path], run_dir: Path, **model: Any) -> TrainConfig:
    config, _, store = base
    return replace(
        config,
        model=replace(config.model, **{"tail_features": None, "ignore": [], **model}),
        base=str(Path(config.run_dir) / "best"),
        store=str(store),
        run_dir=str(run_dir),
    )


@pytest.mark.parametrize("use_user_features", [True, False])
def test_downstream_models_keep_the_features_of_their_base(
    log: EventLog, base: tuple[TrainConfig, VistaModel, Path], tmp_path: Path, use_user_features: bool
) -> None:
    """Only features of requests are their own. One store serves both."""
    _, kept, store = base
    config = downstream_config(base, tmp_path / "run", ignore=[] if use_user_features else ["user_features"])
    if not use_user_features:  # and with items that were added to the base
        kept = with_items(kept, [10**6, 10**6 + 1], selected(log.item_features, np.array([3, 5])))
        kept.save_pretrained(tmp_path / "base")
        config.base = str(tmp_path / "base")
    model = train(config, log)
    assert isinstance(model, VistaModel) and model.summarizer_id() == kept.summarizer_id()
    assert model.num_trained_items == kept.num_trained_items
    rows = torch.arange(1 + len(kept.items))
    assert torch.equal(model.item_vectors(rows), kept.item_vectors(rows))
    assert model.config.tail_features == ["surface"] and model.schema.tail_sizes == {"surface": 3}
    assert model.request_encoder is not None and model.request_encoder.values.any()
    recent, all_of_them = (schema_of(log, config, begin).request_features for begin in (MIDDLE, None))
    assert model.schema.request_features == recent != all_of_them
    if use_user_features:
        assert model.user_features is not None and kept.user_features is not None and model.user_encoder is not None
        assert model.user_features.digests() == kept.user_features.digests() and model.user_encoder.values.any()
    else:
        assert model.user_encoder is None
    with Scorer.open(tmp_path / "run" / "best", store) as scorer:
        phone, tv = (scorer.score([0, 1], [1, 2], now=END, request={"device": each}) for each in ("phone", "tv"))
        assert np.abs(phone - tv).max() > 1e-4


def test_downstream_models_with_another_tail_are_refused(
    log: EventLog, base: tuple[TrainConfig, VistaModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store holds what the base's stage 2 reads of the events of a tail."""
    with pytest.raises(ConfigError, match=r"model.tail_features \(\['surface'\] -> \['dwell'\]\)"):
        train(downstream_config(base, tmp_path / "run", tail_features=["dwell"]), log)
    words = ["store", "get", f"store={base[2]}", "user=3"]
    for more, shown in (([], "0|1|2|-1"), ([f"model={base[0].run_dir}/best"], "app|tv|web|None")):
        assert main([*words, *more]) == 0
        head, *events = capsys.readouterr().out.partition("  tail:")[2].splitlines()
        assert "events, oldest first (item, time, action code, surface)" in head
        assert events and all(re.search(rf"  ({shown})$", event) for event in events)


def test_the_summarizers_id_covers_values_but_not_what_the_tail_reads(run: Run) -> None:
    model = VistaModel.from_pretrained(Path(run[0].run_dir) / "best")
    before = model.summarizer_id()
    object.__setattr__(model.schema, "num_tail_features", 1)
    assert model.summarizer_id() == before
    assert model.event_features is not None
    values = model.event_features.values["surface"]
    model.event_features.values["surface"] = type(values).from_ids([f"{name}!" for name in ids(values)])  # type: ignore[union-attr]
    assert model.summarizer_id() != before


def test_logs_with_features_of_another_kind_are_refused(
    log: EventLog, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that a log lacks are missing, with a warning."""
    model, asked = VistaModel.from_pretrained(Path(run[0].run_dir) / "best"), EvaluateConfig(split="validation")
    until = split_until(run[0].data, "validation")
    refresh(model, log, tmp_path / "store", until=until)
    tables, others = frames(), []
    for name, column, values in (
        ("impressions", "hour", ["noon"] * len(tables["impressions"]["user"])),
        ("users", "region", tables["users"]["age"]),
    ):
        others.append(log_of(tables | {name: tables[name] | {column: values}}, tmp_path / f"other-{name}"))
    assert "lacks" not in caplog.text
    with Scorer.open(model, tmp_path / "store") as scorer:
        best = evaluate_scorer(scorer, log, asked).metrics["ne/like"]
        silent = log_of(frames(), tmp_path / "silent", without=["impressions"])
        assert evaluate_scorer(scorer, silent, asked).metrics["ne/like"] > best
        assert "silent: lacks the features device, hour of impressions, so the model" in caplog.text
        message = r"'hour' of impressions is a category, but a number to .* impressions\.numbers=\[hour\], or train"
        with pytest.raises(ConfigError, match=message):
            evaluate_scorer(scorer, others[0], asked)
    message = r"'region' of users is a number, but a category to .* users\.categories=\[region\], or train a model"
    with pytest.raises(ConfigError, match=message):
        refresh(model, others[1], tmp_path / "new")
    assert not (tmp_path / "new").exists()
    refresh(model, log_of(frames(), tmp_path / "plain", without=["users"]), tmp_path / "new")
    assert caplog.text.count("plain: lacks the features region, age of users, so") == 1
