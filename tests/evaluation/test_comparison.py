"""The paired comparison, by hand and against SciPy; and reports of counting baselines."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Served, small_config
from tests.evaluation.conftest import evaluated
from tests.evaluation.test_windows import ASKED
from vista.arrays import Floats, Int
from vista.config import CompareConfig, DataConfig, DinConfig, EvaluateConfig
from vista.config.checks import AskedBaselines, Split, Target
from vista.errors import ConfigError
from vista.evaluation import baseline_evaluation
from vista.evaluation.baseline_evaluation import BaselineReport, asked_horizons, measure_baseline, measure_by_horizon
from vista.evaluation.cases import next_item_cases
from vista.evaluation.comparison import Comparison, PerUserMetrics, compare, per_user_path
from vista.evaluation.counting_baselines import OwnFrequency, Popularity, Transitions, scores_in_columns
from vista.evaluation.evaluate import evaluate, evaluate_scorer
from vista.evaluation.label_baselines import label_baselines
from vista.evaluation.metrics import auc, log_loss
from vista.evaluation.trained_baselines import PooledFactors
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.scorer import Scorer
from vista.training.trainer import Trainer

QUESTION = {"target": "window", "split": "test", "horizon": ["50 events"], "cases": ["abc"]}


def run_of(question: dict[str, object] | None = None, **values: list[float]) -> PerUserMetrics:
    arrays = {name: np.array(value, np.float64) for name, value in values.items()}
    return PerUserMetrics(np.arange(len(next(iter(arrays.values())))), arrays, question or QUESTION)


def test_by_hand() -> None:
    """Four users, of whom one has no label; with two differences of 1 and one of 2, one sign of four is as extreme."""
    a = run_of(hits=[1, 0, np.nan, 2], other=[0, 0, 0, 0])
    b = run_of(hits=[2, 2, np.nan, 3], more=[1, 1, 1, 1])
    (row,) = Comparison.of([a], [b]).differences.values()
    assert (row.num_users, row.mean_a, row.difference) == (3, 1, pytest.approx(4 / 3))
    assert row.mean_b == pytest.approx(7 / 3)
    assert row.standard_error == pytest.approx(np.std([1, 2, 1], ddof=1) / np.sqrt(3))
    assert row.interval == pytest.approx((4 / 3 - 1.959964 / 3, 4 / 3 + 1.959964 / 3))
    assert row.p == pytest.approx(2 / 8, abs=0.02)


def test_p_agrees_with_scipy() -> None:
    from scipy.stats import permutation_test  # takes a second

    rng = np.random.default_rng(1)
    base = rng.random(60)
    for shift in (0.0, 0.03):
        other = base + rng.normal(shift, 0.1, 60)
        (row,) = Comparison.of([run_of(x=base.tolist())], [run_of(x=other.tolist())]).differences.values()
        expected = permutation_test(
            (other, base), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=9_999, rng=2
        )
        assert row.p == pytest.approx(expected.pvalue, abs=0.02)


def test_equal_models_do_not_differ() -> None:
    run = run_of(x=[0.1, 0.7, 0.3])
    (row,) = Comparison.of([run], [run]).differences.values()
    assert (row.difference, row.standard_error, row.p) == (0, 0, 1)


def test_seeds_are_averaged_per_user() -> None:
    a = [run_of(x=[0, 1]), run_of(x=[1, 1])]
    (row,) = Comparison.of(a, [run_of(x=[1, 3])]).differences.values()
    assert (row.mean_a, row.difference) == (0.75, 1.25)
    assert row.standard_error == pytest.approx(np.std([0.5, 2], ddof=1) / np.sqrt(2))


@pytest.mark.parametrize("signs_per_chunk", [1, 7])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, signs_per_chunk: int) -> None:
    a, b = run_of(x=[0, 1, 2], y=[1, 1, 1]), run_of(x=[1, 3, 2], y=[1, 1, 5])
    monkeypatch.setattr("vista.evaluation.comparison.NUM_FLIPS", 99)
    whole = Comparison.of([a], [b])
    monkeypatch.setattr("vista.evaluation.comparison.SIGNS_PER_CHUNK", signs_per_chunk)
    small = Comparison.of([a], [b])
    for name, row in whole.differences.items():
        assert small.differences[name].difference == row.difference
        assert small.differences[name].p == pytest.approx(row.p, abs=0.15)  # the generator draws other signs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ["other"]}, "were evaluated on other users or labels; evaluate both on the same log"),
        ({"horizon": ["200 events"]}, r"horizon is \['50 events'\] in one evaluation and \['200 events'\] in another"),
        ({"split": "validation"}, "split is 'test' in one evaluation and 'validation' in another"),
        ({"target": "next"}, "target is 'window' in one"),
    ],
)
def test_other_questions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Comparison.of([run_of(x=[1])], [run_of(QUESTION | changes, x=[1])])
    with pytest.raises(ConfigError, match=message):  # also between the seeds of one model
        Comparison.of([run_of(x=[1]), run_of(QUESTION | changes, x=[1])], [run_of(x=[1])])


def test_runs_without_a_common_metric_are_refused() -> None:
    with pytest.raises(ConfigError, match="no metric in common; evaluate both with the same top_k"):
        Comparison.of([run_of(x=[1])], [run_of(y=[1])])


class TestFiles:
    def test_ids_and_values_survive(self, tmp_path: Path) -> None:
        for users in (np.array([5, 9]), np.array(["anna", "b"], object)):
            run = PerUserMetrics(users, {"ndcg@10:new/50-events": np.array([0.5, np.nan])}, QUESTION)
            run.save(tmp_path / "metrics.json.npz")
            read = PerUserMetrics.load(tmp_path / "metrics.json.npz")
            assert read.users.tolist() == users.tolist() and read.question == QUESTION
            np.testing.assert_array_equal(read.values["ndcg@10:new/50-events"], [0.5, np.nan])

    def test_the_table(self, tmp_path: Path) -> None:
        for name, values in (("a", [0.0, 0.5, 0.5]), ("b", [0.5, 0.5, 1.0])):
            run_of(x=values).save(per_user_path(tmp_path / name))
        lines = str(compare(CompareConfig(a=[str(tmp_path / "a")], b=[str(tmp_path / "b")]))).splitlines()
        assert lines[0].split() == ["metric", "users", "a", "b", "b", "-", "a", "95", "%", "interval", "p"]
        assert lines[1].split()[:6] == ["x", "3", "0.3333", "0.6667", "+0.3333", "+0.0067"]

    @pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 damaged", b"\x93NUMPY\x01\x00v\x00{}"])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"a\.npz: does not hold metrics per user .*run `vista evaluate` again"):
            PerUserMetrics.load(tmp_path / "a.npz")

    def test_other_arrays_are_refused(self, tmp_path: Path) -> None:
        good = {"users": np.arange(2), "names": np.array(["x"]), "values": np.zeros((1, 2)), "question": np.array("{}")}
        for wrong in (
            {"values": np.zeros((1, 3))},
            {"values": np.zeros((1, 2), int)},
            {"names": np.array([["x"]])},
            {"users": np.zeros((2, 2))},
            {"question": np.array("[]")},
        ):
            np.savez(tmp_path / "a.npz", **(good | wrong))
            with pytest.raises(ConfigError, match="does not hold metrics per user"):
                PerUserMetrics.load(tmp_path / "a.npz")
        np.savez(tmp_path / "a.npz", users=np.arange(2))
        with pytest.raises(ConfigError, match="does not hold metrics per user"):
            PerUserMetrics.load(tmp_path / "a.npz")

    def test_a_small_file_cannot_take_much_memory(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("values.npy", bytes(1000))
            archive.getinfo("values.npy").file_size = 1 << 40  # what the directory of the archive says
        with pytest.raises(ConfigError, match=r"a\.npz: .*its arrays hold 1,099,511,627,776 bytes, but at most"):
            PerUserMetrics.load(tmp_path / "a.npz")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"gone\.json\.npz: cannot be read .*run `vista evaluate` with `out`"):
            compare(CompareConfig(a=[str(tmp_path / "gone.json")], b=["x"]))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_next_items_are_ranked_as_without_a_model(
    served: Served, tmp_path: Path, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "metrics.json"
    monkeypatch.setattr(served.model.data, "exclude_seen", exclude_seen)
    served.model.save_pretrained(tmp_path / "model")
    config = EvaluateConfig(
        data=str(served.log.path),
        model=str(tmp_path / "model"),
        store=str(served.test_store),
        top_k=[5],
        baselines=AskedBaselines.counting,
        out=str(out),
        num_threads=1,
    )
    report = evaluate(config)
    written = json.loads(out.read_text())
    columns = served.model.rows_of(served.log.items) - 1
    expected = measure_baseline(Transitions(), served.log, served.model.data, config, columns).means()
    assert written["baselines"]["transitions"] == pytest.approx(expected)
    assert ("own frequency" in written["baselines"]) != exclude_seen
    row = next(line for line in str(report).splitlines() if line.startswith("transitions  "))
    assert row.split()[1::4] == [f"{expected['hr@5']:.4f}", f"{expected['ndcg@5']:.4f}"]
    paired = compare(CompareConfig(a=[str(out)], b=[f"{out}.transitions"]))
    assert f"{expected['hr@5'] - report.metrics['hr@5']:+.4f}" in str(paired)


def test_baselines_that_learn_are_measured_if_asked_for(served_tasks: Served) -> None:
    log, columns = served_tasks.log, served_tasks.model.rows_of(served_tasks.log.items) - 1
    config = EvaluateConfig(**ASKED, baselines=AskedBaselines.trained)
    with Scorer.open(served_tasks.model, served_tasks.test_store) as scorer:
        report = evaluate_scorer(scorer, log, config)
    assert report.per_user is not None and report.baselines is not None
    measured = report.baselines.per_user
    learned = {"EASE", "TIFU-KNN", "pooled factors", "pooled vectors", "counter trees", "new-item trees"}
    assert learned <= set(measured) and "popularity" in measured
    assert all(own.question == report.per_user.question for own in measured.values())
    lengths = asked_horizons(config)
    versions = {n: PooledFactors(horizon_events=n) for n in lengths}
    alone = measure_by_horizon(versions, log, served_tasks.config.data, config, columns)
    for name, values in alone.values.items():
        np.testing.assert_allclose(measured["pooled factors"].values[name], values)


def test_windows_are_asked_of_the_same_users(served_tasks: Served) -> None:
    log = served_tasks.log
    report = evaluated(served_tasks.model, served_tasks.test_store, log, **ASKED, baselines=AskedBaselines.counting)
    assert report.per_user is not None and report.baselines is not None
    seen = visible_counts(log, split_until(served_tasks.config.data, "test"))
    own = report.baselines.per_user["own frequency"]
    assert own.users.tolist() == report.per_user.users.tolist() and own.question == report.per_user.question
    baseline = OwnFrequency()
    baseline.fit(log, seen, np.random.default_rng(0))
    for user, value in zip(
        log.users.rows(own.users.tolist()).tolist(), own.values["precision@4/3-events"], strict=True
    ):
        scores = baseline.scores(np.array([user]), seen[[user]], None)[0]
        best = set(np.argsort(-scores)[:4].tolist())
        window = log.slice(user, int(seen[user]), int(seen[user]) + 3).item.tolist()
        if len(np.unique(np.sort(-scores)[:5])) == 5:  # without a tie at the end of the list
            assert value == pytest.approx(len(best & set(window)) / 4)
    text = str(report)
    assert "baselines, next 3 events" in text and "baselines, next 8 events" in text and "recall@4:new" in text


def test_a_model_is_ahead_or_behind_by_two_standard_errors_of_the_paired_difference() -> None:
    rng = np.random.default_rng(0)
    users, spread = np.arange(400), rng.normal(size=400)

    def measured(**values: np.ndarray) -> PerUserMetrics:
        return PerUserMetrics(users, values, {})

    model = measured(hr=spread, **{"log_loss/click": spread})
    noise = rng.normal(size=400)
    noise -= noise.mean()
    error = noise.std(ddof=1) / 20
    others = {"lower": -2.1 * error, "equal": -1.9 * error, "higher": 2.1 * error, "unknown": np.nan}
    baselines = {
        name: measured(hr=spread + noise + shift, **{"log_loss/click": spread + noise + shift})
        for name, shift in others.items()
    }
    report = BaselineReport(model, baselines, {"labels": {"HR": "hr"}})
    # The users differ far more than the two do, and a paired difference does not care.
    assert [report.standing(name, "hr") for name in others] == ["ahead", "level", "behind", "–"]
    assert [report.standing(name, "log_loss/click") for name in others] == ["behind", "level", "ahead", "–"]
    header, own, first, *_, last = str(report).splitlines()
    assert header.split() == ["baselines,", "labels", "HR"] and own.startswith("the model") and "±" in own
    assert first.split()[0] == "lower" and first.endswith("ahead") and "does not mean equal" in last


class AskedAt(Popularity):
    """Keeps the times of the questions, by (row of the log, number of visible events)."""

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        times = [None] * len(user) if now is None else now.tolist()
        self.asked = dict(zip(zip(user.tolist(), seen.tolist(), strict=True), times, strict=True))
        return super().scores(user, seen, now)


def test_baselines_are_asked_when_models_are(event_log: EventLog) -> None:
    """Next items at the time of the label, windows of a split by share at no time."""
    baseline, columns = AskedAt(), np.arange(event_log.num_items)
    asked = EvaluateConfig()
    measure_baseline(baseline, event_log, DataConfig(exclude_seen=False), asked, columns)
    assert len(baseline.asked) > 5 and all(
        event_log.slice(user).timestamp[seen] == time for (user, seen), time in baseline.asked.items()
    )
    shares = DataConfig(split=Split.share, validation_share=0.1, test_share=0.2)
    asked = EvaluateConfig(target=Target.window, min_seen=5, min_after=2)
    measure_baseline(baseline, event_log, shares, asked, columns)
    assert set(baseline.asked.values()) == {None}


def test_each_window_is_answered_by_the_version_for_its_length(
    event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Baselines that do not depend on the length are measured once."""
    data = DataConfig(split=Split.share, validation_share=0.1, test_share=0.2, exclude_seen=False)
    asked = EvaluateConfig(target=Target.window, horizon_events=[3, 8], min_seen=5, min_after=2, top_k=[4])
    columns = np.arange(event_log.num_items)
    versions = {3: OwnFrequency(last=4), 8: Transitions()}
    short, long = (measure_baseline(each, event_log, data, asked, columns) for each in versions.values())
    once = measure_by_horizon(versions, event_log, data, asked, columns)
    monkeypatch.setattr(baseline_evaluation, "LEARNED", (OwnFrequency,))
    both = measure_by_horizon(versions, event_log, data, asked, columns)
    assert list(both.values) == list(short.values) and both.question == short.question
    for name, values in both.values.items():
        np.testing.assert_array_equal(values, (short if name.endswith("/3-events") else long).values[name])
        np.testing.assert_array_equal(once.values[name], short.values[name])
    assert not np.array_equal(short.values["precision@4/8-events"], long.values["precision@4/8-events"])


