"""Training and validation in the ranks of a torchrun job: the run of one process, and how it ends if a rank does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import Served, made_once, small_config, small_frame
from tests.thread_ranks import on_ranks
from tests.training.ranks_of_run import start, torchrun
from tests.training.test_trainer import assert_same_result, metrics
from vista.config import SourceColumns, TrainConfig
from vista.config.checks import Architecture, Precision, Split, TrackerKind
from vista.errors import RankError
from vista.installation import __version__
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel
from vista.ranks import ALONE, JobRanks, Ranks
from vista.training.checkpoint import latest_checkpoint
from vista.training.optimizers import DataParallel
from vista.training.trainer import Trainer, train
from vista.training.validation import Validation

EXACT = {
    "precision": Precision.float32,
    "model__dropout": 0.0,
    "model__counted_dropout": 0.0,
    "model__counter_keys": ["item"],
    "optim__window_weight": 0.5,
    "optim__epochs": 6,
    "optim__learning_rate": 1e-3,
    "optim__validate_every": 3,
    "checkpoint_every": 7,
}
"""A run of 25 steps, without draws in its steps: each rank makes its own."""

WEIGHTS = "weights ([0-9a-f]{64})"


def config_of(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    return small_config(log, run_dir, **(EXACT | changes))


def curve(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir) if "loss" in row]


@pytest.fixture(scope="module")
def runs(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of ranks: the folder of a finished run."""

    def make(folder: Path) -> None:
        train(config_of(event_log, folder / "1"), event_log, metrics_every=1)
        assert_trained(start(config_of(event_log, folder / "2"), 2), 2)

    folder = made_once(tmp_path_factory, "ranks", make)
    return {num_ranks: folder / str(num_ranks) for num_ranks in (1, 2)}


def assert_trained(done: subprocess.CompletedProcess[str], num_ranks: int) -> None:
    assert done.returncode == 0, done.stderr
    weights = re.findall(WEIGHTS, done.stdout)
    assert len(weights) == num_ranks and len(set(weights)) == 1, "all ranks have the same weights"
    assert done.stderr.count("done: ") == 1, "only rank 0 reports"


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(
    event_log: EventLog, runs: dict[int, Path], tmp_path: Path, num_ranks: int
) -> None:
    run = runs[2] if num_ranks == 2 else tmp_path / "run"
    if num_ranks > 2:
        assert_trained(torchrun(config_of(event_log, run), num_ranks), num_ranks)
    expected, found = curve(runs[1]), curve(run)
    assert len(expected) == 25
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in runs[1].iterdir())
    measured, single = (
        [row["validation"] for row in metrics(folder) if "validation" in row] for folder in (run, runs[1])
    )
    for own, other in zip(measured, single, strict=True):
        assert own == pytest.approx(other, abs=1e-3)


