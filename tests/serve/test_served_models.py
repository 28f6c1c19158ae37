"""Several models in one service: opened at their first use, and split between users. Shadow scoring: the
challenger's answers are logged next to those of the service, which do not change."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.conftest import ITEMS, USERS, Served
from tests.serve.conftest import ASKED, NOW, TOLERANCE, models_file, save_other_stage_2
from tests.serve.running_service import RunningService, running, until
from vista.config import ServeConfig
from vista.errors import ConfigError, ModelUnavailableError, RecordError
from vista.model.item_projections import RETRIEVAL_FILE
from vista.model.saved_model import WEIGHTS_FILE
from vista.model.serving_model import Adapter
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve import shadow
from vista.serve.scoring_service import JSON, ScoringService
from vista.serve.served_models import ServedModels, UserSplit
from vista.serve.service_metrics import ServiceMetrics
from vista.serve.shadow import ShadowProcess, compared
from vista.store.keys import user_keys
from vista.store.record import key_hashes

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def model_folders(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of one store by name; b and c share the item table of a."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(served.model_dir, folder / "a")
    for seed, name in enumerate("bc"):
        save_other_stage_2(folder / "a", folder / name, seed)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(served: Served, model_folders: dict[str, Path]) -> dict[str, Any]:
    """Scores of USERS by name of a model."""
    scores = {}
    for name, folder in model_folders.items():
        with Scorer.open(folder, served.store) as scorer:
            scores[name] = scorer.score(USERS, ITEMS, now=NOW)
    return scores


def file_of(tmp_path: Path, served: Served, model_folders: dict[str, Path], **more: Any) -> str:
    return models_file(tmp_path, {name: (folder, served.store) for name, folder in model_folders.items()}, **more)


def scored(service: RunningService, model: str, **options: Any) -> tuple[int, Any]:
    """Status and answer of a request that names a model."""
    return service.fetch("/v1/score", {"users": USERS, "candidates": ITEMS, "now": NOW, "model": model}, **options)


def is_open(service: RunningService, model: str) -> bool:
    return bool(service.fetch("/v1/model")[1]["models"][model]["open"])


def mapped(service: RunningService, file: Path) -> bool:
    return str(file) in Path(f"/proc/{service.process.pid}/maps").read_text()


def test_models_are_opened_at_their_first_use(
    served: Served, model_folders: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    with running(f"models={file_of(tmp_path, served, model_folders)}") as service:
        assert is_open(service, "a") and not is_open(service, "b")  # The first one answers if none is named.
        assert not mapped(service, model_folders["b"])
        assert service.fetch("/readyz")[1] == {"ready": True, "generation": {"a": 1}, "problems": []}
        status, answer = scored(service, "b", headers={"Vista-Timeout-Ms": "1"})
        # A client that is suspended between head and body exceeds the limit while it sends; a service that is suspended
        # may have opened the model when it continues.
        assert (status, answer["error"]["type"]) in (
            (503, "ModelUnavailableError"),
            (408, "SlowBodyError"),
            (504, "DeadlineError"),
        )
        for name in NAMES:
            status, answer = scored(service, name)
            assert status == 200 and answer["variant"] == name
            np.testing.assert_allclose(answer["scores"], expected[name], atol=TOLERANCE)
        assert service.fetch("/readyz")[1]["generation"] == dict.fromkeys(NAMES, 1)
        assert mapped(service, model_folders["b"] / WEIGHTS_FILE)
        assert mapped(service, model_folders["a"] / RETRIEVAL_FILE) and not mapped(
            service, model_folders["b"] / RETRIEVAL_FILE
        )
        assert "opened model b in" in service.log and "of which other models share" in service.log
        assert service.number('vista_users_total{model="c",outcome="hit"}') == len(USERS)
        assert service.number('vista_model_openings_total{model="c",outcome="opened"}') == 1


def test_a_model_that_vanishes_under_the_server(
    served: Served, model_folders: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    """An open one stays in service. One that is not open fails alone, and comes back with its folder."""
    moved = {name: tmp_path / name for name in "ab"}
    for name, folder in moved.items():
        shutil.copytree(model_folders[name], folder)
    with running(f"models={file_of(tmp_path, served, moved)}", "reload_s=0.2") as service:
        for name, folder in moved.items():
            folder.rename(tmp_path / f"{name}-away")
        _, ready = service.fetch("/readyz")
        assert ready["ready"] and [text.partition(";")[0] for text in ready["problems"]] == [
            "a: the folder of the model cannot be read",
            "b: the folder of the model cannot be read, so it cannot be opened",
        ]
        status, answer = scored(service, "b")
        assert status == 503 and answer["error"]["type"] == "ModelUnavailableError"
        assert str(tmp_path) not in answer["error"]["message"]
        np.testing.assert_allclose(scored(service, "a")[1]["scores"], expected["a"], atol=TOLERANCE)
        assert "b: the model cannot be opened (see the log)" in service.fetch("/readyz")[1]["problems"]
        assert "model b cannot be opened: CheckpointError" in service.log
        assert service.number('vista_model_openings_total{model="b",outcome="failed"}') >= 1
        for name, folder in moved.items():
            (tmp_path / f"{name}-away").rename(folder)
        until(lambda: scored(service, "b")[0] == 200)
        assert service.fetch("/readyz")[1]["problems"] == []


def test_a_model_that_failed_is_not_tried_again_at_once(served: Served, model_folders: dict[str, Path]) -> None:
    """Each attempt would read its files."""
    good = ServeConfig(model=str(model_folders["a"]), store=str(served.store), reload_s=1000)
    missing = ServeConfig(model="nowhere", store=str(served.store), reload_s=1000)
    models = ServedModels({"a": good, "b": missing}, None, metrics := ServiceMetrics())
    try:
        for _ in range(3):
            with pytest.raises(ModelUnavailableError, match="b is not available: the model cannot be opened") as raised:
                models.open("b")
            assert 900 < raised.value.retry_after_s <= 1000
        assert models.problem("b") == "the model cannot be opened (see the log)" and models.problem("a") is None
        assert metrics.openings.labels("b", "failed")._value.get() == 1
    finally:
        models.close()


def test_models_follow_their_store(served: Served, model_folders: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    refresh(served.model, served.log, store)
    path = models_file(tmp_path, {name: (model_folders[name], store) for name in "ab"}, split={"a": 0.5, "b": 0.5})
    with running(f"models={path}", "reload_s=0.1") as service:
        refresh(served.model, served.log, store)
        for name in "ab":
            until(lambda name=name: service.number(f'vista_generation{{model="{name}"}}') == 2)


HALVES = {"control": 0.5, "larger": 0.5}
SPLIT = UserSplit(HALVES, "control,larger")


@pytest.fixture(scope="module")
def variant_folders(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models by name."""
    return {
        "control": served.model_dir,
        "larger": save_other_stage_2(served.model_dir, tmp_path_factory.mktemp("models") / "larger"),
    }


