"""A service that starts, or a worker that restarts, between the steps of an upgrade: it waits for the rest."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ITEMS, START, USERS, Served
from tests.serve.model_files import models_file, retrained
from tests.serve.running_service import running, until
from vista.cli.index_command import run_index
from vista.config import IndexConfig, ServeConfig
from vista.errors import CheckpointError
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.serve.served_models import ONE_MODEL, ServedModels
from vista.serve.service_metrics import ServiceMetrics

NOW = START + 200 * 86_400_000
TOLERANCE = 2e-5
"""Between calls with other users, for a model whose K is below 16 (docs/guides/serve.md)."""
ASKED = {"users": USERS, "candidates": ITEMS, "now": NOW}
NO_SUMMARIES = "the store has no summaries of this model yet; the model waits for the rest of its upgrade (see the log)"


def scores(model: VistaModel, store: Path) -> np.ndarray:
    with Scorer.open(model, store) as scorer:
        found: np.ndarray = scorer.score(USERS, ITEMS, now=NOW)
        return found


def test_a_service_that_starts_before_the_summaries_are_published(served: Served, folders: tuple[Path, Path]) -> None:
    model, store = folders
    other = retrained(served.model)
    other.save_pretrained(model)
    with running(f"model={model}", f"store={store}", "reload_s=0.2") as service:
        assert service.fetch("/healthz") == (200, {"status": "ok"})
        assert service.fetch("/readyz") == (503, {"ready": False, "generation": None, "problems": [NO_SUMMARIES]})
        status, headers, answer = service.send("/v1/score", ASKED)
        assert status == 503 and b"ModelUnavailableError" in answer and headers["Retry-After"] == "1"
        assert NO_SUMMARIES.encode() in answer and str(model).encode() not in answer
        assert service.number('vista_model_openings_total{model="default",outcome="failed"}') >= 1
        refresh(other, served.log, store)
        until(lambda: service.fetch("/readyz") == (200, {"ready": True, "generation": 2, "problems": []}))
        status, scored = service.fetch("/v1/score", ASKED)
        np.testing.assert_allclose(scored["scores"], scores(other, store), atol=TOLERANCE)
        said = "model default waits, and is tried again every 0.2 s, because the store has no summaries of this model"
        assert service.log.count(said) == 1 and "opened model default in" in service.log
        assert "Traceback" not in service.log and service.stop() == 0


def test_a_worker_that_restarts_before_the_summaries_are_published(served: Served, folders: tuple[Path, Path]) -> None:
    """It gets no requests, so that none fails; the other worker keeps the old model in service."""
    model, store = folders
    other, expected = retrained(served.model), scores(served.model, store)
    with running(f"model={model}", f"store={store}", "workers=2", "reload_s=0.2") as service:
        other.save_pretrained(model)
        first, second = service.workers()
        os.kill(first, signal.SIGKILL)
        until(lambda: "model default waits" in service.log)
        for _ in range(20):  # The kernel assigns each connection to a worker that listens.
            status, answer = service.fetch("/v1/score", ASKED)
            assert status == 200
            np.testing.assert_allclose(answer["scores"], expected, atol=TOLERANCE)
            assert service.fetch("/readyz")[0] == 200
        (waiting,) = set(service.workers()) - {second}
        refresh(other, served.log, store)
        until(lambda: service.number('vista_model_open{model="default"}') == 2)
        until(lambda: service.number('vista_generation{model="default"}') == 2)
        expected = scores(other, store)
        for _ in range(20):
            np.testing.assert_allclose(service.fetch("/v1/score", ASKED)[1]["scores"], expected, atol=TOLERANCE)
        assert set(service.workers()) == {second, waiting}  # It was not started again and again.
        assert service.stop() == 0


def test_a_worker_that_waits_can_be_stopped(served: Served, folders: tuple[Path, Path]) -> None:
    model, store = folders
    with running(f"model={model}", f"store={store}", "workers=2", "reload_s=1000") as service:
        retrained(served.model).save_pretrained(model)
        os.kill(service.workers()[0], signal.SIGKILL)
        until(lambda: "model default waits" in service.log)
        assert service.stop() == 0
        assert "did not stop in time" not in service.log and "Traceback" not in service.log


def test_one_variant_waits_while_the_other_serves(served: Served, folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, store = folders
    other = retrained(served.model)
    other.save_pretrained(model)
    models = {"a": (served.model_dir, served.store), "b": (model, store)}
    path = models_file(tmp_path, models, split={"a": 0.5, "b": 0.5})
    with running(f"models={path}", "reload_s=0.2") as service:
        status, ready = service.fetch("/readyz")
        assert (status, ready["generation"], ready["problems"]) == (200, {"a": 1}, [f"b: {NO_SUMMARIES}"])
        assert service.fetch("/v1/score", {**ASKED, "model": "a"})[0] == 200
        assert service.fetch("/v1/score", {**ASKED, "model": "b"})[0] == 503
        refresh(other, served.log, store)
        until(lambda: service.fetch("/readyz")[1]["problems"] == [])
        assert service.fetch("/v1/score", {**ASKED, "model": "b"})[0] == 200


def test_a_waiting_variant_keeps_no_worker_from_listening(
    served: Served, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Neither when the service starts, nor when a worker is replaced."""
    model, store = folders
    retrained(served.model).save_pretrained(model)
    models = {"a": (served.model_dir, served.store), "b": (model, store)}
    path = models_file(tmp_path, models, split={"a": 0.5, "b": 0.5})
    with running(f"models={path}", "workers=2", "reload_s=0.2") as service:
        until(lambda: b'vista_model_open{model="a"} 2.0' in service.send("/metrics")[2])
        killed = service.workers()[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in service.workers() and len(service.workers()) == 2)
        until(lambda: b'vista_model_open{model="a"} 2.0' in service.send("/metrics")[2])
        assert service.fetch("/v1/score", {**ASKED, "model": "a"})[0] == 200
        assert service.fetch("/v1/score", {**ASKED, "model": "b"})[0] == 503
        assert service.stop() == 0