def test_items_that_the_model_does_not_know_are_not_recommended(event_log: EventLog) -> None:
    """Every other item has a column, in another order, and the first column belongs to no item of the log."""
    columns = np.where(np.arange(event_log.num_items) % 2, event_log.num_items - np.arange(event_log.num_items), -1)
    baseline = Popularity()
    baseline.fit(event_log, event_log.lengths, np.random.default_rng(0))
    cases = next_item_cases(event_log, visible_counts(event_log, "leave-last-out"))
    scores = scores_in_columns(baseline, columns, cases)
    assert scores.shape == (len(cases), columns.max() + 1)
    counts = Counter(event_log.gather(np.arange(event_log.num_users), event_log.lengths).item.tolist())
    want = np.full(scores.shape[1], -np.inf)
    for item, column in enumerate(columns.tolist()):
        if column >= 0:
            want[column] = counts[item]
    np.testing.assert_array_equal(scores, np.tile(want, (len(cases), 1)))


def test_a_part_without_labels_is_refused(event_log: EventLog) -> None:
    data = DataConfig(split=Split.time, validation_from="2100-01-01", test_from="2100-02-01", exclude_seen=False)
    with pytest.raises(ConfigError, match="has no test label to rank"):
        measure_baseline(Popularity(), event_log, data, EvaluateConfig(), np.arange(event_log.num_items))


