"""`vista index` on the command line, and what it refuses."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import Served
from vista.cli.index_command import run_index
from vista.cli.main import main
from vista.config import IndexConfig
from vista.config.choices import IndexKind
from vista.errors import CheckpointError, ConfigError, ItemIndexError, MissingDependencyError
from vista.model.item_index import ItemIndex
from vista.model.vista_model import VistaModel


def test_the_index_of_a_trained_model(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best.index"
    assert main(["index", f"model={served.model_dir}", f"out={out}"]) == 0
    pattern = r"best\.index: flat index of 40 items, 0\.0 MB, in .* s; recall@100 1\.000 with items as queries"
    assert re.search(pattern, capsys.readouterr().out)
    assert ItemIndex.load(out).num_items == 40


def test_the_index_lies_next_to_its_model(served: Served, tmp_path: Path) -> None:
    served.model.save_pretrained(tmp_path / "best")
    assert run_index(IndexConfig(model=str(tmp_path / "best"))).out == str(tmp_path / "best.index")


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


@pytest.mark.parametrize("kind", [IndexKind.hnsw, IndexKind.ivfpq])
def test_without_faiss_the_message_names_the_extra(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: IndexKind
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "vista.model.faiss_extra", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[faiss\]'"):
        run_index(IndexConfig(model=str(served.model_dir), kind=kind, out=str(tmp_path / "index")))
    assert not (tmp_path / "index").exists()
