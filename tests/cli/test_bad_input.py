"""Bad input on the command line: one line that names the cause, and no data is lost or half written.

Bad source tables are tested in tests/log/ingest/test_bad_sources.py, bad requests in tests/scorer.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Served, small_config
from vista.cli.main import main
from vista.config.composition import to_yaml
from vista.errors import CheckpointError
from vista.examples.batch_source import BatchSource
from vista.log.event_log import EventLog
from vista.store import StoreReader
from vista.training.trainer import train

Fails = Callable[..., str]


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, except locks and reader tables, which reading changes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command line that must fail with an exit code and one line on stderr, and return the line."""

    def run(code: int, *words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == code
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith(("error: ", "interrupted"))]
        assert len(lines) == 1 and "Traceback" not in err, err
        return lines[0]

    return run


@pytest.fixture
def copied(served: Served, tmp_path: Path) -> Served:
    """A model and stores that a test may damage."""
    for name, source in (("log", served.log.path), ("run", served.config.run_dir), ("store", served.store)):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("lock.mdb", "writer.lock"))
    store = tmp_path / "store"
    log = EventLog.open(tmp_path / "log")
    config = small_config(log, tmp_path / "run")
    return Served(log, config, served.model, tmp_path / "run" / "best", store, store, store)


def train_words(given: Served, *more: str) -> list[str]:
    path = Path(given.config.run_dir).with_suffix(".yaml")
    path.write_text(to_yaml(given.config))
    return ["train", f"--config={path}", *more]


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.decay=time"], r"model\.decay_horizons: needs one horizon >= 0 per head \(4\), got \[\]"),
        (["model.tail_len=16"], r"data\.label_spacing: must be at most model\.tail_len=16, .* got 32"),
        (["device=tpu"], r"device=tpu: write auto, cpu, cuda or cuda:N"),
    ],
)
def test_settings_of_training(served: Served, tmp_path: Path, fails: Fails, words: list[str], message: str) -> None:
    line = fails(2, "train", f"data.path={served.log.path}", f"run_dir={tmp_path / 'run'}", *words)
    assert re.search(message, line), line
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["refresh", "until=yesterday"], r"until='yesterday': write all, leave-last-out, .* an ISO date .*or time"),
        (["evaluate", "top_k=[]"], r"top_k: needs one or more numbers from 1 to 1048576, got \[\]"),
        (["score", "users=[100]", "top_k=0"], "top_k: must be at least 1, got 0"),
    ],
)
def test_settings_of_other_commands(
    served: Served, tmp_path: Path, fails: Fails, words: list[str], message: str
) -> None:
    places = [f"model={served.model_dir}", f"store={tmp_path / 'store'}"]
    if words[0] != "score":
        places.append(f"data={served.log.path}")
    assert re.search(message, fails(2, words[0], *places, *words[1:]))
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_column(copied: Served, tmp_path: Path, fails: Fails) -> None:
    (path,) = (tmp_path / "log").rglob("item.npy")
    size = path.stat().st_size
    truncate(path, size - 8)
    before = content(tmp_path / "run"), content(tmp_path / "store")
    places = [f"data={tmp_path / 'log'}", f"model={copied.model_dir}", f"store={copied.store}"]
    for words in (train_words(copied), ["refresh", *places], ["evaluate", *places]):
        line = fails(1, *words)
        assert f"{path}: expected {size} bytes, found {size - 8}; the file is truncated" in line
    assert (content(tmp_path / "run"), content(tmp_path / "store")) == before


def test_a_missing_log(copied: Served, tmp_path: Path, fails: Fails) -> None:
    line = fails(1, *train_words(copied, f"data.path={tmp_path / 'absent'}"))
    assert str(tmp_path / "absent") in line and not (tmp_path / "absent").exists()


def test_a_truncated_export(copied: Served, tmp_path: Path, fails: Fails) -> None:
    weights = copied.model_dir / "model.safetensors"
    truncate(weights, weights.stat().st_size - 10)
    before = content(tmp_path / "store")
    places = [f"model={copied.model_dir}", f"store={copied.store}"]
    for words in (["score", *places, "users=[100]"], ["refresh", *places, f"data={copied.log.path}"]):
        assert str(copied.model_dir) in fails(1, *words)
    assert content(tmp_path / "store") == before


