"""Item tables that TorchRec divides among ranks: the run, the checkpoints, and the model of a plain table."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import ITEMS, USERS
from tests.training.ranks_of_run import torchrun
from tests.training.test_ranks import config_of, curve
from tests.training.test_trainer import metrics
from vista.config.checks import TableKind, TableOptimizer, TablePrecision
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.model.layers import drawn_table
from vista.model.vista_model import VistaModel
from vista.ranks import JobRanks, Ranks
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.checkpoint import RowShards, latest_checkpoint, write_tensors
from vista.training.trainer import train

pytest.importorskip("torchrec", reason="TorchRec is not installed; `make test-torchrec` has it")
pytestmark = [pytest.mark.torchrec, pytest.mark.timeout(900)]
SHARDED = {"model__table": TableKind.torchrec}
BY_ROW = SHARDED | {"optim__table_optimizer": TableOptimizer.rowwise_adagrad, "optim__table_rate": 5.0}
HASHED = {"model__embedding_rows": 50, "data__tokens_per_batch": 16, "optim__epochs": 2, "optim__validate_every": 1}
"""Some of the batches have a single chunk, so one of two ranks has none, and yet reads with the other one."""


def trained(log: EventLog, run_dir: Path, **changes: Any) -> Path:
    """Train in this process."""
    train(config_of(log, run_dir, **changes), log, metrics_every=1)
    return run_dir


def assert_same_run(found: Path, expected: Path, rtol: float = 1e-4) -> None:
    assert len(curve(expected)) > 20
    np.testing.assert_allclose(curve(found), curve(expected), rtol=rtol)
    measured, others = ([row["validation"] for row in metrics(run) if "validation" in row] for run in (found, expected))
    assert len(measured) == 3 and measured == [pytest.approx(other, abs=1e-3) for other in others]
    ours, theirs = (load_file(run / "best" / "model.safetensors") for run in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def plain(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a plain table."""
    return trained(event_log, tmp_path_factory.mktemp("plain") / "run")


def test_one_rank_trains_the_same_model(event_log: EventLog, plain: Path, tmp_path: Path) -> None:
    assert_same_run(trained(event_log, tmp_path / "run", **SHARDED), plain)


def test_two_ranks_train_and_export_the_same_model(event_log: EventLog, plain: Path, tmp_path: Path) -> None:
    done = torchrun(config_of(event_log, tmp_path / "run", **SHARDED), 2)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rows (\d+)", done.stdout)) == ["20", "21"], "no rank holds all 41 rows"
    assert "parameters, 656 of them in a table of 41 x 16" in done.stderr
    assert_same_run(tmp_path / "run", plain)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(path.name for path in plain.iterdir())
    scores = []
    for run in (tmp_path / "run", plain):
        refresh(VistaModel.from_pretrained(run / "best"), event_log, tmp_path / f"store-{run.parent.name}")
        with Scorer.open(run / "best", tmp_path / f"store-{run.parent.name}") as scorer:
            scores.append(np.asarray(scorer.score(USERS, ITEMS)))
    np.testing.assert_allclose(*scores, rtol=1e-3)


def test_hashed_rows(event_log: EventLog, tmp_path: Path) -> None:
    """Actions and gaps read the same table as items."""
    done = torchrun(config_of(event_log, tmp_path / "two", **SHARDED, **HASHED), 2)
    assert done.returncode == 0 and "51 x 8" in done.stderr, done.stderr
    assert_same_run(tmp_path / "two", trained(event_log, tmp_path / "one", **HASHED))


