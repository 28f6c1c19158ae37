"""The trainer: its run folder, bit-identical resumption after kills and Ctrl-C, and what it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Served, small_config, small_frame
from tests.faults.nursery import Say
from tests.thread_ranks import ThreadRank
from tests.training.ranks_of_run import forked
from vista.config import SourceColumns
from vista.config.composition import to_yaml
from vista.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from vista.examples.batch import BatchImpressions
from vista.examples.batch_source import BatchSource, ModelReads
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.ranks import ALONE, Ranks
from vista.training import trainer
from vista.training.checkpoint import STATE_FILE, latest_checkpoint, load_checkpoint
from vista.training.trainer import LABELS_PER_STEP, Trainer, train
from vista.training.validation import Validation


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def result(run_dir: Path) -> tuple[dict[str, torch.Tensor], Any, list[bytes], list[dict[str, Any]]]:
    """The result of a run without times and places: tensors and state of the last checkpoint, export, and metrics."""
    newest = latest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    timed = ("tokens_per_s", "waiting_share", "epoch_seconds", "seconds")
    rows = [{key: value for key, value in row.items() if key not in timed} for row in metrics(run_dir)]
    tensors, state = load_checkpoint(newest)
    assert state["run"]["progress"].pop("seconds") > 0 and state["run"]["progress"].pop("validation_seconds") >= 0
    export = [(run_dir / "best" / name).read_bytes() for name in ("model.safetensors", "README.md")]
    return tensors, state, export, rows


def assert_same_result(run_dir: Path, reference: Path) -> None:
    tensors, state, export, rows = result(run_dir)
    other_tensors, other_state, other_export, other_rows = result(reference)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    assert state == other_state
    assert state["run"]["progress"]["history"]
    assert export == other_export
    assert rows == other_rows


LONG = {
    "optim__epochs": 3,
    "checkpoint_every": 2,
    "data__unknown_share": 0.2,
    "model__counter_keys": ["item"],
    "optim__window_weight": 1.0,
}
"""Changes of the run that is killed at any point and must end with the same bits."""


def kill_often(say: Say, log_path: str, run_dir: str, times: int) -> list[int]:
    """Fork a trainer, kill it at a random time after some progress, several times, and then finish the run. Returns the
    exit codes of those that were killed."""
    log, chance = EventLog.open(log_path), random.Random(1)
    config = small_config(log, run_dir, **LONG)
    train(small_config(log, f"{run_dir}-warm", optim__epochs=1), log)  # lazy imports, once for all forks

    def steps() -> int:
        return max((int(path.name[5:]) for path in Path(run_dir).glob("checkpoints/step-*")), default=0)

    codes = []
    for _ in range(times):
        before, child, status = steps(), os.fork(), 0
        if child == 0:
            train(config, log, metrics_every=1)
            os._exit(0)
        while steps() == before and not (status := os.waitpid(child, os.WNOHANG)[0]):
            time.sleep(0.001)
        if not status:
            time.sleep(chance.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    train(config, log, metrics_every=1)
    return codes


@pytest.fixture(scope="module")
def uninterrupted(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, whose result runs that are ended must equal."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    train(small_config(event_log, run_dir, **LONG), event_log, metrics_every=1)
    return run_dir


@pytest.mark.parametrize("times", [2, pytest.param(6, marks=pytest.mark.nightly)])
def test_a_run_that_is_killed_anywhere_resumes_bit_identically(
    event_log: EventLog, uninterrupted: Path, tmp_path: Path, times: int
) -> None:
    """Ctrl-C is tested below."""
    codes = forked(kill_often, event_log.path, tmp_path / "run", times).result()
    assert codes.count(-signal.SIGKILL) >= times // 2, codes
    assert_same_result(tmp_path / "run", uninterrupted)
    names = sorted(path.name for path in uninterrupted.iterdir())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names


def test_each_step_has_one_line_in_metrics(uninterrupted: Path) -> None:
    rows = metrics(uninterrupted)
    steps = [row["step"] for row in rows if "validation" not in row]
    assert steps == list(range(1, steps[-1] + 1)) and len(steps) > 10
    assert [row["epoch"] for row in rows if "validation" in row] == [0, 1, 2, 3]
    assert all(row["loss"] > 0 and row["gradient_norm"] > 0 for row in rows if "validation" not in row)
    assert all(0 <= row["waiting_share"] < 1 for row in rows if "validation" not in row)


@pytest.mark.processor
def test_an_interrupt_leaves_a_checkpoint_of_the_current_step(
    event_log: EventLog, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Trainer._step

    def step(self: Trainer, *arguments: Any) -> dict[str, float]:
        if (self.progress.epoch, self.progress.batch) == (1, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return make(self, *arguments)

    config = small_config(event_log, tmp_path, **LONG | {"checkpoint_every": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(KeyboardInterrupt, match=r"stopped at step \d+; rerun the same command to resume"):
            train(config, event_log, metrics_every=1)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    progress = load_checkpoint(newest)[1]["run"]["progress"]  # type: ignore[arg-type]
    assert (progress["epoch"], progress["batch"]) == (1, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(config, event_log, metrics_every=1)
    assert_same_result(tmp_path, uninterrupted)


def test_the_run_folder_is_complete_and_a_finished_run_does_not_change(
    event_log: EventLog, uninterrupted: Path, tmp_path: Path
) -> None:
    names = ["best", "checkpoints", "config.yaml", "epoch-0", "metrics.jsonl", "run.json", "train.log"]
    assert sorted(path.name for path in uninterrupted.iterdir()) == names
    assert (uninterrupted / "config.yaml").read_text() == to_yaml(small_config(event_log, uninterrupted, **LONG))
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    log_text = (run_dir / "train.log").read_text()
    assert (
        "EventLog" in log_text
        and "s), validation: hr@10" in log_text
        and "done:" in log_text
        and "kernels: torch" in log_text
    )
    weights = load_file(run_dir / "best" / "model.safetensors")
    model = train(small_config(event_log, run_dir, **LONG), event_log)
    assert not model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert_same_result(run_dir, uninterrupted)


def test_resume_with_another_config_is_refused(served: Served) -> None:
    def content() -> dict[Path, bytes]:
        paths = Path(served.config.run_dir).rglob("*")
        return {path: path.read_bytes() for path in paths if path.is_file() and path.name != "train.log"}

    before = content()
    changes = {"optim__learning_rate": 1e-4, "model__dropout": 0.3, "data__staleness_share": 0.5, "seed": 2}
    with pytest.raises(ConfigError, match=r"holds a run with another.*resume=false") as caught:
        train(small_config(served.log, served.config.run_dir, **changes), served.log)
    assert content() == before
    for named in (
        "optim.learning_rate (0.005 -> 0.0001)",
        "model.dropout (0.1 -> 0.3)",
        "data.staleness_share",
        "seed (1 -> 2)",
    ):
        assert named in str(caught.value)


def test_resuming_on_another_log_is_refused_and_resume_false_starts_over(
    event_log: EventLog, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = EventLog.from_frame(
        small_frame(5), tmp_path / "log", time_unit="ms", columns=SourceColumns(action="action", rating="rating")
    )
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another log \("):
        train(small_config(other, run_dir, **LONG), other)
    config = small_config(event_log, run_dir, **LONG)
    config.resume = False
    (run_dir / "metrics.jsonl").write_text("")
    train(config, event_log, metrics_every=1)
    assert_same_result(run_dir, uninterrupted)


def test_an_export_without_checkpoints_stays_until_it_is_replaced(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = shutil.copytree(served.config.run_dir, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")

    def fail(self: Any, *_: Any) -> None:
        raise RuntimeError("before the first step")

    monkeypatch.setattr(Trainer, "_step", fail)
    with pytest.raises(RuntimeError, match="before the first step"):
        train(replace(served.config, run_dir=str(run_dir)), served.log)
    for path in served.model_dir.iterdir():
        assert (run_dir / "best" / path.name).read_bytes() == path.read_bytes()


def test_a_line_of_metrics_cut_off_by_a_crash_is_dropped(
    event_log: EventLog, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(latest_checkpoint(run_dir / "checkpoints"))  # type: ignore[arg-type]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    train(small_config(event_log, run_dir, **LONG), event_log, metrics_every=1)
    assert_same_result(run_dir, uninterrupted)


def test_an_absurd_learning_rate_stops_the_run_and_names_the_users(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, optim__learning_rate=1e38, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError, match=r"is not finite .*Lower optim\.learning_rate") as caught:
        train(config, event_log)
    assert "\n" not in str(caught.value)
    (saved,) = tmp_path.glob("nonfinite-step-*.safetensors")
    assert str(saved) in str(caught.value)
    batch = load_file(saved)
    users = event_log.users.ids(np.unique(batch["user"].numpy())).tolist()
    assert f"its {len(users)} users are {users[:20]}" in str(caught.value)
    # The saved batch equals the source's batch of that step, so it can be inspected.
    progress = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))[1]["run"]["progress"]  # type: ignore[arg-type]
    item_rows = np.arange(event_log.num_items) + 1
    expected = (
        BatchSource(event_log, ModelReads(item_rows), config).batch(progress["epoch"], progress["batch"]).tensors()
    )
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())


def test_infinite_ratings_are_refused(tmp_path: Path) -> None:
    log = EventLog.from_frame(
        small_frame(), tmp_path / "log", time_unit="ms", columns=SourceColumns(action="action", rating="rating")
    )
    (path,) = (tmp_path / "log").rglob("rating.npy")
    ratings = np.load(path)
    ratings[3] = np.inf
    np.save(path, ratings)
    log = EventLog.open(tmp_path / "log")
    with pytest.raises(DataError, match=r"ratings range from 1\.0 to inf; .*without events\.rating"):
        train(small_config(log, tmp_path / "run", verify_log=False), log)


def test_early_stopping_keeps_the_best(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, optim__epochs=30, optim__patience=2, optim__learning_rate=0.05)
    train(config, event_log)
    validations = [(row["epoch"], row["validation"]["ndcg@10"]) for row in metrics(tmp_path) if "validation" in row]
    best_epoch, best = max(validations, key=lambda pair: (pair[1], -pair[0]))
    assert len(validations) == best_epoch + 2 < 30
    assert "stopping" in (tmp_path / "train.log").read_text()
    validate = Validation(event_log, np.arange(event_log.num_items) + 1, config)
    assert validate(VistaModel.from_pretrained(tmp_path / "best"))["ndcg@10"] == best != validations[-1][1]
    # A resumed run has nothing left to do.
    before = result(tmp_path)[1:]
    train(config, event_log)
    assert result(tmp_path)[1:] == before


def test_epoch_0_is_exported_until_attention_adds_something(event_log: EventLog, tmp_path: Path) -> None:
    wide = {"model__pooled_dim": 8, "optim__learning_rate": 2e-2}
    config = small_config(event_log, tmp_path, optim__epochs=0, **wide)
    model = train(config, event_log)
    row, said = metrics(tmp_path)[-1], (tmp_path / "train.log").read_text()
    assert (row["epoch"], row["step"], row["is_best"]) == (0, 0, True)
    assert "is the model of epoch 0" in said and "attention changes" not in said
    assert isinstance(model, VistaModel) and not model.target_attention.final_norm.weight.any()
    assert model.statistics is not None and model.statistics.weight.bias.ne(0).any()
    last = train(
        small_config(event_log, tmp_path / "last", optim__epochs=0, optim__validate_every=0, **wide), event_log
    )
    for (name, weight), other in zip(last.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    # The same run goes from there: its first step has the whole norm again, and each epoch is compared with epoch 0.
    longer = tmp_path / "longer"
    trained = train(small_config(event_log, longer, optim__epochs=2, **wide), event_log)
    kept = VistaModel.from_pretrained(longer / "epoch-0")
    assert not kept.target_attention.final_norm.weight.any(), "a report can measure epoch 0 later"
    first, *later = [row["validation"]["ndcg@10"] for row in metrics(longer) if "validation" in row]
    assert first == row["validation"]["ndcg@10"]
    said = (longer / "train.log").read_text()
    found = re.findall(r"changes ndcg@10 by ([+-][\d.]+) ± ([\d.]+)", said)
    changes = np.array(found, np.float64)
    assert changes[:, 0] == pytest.approx([value - first for value in later], abs=6e-5)
    is_better = bool((changes[:, 0] > changes[:, 1]).any())
    assert isinstance(trained, VistaModel) and trained.target_attention.final_norm.weight.any() == is_better
    assert ("is the model of epoch 0" in said) != is_better


@pytest.mark.parametrize("ranks_items", [False, True])
def test_epoch_0_mixes_the_labels_of_all_users(served_tasks: Served, tmp_path: Path, ranks_items: bool) -> None:
    """Each pass has all labels once, in another order, and ranks divide each step. Next items are fitted before."""
    own = {f"data__{n}": getattr(served_tasks.config.data, n) for n in ("split", "validation_from", "test_from")}
    own |= {"optim__next_weight": float(ranks_items), "optim__tasks": served_tasks.log.impressions.tasks[:1]}
    own |= {"model__counter_keys": ["item"], "model__pooled_dim": 8}
    config = small_config(served_tasks.log, tmp_path, optim__epochs=0, **own)

    def rows(parts: Iterable[BatchImpressions]) -> np.ndarray:
        columns = []
        for part in parts:
            kept = part.mask.any(-1)
            assert part.codes is not None and part.inputs is not None
            values = (part.codes[kept], part.inputs[kept], part.label[kept] * part.mask[kept], part.mask[kept])
            columns.append(torch.cat([value.double() for value in values], -1))
        return torch.cat(columns).numpy()

    def steps(ranks: Ranks) -> list[np.ndarray]:
        made._ranks = ranks
        return [rows([batch.impressions]) for batch in islice(made._mixed_batches(labeled), 2)]

    made, shown = Trainer(config, served_tasks.log), list[BatchImpressions]()
    every = made._every_batch(shown)
    batch = list(islice(every, made.source.num_batches(0) + ranks_items))[-1]
    assert next(every, None) is not None if ranks_items else next(every, None) is None
    labeled = replace(batch, impressions=BatchImpressions.of_batches(shown))
    first, second = steps(ALONE)
    source = rows(made.source.batch(0, index).impressions for index in range(made.source.num_batches(0)))
    assert 50 < len(source) < LABELS_PER_STEP
    assert not np.array_equal(first, source) and not np.array_equal(first, second)
    for drawn in (first, second):
        np.testing.assert_array_equal(drawn[np.lexsort(drawn.T)], source[np.lexsort(source.T)])
    for rank in range(3):
        _, part = steps(ThreadRank(rank, [None] * 3, Barrier(1)))
        np.testing.assert_array_equal(part, second[rank::3])
    model = train(config, served_tasks.log)
    assert model.candidate_head is not None and model.candidate_head.network[-1].weight.any()
    assert (model.counted is not None and bool(model.counted.network[-1].weight.any())) == ranks_items


def test_a_disk_that_fills_up_leaves_no_part_of_epoch_0(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Trainer(small_config(event_log, tmp_path / "run"), event_log)

    def copy_some(source: Path, target: Path, **options: Any) -> None:
        target.mkdir(exist_ok=True)
        shutil.copy2(source / "config.json", target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer.shutil, "copytree", copy_some)
    with pytest.raises(ConfigError, match=r"epoch-0: cannot be written .*rerun the command"):
        made._export(made.model, {"epoch": 0})
    assert [path.name for path in (tmp_path / "run").iterdir() if "epoch-0" in path.name] == []


def test_the_last_epoch_is_validated_for_any_validate_every(event_log: EventLog, tmp_path: Path) -> None:
    train(small_config(event_log, tmp_path, optim__validate_every=2, optim__epochs=3), event_log)
    assert [row["epoch"] for row in metrics(tmp_path) if "validation" in row] == [2, 3]


def test_a_log_without_validation_cases_trains_with_a_warning(tmp_path: Path) -> None:
    frame = {"user": [1, 1, 2, 2], "item": [1, 2, 2, 3], "timestamp": [1, 2, 3, 4]}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="s")
    model = train(small_config(log, tmp_path / "run"), log)
    assert isinstance(model, VistaModel)
    assert "no case to validate on" in (tmp_path / "run" / "train.log").read_text()


CONTRADICTIONS: dict[str, Any] = {
    "a step that is not the folder's": lambda run: run["progress"].update(step=-5),
    "more epochs than steps": lambda run: run["progress"].update(epoch=10**12),
    "more batches than steps": lambda run: run["progress"].update(batch=10**15),
    "a best that is text": lambda run: run["progress"].update(best="x"),
    "a best that was not measured": lambda run: run["progress"].update(best=7.0),
    "a validation without metrics": lambda run: run["progress"].update(history=[{"epoch": 1}]),
    "a baseline without the metric": lambda run: run["progress"].update(baselines={"a": {"hr@10": 0.5}}),
    "a baseline without a table": lambda run: run["progress"].update(baselines={"a": 1}),
    "an average of no weights": lambda run: run["average"].update(values={}),
    "an average of another weight": lambda run: _averages(run).update(item_table={"$tensor": "state.rng"}),
    "an average without its number": lambda run: run["average"].pop("count"),
    "a lead without an error": lambda run: run["progress"].update(lead=[0.5]),
    "an unknown field": lambda run: run["progress"].update(surplus=1),
    "a missing field": lambda run: run["progress"].pop("stopped"),
    "no progress": lambda run: run.pop("progress"),
    "a key that cannot be hashed": lambda run: run.update(rng={"$dict": [[{"$dict": []}, 1]]}),
    "a generator of another shape": lambda run: run.update(rng={"$tensor": "state.model.item_table"}),
    "a rate that is text": lambda run: run["optimizer"]["param_groups"][0].update(rate_factor="x"),
    "moments of another parameter": lambda run: _first_moments(run).update(exp_avg={"$tensor": "state.rng"}),
    "missing moments": lambda run: _first_moments(run).pop("exp_avg"),
    "moments of no step": lambda run: _first_moments(run).update(step="x"),
    "nothing": dict.clear,
}
"""Changes of a run's state that its digest cannot show, because whoever made them has updated it."""


def _averages(run: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = run["average"]["values"]
    return values


def _first_moments(run: dict[str, Any]) -> dict[str, Any]:
    moments: dict[str, Any] = run["optimizer"]["state"]["$dict"][0][1]
    return moments


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_checkpoint_that_contradicts_itself_is_named_with_a_remedy(
    event_log: EventLog, uninterrupted: Path, tmp_path: Path, change: Any
) -> None:
    run_dir = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    newest = latest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    file = newest / STATE_FILE
    body = json.loads(file.read_text())
    del body["sha256"]
    change(body["state"]["run"])
    text = json.dumps(body, sort_keys=True)
    file.write_text(json.dumps(body | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))
    with pytest.raises(CheckpointError, match=rf"{newest.name}/{STATE_FILE}: is not the state of .*remove the folder"):
        train(small_config(event_log, run_dir, **LONG), event_log)


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_run_folder_that_cannot_be_written_is_named_in_one_line(
    event_log: EventLog, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"run_dir={tmp_path / place}: cannot be written \(") as caught:
        train(small_config(event_log, tmp_path / place), event_log)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
