"""`vista store …` and `vista index` as typed: what is printed, exit codes, and one line per error."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Served
from vista.cli import main as cli
from vista.cli.item_commands import run_index
from vista.cli.main import main
from vista.config import IndexConfig
from vista.config.checks import IndexKind
from vista.errors import CheckpointError, ConfigError, ItemIndexError, MissingDependencyError
from vista.model.item_index import ItemIndex
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.store import StoreReader
from vista.store.layout import environment_path, read_current


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