class RowwiseAdagrad(torch.optim.SparseAdam):
    """The definition: a step of the rate divided by the root of the row's sum of mean squares."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    rows, gradient = table.grad.indices()[0], table.grad.values()
                    sums = self.state[table].setdefault("sums", torch.zeros(len(table)))
                    sums[rows] += gradient.square().mean(1)
                    table.data[rows] -= group["lr"] * gradient / (sums[rows].sqrt() + 1e-8).unsqueeze(1)


@pytest.fixture
def adagrad(event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a plain table and the definition of row-wise Adagrad."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim, "SparseAdam", RowwiseAdagrad)
        return trained(event_log, tmp_path / "reference", optim__table_rate=5.0)


def test_rowwise_adagrad_is_that_of_its_definition(event_log: EventLog, adagrad: Path, tmp_path: Path) -> None:
    assert_same_run(trained(event_log, tmp_path / "one", **BY_ROW), adagrad)
    # The runs differ by rounding of about 1e-3.
    half = trained(event_log, tmp_path / "half", **BY_ROW, model__table_precision=TablePrecision.float16)
    np.testing.assert_allclose(curve(half), curve(adagrad), rtol=2e-2)
    newest = latest_checkpoint(half / "checkpoints")
    assert newest is not None
    stored = load_file(newest / "tensors.safetensors")
    assert stored["state.model.item_table"].dtype == torch.float16
    assert load_file(half / "best" / "model.safetensors")["item_table"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["adam", "rowwise_adagrad"])
def test_a_killed_run_resumes_on_another_number_of_ranks(
    kind: str, event_log: EventLog, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = request.getfixturevalue("plain" if kind == "adam" else "adagrad")
    changes = SHARDED if kind == "adam" else BY_ROW
    killed = torchrun(config_of(event_log, tmp_path / "run", **changes), 2, kill="1:17")
    assert killed.returncode != 0 and "Signal 9 (SIGKILL)" in killed.stderr
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name.endswith("16")
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    assert_same_run(trained(event_log, tmp_path / "alone", **changes), expected)


@pytest.fixture
def alone() -> Any:
    with Ranks.joined(torch.device("cpu"), as_job=True) as ranks:
        yield ranks


@pytest.mark.parametrize("num_rows", [1, 5, 2**16, 2**17 + 1, 3 * 2**16 - 1])
def test_drawn_values_are_those_of_a_plain_table(alone: JobRanks, num_rows: int) -> None:
    from vista.model.sharded_table import ShardedTable

    shape = torch.Size((num_rows, 4))
    torch.manual_seed(3)
    expected, after = drawn_table(shape), torch.rand(3)
    torch.manual_seed(3)
    table = ShardedTable.drawn(shape, TablePrecision.float32)
    assert torch.equal(table.weight, expected) and torch.equal(torch.rand(3), after)


def test_ranks_without_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vista.model.sharded_table import ShardedTable

    with pytest.raises(ConfigError, match="train this model with vista train"):
        ShardedTable(torch.Size((5, 4)), TablePrecision.float32)
    ranks = JobRanks.__new__(JobRanks)
    ranks.size = 4
    monkeypatch.setattr(Ranks, "_current", ranks)
    with pytest.raises(ConfigError, match=r"a table of 5 rows is too small for 4 ranks; set model\.table=plain"):
        ShardedTable(torch.Size((5, 4)), TablePrecision.float32)


def test_files_of_sharded_tensors(alone: JobRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reads them, with every dtype, and no more than a piece is in memory at once."""
    from vista.model.sharded_table import ShardedTable

    monkeypatch.setattr("vista.ranks.PIECE_BYTES", 64)
    table = ShardedTable.drawn(torch.Size((41, 4)), TablePrecision.float32)
    rest: dict[str, Tensor] = {
        "flag": torch.tensor([True, False, True]),
        "byte": torch.arange(5, dtype=torch.uint8),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": torch.rand(3).bfloat16(),
    }
    shards = RowShards(table, table.weight, torch.float16)
    assert [len(piece) for piece in shards.pieces()] == [4] * 10 + [1]
    write_tensors(tmp_path / "file", {**rest, "table": shards})
    found = load_file(tmp_path / "file")
    assert found.keys() == {*rest, "table"} and all(torch.equal(found[name], rest[name]) for name in rest)
    assert torch.equal(found["table"], table.weight.detach().half())