def readers(given: Served, store: Path) -> list[list[str]]:
    places = [f"model={given.model_dir}", f"store={store}"]
    return [["score", *places, "users=[100]"], ["evaluate", *places, f"data={given.log.path}"]]


def test_a_truncated_store(copied: Served, tmp_path: Path, fails: Fails) -> None:
    (path,) = copied.store.rglob("summary/data.mdb")
    truncate(path, path.stat().st_size // 2)
    for words in readers(copied, copied.store):
        assert str(path.parent) in fails(1, *words)
    # A refresh repairs it.
    assert main(["refresh", *words[1:]]) == 0
    with StoreReader.open(copied.store) as store:
        assert len(store) == copied.log.num_users and store.get_many([100]).found.all()


def test_a_folder_that_is_not_a_store(copied: Served, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "CURRENT").write_text("not a store\n")
    (tmp_path / "text").write_text("text")
    for place in ("foreign", "text", "absent"):
        for words in readers(copied, tmp_path / place):
            assert str(tmp_path / place) in fails(1, *words)
    assert content(tmp_path / "foreign") == {"CURRENT": b"not a store\n"} and not (tmp_path / "absent").exists()


def test_unknown_user_and_candidate(copied: Served, fails: Fails) -> None:
    places = [f"model={copied.model_dir}", f"store={copied.store}", "on_missing=raise"]
    assert "users [999] have no record" in fails(1, "score", *places, "users=[999]")
    assert "items [7]" in fails(1, "score", *places, "users=[100]", "candidates=[0,7]")
    assert "users: ids must be integers, as in the log, got bob" in fails(2, "score", *places, "users=[bob]")
    assert "users: expected [str, ...], got [[100]]" in fails(2, "score", *places, "users=[[100]]")


def test_folders_that_cannot_be_written(copied: Served, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "file").write_text("kept")
    below = tmp_path / "file" / "below"
    places = [f"data={copied.log.path}", f"model={copied.model_dir}"]
    assert f"run_dir={below}: cannot be written" in fails(2, *train_words(copied, f"run_dir={below}"))
    assert f"{below} cannot be written" in fails(1, "refresh", *places, f"store={below}")
    line = fails(2, "evaluate", *places, f"store={copied.store}", f"out={below}")
    assert f"out={below.parent}: cannot be written" in line
    assert (tmp_path / "file").read_text() == "kept"
    metrics = Path(copied.config.run_dir) / "metrics.jsonl"
    assert f"out={metrics}: belongs to the run" in fails(2, "plan", f"out={metrics}")
    within = Path(copied.log.path) / "run"
    assert f"run_dir={within}: lies in the EventLog" in fails(2, *train_words(copied, f"run_dir={within}"))
    assert not within.exists()


def test_a_full_disk_in_training(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path / "run", checkpoint_every=2)
    with file_size_limit(30_000), pytest.raises(CheckpointError, match=r"could not be written .*free space"):
        train(config, event_log)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "best").exists()
    assert (tmp_path / "run" / "config.yaml").exists() and not train(config, event_log).training


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make writing beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_resumes(copied: Served, tmp_path: Path, fails: Fails, monkeypatch: Any) -> None:
    make = BatchSource.batch

    def batch(source: BatchSource, epoch: int, index: int) -> Any:
        if (epoch, index) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return make(source, epoch, index)

    run_dir = tmp_path / "again"
    words = train_words(copied, f"run_dir={run_dir}")
    with monkeypatch.context() as patch:
        patch.setattr(BatchSource, "batch", batch)
        assert fails(130, *words) == "interrupted; rerun the command to resume"
    assert main(words) == 0
    assert "resuming at step" in (run_dir / "train.log").read_text()
    assert content(run_dir / "best")["model.safetensors"] == content(copied.model_dir)["model.safetensors"]
