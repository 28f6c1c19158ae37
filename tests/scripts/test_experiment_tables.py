"""Data sets become logs, and tables of windows, worlds, and public protocols are run on small ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from scripts.experiments import reproduce
from scripts.experiments.label_rows import part_cases
from scripts.experiments.results import read_results
from scripts.experiments.row_measurement import WINDOW_METRICS, yambda_metrics
from scripts.experiments.sets import SETS, prepare_set, prepare_with_texts
from scripts.experiments.table_run import part_configs, train_config
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.public_tables import LAST_DAY
from scripts.experiments.tables.public_tables import TABLES as PUBLIC_TABLES
from scripts.experiments.tables.table import K0, ORACLE, Table, TableRow
from tests.cli.test_items_commands import LettersEncoder
from tests.conftest import real_set
from tests.log.ingest.public.samples import SAMPLES, complete_journey
from tests.training.test_public_experiments import FEW
from tests.training.test_public_experiments import TINY as TINY_MODEL
from vista.cli import item_commands
from vista.config import EvaluateConfig, TrainConfig
from vista.config.checks import Codec, Target
from vista.config.composition import compose_config
from vista.errors import DataError
from vista.evaluation.answers import ScorerAnswers
from vista.evaluation.cases import WindowCases, impression_cases
from vista.evaluation.metrics import log_loss
from vista.evaluation.protocol import measure_windows
from vista.log.event_log import EventLog
from vista.log.splits import Until, parse_time, split_until
from vista.model.item_feature_table import category_codes
from vista.model.registry import load_model
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer

pytestmark = pytest.mark.research


def test_baskets_keep_their_order_and_products_their_categories(tmp_path: Path) -> None:
    folder, out = tmp_path / "baskets", tmp_path / "logs" / "baskets"
    folder.mkdir()
    events = {
        "household_id": [7, 7, 7, 3],
        "product_id": [40, 10, 40, 99],
        "timestamp": [5, 5, 6, 1],
        "quantity": [1] * 4,
    }
    pl.DataFrame(events).write_parquet(folder / "events.parquet")
    products = {"product_id": [10, 40], "product_type": ["RYE", None], "product_category": ["BREAD", "MILK"]}
    products |= {name: ["x", "y"] for name in ("manufacturer_id", "department", "brand", "package_size")}
    pl.DataFrame(products).write_parquet(folder / "products.parquet")
    prepare_set("complete-journey", folder, out)
    log = EventLog.open(out)
    (user,) = log.users.rows([7])
    history = log.gather(np.array([user]), np.array([3]))
    assert log.items.ids(history.item).tolist() == [40, 10, 40] and history.timestamp.tolist() == [5000, 5000, 6000]
    types, categories = (category_codes(log.item_features, f"product_{name}", "") for name in ("type", "category"))
    ten, forty, unknown = 1 + log.items.rows([10, 40, 99])
    assert types[ten] and not types[forty] and categories[ten] != categories[forty] and not categories[unknown]
    with pytest.raises(DataError, match="has the files of none of"):
        prepare_set("complete-journey", tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "sizes"), [("complete-journey", (1238, 53_185, 738_201)), ("dev-packages", (355, 42_655, 368_040))]
)
def test_long_histories_with_returns_are_read(name: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    prepare_set(name, real_set(name), tmp_path / "log")
    log = EventLog.open(tmp_path / "log")
    assert (log.num_users, log.num_items, int(log.lengths.sum())) == sizes and log.has_time


@pytest.mark.parametrize("name", ["complete-journey", "dev-packages"])
def test_the_experiment_splits_where_the_tables_do(name: str) -> None:
    splits = []
    for words in (SETS[name].words, [f"experiment={name}"]):
        data = compose_config(TrainConfig, words).data
        splits.append((data.split, data.validation_from, data.test_from, data.validation_share, data.test_share))
    assert splits[0] == splits[1]


TEXT_SET = "complete-journey"


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    made = tmp_path / TEXT_SET
    made.mkdir()
    complete_journey(made)
    return made


@pytest.mark.parametrize("texts", ["vectors", "codes"])
def test_a_log_gets_one_more_feature(
    text_folder: Path, tmp_path: Path, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_commands, "TextEncoder", lambda device: LettersEncoder())
    if texts == "codes":
        pytest.importorskip("faiss")
    prepare_set(TEXT_SET, text_folder, tmp_path / "plain")
    (tmp_path / "log.partial").mkdir()  # of a run that was killed
    prepare_with_texts(TEXT_SET, text_folder, tmp_path / "log", texts)
    plain, log = EventLog.open(tmp_path / "plain"), EventLog.open(tmp_path / "log")
    assert not (tmp_path / "log.partial").exists()
    assert log.num_events == plain.num_events and log.items.digest() == plain.items.digest()
    before, after = plain.item_features, log.item_features
    name, kind = {"vectors": ("text", "vector"), "codes": ("codes", "category")}[texts]
    assert [*after] == [*before, name] and after[name].kind == kind
    assert after[name].is_known.all()
    assert pl.read_parquet(tmp_path / "log-source" / "vectors.parquet").columns == ["product_id", "text"]


SMALL = (
    *("optim.epochs=1", "optim.warmup_steps=2", "optim.validate_every=0", "optim.tasks=[click]"),
    *("model.dim=16", "data.windows_per_chunk=8"),
)


TINY = Table(
    "simulation",
    "tiny",
    {
        "vista": TableRow(1),
        "tail-only": TableRow(1, (*K0, "model.counter_keys=[]")),
        "sasrec": TableRow(1, ("model.kind=sasrec",), trial=True),
        "transitions": TableRow(1, untrained="transitions"),
    },
    SMALL,
    {"num_users": 24, "events_per_user": 200},
    windows=True,
    pairs=(("vista", "tail-only"), ("vista", "sasrec"), ("vista", "transitions")),
)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(TABLES, "tiny", TINY)
    return ["tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path), "--threads", "1"]


def lines_of(tmp_path: Path) -> list[dict[str, Any]]:
    return read_results(tmp_path / "tiny.jsonl")


def test_rows_are_measured_on_both_parts_and_compared_by_user(tmp_path: Path, words: list[str]) -> None:
    """A trial is not measured on test, and not compared. A second seed is averaged per user with the first."""
    assert reproduce.main(words) == 0
    vista, tail_only, trial, baseline, paired, against_baseline = lines_of(tmp_path)
    validation = {f"validation {name}" for name in WINDOW_METRICS}
    assert vista["metrics"].keys() == {*WINDOW_METRICS, *validation}
    assert vista["errors"].keys() == {*WINDOW_METRICS, *validation}
    assert trial["metrics"].keys() == validation and trial["errors"].keys() == validation
    assert (paired["model"], paired["seed"], paired["seeds"]) == ("vista − tail-only", 1, [1])
    assert paired["command"].endswith("tiny --rows vista tail-only --seeds 1 --threads 1")
    name = "precision@10/50-events"
    assert paired["metrics"][name] == pytest.approx(vista["metrics"][name] - tail_only["metrics"][name])
    assert against_baseline["metrics"][name] == pytest.approx(vista["metrics"][name] - baseline["metrics"][name])
    assert against_baseline["seeds"] == [1] and baseline["seed"] == 0
    assert 0 < paired["errors"][name] < vista["errors"][name] + tail_only["errors"][name]
    assert 0 < against_baseline["errors"][name] < vista["errors"][name] + baseline["errors"][name]
    assert vista["seconds"] > 0
    page = (tmp_path / "tiny.md").read_text()
    assert "# tiny, paired differences" in page and "| tiny | vista − tail-only | 1 |" in page
    assert reproduce.main(words) == 0 and len(lines_of(tmp_path)) == 6

    assert reproduce.main([*words, "--seeds", "2", "--rows", "vista", "tail-only"]) == 0
    first, second = lines_of(tmp_path)[6:8]
    both = lines_of(tmp_path)[8]
    assert both["seeds"] == [1, 2] and len(lines_of(tmp_path)) == 10
    mean = (vista["metrics"][name] - tail_only["metrics"][name] + first["metrics"][name] - second["metrics"][name]) / 2
    assert both["metrics"][name] == pytest.approx(mean)
    page = (tmp_path / "tiny.md").read_text()
    assert page.count("| vista − tail-only |") == 1 and "| tiny | vista − tail-only | 2 |" in page


@pytest.mark.parametrize("name", ["returns-cj", "returns-dev", "window-cj", "window-dev"])
def test_models_for_the_test_are_trained_until_the_test(name: str) -> None:
    for row in TABLES[name].rows.values():
        configs = part_configs(TABLES[name], row)
        assert ("test" in configs) != row.trial
        for part, config in configs.items():
            assert split_until(config.data, "train") == split_until(configs["validation"].data, part)
            assert config.optim == configs["validation"].optim and config.model == configs["validation"].model


@pytest.mark.parametrize("name", ["newcomer-cj", "newcomer-dev"])
def test_a_newcomer_has_one_model_whose_epoch_validation_chooses(name: str) -> None:
    ((part, config),) = part_configs(TABLES[name], TABLES[name].rows["vista"]).items()
    assert part == "test" and config.optim.validate_every == 1
    assert split_until(config.data, "train") != split_until(config.data, "test")


def test_reference_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: TableRow(1, untrained=name) for name in ("last 32", "pooled")} | ORACLE
    size = {"world": "returns", "num_users": 60, "events_per_user": 1500}
    monkeypatch.setitem(TABLES, "tiny", Table("simulation", "tiny", rows, (), size))
    assert reproduce.main(["tiny", "--work", str(tmp_path / "work"), "--results", str(tmp_path), "--threads", "1"]) == 0
    lines = {line["model"]: line for line in read_results(tmp_path / "tiny.jsonl")}
    auc = {name: line["metrics"]["auc/click"] for name, line in lines.items()}
    assert list(auc) == list(rows) and auc["oracle"] > max(auc["last 32"], auc["pooled"]) + 0.02
    assert lines["pooled"]["config"]["simulation"] == size


SHORT = ("kuairand", "yambda")
"""Sets that `make test-research` runs; `make nightly` runs all."""


TITLES = {"complete-journey": "window-cj", "dev-packages": "window-dev", "bought-again": "labels-cj"}
"""Tables of sets that do not have the name of the set."""
METRICS = {"window-cj": "precision@10/50-events", "window-dev": "precision@10/50-events", "labels-cj": "log_loss/again"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in SHORT else pytest.param(name, marks=pytest.mark.nightly)
        for name in SAMPLES
        if name != "assist17"  # has a test of its own
    ],
)
def test_from_the_files_to_the_metrics(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, title = tmp_path / "files", TITLES.get(name, name)
    folder.mkdir()
    SAMPLES[name](folder)
    table = TABLES[title]
    kept = list(table.rows) if title in PUBLIC_TABLES else ["vista, counters" if "window" in title else "vista"]
    rows = {row: replace(table.rows[row], codecs=(Codec.int8,), tails=()) for row in kept}
    few = {"min_seen": 5, "min_after": 1} if "window" in title else {}
    early = ["data.validation_from=2017-04-01"] if title == "labels-cj" else []  # so that the sample has both labels
    tiny = replace(table, words=(*table.words, *TINY_MODEL, *early), rows=rows, pairs=(), asked=table.asked | few)
    monkeypatch.setitem(TABLES, title, tiny)
    if name == "kuairand":
        monkeypatch.setitem(SETS, name, replace(SETS[name], prepare=(*SETS[name].prepare, *FEW)))
    work, results = tmp_path / "work", tmp_path / "results"
    words = [title, "--data", str(folder), "--work", str(work), "--results", str(results), "--threads", "1"]
    assert reproduce.main(words) == 0, capsys.readouterr().err
    printed, lines = capsys.readouterr().out, read_results(results / f"{title}.jsonl")
    assert [line["model"] for line in lines] == kept
    metric = METRICS.get(title, "recall@100" if name == "yambda" else "hr@10")
    for line in lines:
        assert f"{title}, {line['model']}, seed {line['seed']}\n" in printed
        assert f"  {metric:<22} {line['metrics'][metric]:.4f}\n" in printed


def test_labels_as_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "files").mkdir()
    SAMPLES["assist17"](tmp_path / "files")
    table = TABLES["labels-assist17"]
    kept = ("vista", "tail-only", "din", "label trees", "stack")
    pairs = tuple(pair for pair in table.pairs if {*pair} <= {*kept})
    assert ("vista", "tail-only") in pairs and ("vista", "stack") in pairs
    tiny = replace(table, words=(*table.words, *TINY_MODEL), rows={row: table.rows[row] for row in kept}, pairs=pairs)
    monkeypatch.setitem(TABLES, "labels-assist17", tiny)
    monkeypatch.setattr("vista.evaluation.label_baselines._TREES", {"min_samples_leaf": 4})  # 48 answers, not 100
    work, places = tmp_path / "work", ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    words = ["labels-assist17", "--data", str(tmp_path / "files"), *places, "--threads", "1"]
    assert reproduce.main([*words, "--rows", "stack"]) == 1
    assert "--rows stack: needs the row vista with seed 1" in capsys.readouterr().err
    assert reproduce.main(words) == 0, capsys.readouterr().err
    lines = {line["model"]: line for line in read_results(tmp_path / "labels-assist17.jsonl")}
    assert list(lines) == [*kept, *(" − ".join(pair) for pair in pairs)]
    of_test = {"log_loss/correct", "auc/correct"}
    assert set(lines["stack"]["metrics"]) == set(lines["din"]["metrics"]) == of_test
    assert set(lines["vista"]["metrics"]) == {*of_test, *(f"validation {name}" for name in of_test)}
    log = EventLog.open(next((work / "logs").glob("assist17")))
    cases = part_cases(log, train_config(tiny, tiny.rows["vista"]).data, "test", "correct")
    assert len(cases.user) == 48  # of 8 students with 40 answers each
    for name in kept:
        answers = np.load(next(work.rglob(f"{name}, test.npy")))
        assert lines[name]["metrics"]["log_loss/correct"] == pytest.approx(log_loss(cases.label[:, 0], answers[:, 0]))
        assert lines[name]["errors"]["log_loss/correct"] > 0
    gain = lines["vista − din"]["metrics"]["auc/correct"]
    assert gain == pytest.approx(lines["vista"]["metrics"]["auc/correct"] - lines["din"]["metrics"]["auc/correct"])
    # Each answer comes from the last refresh before it, as a store shows that is refreshed at that time alone.
    file = next(work.rglob("vista, test.npy"))
    model, found = load_model(file.parents[1] / "run" / "best"), np.load(file)
    assert isinstance(model, VistaModel)
    begin = parse_time("1970-09-13") + 3 * 5 * 86_400_000
    own = np.flatnonzero((cases.timestamp >= begin) & (cases.timestamp < begin + 5 * 86_400_000))
    refresh(model, log, tmp_path / "store", until=Until(before=begin))
    with Scorer.open(model, tmp_path / "store") as scorer:
        expected = ScorerAnswers(scorer, log, requests_per_batch=64).probabilities(cases.part(own))
    np.testing.assert_allclose(found[own], expected, atol=1e-5)
    assert 0 < len(own) < 48


def test_ratings_become_answers(tmp_path: Path) -> None:
    columns = {"user": [0, 0, 1], "item": [5, 3, 3], "rating": [4.0, 3.5, 5.0], "time": [9, 9, 1]}
    np.savez(tmp_path / "events.npz", **{name: np.array(values) for name, values in columns.items()})
    prepare_set("ml-1m-half-liked", tmp_path, tmp_path / "log")
    log = EventLog.open(tmp_path / "log")
    shown = impression_cases(log, 0, None)
    assert log.items.ids(shown.item).tolist() == [5, 3, 3] and shown.label[:, 0].tolist() == [1, 0, 1]
    assert shown.tasks == ["liked"] and shown.seen.tolist() == [0, 1, 0]
    day = 86_400_000
    assert shown.timestamp.tolist() == [75 * day - 1000, 225 * day - 1000, 150 * day - 1000]
    events = log.gather(np.arange(2))
    assert events.timestamp.tolist() == [75 * day, 225 * day, 150 * day]
    assert [log.actions[action] for action in events.action] == ["4.0", "3.5", "5.0"]


def test_the_metrics_of_yambda(tmp_path: Path) -> None:
    """As the benchmark's code has them: repeats in the test count as labels, but can be found only once."""
    (tmp_path / "files").mkdir()
    SAMPLES["yambda"](tmp_path / "files")
    prepare_set("yambda", tmp_path / "files", tmp_path / "log")
    log, table = EventLog.open(tmp_path / "log"), TABLES["yambda"]
    data = train_config(table, table.rows["vista"]).data
    asked = EvaluateConfig(target=Target.window, **{**LAST_DAY, "top_k": [1, 5, 10]})  # type: ignore[arg-type]
    scores = np.random.default_rng(0).standard_normal((log.num_users, log.num_items))

    def score(cases: WindowCases) -> np.ndarray:
        return scores[cases.user]

    _, per_user = measure_windows(log, data, np.arange(log.num_items), asked, score)
    found = yambda_metrics(per_user.values, log, data, asked)
    begin = 1000 * (26_000_000 - 86_400)
    test = {user: log[user] for user in log.users.ids(np.arange(log.num_users)).tolist()}
    labels = [history.item[history.timestamp >= begin] for history in test.values()]
    asked_rows = [
        row
        for row, history in enumerate(test.values())
        if len(labels[row]) and (history.timestamp < begin - 30 * 60_000).any()
    ]
    assert asked_rows and any(len(set(own.tolist())) < len(own) for own in labels)
    for k in (1, 5, 10):
        recalls, gains, best = [], 0.0, 0.0
        for row in asked_rows:
            ranked = np.argsort(-scores[row])[:k]
            hit = np.isin(ranked, labels[row])
            recalls.append(hit.sum() / len(labels[row]))
            gains += sum(1 / math.log2(2 + rank) for rank in np.flatnonzero(hit))
            best += sum(1 / math.log2(2 + rank) for rank in range(min(k, len(labels[row]))))
        assert found[f"recall@{k}"] == pytest.approx(np.mean(recalls))
        assert found[f"ndcg@{k}"] == pytest.approx(gains / best)