@pytest.fixture(scope="module")
def scorers(served: Served, variant_folders: dict[str, Path]) -> Iterator[dict[str, Scorer]]:
    opened = {name: Scorer.open(folder, served.store) for name, folder in variant_folders.items()}
    yield opened
    for scorer in opened.values():
        scorer.close()


@pytest.fixture(scope="module")
def variants(
    served: Served, variant_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """A service that splits users in halves."""
    models = {name: (folder, served.store) for name, folder in variant_folders.items()}
    with running(f"models={models_file(tmp_path_factory.mktemp('file'), models, split=HALVES)}") as service:
        yield service


def test_each_user_gets_the_scores_of_one_variant(variants: RunningService, scorers: dict[str, Scorer]) -> None:
    given = set()
    for user in USERS:
        status, answer = variants.fetch("/v1/score", {"users": [user], "candidates": ITEMS, "now": NOW})
        variant = SPLIT.variant(user)
        assert status == 200 and answer["variant"] == variant
        expected = scorers[variant].score([user], ITEMS, now=NOW)
        np.testing.assert_allclose(answer["scores"], expected, atol=TOLERANCE)
        given.add(variant)
    assert given == {"control", "larger"}  # USERS has users of both


@pytest.mark.parametrize("path", ["score", "predict", "rank", "explain", "users"])
def test_all_endpoints_name_the_variant(variants: RunningService, scorers: dict[str, Scorer], path: str) -> None:
    for user in USERS[:3]:
        if path == "users":
            status, answer = variants.fetch(f"/v1/users/{user}")
        else:
            asked: dict[str, Any] = {"users": [user]} if path in ("score", "predict") else {"user": user}
            asked |= {"items": ITEMS} if path == "explain" else {"candidates": ITEMS}
            status, answer = variants.fetch(f"/v1/{path}", {**asked, "now": NOW})
        assert status == 200 and answer["variant"] == SPLIT.variant(user)
    assert variants.number(f'vista_requests_total{{endpoint="{path}",model="{answer["variant"]}",status="200"}}') >= 1


def test_the_variant_in_messagepack(variants: RunningService) -> None:
    body = msgspec.msgpack.encode({"users": [103], "candidates": np.array(ITEMS, "<i8").tobytes(), "now": NOW})
    answer = variants.send("/v1/score", body, headers={"Content-Type": "application/msgpack"})[2]
    assert msgspec.msgpack.decode(answer)["variant"] == SPLIT.variant(103)


def test_requests_that_name_a_model(variants: RunningService, scorers: dict[str, Scorer]) -> None:
    """They get it, whatever the split says, and may have several users."""
    for name, scorer in scorers.items():
        asked = {"users": USERS, "candidates": ITEMS, "now": NOW, "model": name}
        status, answer = variants.fetch("/v1/score", asked)
        assert status == 200 and answer["variant"] == name
        np.testing.assert_allclose(answer["scores"], scorer.score(USERS, ITEMS, now=NOW), atol=TOLERANCE)
        assert variants.fetch(f"/v1/users/103?model={name}")[1]["variant"] == name
        description = variants.fetch(f"/v1/model?model={name}")[1]
        assert description["variant"] == name
        assert description["models"] == {name: {"share": 0.5, "open": True} for name in HALVES}
    assert variants.fetch("/v1/model")[1]["variant"] == "control"  # the first one


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/score", {"users": USERS, "candidates": ITEMS}, 422, "must name one (`model`: control or larger)"),
        ("/v1/score", {"users": [103], "candidates": ITEMS, "model": "huge"}, 404, "'huge' is not one of control"),
        ("/v1/rank", {"user": 103, "model": 7}, 422, "$.model"),
        ("/v1/users/103?model=huge", None, 404, "'huge' is not one of control, larger"),
    ],
)
def test_models_that_cannot_be_chosen(variants: RunningService, path: str, body: Any, status: int, words: str) -> None:
    code, answer = variants.fetch(path, body)
    assert code == status and words in answer["error"]["message"]