def test_workers_that_all_wait_listen(served: Served, folders: tuple[Path, Path]) -> None:
    model, store = folders
    other = retrained(served.model)
    other.save_pretrained(model)
    with running(f"model={model}", f"store={store}", "workers=2", "reload_s=0.2") as service:
        assert service.fetch("/readyz")[1]["problems"] == [NO_SUMMARIES]
        refresh(other, served.log, store)
        until(lambda: b'vista_model_open{model="default"} 2.0' in service.send("/metrics")[2])
        assert service.fetch("/v1/score", ASKED)[0] == 200 and service.stop() == 0


def test_a_service_that_starts_before_longer_tails_are_published(served: Served, folders: tuple[Path, Path]) -> None:
    """A new stage 2 with the summarizer of the store, which reads more events than the store's tails hold."""
    model, store = folders
    refresh(served.model.with_tail(3), served.log, store)
    with running(f"model={model}", f"store={store}", "reload_s=0.2") as service:
        status, ready = service.fetch("/readyz")
        assert status == 503 and ready["problems"][0].startswith("the records of the store lack what this model reads")
        refresh(served.model, served.log, store)
        until(lambda: service.fetch("/readyz")[0] == 200)
        answer = service.fetch("/v1/score", ASKED)[1]
        np.testing.assert_allclose(answer["scores"], scores(served.model, store), atol=TOLERANCE)


def test_an_index_of_another_model(served: Served, served_tasks: Served, tmp_path: Path) -> None:
    index = tmp_path / "index"
    run_index(IndexConfig(model=str(served_tasks.model_dir), out=str(index)))
    words = [f"model={served.model_dir}", f"store={served.store}", f"index={index}", "reload_s=0.2"]
    with running(*words) as service:
        status, ready = service.fetch("/readyz")
        assert status == 503 and ready["problems"][0].startswith("the index is not of this model yet")
        assert "run `vista index model=…` for the model in service" in service.log
        run_index(IndexConfig(model=str(served.model_dir), out=str(index)))
        until(lambda: service.fetch("/readyz")[0] == 200)
        assert service.fetch("/v1/retrieve", {"users": USERS, "now": NOW})[0] == 200


def test_what_happens_to_a_model_that_waits(
    served: Served, folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other errors end the start, but not the wait. The log names each reason once."""
    model, store = folders
    retrained(served.model).save_pretrained(model)
    config = ServeConfig(model=str(model), store=str(store), reload_s=1e-6)
    models = ServedModels({ONE_MODEL: config}, None, None, ServiceMetrics())
    try:
        with caplog.at_level(logging.INFO, "vista.serve.served_models"):
            models.open_first()
            for _ in range(2):
                models.open_waiting()
            assert models.waiting == [ONE_MODEL] and len(caplog.records) == 1
            model.rename(tmp_path / "away")
            models.open_waiting()
            assert models.waiting == [ONE_MODEL] and "cannot be opened: CheckpointError" in caplog.records[-1].message
            shutil.copytree(served.model_dir, model)
            models.open_waiting()
            assert not models.waiting and models.problem(ONE_MODEL) is None and models.is_open(ONE_MODEL)
    finally:
        models.close()
    model.rename(tmp_path / "gone")
    models = ServedModels({ONE_MODEL: config}, None, None, ServiceMetrics())
    with pytest.raises(CheckpointError):
        models.open_first()
