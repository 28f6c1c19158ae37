"""Runs in TensorBoard, MLflow, and Weights & Biases, read back with the libraries of these trackers."""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.conftest import small_config
from vista.cli.main import main
from vista.config import TrainConfig
from vista.config.checks import TrackerKind, to_dict
from vista.config.composition import to_yaml
from vista.config.train_config import TrackingConfig
from vista.errors import MissingDependencyError, TrackingError
from vista.log.event_log import EventLog
from vista.runs import tracking
from vista.runs.tracking import TrackedFolder, WandbTracker
from vista.training.trainer import Trainer, train_model

KINDS = [
    pytest.param(
        kind,
        marks=[
            pytest.mark.skipif(find_spec(kind) is None, reason=f"needs {kind}"),
            *([] if kind == "tensorboard" else [pytest.mark.nightly]),
        ],
    )
    for kind in ("tensorboard", "mlflow", "wandb")
]
BLOCK_BYTES = 1 << 15
WRITE_S = 60.0
"""Most seconds that W&B's process may take to write what it has; a shared machine can be slow."""
mlflow_only = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")


@pytest.fixture(autouse=True)
def quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@functools.cache
def new_database() -> bytes:
    """A database of MLflow without runs, which takes seconds to make."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def tracked_config(log: EventLog, folder: Path, kind: str, **changes: Any) -> TrainConfig:
    tracking = TrackingConfig(kind=kind)  # type: ignore[arg-type]
    if kind == "mlflow":
        tracking.server = f"sqlite:///{folder}/mlflow.db"
        (folder / "mlflow.db").write_bytes(new_database())
    return small_config(log, folder / "run", tracking=tracking, **changes)


def without_tracking(config: TrainConfig) -> str:
    """The configuration as a file, to which the command line adds a tracker."""
    return yaml.safe_dump({key: value for key, value in to_dict(config).items() if key != "tracking"})


def rows_of_run(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def shown_by(kind: str, folder: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    """The metrics of the only run that a tracker shows, {name: [(step, value), …]}, and names of its files."""
    return {"tensorboard": _in_tensorboard, "mlflow": _in_mlflow, "wandb": _in_wandb}[kind](folder)


def _in_tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    texts = {name.removesuffix("/text_summary") for name in tags["tensors"]} - {"run"}
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in tags["scalars"]}
    return scalars, {*texts, *tags["images"]}


def the_run(server: str | None) -> Any:
    """The only run that a server of MLflow has."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("vista")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def _in_mlflow(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    from mlflow import MlflowClient

    client, run = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db"), the_run(f"sqlite:///{folder}/mlflow.db")
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    metrics = {
        name.replace("_at_", "@"): sorted((metric.step, metric.value) for metric in history)
        for name, history in histories.items()
    }
    return metrics, {Path(file.path).stem for file in client.list_artifacts(run.info.run_id)}