def test_a_service_of_one_model(service: RunningService) -> None:
    """Its answers name no variant, and requests may name no other model."""
    asked = {"user": 103, "candidates": ITEMS, "now": NOW}
    status, answer = service.fetch("/v1/rank", asked)
    assert status == 200 and "variant" not in answer and "models" not in service.fetch("/v1/model")[1]
    assert service.fetch("/v1/rank", {**asked, "model": "default"}) == (200, answer)
    assert service.fetch("/v1/rank", {**asked, "model": "larger"})[0] == 404
    escaped = json.dumps({**asked, "model": "larger"}).replace('"model"', r'"\u006dodel"').encode()
    assert service.fetch("/v1/rank", escaped)[0] == 404


def test_all_workers_assign_alike(served: Served, variant_folders: dict[str, Path], tmp_path: Path) -> None:
    models = {name: (folder, served.store) for name, folder in variant_folders.items()}
    path = models_file(tmp_path, models, split={"control": 0.3, "larger": 0.7}, experiment="spring")
    split = UserSplit({"control": 0.3, "larger": 0.7}, "spring")
    with running(f"models={path}", "workers=2") as service:
        for _ in range(10):  # The kernel assigns each connection to a worker.
            for user in USERS:
                answer = service.fetch("/v1/rank", {"user": user, "candidates": ITEMS})[1]
                assert answer["variant"] == split.variant(user)
        assert service.number('vista_model_open{model="control"}') == 2
        assert service.stop() == 0


def test_fixed_assignments() -> None:
    """They never change: analyses of past experiments rely on them."""
    split = UserSplit(HALVES, "spring")
    assert [split.variant(user) for user in (1, 2, 3, "anna", "ben", "ümit")] == ["control", "larger"] * 3


def test_integers_are_the_same_users_as_their_texts() -> None:
    split = UserSplit(HALVES, "spring")
    assert all(split.variant(user) == split.variant(str(user)) for user in range(100))


def test_shares() -> None:
    split = UserSplit({"a": 0.7, "b": 0.0, "c": 0.3}, "x")
    given = [split.variant(user) for user in range(20_000)]
    assert "b" not in given
    assert given.count("c") / len(given) == pytest.approx(0.3, abs=0.02)  # six standard deviations