def test_labels_have_baselines_of_their_own(served_tasks: Served, tmp_path: Path) -> None:
    """Also for a model that ranks no items."""
    out = tmp_path / "metrics.json"
    config = replace(
        small_config(served_tasks.log, tmp_path / "run", model=DinConfig(history_limit=9, dim=16)),
        data=served_tasks.config.data,
    )
    Trainer(config, served_tasks.log).model.save_pretrained(tmp_path / "run" / "best")
    asked = {"data": str(served_tasks.log.path), "model": str(tmp_path / "run" / "best"), "out": str(out)}
    report = evaluate(EvaluateConfig(**asked, baselines=AskedBaselines.trained, num_threads=1))
    written = json.loads(out.read_text())
    assert report.per_user is None and report.labels is not None and report.impressions is not None
    expected = label_baselines(served_tasks.log, served_tasks.config.data, report.impressions, trained=True)
    assert list(written["baselines"]) == list(expected)
    assert report.probabilities is not None
    click = report.impressions.mask[:, 0]
    for name, answers in [("label trees", expected["label trees"]), ("", report.probabilities)]:
        label, answer = report.impressions.label[click, 0], answers[click, 0]
        found = written["baselines"][name] if name else written["metrics"]
        assert found["log_loss/click"] == pytest.approx(log_loss(label, answer))
        assert found["auc/click"] == pytest.approx(auc(label, answer))
    assert {"auc/click", "log_loss/click"} <= set(written["standard_errors"])
    assert "baselines, labels" in str(report) and "label trees" in str(report)
    paired = compare(CompareConfig(a=[f"{out}.labels"], b=[f"{out}.labels.label-trees"]))
    gain = written["baselines"]["label trees"]["auc/click"] - written["metrics"]["auc/click"]
    assert f"{gain:+.4f}" in str(paired)
