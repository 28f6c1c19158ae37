"""Models are opened at their first use, and idle ones are closed under a memory budget, but never during a call."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served
from tests.serve.model_files import models_file, save_other_stage_2
from tests.serve.running_service import RunningService, running, until
from vista.config import ServeConfig
from vista.errors import ModelUnavailableError
from vista.model.item_projections import RETRIEVAL_FILE
from vista.model.saved_parts import WEIGHTS_FILE
from vista.model.shared_tables import tables_of
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics

NOW = START + 200 * 86_400_000
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of one store by name; b and c share the item table of a."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(served.model_dir, folder / "a")
    for seed, name in enumerate("bc"):
        save_other_stage_2(folder / "a", folder / name, seed)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(served: Served, folders: dict[str, Path]) -> dict[str, Any]:
    """Scores of USERS by name of a model."""
    scores = {}
    for name, folder in folders.items():
        with Scorer.open(folder, served.store) as scorer:
            scores[name] = scorer.score(USERS, ITEMS, now=NOW)
    return scores


def file_of(tmp_path: Path, served: Served, folders: dict[str, Path], **more: Any) -> str:
    return models_file(tmp_path, {name: (folder, served.store) for name, folder in folders.items()}, **more)


def scored(service: RunningService, model: str, **options: Any) -> tuple[int, Any]:
    """Status and answer of a request that names a model."""
    return service.fetch("/v1/score", {"users": USERS, "candidates": ITEMS, "now": NOW, "model": model}, **options)


def is_open(service: RunningService, model: str) -> bool:
    return bool(service.fetch("/v1/model")[1]["models"][model]["open"])


def mapped(service: RunningService, file: Path) -> bool:
    return str(file) in Path(f"/proc/{service.process.pid}/maps").read_text()


def test_models_are_opened_at_their_first_use(
    served: Served, folders: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    with running(f"models={file_of(tmp_path, served, folders)}") as service:
        assert is_open(service, "a") and not is_open(service, "b")  # The first one answers if none is named.
        assert not mapped(service, folders["b"])
        assert service.fetch("/readyz")[1] == {"ready": True, "generation": {"a": 1}, "problems": []}
        status, answer = scored(service, "b", headers={"Vista-Timeout-Ms": "5"})
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
        assert mapped(service, folders["b"] / WEIGHTS_FILE)
        assert mapped(service, folders["a"] / RETRIEVAL_FILE) and not mapped(service, folders["b"] / RETRIEVAL_FILE)
        assert "opened model b in" in service.log and "of which other models share" in service.log
        assert service.number('vista_users_total{model="c",outcome="hit"}') == len(USERS)
        assert service.number('vista_model_openings_total{model="c",outcome="opened"}') == 1


def test_idle_models_are_closed_under_the_budget(
    served: Served, folders: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    with Scorer.open(folders["a"], served.store) as scorer:
        budget = tables_of(scorer.model).num_bytes + 100
    with running(f"models={file_of(tmp_path, served, folders, memory_bytes=budget)}") as service:
        for name in (*NAMES, *NAMES):
            status, answer = scored(service, name)
            assert status == 200
            np.testing.assert_allclose(answer["scores"], expected[name], atol=TOLERANCE)
            # What all share stays in the files of a.
            assert [mapped(service, folders[other] / WEIGHTS_FILE) for other in "bc"] == [name == "b", name == "c"]
        assert f"closing model b, because the open models exceed memory_bytes={budget}" in service.log
        assert service.number('vista_model_closings_total{model="b"}') == 2
        assert service.number('vista_model_open{model="b"}') == 0
        assert service.number('vista_users_total{model="b",outcome="hit"}') == 2 * len(USERS)


def test_no_answer_is_wrong_while_models_are_swapped(
    served: Served, folders: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    """Clients of three models, with memory for one, and two threads that score."""
    wrong: list[Any] = []
    path = file_of(tmp_path, served, folders, memory_bytes=1)
    with running(f"models={path}", "scoring_threads=2", "reload_s=0.05") as service:

        def work(name: str) -> None:
            for _ in range(8):
                status, answer = scored(service, name)
                if status != 200 or not np.allclose(answer["scores"], expected[name], atol=TOLERANCE):
                    wrong.append(answer)

        threads = [threading.Thread(target=work, args=(name,)) for name in (*NAMES, "a")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert service.number('vista_users_total{model="c",outcome="hit"}') == 8 * len(USERS)
        assert service.stop() == 0


def test_a_model_stays_open_during_its_calls(served: Served, folders: dict[str, Path]) -> None:
    configs = {name: ServeConfig(model=str(folder), store=str(served.store)) for name, folder in folders.items()}
    models = ServedModels(configs, None, 1, ServiceMetrics())
    try:
        with models.use("a") as first, models.use("a"), models.use("b"):
            models.open("c")
            assert models.is_open("a") and models.is_open("b")
            first.scorer.score(USERS, ITEMS, now=NOW)
        until(lambda: [models.is_open(name) for name in NAMES] == [False, False, True])
        with models.open_services() as services:
            assert list(services) == ["c"]
    finally:
        models.close()
    assert not models.is_open("c")


def test_a_model_that_vanishes_under_the_server(
    served: Served, folders: dict[str, Path], expected: dict[str, Any], tmp_path: Path
) -> None:
    """An open one stays in service. One that is not open fails alone, and comes back with its folder."""
    moved = {name: tmp_path / name for name in "ab"}
    for name, folder in moved.items():
        shutil.copytree(folders[name], folder)
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


def test_a_model_that_failed_is_not_tried_again_at_once(served: Served, folders: dict[str, Path]) -> None:
    """Each attempt would read its files."""
    good = ServeConfig(model=str(folders["a"]), store=str(served.store), reload_s=1000)
    missing = ServeConfig(model="nowhere", store=str(served.store), reload_s=1000)
    models = ServedModels({"a": good, "b": missing}, None, None, metrics := ServiceMetrics())
    try:
        for _ in range(3):
            with pytest.raises(ModelUnavailableError, match="b is not available: the model cannot be opened") as raised:
                models.open("b")
            assert 900 < raised.value.retry_after_s <= 1000
        assert models.problem("b") == "the model cannot be opened (see the log)" and models.problem("a") is None
        assert metrics.openings.labels("b", "failed")._value.get() == 1
    finally:
        models.close()


def test_models_follow_their_store(served: Served, folders: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    refresh(served.model, served.log, store)
    path = models_file(tmp_path, {name: (folders[name], store) for name in "ab"}, split={"a": 0.5, "b": 0.5})
    with running(f"models={path}", "reload_s=0.1") as service:
        refresh(served.model, served.log, store)
        for name in "ab":
            until(lambda name=name: service.number(f'vista_generation{{model="{name}"}}') == 2)
