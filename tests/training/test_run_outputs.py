"""What a run writes in addition to its checkpoints: text files, the model card, and its comparison with baselines."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Served, small_config
from vista.config import DataConfig, EvaluateConfig, TrainConfig
from vista.config.checks import Split
from vista.errors import CheckpointError, ConfigError, NonFiniteLossError
from vista.evaluation import counting_baselines
from vista.evaluation.baseline_evaluation import measure_baseline
from vista.evaluation.counting_baselines import Transitions
from vista.log.event_log import EventLog
from vista.training.checkpoint import latest_checkpoint, load_checkpoint
from vista.training.run_folder import log_file, model_card
from vista.training.run_plan import Progress
from vista.training.trainer import train, train_model
from vista.training.validation import Validation, compare_with_baselines


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


@pytest.mark.parametrize(("name", "resume"), [("best", True), ("best.old", False)])
def test_a_folder_that_is_no_model_is_kept(event_log: EventLog, tmp_path: Path, resume: bool, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("x")
    with pytest.raises(CheckpointError, match=f"{name}: holds something other than a model, and would be replaced"):
        train(small_config(event_log, tmp_path, resume=resume), event_log)
    assert (tmp_path / name / "mine.txt").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_refused_batch_is_not_written_through_a_link_or_to_a_pipe(event_log: EventLog, tmp_path: Path) -> None:
    def run(name: str) -> str:
        with pytest.raises(NonFiniteLossError) as caught:
            train_model(small_config(event_log, tmp_path / name, optim__learning_rate=1e37), event_log)
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


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json"])
def test_a_full_disk_is_a_typed_error(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    move = os.replace

    def fill(source: str, target: str, **folders: int) -> None:
        if target == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        move(source, target, **folders)

    monkeypatch.setattr(os, "replace", fill)
    with pytest.raises(ConfigError, match=rf"{name}: cannot be written \(No space left on device\); free space"):
        train_model(small_config(event_log, tmp_path / "run"), event_log)


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


def table_of(card: str, heading: str) -> dict[str, str]:
    """Cells of the table below a heading, by the first one."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line]
    return {row[0]: row[1] for row in rows[2:]}


def test_a_run_exports_its_numbers(served_tasks: Served) -> None:
    impression_log, model, data = served_tasks.log, served_tasks.model, served_tasks.config.data
    run_dir = Path(served_tasks.config.run_dir)
    card = (run_dir / "best" / "README.md").read_text()
    counts = table_of(card, "Training data")
    assert impression_log.impressions is not None
    assert int(counts["events"].replace(",", "")) == impression_log.num_events == impression_log.lengths.sum()
    assert int(counts["users"].replace(",", "")) == impression_log.num_users
    assert int(counts["items"].replace(",", "")) == impression_log.num_items
    assert int(counts["impressions"].replace(",", "")) == len(impression_log.impressions.item)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "validation" in row), key=lambda row: row["validation"]["ne/click"])
    assert f"Epoch {best['epoch']} was the best" in card
    assert table_of(card, "Validation") == {name: f"{value:.4f}" for name, value in best["validation"].items()}
    assert f"Labels from {data.validation_from} on are not trained on: those before {data.test_from}" in card
    made = table_of(card, "Model")
    assert made["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert made["summary tokens per user (`model.num_seeds`)"] == "3"
    assert "`click`, `like`, `long_view`" in card and "Pass the time of the request" in card


def test_a_model_without_validation_says_so(order_log: EventLog, tmp_path: Path) -> None:
    """It is the average at the end."""
    config = small_config(order_log, tmp_path, optim__epochs=1, optim__validate_every=0)
    model = train(config, order_log)
    last = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))[0]  # type: ignore[arg-type]
    assert torch.equal(model.item_table, last["state.average.values.item_table"])
    card = (tmp_path / "best" / "README.md").read_text()
    assert "The model was not validated." in card
    assert table_of(card, "Training data")["time of events"] == "no times"
    assert "Pass the time" not in card and "new action type" not in card


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"split": Split.time, "validation_from": "2024-01-01", "test_from": "1704067200000"},
            "Labels from 1704067200000 on are not trained on: all are for the test, and none for validation.",
        ),
        (
            {"split": Split.share, "validation_share": 0.0, "test_share": 0.2},
            "The last 20 % of each user's events are held out for the test, and none for validation.",
        ),
        (
            {"split": Split.share, "validation_share": 0.1, "test_share": 0.2},
            "The last 20 % of each user's events are held out for the test, and the 10 % before them for validation.",
        ),
    ],
)
def test_the_card_says_what_is_held_out(served: Served, changes: dict[str, Any], expected: str) -> None:
    config = TrainConfig(data=DataConfig(**changes))
    assert f"\n\n{expected}\n\n" in model_card(served.model, config, served.log)