def test_experiments_are_independent() -> None:
    one, other = (
        np.array([UserSplit(HALVES, name).variant(user) == "larger" for user in range(20_000)])
        for name in ("spring", "summer")
    )
    assert (one & other).mean() == pytest.approx(0.25, abs=0.02)


def test_a_growing_share_only_adds_users() -> None:
    small, large = UserSplit({"control": 0.9, "larger": 0.1}, "x"), UserSplit({"control": 0.6, "larger": 0.4}, "x")
    for user in range(2000):
        assert small.variant(user) == "control" or large.variant(user) == "larger"


def test_a_damaged_key_does_not_keep_a_model_from_opening(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The record names another key: only requests for its user fail."""
    store = shutil.copytree(served.store, tmp_path / "store")
    damage_key(store, USERS[1])
    models = ServedModels.of(ServeConfig(model=str(served.model_dir), store=str(store)), None, ServiceMetrics())
    try:
        models.open_first()
        service = models.open("default")
        assert service.reads_store()
        with pytest.raises(RecordError):
            service.scorer.score(USERS[1:2], ITEMS, now=NOW)
        assert np.isfinite(service.scorer.score(USERS[:1], ITEMS, now=NOW)).all()
    finally:
        models.close()
    assert "the first request was not tried" in caplog.text


def damage_key(store: Path, user: int) -> None:
    """Change the hash of the key in the record of a user."""
    wanted = int(key_hashes(user_keys([user]))[0]).to_bytes(8, "little")
    for path in store.glob("gen-*/summary/data.mdb"):
        held = path.read_bytes()
        assert wanted in held
        path.write_bytes(held.replace(wanted, bytes(8)))


DEADLINE_S = 60
RANKED = {"user": USERS[0], "top_k": 5, "now": NOW}


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_answers_are_compared_and_unchanged(served: Served, service: RunningService, tmp_path: Path) -> None:
    challenger = save_other_stage_2(served.model_dir, tmp_path / "challenger")
    file = tmp_path / "shadow.jsonl"
    words = f"shadow_model={challenger}", f"shadow_store={served.store}", f"shadow_file={file}"
    with running(f"model={served.model_dir}", f"store={served.store}", *words) as shadowed:

        def has_compared() -> bool:  # What arrives before the challenger is open is dropped.
            assert shadowed.fetch("/v1/score", ASKED) == service.fetch("/v1/score", ASKED)
            return bool(lines_of(file))

        eventually(has_compared)
        assert shadowed.fetch("/v1/rank", RANKED) == service.fetch("/v1/rank", RANKED)
        packed = {"headers": {"content-type": "application/msgpack"}}
        own, plain = (one.send("/v1/score", msgspec.msgpack.encode(ASKED), **packed)[2] for one in (shadowed, service))
        assert own == plain
        assert shadowed.fetch("/v1/predict", ASKED)[0] == 200
        eventually(lambda: {line["endpoint"] for line in lines_of(file)} == {"score", "rank"})
        count = shadowed.number('vista_shadow_requests_total{outcome="sent"}')
        assert count >= 3
        large = ASKED | {"candidates": (ITEMS * 9900)[:9900], "users": USERS[:1]}  # beyond MAX_MESSAGE
        assert shadowed.fetch("/v1/score", large)[0] == 200
        eventually(lambda: shadowed.number('vista_shadow_requests_total{outcome="dropped"}') == 1)
    with Scorer.open(challenger, served.store) as scorer:
        expected = scorer.score(USERS, ITEMS, now=NOW).reshape(-1)
    for line in lines_of(file):
        if line["endpoint"] == "rank":
            assert 0 <= line["overlap"] <= 1 and line["users"] == [USERS[0]]
            continue
        assert line["users"] == USERS
        np.testing.assert_allclose(line["challenger"]["scores"], expected[:100], atol=1e-4)
        assert line["difference"] > 0 and -1 <= line["correlation"] < 1
        assert line["champion"]["model_checksum"] != line["challenger"]["model_checksum"]


def test_a_challenger_that_cannot_be_opened_is_logged(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The requests that arrive until it is tried again are dropped."""
    file = tmp_path / "file"
    config = ServeConfig(
        shadow_model=str(tmp_path / "none"), shadow_store=str(served.store), shadow_file=str(file), reload_s=1000
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        with ours:
            for _ in range(3):
                ours.send(msgspec.msgpack.encode(("score", json.dumps(ASKED).encode(), JSON, b"")))
        shadow.run(theirs, config)
    assert caplog.text.count("cannot be opened") == 1 and "was not compared" not in caplog.text
    assert not file.exists()


def test_an_error_of_the_challenger_is_a_line(served: Served) -> None:
    config = ServeConfig(model=str(served.model_dir), store=str(served.store), max_candidates=1)
    with Scorer.open(served.model_dir, served.store) as scorer:
        body = json.dumps(ASKED).encode()
        answer = ScoringService(scorer, ServeConfig()).scored(
            ScoringService(scorer, ServeConfig()).checked(body, JSON), JSON
        )
        line = compared(ScoringService(scorer, config), "score", body, JSON, answer.body)
        same = compared(ScoringService(scorer, ServeConfig()), "score", body, JSON, answer.body)
    assert "max_candidates" in line["error"] and "challenger" not in line
    assert same["difference"] == pytest.approx(0) and same["correlation"] == pytest.approx(1)


@pytest.mark.parametrize("by_request", [True, False])
def test_answers_with_an_adapter_are_not_compared(served: Served, tmp_path: Path, *, by_request: bool) -> None:
    """The challenger has no adapters, so its answer would differ for another reason."""
    with Scorer.open(served.model_dir, served.store) as scorer:
        values = np.full(scorer.served.num_adapted, 0.1, np.float32)
        Adapter(values, scorer.served.stage2_id, scorer.model.data, []).write(tmp_path / "music.adapter")
    adapter, file = tmp_path if by_request else tmp_path / "music.adapter", tmp_path / "shadow.jsonl"
    asked = [ASKED | {"adapter": "music"}, ASKED] if by_request else [ASKED]
    config = ServeConfig(
        model=str(served.model_dir),
        store=str(served.store),
        adapter=str(adapter),
        shadow_model=str(served.model_dir),
        shadow_store=str(served.store),
        shadow_file=str(file),
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, Scorer.open(served.model_dir, served.store, adapter=adapter) as scorer:
        champion = ScoringService(scorer, config)
        with ours:
            for body in (json.dumps(one).encode() for one in asked):
                answer = champion.scored(champion.checked(body, JSON), JSON)
                ours.send(msgspec.msgpack.encode(("score", body, JSON, answer.body)))
        shadow.run(theirs, config)
    first, *others = lines_of(file)
    assert first["not_compared"] == "adapter" and first["users"] == USERS and first["champion"]["scores"]
    assert not first.keys() & {"challenger", "difference", "error"}
    assert [line["difference"] for line in others] == [pytest.approx(0)] * by_request


def test_an_unexpected_error_costs_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Any] = [RuntimeError("no memory"), OSError("no disk"), {"at": "a"}, {"at": "b"}, {"at": "c"}]

    def answered(*_: object, **__: object) -> dict[str, Any]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return dict(outcome)

    class Opened:
        scorer = socket.socket()

    monkeypatch.setattr(shadow, "open_warm_scorer", lambda config: None)
    monkeypatch.setattr(shadow, "ScoringService", lambda scorer, config: Opened)
    monkeypatch.setattr(shadow, "compared", answered)
    monkeypatch.setattr(shadow, "MOST_FILE_BYTES", 15)
    file = tmp_path / "file"
    config = ServeConfig(shadow_model="a", shadow_store="b", shadow_file=str(file))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        with ours:
            for _ in range(5):
                ours.send(msgspec.msgpack.encode(("score", b"", JSON, b"")))
        shadow.run(theirs, config)
    assert "no memory" in caplog.text and "no disk" in caplog.text
    assert lines_of(tmp_path / "file.1") == [{"at": "a"}, {"at": "b"}] and lines_of(file) == [{"at": "c"}]


def test_a_process_that_ended_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    offered: list[str] = []
    process = ShadowProcess(ServeConfig(shadow_model="a", shadow_store="b"), offered.append)
    process._process.kill()
    process._process.wait()
    for _ in range(3):
        process.offer("score", b"", JSON, b"")
    process.close()
    assert offered == ["dropped"] * 3 and caplog.text.count("has ended") == 1


def test_a_challenger_needs_a_store() -> None:
    with pytest.raises(ConfigError, match="name both"):
        ServeConfig(shadow_model="a")
    with pytest.raises(ConfigError, match="service of one model"):
        ServeConfig(models="models.yaml", shadow_model="a", shadow_store="b")
