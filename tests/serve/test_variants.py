"""Two models in one service: each user gets a variant, or the one that the request names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served
from tests.serve.model_files import models_file, save_other_stage_2
from tests.serve.running_service import RunningService, running
from vista.cli.main import main
from vista.scorer import Scorer
from vista.serve.user_split import UserSplit

NOW = START + 200 * 86_400_000
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""
SHARES = {"control": 0.5, "larger": 0.5}
SPLIT = UserSplit(SHARES, "control,larger")


@pytest.fixture(scope="module")
def folders(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models by name."""
    return {
        "control": served.model_dir,
        "larger": save_other_stage_2(served.model_dir, tmp_path_factory.mktemp("models") / "larger"),
    }


@pytest.fixture(scope="module")
def scorers(served: Served, folders: dict[str, Path]) -> Iterator[dict[str, Scorer]]:
    opened = {name: Scorer.open(folder, served.store) for name, folder in folders.items()}
    yield opened
    for scorer in opened.values():
        scorer.close()


@pytest.fixture(scope="module")
def variants(
    served: Served, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """A service that splits users in halves."""
    models = {name: (folder, served.store) for name, folder in folders.items()}
    with running(f"models={models_file(tmp_path_factory.mktemp('file'), models, split=SHARES)}") as service:
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
            asked = {"users": [user]} if path in ("score", "predict") else {"user": user}
            status, answer = variants.fetch(f"/v1/{path}", {**asked, "candidates": ITEMS, "now": NOW})
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
        assert description["models"] == {name: {"share": 0.5, "open": True} for name in SHARES}
    assert variants.fetch("/v1/model")[1]["variant"] == "control"  # the first one


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/score", {"users": USERS, "candidates": ITEMS}, 422, "must name one (`model`: control or larger)"),
        ("/v1/score", {"users": [103], "candidates": ITEMS, "model": "huge"}, 404, "'huge' is not one of control"),
        ("/v1/rank", {"user": 103, "model": 7}, 422, "$.model"),
        ("/v1/users/103?model=huge", None, 404, "'huge' is not one of control, larger"),
        ("/v1/model?model=huge", None, 404, "'huge' is not one of control, larger"),
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


def test_all_workers_assign_alike(served: Served, folders: dict[str, Path], tmp_path: Path) -> None:
    models = {name: (folder, served.store) for name, folder in folders.items()}
    path = models_file(tmp_path, models, split={"control": 0.3, "larger": 0.7}, experiment="spring")
    split = UserSplit({"control": 0.3, "larger": 0.7}, "spring")
    with running(f"models={path}", "workers=2") as service:
        for _ in range(10):  # The kernel assigns each connection to a worker.
            for user in USERS:
                answer = service.fetch("/v1/rank", {"user": user, "candidates": ITEMS})[1]
                assert answer["variant"] == split.variant(user)
        assert service.number('vista_model_open{model="control"}') == 2
        assert service.stop() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.replace("model: ", "model: nowhere"), "models.control.model: nowhere"),
        (lambda file: file.replace("store:", "shop:"), "unknown key shop"),
        (lambda file: file + "split: {control: 0.5, larger: 0.6}\n", "must sum to 1"),
        (lambda file: file + "split: {control: 0.5, other: 0.5}\n", "'other' is not one of the models"),
        (lambda file: file + "  control: {model: a, store: b}\n", "duplicate key control"),
    ],
)
def test_files_that_cannot_be_served(
    served: Served,
    folders: dict[str, Path],
    tmp_path: Path,
    change: Any,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(models_file(tmp_path, {name: (folder, served.store) for name, folder in folders.items()}))
    path.write_text(change(path.read_text()))
    assert main(["serve", f"models={path}", "port=0"]) == 2
    assert words in capsys.readouterr().err
