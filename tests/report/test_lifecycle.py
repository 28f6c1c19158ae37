"""`vista model`: a registry of models, gates, aliases that scorers follow, and the audit file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Served, small_config
from tests.examples.test_batch_source import listed_log
from vista.cli.main import main
from vista.config import ModelListConfig, ModelPromoteConfig, ModelRollbackConfig, RefreshOptions
from vista.config.checks import Alias, Codec, Split
from vista.errors import ConfigError, PromotionError
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.report import lifecycle, report_data
from vista.report.lifecycle import AUDIT_FILE, Promotion, audit_lines, list_models, measured_gates, promote, roll_back
from vista.scorer import Scorer
from vista.training.trainer import train


def damaged(served: Served, folder: Path) -> Path:
    """A copy of a model whose labeled tasks and rankings are noise."""
    model = VistaModel.from_pretrained(served.model_dir)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def test_promotion_gates_and_rollback(served_tasks: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "REQUESTS_PER_ROUND", 5)  # not 30, which take seconds
    registry, data = str(tmp_path / "registry"), str(served_tasks.log.path)

    def asked(model: Path | None, alias: Alias = Alias.champion, **more: object) -> Promotion:
        path = None if model is None else str(model)
        return promote(ModelPromoteConfig(registry=registry, model=path, alias=alias, **more))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="data: name the EventLog"):
        asked(served_tasks.model_dir, name="first")
    assert not (tmp_path / "registry").exists()
    first = asked(served_tasks.model_dir, name="first", data=data)
    assert first.before is None and all(gate.passed for gate in first.gates)
    assert [gate.name for gate in first.gates][-2:] == ["served against float32", "median ms for 200 candidates"]
    assert os.readlink(tmp_path / "registry" / "champion") == "models/first"

    bad = damaged(served_tasks, tmp_path / "bad")
    asked(bad, Alias.challenger)
    with pytest.raises(PromotionError, match="against the champion"):
        asked(None, data=data)
    assert os.readlink(tmp_path / "registry" / "champion") == "models/first"
    assert asked(bad, force=True).before == "first"
    assert os.readlink(tmp_path / "registry" / "champion") == "models/bad"
    assert roll_back(ModelRollbackConfig(registry=registry)).model == "first"
    assert os.readlink(tmp_path / "registry" / "champion") == "models/first"
    with pytest.raises(PromotionError, match="no earlier model"):
        roll_back(ModelRollbackConfig(registry=registry))

    lines = audit_lines(Path(registry))
    assert [(line["what"], line["model"]) for line in lines] == [
        ("promote", "first"),
        ("promote", "bad"),
        ("refuse", "bad"),
        ("force", "bad"),
        ("rollback", "first"),
    ]
    assert not all(gate["passed"] for gate in lines[2]["gates"]) and "@" in lines[2]["who"]
    listed = list_models(ModelListConfig(registry=registry)).models
    assert {one["name"]: one["aliases"] for one in listed} == {"first": ["champion"], "bad": ["challenger"]}


def test_gates_of_labels_that_were_not_all_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users look at 1, 1/2, and 1/4 of the three places of a list, and the models know nothing else that matters."""
    monkeypatch.setattr(report_data, "REQUESTS_PER_ROUND", 5)
    log, folders = listed_log(tmp_path, "propensity"), dict[str, Path]()
    for name, tasks in (("naive", []), ("corrected", ["click"])):
        config = small_config(log, tmp_path / name, data__split=Split.time, optim__examined_tasks=tasks)
        config.data.validation_from, config.data.test_from = "1970-01-01T00:10:00", "1970-01-01T00:14:00"
        config.optim.next_weight, config.optim.epochs, config.optim.learning_rate = 0.0, 8, 2e-2
        train(config, log)
        folders[name] = tmp_path / name / "best"
    for candidate, champion in (("corrected", "naive"), ("naive", "corrected"), ("corrected", "corrected")):
        gates = {gate.name: gate for gate in measured_gates(folders[candidate], folders[champion], log)}
        assert gates["predicted / observed click"].passed, gates
        compared = gates["log loss of click against the champion"]
        assert compared.passed and abs(float(compared.value.split()[0])) < 0.03, compared


