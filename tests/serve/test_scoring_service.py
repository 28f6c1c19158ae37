"""Answers over HTTP are those of the scorer, bit for bit, in JSON and in MessagePack."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served, draw_counter_weights, small_config
from tests.serve.running_service import RunningService, running
from vista.config import ServeConfig
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.serve.request_bodies import JSON
from vista.serve.scoring_service import ScoringService
from vista.training.trainer import train

NOW = START + 200 * 86_400_000
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""
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
    status, answer = service.fetch("/v1/explain", {"user": 103, "candidates": ITEMS, "now": NOW})
    expected = scorer.explain(103, ITEMS, now=NOW)
    assert status == 200 and answer["tail_items"] == expected.tail_items
    for name in ("value", "summary", "state", "tail", "own", "counted", "remainder"):
        np.testing.assert_array_equal(bits(answer[name]), bits(getattr(expected, name)))


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
        ("explain", {"user": 103, "candidates": ITEMS}),
    ):
        packed = service.send(f"/v1/{path}", msgspec.msgpack.encode(asked), headers=MSGPACK)[2]
        for answer in (service.fetch(f"/v1/{path}", asked)[1], msgspec.msgpack.decode(packed)):
            assert {name: answer[name] for name in source} == source, path
            content = page[f"/v1/{path}"]["post"]["responses"]["200"]["content"]
            assert list(answer) == list(content["application/json"]["example"]), path
    model = service.fetch("/v1/model")[1]
    assert {name: model[name] for name in source} == source


def test_unknown_users_and_items(service: RunningService, strict: RunningService) -> None:
    asked = {"users": [103, 999], "candidates": [0, 7], "now": NOW}
    status, answer = service.fetch("/v1/score", asked)
    assert status == 200 and [row[1] for row in answer["scores"]] == [0, 0]
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
    assert sent == 11
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
    changes = {"model__counters": counters, "optim__epochs": 1}
    model = train(small_config(order_log, tmp_path / "run", **changes), order_log)
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
