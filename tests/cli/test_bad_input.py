"""Bad input on the command line: one line that names the cause, and no data is lost or half written. Bad source
tables are tested in tests/log/ingest/test_sources.py, bad requests in tests/scorer. `vista store …` and
`vista index` as typed: what is printed, exit codes, and one line per error."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Served, small_config
from vista.cli import main as cli
from vista.cli.item_commands import run_index
from vista.cli.main import main
from vista.config import IndexConfig
from vista.config.checks import IndexKind
from vista.config.composition import to_yaml
from vista.errors import CheckpointError, ConfigError, ItemIndexError, MissingDependencyError
from vista.examples.batch_source import BatchSource
from vista.log.event_log import EventLog
from vista.model.item_index import ItemIndex
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.store import StoreReader
from vista.store.layout import environment_path, read_current
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


@pytest.fixture
def store(served: Served, tmp_path: Path) -> Path:
    shutil.copytree(served.store, tmp_path / "store")
    return tmp_path / "store"


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert cli.main(["store", *words]) == code
    printed = capsys.readouterr()
    if code:
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    return printed.err if code else printed.out


def test_all_commands_in_turn(store: Path, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    at = f"store={store}"
    users = served.log.users.ids(np.arange(served.log.num_users))
    assert f"{len(users)} records" in said(capsys, "stats", at)
    assert "no problem found" in said(capsys, "verify", at)
    assert "generation 2 of" in said(capsys, "compact", at)
    assert "error: " in said(capsys, "rollback", at, code=1)
    exported = tmp_path / "out.parquet"
    assert f"{len(users)} records of generation 2" in said(capsys, "export", at, f"out={exported}")
    assert "generation 3 of" in said(capsys, "import", at, f"file={exported}")
    assert "generation 2 of" in said(capsys, "rollback", at)
    assert "generation 3 of" in said(capsys, "rollback", at, "to=3")
    to = f"to={tmp_path / 'host'}"
    assert "not published yet" in said(capsys, "copy", at, to, "publish=false")
    assert "no published generation" in said(capsys, "verify", f"store={tmp_path / 'host'}", code=1)
    assert "is published" in said(capsys, "copy", at, to)
    assert "name the folder" in said(capsys, "copy", at, code=2)
    with StoreReader.open(served.store) as first, StoreReader.open(tmp_path / "host") as last:
        assert last.generation == 3
        np.testing.assert_array_equal(first.get_many(users).summary, last.get_many(users).summary)


def test_a_record_is_printed(store: Path, served: Served, capsys: pytest.CaptureFixture[str]):
    user = served.log.users.ids(np.array([3]))[0]
    history = served.log.gather(np.array([3]), np.array([served.log.slice(3).num_events]))
    text = said(capsys, "get", f"store={store}", f"user={user}")
    assert f"events covered:    {history.num_events}, the newest at {int(history.timestamp[-1])} (" in text
    assert "  row " in text and "authenticated:     no" in text
    named = said(capsys, "get", f"store={store}", f"user={user}", f"model={served.model_dir}")
    newest = served.log.items.ids(np.asarray(history.item[-1:]))[0]
    assert named.splitlines()[-1].split()[0] == str(newest)
    assert "has no record" in said(capsys, "get", f"store={store}", "user=123456789", code=1)
    assert "user: ids must be integers" in said(capsys, "get", f"store={store}", "user=abc", code=2)
    assert "user: name a user" in said(capsys, "get", f"store={store}", code=2)


def test_problems_end_in_exit_code_1(store: Path, capsys: pytest.CaptureFixture[str]):
    data = environment_path(store, read_current(store)) / "data.mdb"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4096])
    assert "1 problem; " in (text := said(capsys, "verify", f"store={store}", code=1)) and "truncated" in text
    assert "truncated" in said(capsys, "stats", f"store={store}")
    for command in ("compact", "export"):
        assert "truncated" in said(capsys, command, f"store={store}", code=1)


def test_get_counts_the_keys_of_a_store_with_counters(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = VistaModel.from_pretrained(served.model_dir)
    config = dataclasses.replace(base.config, counter_keys=["item"], num_counters=2)
    model = VistaModel(config, base.schema, base.items, base.data)
    refresh(model, served.log, tmp_path / "store")
    user = served.log.users.ids(np.array([int(served.log.lengths.argmax())]))[0]
    assert "counted keys:      2 (item)" in said(capsys, "get", f"store={tmp_path / 'store'}", f"user={user}")


def test_the_index_of_a_trained_model(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best.index"
    assert main(["index", f"model={served.model_dir}", f"out={out}"]) == 0
    pattern = r"best\.index: flat index of 40 items, 0\.0 MB, in .* s; recall@100 1\.000 with items as queries"
    assert re.search(pattern, capsys.readouterr().out)
    assert ItemIndex.load(out).num_items == 40
    shutil.copytree(served.model_dir, tmp_path / "copy")
    assert run_index(IndexConfig(model=str(tmp_path / "copy"))).out == str(tmp_path / "copy.index")


def test_what_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable model"):
        run_index(IndexConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(ItemIndexError, match="something other than an index"):
        run_index(IndexConfig(model=str(served.model_dir), out=str(served.model_dir)))
    with pytest.raises(ConfigError, match="kind: 'tree' is not one of flat, hnsw, ivfpq"):
        IndexConfig(kind="tree")  # type: ignore[arg-type]


def test_a_model_without_a_retrieval_head(served: Served, tmp_path: Path) -> None:
    saved = served.model
    torch.manual_seed(0)
    schema = replace(saved.schema, has_retrieval=False, tasks=["click"])
    VistaModel(saved.config, schema, saved.items, saved.data).save_pretrained(tmp_path / "labeled")
    with pytest.raises(ConfigError, match="has no retrieval head"):
        run_index(IndexConfig(model=str(tmp_path / "labeled")))


def test_without_faiss_the_message_names_the_extra(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[faiss\]'"):
        run_index(IndexConfig(model=str(served.model_dir), kind=IndexKind.hnsw, out=str(tmp_path / "index")))
    assert not (tmp_path / "index").exists()