class TwoEqualRanks(JobRanks):
    """This rank, and another one that has the same tensors."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        return [tensor, tensor.clone()]

    def sum(self, tensor: Tensor) -> None:
        tensor *= 2


class TwoRanks(JobRanks):
    """This rank, and another one with given tensors."""

    def __init__(self, *of_other: Tensor) -> None:
        self.device, self._of_other = torch.device("cpu"), iter(of_other)

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        return [tensor, next(self._of_other)]


def test_sums_of_sparse_gradients_have_the_rows_of_a_single_process() -> None:
    """Sparse Adam counts a step for a gradient without rows, but not for None."""
    table = torch.zeros(5, 2)

    def gradient(*rows: int) -> Tensor:
        index = torch.tensor([rows], dtype=torch.int64)
        return torch.sparse_coo_tensor(index, torch.ones(len(rows), 2), table.shape, check_invariants=True).coalesce()

    ranks = TwoEqualRanks()
    full, empty, none = ranks.sum_sparse([gradient(1, 3), gradient(), None], [table] * 3)
    assert full is not None and full.indices().tolist() == [[1, 3]] and full.values().tolist() == [[2.0, 2.0]] * 2
    assert empty is not None and empty.is_coalesced() and empty.shape == table.shape and len(empty.values()) == 0
    assert none is None and ranks.sum_sparse([], []) == []
    other = torch.tensor([[2, 0]]), torch.tensor([3, 4]), torch.tensor([[5.0, 5.0], [7.0, 7.0]])
    (mixed,) = TwoRanks(*other).sum_sparse([gradient(1, 3)], [table])
    assert mixed is not None and mixed.is_coalesced() and mixed.indices().tolist() == [[1, 3, 4]]
    assert mixed.values()[:, 0].tolist() == [1.0, 6.0, 7.0], "as many rows, but others"


def test_only_errors_of_others_are_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def all_reduce(tensor: Tensor) -> None:
            raise error

        monkeypatch.setattr("vista.ranks.dist.all_reduce", all_reduce)
        TwoRanks().sum(torch.zeros(1))

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        fail(torch.OutOfMemoryError("Tried to allocate 2 GiB"))
    with pytest.raises(RankError, match=r"another rank has ended .*\(Connection closed by peer\)"):
        fail(RuntimeError("Connection closed by peer"))


@pytest.mark.nightly
def test_a_killed_rank_ends_the_job_and_the_run_resumes(
    event_log: EventLog, runs: dict[int, Path], tmp_path: Path
) -> None:
    config = config_of(event_log, tmp_path / "run")
    killed = start(config, 2, kill="1:17")
    assert killed.returncode != 0 and "rank 0: " in killed.stderr
    assert "error: another rank has ended or cannot be reached" in killed.stderr
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name.endswith("16")
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    resumed = start(config, 2)
    assert resumed.returncode == 0 and "resuming at step 16" in resumed.stderr, resumed.stderr
    assert_same_result(tmp_path / "run", runs[2])
    # Another number of ranks resumes too.
    train(config_of(event_log, tmp_path / "alone"), event_log, metrics_every=1)
    np.testing.assert_allclose(curve(tmp_path / "alone"), curve(runs[1]), rtol=1e-4)


@pytest.mark.nightly
def test_a_rank_with_other_weights_ends_the_job_before_they_are_saved(event_log: EventLog, tmp_path: Path) -> None:
    """The run resumes from a checkpoint as after a kill."""
    config = config_of(event_log, tmp_path / "run")
    done = start(config, 2, change="1:17")
    assert done.returncode != 0
    for rank in (0, 1):
        expected = rf"rank {rank}: error: step 20: rank 1 has other weights than rank 0 \(\d+ of \d+ tensors\)"
        assert re.search(expected, done.stderr), done.stderr
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name.endswith("16"), "the step before the change"


@pytest.mark.nightly
def test_ranks_that_differ_are_refused_by_name(event_log: EventLog, tmp_path: Path) -> None:
    other = EventLog.from_frame(
        small_frame(seed=1), tmp_path / "other", time_unit="ms", columns=SourceColumns(action="action", rating="rating")
    )
    config = config_of(event_log, tmp_path / "run")
    done = start(config, 2, f"1:data.path={other.path}", "1:model.dim=8", "0:data.num_negatives=7", version="1:9.9")
    assert done.returncode != 0
    differences = (
        rf"vista \({re.escape(__version__)} -> 9\.9\), "
        r"log \(\w+ -> \w+\), model.dim \(16 -> 8\), data.num_negatives \(7 -> 20\)"
    )
    for rank in (0, 1):
        expected = f"rank {rank}: error: rank 1 differs from rank 0 in {differences}; start all ranks with the same"
        assert re.search(expected, done.stderr), done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.nightly
def test_time_ends_all_ranks_after_the_same_step(event_log: EventLog, tmp_path: Path) -> None:
    changes = {"optim__epochs": 1000, "optim__minutes": 0.05, "optim__patience": 0}
    done = start(config_of(event_log, tmp_path / "run", **changes), 2)
    assert_trained(done, 2)
    last = metrics(tmp_path / "run")[-1]
    assert "validation" in last and f"done: {last['step']} steps" in done.stderr, done.stderr


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
@pytest.mark.nightly
def test_only_rank_0_tracks_the_run(event_log: EventLog, tmp_path: Path) -> None:
    changes = {"optim__epochs": 1, "optim__validate_every": 1, "tracking__kind": TrackerKind.tensorboard}
    done = start(config_of(event_log, tmp_path / "run", **changes), 2)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    state = json.loads((tmp_path / "run" / "tracking.json").read_text())
    assert state["complete"] and state["step"] > 0


def test_draws_of_a_step_depend_on_seed_step_and_rank(event_log: EventLog, tmp_path: Path) -> None:
    """So a resumed run makes them again, and ranks make different ones."""
    made = Trainer(config_of(event_log, tmp_path / "run"), event_log)
    batch = made.source.batch(0, 0)

    def drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
        ranks: Any = SimpleNamespace(rank=rank, size=2, device=torch.device("cpu"))
        part = DataParallel(ranks, [], made.config.optim, seed).part(batch, step)
        assert part is not None and 0 < len(part.events.item) < len(batch.events.item)
        return tuple(torch.rand(3).tolist())

    draws = [drawn(*each) for each in ((1, 5, 0), (1, 5, 1), (1, 6, 0), (2, 5, 0))]
    assert len(set(draws)) == 4 and draws[0] == drawn(1, 5, 0)


def changes_by_swaps(validation: Validation, model: RankingModel) -> dict[str, float]:
    """By metric: how much it changes at most if rounding swaps pairs of scores that differ by less than 2e-6."""
    cases, found = validation._impressions, dict[str, float]()
    if cases is None:
        return {}
    answers = validation._answers(model, np.unique(cases.user))
    assert answers is not None
    predicted = answers.probabilities(cases)
    for index, task in enumerate(cases.tasks):
        known = cases.mask[:, index]
        label, value, user = cases.label[known, index], predicted[known, index], cases.user[known]

        def close(rows: np.ndarray, label: np.ndarray = label, value: np.ndarray = value) -> tuple[int, float]:
            apart = np.abs(value[rows & (label == 1)][:, None] - value[rows & (label == 0)])
            return (int(rows.sum()), float((apart < 2e-6).mean())) if apart.size else (0, 0.0)

        counts, shares = zip(*(close(user == one) for one in np.unique(user)), strict=True)
        found[f"auc/{task}"] = close(np.ones(len(user), np.bool_))[1]
        found[f"gauc/{task}"] = float(np.average(shares, weights=counts)) if sum(counts) else 0.0
    assert max(found.values()) < 0.03, "some items are shown to a user twice"
    return found


def assert_ranks_measure_the_same(made: Trainer) -> None:
    """With weights by which only scores of an item that is shown to a user twice are almost equal."""
    generator, model = torch.Generator().manual_seed(1), made.model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        model.item_table[0] = 0

    def measured(ranks: Ranks) -> dict[str, float]:
        return Validation(made.log, model.rows_of(made.log.items), made.config, ranks)(model)

    expected = measured(ALONE)
    assert expected
    swaps = changes_by_swaps(Validation(made.log, model.rows_of(made.log.items), made.config), model)
    for num_ranks in (2, 13):
        for found in on_ranks(num_ranks, measured):
            assert found.keys() == expected.keys()
            for name, value in found.items():
                # NE and calibration are means of float32 values, which rounding changes by about 1e-6.
                bound = 1e-5 * abs(expected[name]) + swaps.get(name, 0)
                assert value == pytest.approx(expected[name], abs=bound, nan_ok=True), name


@pytest.mark.parametrize(("architecture", "users"), [(Architecture.vista, 3), (Architecture.sasrec, 0)])
def test_validation_of_next_items(event_log: EventLog, tmp_path: Path, architecture: Architecture, users: int) -> None:
    """With three users, some ranks have none."""
    limit = 0 if architecture is Architecture.vista else 9
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__validation_users": users}
    assert_ranks_measure_the_same(Trainer(small_config(event_log, tmp_path / "run", **changes), event_log))


def test_validation_of_windows(event_log: EventLog, tmp_path: Path) -> None:
    changes = {"model__counter_keys": ["item"], "data__split": Split.share, "data__test_share": 0.3}
    weights = {"optim__window_weight": 1.0, "optim__next_weight": 0.0, "data__validation_share": 0.3}
    config = small_config(event_log, tmp_path / "run", **changes, **weights)
    assert_ranks_measure_the_same(Trainer(config, event_log))


@pytest.mark.parametrize(("architecture", "users"), [(Architecture.vista, 0), (Architecture.din, 3)])
def test_validation_of_impressions(
    served_tasks: Served, tmp_path: Path, architecture: Architecture, users: int
) -> None:
    """Three users mean twelve impressions, fewer than ranks."""
    limit, config = 0 if architecture is Architecture.vista else 9, served_tasks.config
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__validation_users": users}
    changes |= {f"data__{name}": getattr(config.data, name) for name in ("split", "validation_from", "test_from")}
    made = Trainer(small_config(served_tasks.log, tmp_path / "run", **changes), served_tasks.log)
    assert_ranks_measure_the_same(made)