def _in_wandb(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    metrics: dict[str, list[tuple[int, float]]] = {}
    files, ids = set[str](), set[str]()
    for path in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in complete_records(path):
            ids |= {record.run.run_id} - {""}
            files |= {Path(file.path).stem.partition("_")[0] for file in record.files.files}
            values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            for name, value in values.items():
                if not isinstance(value, dict):  # an image
                    metrics.setdefault(name, []).append((values["_step"], value))
    assert len(ids) == 1
    return metrics, files


def complete_records(path: Path) -> list[Any]:
    """The records of a .wandb file. `finish` returns before W&B's process has written them; the exit is the last."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + WRITE_S
    while True:
        records = [Record.FromString(data) for data in records_of(path.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < deadline, f"{path} has {len(records)} records, and no exit"
        time.sleep(0.01)


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, after a header of seven bytes."""
    place, parts = 7, []
    while place + 7 <= len(content):
        if (left := -place % BLOCK_BYTES or BLOCK_BYTES) < 7:  # the rest of a block is empty
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + 7 + size > len(content):  # the rest is not written yet
            return
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # a complete record, or its last part
            yield b"".join(parts)
            parts = []


def expected_of(rows: list[dict[str, Any]], name: str) -> list[tuple[int, Any]]:
    flat = ({**row, **row.get("validation", {})} for row in rows)
    return [(row["step"], pytest.approx(row[name], rel=1e-6, abs=1e-6)) for row in flat if name in row]


@pytest.fixture
def dashboard_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own: MLflow writes artifacts into it. Weights & Biases writes files only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


@pytest.fixture(scope="module")
def untracked_model(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run_dir = tmp_path_factory.mktemp("untracked")
    train_model(small_config(event_log, run_dir), event_log)
    return (run_dir / "best" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_shows_metrics_and_files_and_changes_nothing(
    event_log: EventLog, dashboard_folder: Path, untracked_model: bytes, kind: str
) -> None:
    config = tracked_config(event_log, dashboard_folder, kind)
    train_model(config, event_log, metrics_every=2)
    metrics, files = shown_by(kind, dashboard_folder)
    rows = rows_of_run(dashboard_folder)
    for name in ("loss", "learning_rate", "ndcg@10", "seconds"):
        assert metrics[name] == expected_of(rows, name), name
    assert files >= {"README", "config", "curves"}
    assert (dashboard_folder / "run" / "best" / "model.safetensors").read_bytes() == untracked_model
    assert json.loads((dashboard_folder / "run" / "tracking.json").read_text())["complete"]
    if kind == "mlflow":
        run = the_run(config.tracking.server)
        assert run.info.status == "FINISHED" and run.info.run_name == "run"
        assert run.data.params["model.dim"] == "16" and run.data.params["optim.learning_rate"] == "0.005"
        assert run.data.tags["commit"] and int(run.data.tags["parameters"]) > 1000


def test_the_configuration_has_no_password(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path)
    config.tracking.server = "postgresql://me:secret@host/runs"
    assert "secret" not in to_yaml(config) and "postgresql://me@host/runs" in to_yaml(config)


def test_the_reason_of_a_failure_has_no_password(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> None:
        raise ConnectionError("http://me:secret@host/runs does not answer")

    monkeypatch.setattr(Trainer, "_step", step)
    config = small_config(event_log, tmp_path)
    with pytest.raises(ConnectionError):
        train_model(config, event_log)
    facts = json.loads((Path(config.run_dir) / "run.json").read_text())
    assert facts["reason"] == "ConnectionError: http://me@host/runs does not answer"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.nightly
def test_a_resumed_run_is_the_same_run(
    event_log: EventLog, dashboard_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is killed after steps that no checkpoint has, which the tracker then has already."""
    config = tracked_config(event_log, dashboard_folder, kind, checkpoint_every=5)
    make = Trainer._step

    def step(self: Trainer, *arguments: Any) -> dict[str, float]:
        if self.progress.step == 6:
            raise KeyboardInterrupt
        return make(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train_model(config, event_log, metrics_every=1)
    state = json.loads((dashboard_folder / "run" / "tracking.json").read_text())
    assert state["step"] == 6 and not state["complete"]
    assert json.loads((dashboard_folder / "run" / "run.json").read_text())["state"] == "stopped"
    train_model(config, event_log, metrics_every=1)
    metrics, files = shown_by(kind, dashboard_folder)
    for name in ("loss", "ndcg@10"):
        assert metrics[name] == expected_of(rows_of_run(dashboard_folder), name)
    assert "curves" in files
    assert json.loads((dashboard_folder / "run" / "tracking.json").read_text())["id"] == state["id"]


@pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(*kind.values, marks=[*kind.marks, pytest.mark.nightly]) for kind in KINDS[1:])]
)
def test_a_tracker_that_fails_midway_gets_the_rest_when_the_command_is_rerun(
    event_log: EventLog,
    dashboard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    config = tracked_config(event_log, dashboard_folder, kind)
    tracker: Any = tracking.tracker_class(config.tracking.kind)
    log, close = tracker.log, tracker.close
    closed = list[Any]()

    def fail(self: Any, step: int, values: Any) -> None:
        if step > 6:
            raise ConnectionError("the network is down: API request to http://me:hunter2@host/api failed")
        log(self, step, values)

    def note(self: Any, files: Any) -> None:
        closed.append(files)
        close(self, files)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(tracker, "log", fail)
        patch.setattr(tracker, "close", note)
        with pytest.raises(
            TrackingError, match=r"lacks the metrics after step 6 \(ConnectionError: the network is down"
        ):
            train_model(config, event_log, metrics_every=2)
    warnings = [record.message for record in caplog.records if "the network is down" in record.message]
    assert closed == [None], "a run that stays open gets what this process tracks next"
    assert len(warnings) == 1 and "training continues" in warnings[0] and "http://me@host/api" in warnings[0]
    assert (dashboard_folder / "run" / "best" / "model.safetensors").exists()
    assert json.loads((dashboard_folder / "run" / "run.json").read_text())["state"] == "finished"
    train_model(config, event_log, metrics_every=2)
    metrics, files = shown_by(kind, dashboard_folder)
    assert metrics["loss"] == expected_of(rows_of_run(dashboard_folder), "loss") and "curves" in files


@mlflow_only
@pytest.mark.nightly
def test_a_run_without_a_tracker_can_be_sent_afterwards(event_log: EventLog, dashboard_folder: Path) -> None:
    config = tracked_config(event_log, dashboard_folder, "mlflow")
    train_model(small_config(event_log, dashboard_folder / "run"), event_log, metrics_every=2)
    assert not (dashboard_folder / "run" / "tracking.json").exists()
    train_model(config, event_log, metrics_every=2)
    rows = rows_of_run(dashboard_folder)
    assert shown_by("mlflow", dashboard_folder)[0]["loss"] == expected_of(rows, "loss")
    (dashboard_folder / "mlflow.db").rename(dashboard_folder / "moved.db")
    train_model(config, event_log)  # complete, so the tracker is not asked
    assert not (dashboard_folder / "mlflow.db").exists()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0] != "tensorboard"])
@pytest.mark.nightly
def test_a_server_that_does_not_answer_stops_the_run_before_training(
    event_log: EventLog,
    dashboard_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        if kind == "wandb":
            monkeypatch.delenv("WANDB_MODE")
            monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
            monkeypatch.setattr("vista.runs.tracking.START_TIMEOUT_S", 1)
        config = small_config(event_log, dashboard_folder / "run")
        (dashboard_folder / "train.yaml").write_text(without_tracking(config))
        words = (f"tracking={kind}", f"tracking.server={address}")
        assert main(["train", "--config", str(dashboard_folder / "train.yaml"), *words]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: tracking={kind} ({address}): the run cannot be tracked")
    assert "so nothing was trained" in line and "tracking=none" in line
    assert not (dashboard_folder / "run" / "best").exists() and rows_of_run(dashboard_folder) == []
    assert json.loads((dashboard_folder / "run" / "run.json").read_text())["state"] == "failed"
    train_model(config, event_log)


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_a_missing_key_of_wandb_is_named(
    event_log: EventLog, dashboard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(dashboard_folder))
    monkeypatch.setenv("NETRC", str(dashboard_folder / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = tracked_config(event_log, dashboard_folder, "wandb")
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(TrackingError, match=r"wandb login.*WANDB_MODE=offline"):
        train_model(config, event_log)


def test_the_offline_mode_of_wandb_is_honored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    wandb = SimpleNamespace(Settings=SimpleNamespace, login=lambda **_: False, init=lambda **words: given.update(words))
    monkeypatch.setattr("vista.runs.tracking.require_module", lambda *_: wandb)
    folder = TrackedFolder(tmp_path, TrackingConfig(kind=TrackerKind.wandb), {}, {})
    with pytest.raises(TrackingError, match="WANDB_MODE=offline"):
        WandbTracker(folder, None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbTracker(folder, None)
    assert given["mode"] == "offline"


def test_an_unknown_tracker_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tracking=mlfow"]) == 2
    line = capsys.readouterr().err
    assert "tracking: no option 'mlfow'; did you mean mlflow?" in line and "none, tensorboard, wandb" in line


@pytest.mark.parametrize(("kind", "module"), [("mlflow", "mlflow"), ("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_an_extra_that_is_not_installed_is_named_before_the_log_is_read(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str
) -> None:
    name = "torch.utils.tensorboard" if module == "tensorboard" else module
    monkeypatch.setitem(sys.modules, name, None)
    config = small_config(event_log, tmp_path / "run", tracking=TrackingConfig(kind=kind))  # type: ignore[arg-type]
    with pytest.raises(MissingDependencyError, match=rf"pip install .*\[{kind}\]'"):
        train_model(config, event_log)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture
def mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real server, which the complete package `mlflow` has."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")  # its first answers take long on a busy machine
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    program = os.environ.get("MLFLOW_PROGRAM", "mlflow")
    with subprocess.Popen([program, *words, *stores], env=environment, cwd=tmp_path, start_new_session=True) as process:
        try:
            _wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(2000):
        assert process.poll() is None, "the server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.mark.nightly
@pytest.mark.skipif(
    find_spec("flask") is None and not {"MLFLOW_PROGRAM", "CI"} & os.environ.keys(),
    reason="needs a server: install the package mlflow, here or elsewhere, and set MLFLOW_PROGRAM to its program",
)
@mlflow_only
def test_a_server_of_mlflow_has_the_metrics_and_the_files(
    event_log: EventLog, dashboard_folder: Path, mlflow_server: str
) -> None:
    from mlflow import MlflowClient

    config = tracked_config(event_log, dashboard_folder, "mlflow")
    config.tracking.server = mlflow_server
    train_model(config, event_log, metrics_every=2)
    client, run = MlflowClient(tracking_uri=mlflow_server), the_run(mlflow_server)
    history = client.get_metric_history(run.info.run_id, "loss")
    shown = sorted((metric.step, metric.value) for metric in history)
    assert shown == expected_of(rows_of_run(dashboard_folder), "loss")
    card = Path(client.download_artifacts(run.info.run_id, "README.md", str(dashboard_folder)))
    assert card.read_text() == (dashboard_folder / "run" / "best" / "README.md").read_text()
