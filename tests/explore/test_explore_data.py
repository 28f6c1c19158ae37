"""What the tabs of the page show agrees with the store and the log."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import START, Served, small_frame, untrained
from tests.explore.conftest import places_of
from vista.config import EvaluateConfig, ExploreConfig, SourceColumns
from vista.config.checks import OnMissing, Precision
from vista.errors import ConfigError, LeakageError
from vista.evaluation.comparison import Estimate
from vista.evaluation.evaluate import evaluate_scorer
from vista.explore.benefit import BenefitRow, EmptySummaryScorer, SummaryBenefit, summary_benefit
from vista.explore.user_page import (
    MAX_KINDS,
    NUM_BINS,
    OTHER,
    Freshness,
    Timeline,
    counter_rows,
    frequent_items,
    generation_rows,
    history_of,
    record_sample,
    store_freshness,
    timeline,
    user_facts,
)
from vista.explore.workspace import Places, UserSearch, Workspace, escaped, log_version, record_of
from vista.log.event_log import EventLog
from vista.log.inspection import ItemNames
from vista.log.vocabulary import Vocabulary
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.scorer.serving_source import ServingSource
from vista.store import StoreReader
from vista.store.layout import environment_path
from vista.store.writer import erase


@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-200, 200), min_size=1, max_size=50),
    text=st.integers(-999, 999).map(str) | st.sampled_from(["", "-", "01", "x", "9" * 19, "9" * 30, "-0", " 7 "]),
)
@example(ids=[0], text="-0")
def test_integer_ids_are_found_by_their_digits(ids: list[int], text: str) -> None:
    users = Vocabulary.from_ids(ids)
    found = UserSearch(users).matches(text, limit=1000)
    wanted = text.strip()
    assert found == sorted(user for user in set(ids) if wanted and str(user).startswith(wanted) and wanted != "-")


@given(ids=st.lists(st.text("abé", min_size=0, max_size=4), min_size=1, max_size=40), text=st.text("abé", max_size=3))
def test_text_ids_are_found_by_their_beginning(ids: list[str], text: str) -> None:
    found = UserSearch(Vocabulary.from_ids(ids)).matches(text, limit=1000)
    assert sorted(found) == sorted(user for user in set(ids) if text and user.startswith(text))
    assert text not in ids or not text or found[0] == text


def test_a_million_users_give_few_matches() -> None:
    users = Vocabulary("int", np.arange(1, 1_000_001))
    search = UserSearch(users, np.arange(1_000_000))
    assert search.matches("12", limit=5) == [12, 120, 121, 122, 123] and len(search) == 1_000_000
    heavy = {search.heavy_user(np.random.default_rng(seed)) for seed in range(20)}
    assert len(heavy) > 10 and min(heavy) > 990_000  # type: ignore[type-var]


def test_removed_users_are_not_found() -> None:
    users = Vocabulary.from_ids([10, 11, 12]).without_ids(np.array([1]))
    search = UserSearch(users, np.array([1, 99, 2]))
    assert search.matches("1") == [10, 12] and len(search) == 2
    assert {search.heavy_user(np.random.default_rng(seed)) for seed in range(9)} == {10, 12}
    assert UserSearch(Vocabulary.empty("int")).heavy_user(np.random.default_rng(0)) is None


@pytest.mark.parametrize(("text", "user"), [("103", 103), (" 103 ", 103), ("abc", None), ("", None), ("5", 5)])
def test_a_text_that_is_an_id(text: str, user: int | None) -> None:
    assert UserSearch(Vocabulary.from_ids([103])).exact(text) == user


def test_without_a_log_users_come_from_the_store(workspace: Workspace) -> None:
    from_log, from_store = UserSearch.of(workspace.log, None), UserSearch.of(None, workspace.scorer)
    assert from_store.matches("1", 99) == from_log.matches("1", 99) == list(range(100, 116))
    assert from_store.heavy_user(np.random.default_rng(0)) in range(100, 116)


def test_the_demo_is_shown_without_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    empty = Places.of(ExploreConfig())
    assert empty.is_demo and (empty.store, empty.other_store) == ("demo/simulation/store", None)
    for name in ("ml-1m", "simulation"):
        (tmp_path / "demo" / name / "vista" / "best").mkdir(parents=True)
    (tmp_path / "demo/simulation/store-test").mkdir()
    places = Places.of(ExploreConfig())
    assert (places.model, places.data) == (Path("demo/simulation/vista/best"), Path("demo/simulation/log"))
    assert places.other_store == "demo/simulation/store-test"
    (tmp_path / "demo/simulation/vista/best").rmdir()
    assert Places.of(ExploreConfig()).model == Path("demo/ml-1m/vista/best")


def test_the_log_of_the_models_own_run_is_found(served: Served, tmp_path: Path) -> None:
    places = Places.of(ExploreConfig(model=str(served.model_dir), store=str(served.store)))
    assert places.data == served.log.path and not places.is_demo
    named = Places.of(ExploreConfig(model=str(served.model_dir), store=str(served.store), data="elsewhere"))
    assert named.data == Path("elsewhere")
    without = Places.of(ExploreConfig(model=str(tmp_path / "best"), store="store"))
    assert without.data is None
    (tmp_path / "config.yaml").write_text("data: [")
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read .*; name one with data="):
        Places.of(ExploreConfig(model=str(tmp_path / "best"), store="store"))


def test_a_model_without_a_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="model, store: name both"):
        ExploreConfig(model="runs/mine/best")


HOUR_MS = 3_600_000


def test_a_store_of_the_whole_log_is_fresh(workspace: Workspace) -> None:
    assert workspace.scorer is not None
    manifest = workspace.scorer.manifest
    fresh = store_freshness(manifest, workspace.log, manifest.refreshed_at + 2 * HOUR_MS)
    assert fresh.state is Freshness.fresh and fresh.reason.startswith("The last refresh started 2 hours ago")
    assert store_freshness(manifest, None).state is Freshness.unknown
    merged = store_freshness(replace(manifest, applied_segment=0), workspace.log)
    assert merged.state is Freshness.unknown and "was merged from several logs" in merged.reason


def test_a_store_for_evaluation_is_held_back(served: Served) -> None:
    with StoreReader.open(served.test_store) as store:
        held = store_freshness(store.manifest, served.log)
    assert held.state is Freshness.partial and "leave-last-out" in held.reason


def test_a_store_behind_its_log(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.log.path, tmp_path / "log")
    version = log_version(tmp_path / "log")
    frame = small_frame()
    new = {name: values[:3] for name, values in frame.items()} | {"timestamp": START + 10**11 + frame["user"][:3]}
    columns = SourceColumns(action="action", rating="rating")
    longer = EventLog.from_frame(new, tmp_path / "log", time_unit="ms", columns=columns, append=True)
    assert log_version(tmp_path / "log") != version
    opened = Workspace.open(places_of(served, data=tmp_path / "log"))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        behind = store_freshness(scorer.manifest, longer)
        sample = record_sample(scorer, longer, UserSearch.of(longer, scorer))
    assert behind.state is Freshness.behind and "1 newer segment with changes of 1 user;" in behind.reason
    assert (sample.num_users, sample.without_record, sample.behind) == (16, 0, 1)
    assert {"events": 15, "covered": 12} in sample.covered


def test_users_without_a_record_are_counted(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    erase(tmp_path / "store", [100, 104])
    opened = Workspace.open(places_of(served, store=str(tmp_path / "store")))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        sample = record_sample(scorer, served.log, UserSearch.of(served.log, scorer))
        alone = record_sample(scorer, None, UserSearch.of(None, scorer))
    assert (sample.num_users, sample.without_record, sample.behind) == (16, 2, 0)
    assert (alone.num_users, alone.covered) == (14, [])


def test_generations_are_listed_with_the_served_one_first(served: Served, tmp_path: Path) -> None:
    for until in ("leave-last-out", "all"):
        refresh(served.model, served.log, tmp_path / "store", until=until)
    rows, problems = generation_rows(str(tmp_path / "store"))
    assert [(row["generation"], row["state"], row["users"]) for row in rows] == [(2, "served", 16), (1, "kept", 16)]
    assert [row["events"] for row in rows] == ["all", "until=leave-last-out"]
    assert problems == [] and rows[0]["vectors"] == "3 x 16" and rows[0]["tail"] == 6 and rows[0]["bytes per user"] > 0
    (environment_path(tmp_path / "store", 1) / "data.mdb").write_bytes(b"damaged")
    rows, problems = generation_rows(str(tmp_path / "store"))
    assert rows[1] == {"generation": 1, "state": "damaged"} and problems[0].startswith("gen-1: ")


USER = 104
"""The user with the most events, 40."""


def test_facts_agree_with_store_and_log(workspace: Workspace) -> None:
    assert workspace.scorer is not None and workspace.log is not None
    facts, history = user_facts(workspace, workspace.scorer, USER), workspace.log[USER]
    assert facts.in_log and facts.has_record and facts.num_events == facts.num_covered == 40 and facts.num_missing == 0
    assert facts.summary_shape == (3, 16) and facts.newest_at == history.timestamp[-1]
    newest = workspace.log.items.ids(history.item[-6:]).tolist()[::-1]
    assert [row["item"] for row in facts.tail] == newest and facts.tail[0]["time"] == history.timestamp[-1]
    assert {row["action"] for row in facts.tail} <= {"click", "like"} and facts.counters == {}


def test_a_user_without_a_record(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    erase(tmp_path / "store", [USER])
    opened = Workspace.open(places_of(served, store=str(tmp_path / "store")))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        facts, nobody = user_facts(opened, scorer, USER), user_facts(opened, scorer, 999_999)
    assert not facts.has_record and facts.num_events == 40 and facts.tail == [] and facts.num_missing is None
    assert not nobody.in_log and not nobody.has_record and nobody.num_events is None
    assert history_of(opened, 999_999) is None


def test_counters_have_the_counts_of_the_history(tmp_path: Path) -> None:
    frame = small_frame()
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
    model = untrained(log, model__counter_keys=["item"])
    model.save_pretrained(tmp_path / "model")
    refresh(model, log, tmp_path / "store")
    opened = Workspace.open(Places(model=tmp_path / "model", store=str(tmp_path / "store"), data=log.path))
    assert opened.scorer is not None
    with opened.scorer as scorer:
        rows = counter_rows(opened, scorer, record_of(scorer, USER))["item"]
    items, counts = np.unique(frame["item"][frame["user"] == USER], return_counts=True)
    assert {row["item"]: row["count"] for row in rows} == dict(zip(map(str, items), counts.astype(float), strict=True))
    assert [row["count"] for row in rows] == sorted((row["count"] for row in rows), reverse=True)
    assert all(row["seconds since the last"] >= 0 for row in rows)


def test_the_timeline_counts_every_event_once(workspace: Workspace) -> None:
    log = workspace.log
    assert log is not None
    history = log[USER]
    line = timeline(log, history, workspace.names, [int(history.timestamp[-6])])
    assert sum(row["events"] for row in line.rows) == 40 and line.tail_from == history.timestamp[-6]
    assert line.kind_name == "action" and set(line.kinds) == {"click", "like"}
    assert len({row["time"] for row in line.rows}) <= NUM_BINS
    assert all(row["above"] - row["below"] == row["events"] and row["time"] < row["end"] for row in line.rows)
    times = np.asarray(history.timestamp)
    for row in line.rows:
        inside = (times >= row["time"]) & (times < row["end"])
        assert row["events"] == (np.array(log.actions)[history.action[inside]] == row["kind"]).sum()
    empty = timeline(log, log.gather([0], [0]), workspace.names, [])
    assert empty.rows == [] and empty.kinds == []


def test_the_legend_of_the_timeline_says_what_a_kind_is() -> None:
    pytest.importorskip("altair", reason="the extra `explore` is not installed")
    from vista.explore.charts import timeline_chart

    rows = [{"time": 0, "end": 9, "kind": "drama", "events": 2, "below": 0, "above": 2}]
    chart = timeline_chart(Timeline(rows, ["drama"], "genre", None), has_time=False).to_dict()
    assert chart["encoding"]["color"]["legend"]["title"] == "genre"


def test_rare_kinds_are_counted_together(tmp_path: Path) -> None:
    count = MAX_KINDS + 3
    frame = {"user": np.ones(count, int), "item": np.arange(count), "timestamp": 10**12 + np.arange(count) * 1000}
    items = {"item": np.arange(count), "title": [f"Film {n}" for n in range(count)], "genre": [*"abcdefghi"]}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", items=items)
    names = ItemNames.of(log)
    line = timeline(log, log[1], names, [])
    assert line.kind_name == "genre" and len(line.kinds) == MAX_KINDS + 1 and line.kinds[-1] == OTHER
    assert sum(row["events"] for row in line.rows if row["kind"] == OTHER) == 3
    assert names.of_ids([3, None, 0]) == ["Film 3 (3)", "unknown item", "Film 0 (0)"]
    assert names.groups_of_ids([2, None, 12345]) == ["c", "", ""]
    assert ItemNames.of(log, "genre").of_ids([3, None]) == ["d (3)", "unknown item"]
    for column in ("color", "item"):
        with pytest.raises(
            ConfigError, match=f"item_name: '{column}' is not a category of the log's items; it has .*'title'"
        ):
            ItemNames.of(log, column)
    long = replace(names, titles=replace(names.titles, values=type(names.items).from_ids(["x" * 99])))  # type: ignore[type-var]
    assert long.titles is not None and len(long.titles.values) == 1


def test_names_without_a_title_are_ids(workspace: Workspace) -> None:
    assert workspace.names.of_ids([10, None]) == ["10", "unknown item"]
    assert workspace.names.groups_of_ids([10]) == [""] and ItemNames.of(None).of_ids(["a"]) == ["a"]


def test_frequent_items(workspace: Workspace) -> None:
    assert workspace.log is not None
    history = workspace.log[USER]
    rows = frequent_items(workspace, history, 5)
    items = workspace.log.items.ids(history.item)
    top = rows[0]
    assert top["events"] == (items == int(top["item"])).sum() == max(np.unique(items, return_counts=True)[1])
    assert top["last"] == history.timestamp[items == int(top["item"])].max() and len(rows) == 5


def empty_scorer(served: Served) -> EmptySummaryScorer:
    source = ServingSource(served.model_dir, served.test_store, "cpu", None, Precision.float32)
    return EmptySummaryScorer(source, OnMissing.empty, None, None)


def test_users_are_grouped_by_length(served: Served) -> None:
    with Scorer.open(served.model_dir, served.test_store) as scorer, empty_scorer(served) as without:
        benefit = summary_benefit(scorer, without, served.log)
        report = evaluate_scorer(scorer, served.log, EvaluateConfig())
    assert benefit.metric == "hit rate at 10" and sum(row.users for row in benefit.rows) == report.num_cases
    mean = sum(row.with_summary * row.cases for row in benefit.rows) / report.num_cases
    assert np.isclose(mean, report.metrics["hr@10"])
    assert all(np.isclose(row.gain.value, row.with_summary - row.without) for row in benefit.rows)
    assert benefit.answer().startswith("For the users with the longest histories")


def test_impressions_are_measured_where_there_are_some(served_tasks: Served) -> None:
    with Scorer.open(served_tasks.model_dir, served_tasks.test_store) as scorer, empty_scorer(served_tasks) as without:
        benefit = summary_benefit(scorer, without, served_tasks.log)
    assert benefit.metric == f"AUC of {served_tasks.model.schema.tasks[0]}" and len(benefit.rows) == 4
    assert all(row.gain.half_width > 0 for row in benefit.rows if row.unmeasured is None), "intervals come from users"


def test_without_summaries_users_differ_only_by_their_tail(served: Served) -> None:
    """A user without a tail and a record gets the same scores either way."""
    with Scorer.open(served.model_dir, served.test_store) as scorer, empty_scorer(served) as without:
        items = [0, 10, 20]
        assert np.array_equal(scorer.score([999_999], items), without.score([999_999], items))
        assert not np.array_equal(scorer.score([104], items), without.score([104], items))


def test_a_store_that_covers_the_labels_is_refused(served: Served) -> None:
    refused = pytest.raises(LeakageError, match="its records cover them")
    with Scorer.open(served.model_dir, served.store) as scorer, empty_scorer(served) as without, refused:
        summary_benefit(scorer, without, served.log)


def benefit_of(first: Estimate, last: Estimate, num_positive: int = 30) -> SummaryBenefit:
    """Of two groups of 75 impressions with these gains; `num_positive` is of the one whose gain is not defined."""
    rows = [
        BenefitRow(group, 75, 75, 0.6 + gain.value, 0.6, gain, 30 if gain.value == gain.value else num_positive)
        for group, gain in (("1 to 9 events", first), ("10 to 99 events", last))
    ]
    return SummaryBenefit("AUC of click", rows)


def test_a_difference_within_its_interval_is_not_announced() -> None:
    text = benefit_of(Estimate(-0.004, 0.01), Estimate(0.03, 0.02)).answer()  # the page shows 95 % intervals
    assert text.count("no clear difference") == 2 and "more" not in text and "+0.030 ± 0.039" in text
    text = benefit_of(Estimate(-0.004, 0.001), Estimate(0.03, 0.005)).answer()
    assert "**0.030 more** (± 0.010)" in text and "**0.004 less** (± 0.002)" in text
    benefit = benefit_of(Estimate(-0.0004, 0.01), Estimate(-0.0006, 0.01))
    assert "(+0.000 ±" in benefit.answer() and "(-0.001 ±" in benefit.answer()
    assert [f"{row['gain']:.3f}" for row in benefit.table()] == ["0.000", "-0.001"]


def test_a_group_of_one_class_cannot_be_measured() -> None:
    undefined = Estimate(float("nan"))
    text = benefit_of(Estimate(0.03, 0.01), undefined, num_positive=0).answer()
    assert "cannot be measured: none of the impressions has a positive label" in text and "nan" not in text
    text = benefit_of(undefined, Estimate(0.03, 0.01), num_positive=75).answer()
    assert "cannot be measured: all of the impressions have a positive label" in text and "nan" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("M*A*S*H", r"M\*A\*S\*H"),
        ("$5 $6", r"\$5 \$6"),
        ("![x](http://a/b.png)", r"!\[x\](http\://a/b.png)"),
        (":red[x] <b> `c` \\ _d_ ~e~ &amp; # |", r"\:red\[x\] \<b\> \`c\` \\ \_d\_ \~e\~ \&amp; \# \|"),
        ("two\n\n# lines", r"two \# lines"),
    ],
)
def test_escaped(text: object, expected: str) -> None:
    assert escaped(text) == expected