def test_another_model_cannot_take_a_name(served: Served, served_tasks: Served, tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")
    promote(ModelPromoteConfig(registry=registry, model=str(served.model_dir), name="a", force=True))
    with pytest.raises(ConfigError, match="names another model"):
        promote(ModelPromoteConfig(registry=registry, model=str(served_tasks.model_dir), name="a", force=True))
    with pytest.raises(ConfigError, match="no challenger"):
        promote(ModelPromoteConfig(registry=registry, force=True))
    (tmp_path / "registry" / AUDIT_FILE).write_text("{\n")
    with pytest.raises(ConfigError, match="restore it"):
        list_models(ModelListConfig(registry=registry))


@pytest.fixture
def registry(served: Served, tmp_path: Path) -> Path:
    """A registry of a first and a second model, the champion."""
    for name in ("first", "second"):
        promote(
            ModelPromoteConfig(registry=str(tmp_path / "registry"), model=str(served.model_dir), name=name, force=True)
        )
    return tmp_path / "registry"


def test_a_rollback_does_not_wait_for_gates(served: Served, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rolled_back(*_: object) -> list[lifecycle.Gate]:
        roll_back(ModelRollbackConfig(registry=str(registry)))
        return []

    monkeypatch.setattr(lifecycle, "measured_gates", rolled_back)
    asked = ModelPromoteConfig(
        registry=str(registry), model=str(served.model_dir), name="third", data=str(served.log.path)
    )
    with pytest.raises(PromotionError, match="was second and became first"):
        promote(asked)
    assert os.readlink(registry / "champion") == "models/first"
    assert [line["what"] for line in audit_lines(registry)] == ["force", "force", "rollback"]


def test_an_alias_is_switched_after_its_line(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "_audit", failing)
        with pytest.raises(OSError, match="full"):
            roll_back(ModelRollbackConfig(registry=str(registry)))
    assert os.readlink(registry / "champion") == "models/second"


@pytest.mark.parametrize("rest", ['{"at": "2026', ""])
def test_a_line_that_was_not_written_whole_is_skipped(registry: Path, rest: str) -> None:
    file = registry / AUDIT_FILE
    file.write_text(file.read_text() + rest if rest else file.read_text().rstrip())
    assert [line["model"] for line in audit_lines(registry)] == ["first", "second"]
    roll_back(ModelRollbackConfig(registry=str(registry)))
    assert [line["what"] for line in audit_lines(registry)] == ["force", "force", "rollback"]
    assert file.read_text().endswith("\n")


def test_a_scorer_follows_the_alias(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = VistaModel.from_pretrained(served.model_dir)
    with torch.no_grad():
        other.item_table.mul_(2.0)
    other.save_pretrained(tmp_path / "other")
    registry = tmp_path / "registry"
    promoted = ["model", "promote", f"registry={registry}", "force=true"]
    assert main([*promoted, f"model={served.model_dir}", "name=first"]) == 0
    shutil.copytree(served.exact_store, tmp_path / "store")
    with Scorer.open(registry / "champion", tmp_path / "store") as scorer:
        users, items = served.log.users.ids([0, 1]).tolist(), served.log.items.ids(np.arange(5)).tolist()
        before = scorer.score(users, items)
        assert main([*promoted, f"model={tmp_path / 'other'}"]) == 0
        options = RefreshOptions(codec=Codec.float32)
        refresh(VistaModel.from_pretrained(registry / "champion"), served.log, tmp_path / "store", options=options)
        assert scorer.reload()
        assert not np.allclose(before, scorer.score(users, items))
    capsys.readouterr()
    assert main(["model", "list", f"registry={registry}"]) == 0
    assert "champion" in capsys.readouterr().out
    assert json.loads((registry / AUDIT_FILE).read_text().splitlines()[1])["before"] == "first"