def test_names_of_a_log_do_not_break_a_table(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.log, "actions", ["click", "a|b\nc"])
    assert "| actions | `click`, `a\\|b c` |\n" in model_card(served.model, served.config, served.log)


def test_a_run_measures_the_baselines_once(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = shutil.copytree(served.config.run_dir, tmp_path / "run")
    text = (run_dir / "train.log").read_text()
    assert text.count("counting baselines") == 1 and "transitions 0." in text
    monkeypatch.setattr(Validation, "baselines", lambda self: pytest.fail("measured again"))
    train(replace(served.config, run_dir=str(run_dir)), served.log)  # resumes, and has nothing left to do


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_validation_measures_baselines_as_evaluation_does(
    event_log: EventLog, tmp_path: Path, exclude_seen: bool
) -> None:
    config = small_config(event_log, tmp_path / "run", data__exclude_seen=exclude_seen)
    rows = np.arange(1, event_log.num_items + 1)
    measured, of_users = Validation(event_log, rows, config).baselines()
    assert ("own frequency" in measured) != exclude_seen, "returns are ranked only if seen items are"
    asked = EvaluateConfig(split="validation", top_k=[10])
    expected = measure_baseline(Transitions(), event_log, config.data, asked, rows - 1).means()
    assert measured["transitions"] == pytest.approx(expected)
    assert np.mean(of_users) == pytest.approx(max(each["ndcg@10"] for each in measured.values()))


def test_in_a_large_log_item_neighbors_count_some_users(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(event_log, tmp_path / "run", data__exclude_seen=False)
    validation = Validation(event_log, np.arange(1, event_log.num_items + 1), config)
    whole, _ = validation.baselines()
    monkeypatch.setattr(counting_baselines, "MOST_EVENTS", 10)
    with caplog.at_level(logging.INFO):
        some, _ = validation.baselines()
    assert {name for name in whole if whole[name] != some[name]} == {"item neighbors"} and some.keys() == whole.keys()
    assert len([line for line in caplog.messages if line.startswith("pairs of items are counted among")]) == 1


def decided_by(metric: str) -> Any:
    """A validation that chooses models by `metric`, and ranks by NDCG@10."""
    return SimpleNamespace(metric=metric, ranking_metric="ndcg@10")


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize(
    ("reached", "standing"), [(0.27, "behind"), (0.29, "level"), (0.3, "level"), (0.31, "level"), (0.33, "ahead")]
)
def test_the_last_lines_compare_with_the_best_baseline_by_two_standard_errors(
    reached: float, standing: str, counts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress(
        lead=[reached - 0.3, 0.01],
        best=0.7,  # NE: the second validation is the best, though its NDCG@10 is not
        history=[{"ne/click": 0.9, "ndcg@10": 0.5}, {"ne/click": 0.7, "ndcg@10": reached}],
        baselines={"popularity": {"ndcg@10": 0.1}, "own frequency": {"ndcg@10": 0.3}},
    )
    with caplog.at_level(logging.INFO):
        compare_with_baselines(progress, decided_by("ne/click"), counts=counts)
    (record,) = caplog.records
    lead = f"{reached - 0.3:+.4f} ± 0.0100 compared with the best counting baseline, own frequency: {standing}"
    assert record.message.startswith(f"validation ndcg@10 {reached:.4f}, {lead}")
    assert (record.levelno == logging.WARNING) == (standing == "behind")
    assert standing != "behind" or ("count more" in caplog.text) == counts


def test_without_validations_nothing_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    compare_with_baselines(Progress(baselines={"popularity": {"ndcg@10": 0.1}}), decided_by("ndcg@10"), counts=False)
    compare_with_baselines(Progress(best=0.5, history=[{"ndcg@10": 0.05}]), decided_by("ndcg@10"), counts=False)
    assert not caplog.records
