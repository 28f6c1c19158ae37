"""The text files that a run appends to."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.conftest import small_config
from vista.errors import ConfigError, NonFiniteLossError
from vista.log.event_log import EventLog
from vista.training.metrics_writer import MetricsWriter
from vista.training.run_folder import log_file
from vista.training.trainer import train_model


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl"])
def test_a_run_writes_to_no_link_and_waits_for_no_pipe(event_log: EventLog, tmp_path: Path, name: str) -> None:
    config = small_config(event_log, tmp_path / "run", optim__epochs=1)
    (tmp_path / "victim").write_bytes(b"kept")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    path.symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=rf"{name}: cannot be written \(is a symbolic link; remove it\)"):
        train_model(config, event_log)
    assert (tmp_path / "victim").read_bytes() == b"kept" and path.is_symlink()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=rf"{name}: cannot be written \(is not a regular file\)"):
        train_model(config, event_log)


def test_a_refused_batch_is_not_written_through_a_link_or_to_a_pipe(event_log: EventLog, tmp_path: Path) -> None:
    def run(name: str) -> str:
        with pytest.raises(NonFiniteLossError) as caught:
            train_model(small_config(event_log, tmp_path / name, optim__learning_rate=1e38), event_log)
        return str(caught.value)

    run("first")
    (saved,) = (tmp_path / "first").glob("nonfinite-step-*.safetensors")
    victim, link, pipe = tmp_path / "victim", tmp_path / "second" / saved.name, tmp_path / "third" / saved.name
    victim.write_bytes(b"kept")
    for path in (link, pipe):
        path.parent.mkdir()
    link.symlink_to(victim)
    os.mkfifo(pipe)
    assert f"the batch is saved in {link}" in run("second")
    assert victim.read_bytes() == b"kept" and link.read_bytes() == saved.read_bytes()
    assert f"the batch cannot be saved in {pipe} (is not a regular file)" in run("third")


@pytest.mark.parametrize("step", [0, 5])
def test_metrics_in_a_pipe_are_not_waited_for(tmp_path: Path, step: int) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    metrics = MetricsWriter(tmp_path)
    with pytest.raises(ConfigError, match="is not a regular file"):
        metrics.rewind(step, [])
    with pytest.raises(ConfigError, match="is not a regular file"):
        metrics.write({"step": step})


def test_a_log_is_appended_to_and_its_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        for text in ("first", "second"):
            with log_file(tmp_path / "train.log"):
                logging.getLogger("vista").info(text)
    finally:
        os.umask(old)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]
    assert (tmp_path / "train.log").stat().st_mode & 0o777 == 0o640
