"""Answers over HTTP are those of the scorer, bit for bit, also while it is moved to another model or generation."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served, draw_counter_weights, small_frame, untrained
from tests.scorer.test_retrieval import export, item_table
from tests.scorer.test_scorer_bad_input import damage_record
from tests.serve.conftest import ASKED, NOW, TOLERANCE, retrained
from tests.serve.running_service import RunningService, running, until
from vista.cli.item_commands import run_index
from vista.config import IndexConfig, ServeConfig, SourceColumns
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.serve import scoring_service
from vista.serve.scoring_service import JSON, ScoreBatches, ScoringService
from vista.store import StoreReader

MSGPACK = {"Content-Type": "application/msgpack"}


def bits(values: Any) -> Any:
    return np.array(values, np.float32).view(np.uint32)


def test_scores(service: RunningService, scorer: Scorer) -> None:
    status, answer = service.fetch("/v1/score", {"users": USERS, "candidates": ITEMS, "now": NOW})
    assert (status, answer["task"]) == (200, "next")
    np.testing.assert_array_equal(bits(answer["scores"]), bits(scorer.score(USERS, ITEMS, now=NOW)))


def test_scores_of_one_list_per_user(service: RunningService, scorer: Scorer) -> None:
    lists = [ITEMS[:2], [], ITEMS]
    status, answer = service.fetch("/v1/score", {"users": USERS[:3], "candidates": lists, "now": [NOW, NOW, NOW + 1]})
    assert status == 200 and list(map(len, answer["scores"])) == [2, 0, 6]
    values = [item for row in lists for item in row]
    expected = scorer.score(USERS[:3], (values, [0, 2, 2, 8]), now=[NOW, NOW, NOW + 1])
    np.testing.assert_array_equal(bits([score for row in answer["scores"] for score in row]), bits(expected))


def test_events_since_the_refresh(service: RunningService, scorer: Scorer) -> None:
    """They have names of actions, and change the scores as in the scorer."""
    events = [{"item": 10, "time": NOW - 2000, "action": "like"}, {"item": 390, "time": NOW - 1000, "action": "click"}]
    actions = scorer.model.schema.actions
    tail = Tail([10, 390], [NOW - 2000, NOW - 1000], [actions.index("like"), actions.index("click")], [0, 2, 2])  # type: ignore[arg-type]
    asked = {"users": USERS[:2], "candidates": ITEMS, "tail": [events, []], "now": NOW}
    status, answer = service.fetch("/v1/score", asked)
    assert status == 200
    expected = scorer.score(USERS[:2], ITEMS, tail=tail, now=NOW)
    np.testing.assert_array_equal(bits(answer["scores"]), bits(expected))
    assert not np.array_equal(expected[0], scorer.score(USERS[:1], ITEMS, now=NOW)[0])
    status, answer = service.fetch("/v1/rank", {"user": USERS[0], "tail": events, "exclude_tail": True, "now": NOW})
    assert status == 200 and not {10, 390} & set(answer["items"])


def test_ranking(service: RunningService, scorer: Scorer) -> None:
    for asked in (
        {"top_k": 5},
        {"candidates": ITEMS, "exclude": [10]},
        {"candidates": [10, 77_777], "exclude_tail": True},
    ):
        status, answer = service.fetch("/v1/rank", {"user": 103, "now": NOW, **asked})
        expected = scorer.rank(103, now=NOW, **asked)  # type: ignore[arg-type]
        assert status == 200 and answer["items"] == expected.items.tolist()
        assert answer["num_dropped"] == expected.num_dropped
        np.testing.assert_array_equal(bits(answer["scores"]), bits(expected.scores))


def test_explanation(service: RunningService, scorer: Scorer) -> None:
    status, answer = service.fetch("/v1/explain", {"user": 103, "items": ITEMS, "now": NOW})
    expected = scorer.explain(103, ITEMS, now=NOW)
    assert status == 200 and answer["items"] == ITEMS and answer["tail_items"] == expected.tail_items
    np.testing.assert_array_equal(answer["value"], expected.value)
    np.testing.assert_array_equal(answer["tail"], expected.tail)
    assert answer["mean"] == expected.mean
    assert answer["shares"] == {name: shares.tolist() for name, shares in expected.shares.items()}
    words = [[(each["text"], each["share"]) for each in reasons] for reasons in answer["reasons"]]
    assert words == [[(each.words(), each.share) for each in reasons] for reasons in expected.reasons] and any(words)
    some = {"items": ITEMS[:1], "candidates": ITEMS, "now": NOW}
    assert service.fetch("/v1/explain", {"user": 103, **some})[1]["mean"] == scorer.explain(103, **some).mean


def test_messagepack(service: RunningService, scorer: Scorer) -> None:
    expected = scorer.score(USERS, ITEMS, now=NOW)
    ids = np.array(ITEMS, "<i8").tobytes()
    for candidates in (ITEMS, ids):
        body = msgspec.msgpack.encode({"users": USERS, "candidates": candidates, "now": NOW})
        status, headers, answer = service.send("/v1/score", body, headers=MSGPACK)
        assert (status, headers["Content-Type"]) == (200, "application/msgpack")
        held = msgspec.msgpack.decode(answer)
        assert held["scores"] == expected.tobytes() and held["task"] == "next"
    asked = {"user": 103, "candidates": ids, "now": NOW}
    held = msgspec.msgpack.decode(service.send("/v1/rank", msgspec.msgpack.encode(asked), headers=MSGPACK)[2])
    ranking = scorer.rank(103, candidates=ITEMS, now=NOW)
    assert held["items"] == ranking.items.tolist() and held["scores"] == ranking.scores.tobytes()


def test_answers_say_what_they_were_computed_from(service: RunningService, served: Served) -> None:
    """The generation and the model, in JSON and in MessagePack, and the fields that the OpenAPI page shows."""
    source = {"generation": 1, "model_checksum": json.loads((served.model_dir / "config.json").read_text())["checksum"]}
    page = service.fetch("/openapi.json")[1]["paths"]
    for path, asked in (
        ("score", {"users": USERS, "candidates": ITEMS}),
        ("predict", {"users": USERS, "candidates": ITEMS}),
        ("rank", {"user": 103}),
        ("retrieve", {"users": USERS}),
        ("explain", {"user": 103, "items": ITEMS}),
    ):
        packed = service.send(f"/v1/{path}", msgspec.msgpack.encode(asked), headers=MSGPACK)[2]
        for answer in (service.fetch(f"/v1/{path}", asked)[1], msgspec.msgpack.decode(packed)):
            assert {name: answer[name] for name in source} == source, path
            known = answer["known_user"] if "user" in asked else answer["known_users"]
            assert known == (True if "user" in asked else [True] * len(USERS)), path
            assert np.shape(answer["now"]) == np.shape(known), path
            assert {"413", "421", "431"} <= page[f"/v1/{path}"]["post"]["responses"].keys()
            content = page[f"/v1/{path}"]["post"]["responses"]["200"]["content"]
            assert list(answer) == list(content["application/json"]["example"]), path
    model = service.fetch("/v1/model")[1]
    assert {name: model[name] for name in source} == source


def test_unknown_users_and_items(service: RunningService, strict: RunningService) -> None:
    asked = {"users": [103, 999], "candidates": [0, 7], "now": NOW}
    status, answer = service.fetch("/v1/score", asked)
    assert status == 200 and [row[1] for row in answer["scores"]] == [0, 0]
    assert answer["known_users"] == [True, False] and answer["now"] == [NOW, NOW]
    status, answer = service.fetch("/v1/rank", {"user": 999, "now": NOW})
    assert status == 200 and answer["known_user"] is False and answer["now"] == NOW
    status, answer = service.fetch("/v1/explain", {"user": 103, "items": [0, 7]})
    assert status == 404 and answer["error"]["type"] == "UnknownItemError" and "place 1" in answer["error"]["message"]
    status, answer = strict.fetch("/v1/score", asked)
    assert status == 404 and answer["error"]["type"] == "UnknownUserError" and "999" in answer["error"]["message"]
    assert "/" not in answer["error"]["message"].replace("on_missing", "")
    status, answer = strict.fetch("/v1/score", {**asked, "users": [103]})
    assert status == 404 and answer["error"]["type"] == "UnknownItemError" and "[7]" in answer["error"]["message"]
    assert service.fetch("/v1/users/999")[0] == 404


def test_user_records(service: RunningService, scorer: Scorer) -> None:
    status, record = service.fetch("/v1/users/103")
    stored = scorer.store.get_many([103])
    assert status == 200 and record["num_events"] == int(stored.event_count[0])
    assert [event["time"] for event in record["tail"]] == stored.tail.times.tolist()
    rows = scorer.model.item_rows([event["item"] for event in record["tail"]])
    assert rows.tolist() == stored.tail.items.tolist()
    assert {event["action"] for event in record["tail"]} <= {"click", "like"}
    assert service.fetch("/v1/users/nobody")[0] == 422
    assert service.fetch("/v1/users/..%2F..%2Fetc%2Fpasswd")[0] == 422


def test_what_is_in_service(service: RunningService, scorer: Scorer) -> None:
    status, model = service.fetch("/v1/model")
    assert status == 200 and model["tasks"] == ["next"] and model["num_items"] == 40
    assert model["summarizer_id"] == scorer.model.summarizer_id().hex()
    assert service.fetch("/readyz") == (200, {"ready": True, "generation": 1, "problems": []})
    assert service.fetch("/healthz") == (200, {"status": "ok"})


def test_metrics(service: RunningService, scorer: Scorer) -> None:
    def numbers() -> list[float]:
        names = (
            'vista_users_total{model="default",outcome="hit"}',
            'vista_users_total{model="default",outcome="miss"}',
            'vista_candidates_total{model="default"}',
        )
        return [service.number(name) for name in names]

    before = numbers()
    assert service.fetch("/v1/score", {"users": [103, 999], "candidates": ITEMS})[0] == 200
    assert [after - then for after, then in zip(numbers(), before, strict=True)] == [1, 1, 12]
    assert service.number('vista_request_seconds_count{candidates="100",endpoint="score",model="default"}') >= 1
    assert service.number('vista_generation{model="default"}') == 1
    refreshed_at = 1000 * service.number('vista_refreshed_timestamp_seconds{model="default"}')
    assert round(refreshed_at) == scorer.manifest.refreshed_at
    assert service.number("vista_refused_connections_total") == 0
    assert service.number('vista_requests_total{endpoint="score",model="default",status="200"}') >= 1


def test_examples_of_the_openapi_page(service: RunningService) -> None:
    status, page = service.fetch("/openapi.json")
    assert status == 200
    sent = 0
    for path, operations in page["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for name, example in content.get("application/json", {}).get("examples", {}).items():
            status, answer = service.fetch(path, example["value"])
            assert status == 200, (path, name, answer)
            sent += 1
    assert sent == 12
    assert list(page["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    references = set(json.dumps(page).split('"$ref": "#/components/schemas/')[1:])
    assert {text.partition('"')[0] for text in references} <= set(page["components"]["schemas"])
    assert service.send("/docs")[0] == 200


def test_many_clients_at_once(service: RunningService, scorer: Scorer) -> None:
    """Their requests may be scored in one call, so bits may differ as for any other users in a call."""
    expected = [scorer.score([user], ITEMS, now=NOW)[0] for user in USERS]
    wrong: list[Any] = []

    def work(place: int) -> None:
        for turn in range(10):
            user = (place + turn) % len(USERS)
            status, answer = service.fetch("/v1/score", {"users": [USERS[user]], "candidates": ITEMS, "now": NOW})
            if status != 200 or not np.allclose(answer["scores"][0], expected[user], atol=TOLERANCE):
                wrong.append(answer)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tasks_and_string_ids(served_tasks: Served, task_scorer: Scorer) -> None:
    users = list(task_scorer.store.keys())[:3]
    items = task_scorer.model.items.ids(np.arange(8)).tolist()
    now = int(task_scorer.store.get_many(users).last_event_ts.max()) + 1000
    with running(f"model={served_tasks.model_dir}", f"store={served_tasks.store}", "on_missing=nan") as service:
        status, answer = service.fetch("/v1/predict", {"users": users, "candidates": items, "now": now})
        expected = task_scorer.predict(users, items, now=now)
        assert status == 200 and list(answer["scores"]) == list(expected) and len(expected) == 4
        for task, scores in expected.items():
            np.testing.assert_array_equal(bits(answer["scores"][task]), bits(scores))
        status, answer = service.fetch("/v1/score", {"users": [10**9, users[0]], "candidates": [items[0], 10**9]})
        assert status == 200 and answer["scores"][0] == [None, None] and answer["scores"][1][1] is None


@pytest.mark.parametrize("counters", [False, True])
def test_a_model_without_times_does_not_read_the_clock(order_log: EventLog, tmp_path: Path, *, counters: bool) -> None:
    model = untrained(order_log, model__counter_keys=["item"] if counters else [])
    if counters:
        draw_counter_weights(model)
    model.save_pretrained(tmp_path / "model")
    refresh(model, order_log, tmp_path / "store")
    users, items = ["u100", "u104", "nobody"], [f"i{item}" for item in ITEMS]
    event = {"item": "i10", "time": 10**6}
    with Scorer.open(tmp_path / "model", tmp_path / "store") as scorer:
        answerer = ScoringService(scorer, ServeConfig())
        for tails, tail in (
            (None, None),
            ([[event], [event], []], Tail(["i10"] * 2, [10**6] * 2, [0, 0], [0, 1, 2, 2])),  # type: ignore[arg-type]
        ):
            body = json.dumps({"users": users, "candidates": items, "tail": tails}).encode()
            answer = json.loads(answerer.scored(answerer.checked(body, JSON), JSON).body)
            np.testing.assert_array_equal(bits(answer["scores"]), bits(scorer.score(users, items, tail=tail)))


LATER = START + 400 * 86_400_000


ALL = np.unique(small_frame()["item"])


@pytest.fixture(scope="module")
def indexed(served: Served, index: Path) -> Iterator[Scorer]:
    with Scorer.open(served.model_dir, served.store, index=index) as scorer:
        yield scorer


def require_same(answer: Any, expected: list[Any]) -> None:
    assert len(answer["rankings"]) == len(expected)
    for ranking, wanted in zip(answer["rankings"], expected, strict=True):
        assert ranking["items"] == wanted.items.tolist() and ranking["num_dropped"] == wanted.num_dropped
        np.testing.assert_allclose(ranking["scores"], wanted.scores, atol=2e-5)


def test_rankings(service: RunningService, indexed: Scorer) -> None:
    for asked in (
        {},
        {"top_k": 4, "num_candidates": 6},
        {"top_k": 5, "within": ITEMS, "exclude": [10, 77_777]},
        {"top_k": 40, "exclude_tail": True},
        {"within": []},
    ):
        status, answer = service.fetch("/v1/retrieve", {"users": USERS, "now": LATER, **asked})
        assert (status, answer["task"]) == (200, "next")
        require_same(answer, indexed.retrieve(USERS, now=LATER, **asked))  # type: ignore[arg-type]
    assert service.fetch("/v1/retrieve", {"users": []})[1]["rankings"] == []
    assert len(service.fetch("/v1/retrieve", {"users": [999], "top_k": 3})[1]["rankings"][0]["items"]) == 3


def test_retrieval_after_events_since_the_refresh(service: RunningService, indexed: Scorer) -> None:
    events = [{"item": 10, "time": LATER - 2000, "action": "like"}]
    asked = {"users": USERS[:2], "tail": [events, []], "now": [LATER, LATER + 1], "top_k": 3, "exclude_tail": True}
    tail = Tail([10], [LATER - 2000], [indexed.model.schema.actions.index("like")], [0, 1, 1])  # type: ignore[arg-type]
    status, answer = service.fetch("/v1/retrieve", asked)
    assert status == 200 and 10 not in answer["rankings"][0]["items"]
    require_same(answer, indexed.retrieve(USERS[:2], tail=tail, now=[LATER, LATER + 1], top_k=3, exclude_tail=True))


def test_retrieval_in_messagepack(service: RunningService, indexed: Scorer) -> None:
    body = {"users": USERS, "within": np.array(ITEMS, "<i8").tobytes(), "top_k": 3, "now": LATER}
    headers = {"Content-Type": "application/msgpack"}
    status, _, answer = service.send("/v1/retrieve", msgspec.msgpack.encode(body), headers=headers)
    held = msgspec.msgpack.decode(answer)
    for ranking in held["rankings"]:
        ranking["scores"] = np.frombuffer(ranking["scores"], "<f4")
    assert status == 200
    require_same(held, indexed.retrieve(USERS, within=ITEMS, top_k=3, now=LATER))


def test_own_items_count_as_candidates(indexed: Scorer) -> None:
    """They are scored in addition to `num_candidates`."""
    body, before = {"users": USERS, "num_candidates": 2, "top_k": 2, "now": LATER}, indexed.stats().candidates
    answer = ScoringService(indexed, ServeConfig()).retrieve(json.dumps(body).encode(), JSON)
    assert answer.num_candidates == indexed.stats().candidates - before > 2 * len(USERS)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"users": [103], "num_candidates": 0}, 422, "num_candidates"),
        ({"users": [103], "num_candidates": 10_001}, 413, "max_candidates"),
        ({"users": [103], "within": ["a"]}, 422, "within: this vocabulary has integer ids"),
        ({"users": [103], "where": {"brand": ["acme"]}}, 422, "'brand' is not a category"),
    ],
)
def test_retrievals_that_are_refused(service: RunningService, body: Any, status: int, words: str) -> None:
    code, answer = service.fetch("/v1/retrieve", body)
    assert code == status and words in answer["error"]["message"], answer


def test_a_service_without_an_index(strict: RunningService) -> None:
    status, answer = strict.fetch("/v1/retrieve", {"users": [103]})
    assert status == 400 and answer["error"]["type"] == "ItemIndexError"
    assert "start the service, with index=… and the folder that the command wrote" in answer["error"]["message"]


def test_filters_by_category_and_a_new_model(tmp_path: Path) -> None:
    """The index goes into service together with its model, and answers until then are those of the old ones."""
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=item_table(ALL))
    model, store, index = (str(tmp_path / name) for name in ("model", "store", "model.index"))
    export(tmp_path, log)
    run_index(IndexConfig(model=model))
    asked: dict[str, Any] = {"top_k": 5, "num_candidates": 5, "where": {"brand": ["brand 1", "brand 2"]}, "now": LATER}

    def expected() -> list[Any]:
        with Scorer.open(model, store, index=index) as scorer:
            return scorer.retrieve(USERS, **asked)

    before = expected()
    with running(f"model={model}", f"store={store}", f"index={index}", "reload_s=0.1") as service:

        def answer() -> Any:
            status, held = service.fetch("/v1/retrieve", {"users": USERS, **asked})
            assert status == 200
            return held

        require_same(answer(), before)
        export(tmp_path, log, seed=6)  # and its summaries, but not its index
        until(lambda: "the old one stays in service" in service.log)
        require_same(answer(), before)
        run_index(IndexConfig(model=model))
        until(lambda: service.number('vista_reloads_total{model="default",outcome="moved"}') >= 1)
        after = expected()
        assert any(not np.array_equal(one.scores, other.scores) for one, other in zip(before, after, strict=True))
        require_same(answer(), after)
        Path(index).rename(tmp_path / "away")
        assert any("the loaded index stays" in problem for problem in service.fetch("/readyz")[1]["problems"])
        require_same(answer(), after)


def counts(service: RunningService) -> dict[str, float]:
    """Users by outcome."""
    return {
        outcome: service.number(f'vista_users_total{{model="default",outcome="{outcome}"}}')
        for outcome in ("hit", "miss", "stale", "damaged")
    }


def test_damaged_records_and_wrong_actions(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    damage_record(tmp_path / "store", USERS[1])
    with running(f"model={served.model_dir}", f"store={tmp_path / 'store'}", "on_missing=nan") as service:
        before = counts(service)
        events = [[{"item": ITEMS[0], "time": NOW - 1000, "action": "no-action"}]]
        status, answer = service.fetch("/v1/score", {**ASKED, "users": USERS[:1], "tail": events})
        assert status == 422 and "'no-action' is not one of this model's actions" in answer["error"]["message"]
        assert counts(service)["damaged"] == before["damaged"] == 0
        status, answer = service.fetch("/v1/score", ASKED)
        assert status == 200
        assert [row[0] is None for row in answer["scores"]] == [user == USERS[1] for user in USERS]
        after = counts(service)
        assert (after["damaged"], after["miss"], after["stale"]) == (1, before["miss"], 0)
        assert after["hit"] - before["hit"] == len(USERS) - 1
        assert service.fetch("/v1/score", {**ASKED, "users": USERS[:1]})[0] == 200


def test_stale_records(served: Served, tmp_path: Path) -> None:
    refresh(served.model, served.log, tmp_path / "store")
    words = (f"model={served.model_dir}", f"store={tmp_path / 'store'}", "max_age_s=0.001")
    with running(*words, "on_missing=raise") as service:
        before = counts(service)
        assert service.fetch("/v1/score", ASKED)[0] == 404
        after = counts(service)
        assert after == {**before, "stale": before["stale"] + len(USERS)}


USER = 103


def at_the_first_read(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None], *, after: bool = False) -> None:
    """Let something happen in the middle of a request, just before or after it reads a record."""
    waiting = [happens]

    def instead_of(bare: Callable[..., object]) -> Callable[..., object]:
        def read(*arguments: Any) -> object:
            found = bare(*arguments) if after else None
            if waiting:
                waiting.pop()()
            return found or bare(*arguments)

        return read

    monkeypatch.setattr(StoreReader, "get_many", instead_of(StoreReader.get_many))
    monkeypatch.setattr(StoreReader, "record", instead_of(StoreReader.record))


def publish(served: Served, store: Path, scorer: Scorer) -> None:
    """Another generation, which the scorer takes into service."""
    refresh(served.model, served.log, store)
    assert scorer.reload()


def test_another_model_does_not_close_the_store_of_a_request(
    served: Served, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = folders
    with Scorer.open(model, store) as scorer:
        service = ScoringService(scorer, ServeConfig())
        expected = json.loads(service.user(str(USER)).body)
        for call, answer in ((lambda: json.loads(service.user(str(USER)).body), expected), (service.reads_store, True)):
            other = retrained(served.model)

            def replace(other: VistaModel = other) -> None:
                other.save_pretrained(model)
                refresh(other, served.log, store)
                assert scorer.reload()

            at_the_first_read(monkeypatch, replace)
            assert call() == answer
            monkeypatch.undo()
            assert scorer.model.summarizer_id() == other.summarizer_id()
            served.model.save_pretrained(model)
            refresh(served.model, served.log, store)
            assert scorer.reload()


def test_a_record_names_its_generation(
    served: Served, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = folders
    with Scorer.open(model, store) as scorer:
        service = ScoringService(scorer, ServeConfig())
        at_the_first_read(monkeypatch, lambda: publish(served, store, scorer), after=True)
        before, after = (json.loads(service.user(str(USER)).body) for _ in range(2))
        assert (before["generation"], after["generation"]) == (1, 2)
        assert before["created_at"] < after["created_at"] == scorer.manifest.created_at


@pytest.mark.parametrize("after", [False, True])
def test_scores_name_the_generation_that_they_read(
    served: Served, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, *, after: bool
) -> None:
    """Although another one is published just before or after the records are read."""
    model, store = folders
    with Scorer.open(model, store) as scorer:
        service = ScoringService(scorer, ServeConfig())
        at_the_first_read(monkeypatch, lambda: publish(served, store, scorer), after=after)
        body = json.dumps({"users": [USER], "candidates": ITEMS, "now": NOW}).encode()
        assert json.loads(service.predict(body, JSON).body)["generation"] == (1 if after else 2)
        assert scorer.manifest.generation == 2


@pytest.fixture(scope="module")
def other_order(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, VistaModel]:
    """The events of `event_log` with its actions in another order, and a model of them."""
    folder = tmp_path_factory.mktemp("other-order")
    frame, columns = small_frame(), SourceColumns(action="action", rating="rating")
    is_like = frame["action"] == "like"
    EventLog.from_frame(_rows(frame, is_like), folder / "log", time_unit="ms", columns=columns)
    log = EventLog.from_frame(_rows(frame, ~is_like), folder / "log", time_unit="ms", columns=columns, append=True)
    return log, untrained(log)


@pytest.mark.parametrize("endpoint", ["score", "rank", "retrieve", "several scores"])
def test_actions_of_a_tail_are_those_of_the_model_that_answers(
    served: Served,
    folders: tuple[Path, Path],
    other_order: tuple[EventLog, VistaModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
) -> None:
    """Although another model, which orders its actions differently, goes into service after the body was read."""
    (model, store), (log, other) = folders, other_order
    assert served.model.schema.actions == ["click", "like"] and other.schema.actions == ["like", "click"]
    event, index = {"item": 10, "time": NOW - 1000, "action": "like"}, str(tmp_path / "index")
    run_index(IndexConfig(model=str(model), out=index))
    with Scorer.open(model, store, index=index) as scorer:
        service, bare, waiting = ScoringService(scorer, ServeConfig()), scoring_service.tail_of, [True]

        def then_another_model(given: Any, model_in_service: VistaModel) -> Any:
            tail = bare(given, model_in_service)
            if waiting:
                waiting.pop()
                other.save_pretrained(model)
                refresh(other, log, store)
                run_index(IndexConfig(model=str(model), out=index))
                assert scorer.reload()
            return tail

        def answer() -> Any:
            asked: dict[str, Any] = {"candidates": ITEMS, "now": NOW}
            if endpoint == "rank":
                body = json.dumps({**asked, "user": USER, "tail": [event]}).encode()
                return json.loads(service.rank(body, JSON, timeout_s=60.0).body)
            if endpoint == "retrieve":
                del asked["candidates"]
            body = json.dumps({**asked, "users": [USER], "tail": [[event]]}).encode()
            if endpoint == "retrieve":
                return json.loads(service.retrieve(body, JSON).body)
            batches = ScoreBatches()
            entries = [batches.enter(body, JSON) for _ in range(1 if endpoint == "score" else 2)]
            return [json.loads(batches.answer(entry, service).body) for entry in entries]

        monkeypatch.setattr(scoring_service, "tail_of", then_another_model)
        during = answer()
        assert not waiting and during == answer()  # The second answer is of the other model alone.


def _rows(frame: dict[str, Any], chosen: Any) -> dict[str, Any]:
    return {name: values[chosen] for name, values in frame.items()}


def test_the_page_of_the_model_costs_little(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not compute the digest of all weights, during which no other request is answered."""
    with Scorer.open(*folders) as scorer:
        expected = scorer.model.summarizer_id().hex()
        monkeypatch.setattr(VistaModel, "summarizer_id", lambda _: pytest.fail("computes the digest"))
        assert json.loads(ScoringService(scorer, ServeConfig()).model().body)["summarizer_id"] == expected
