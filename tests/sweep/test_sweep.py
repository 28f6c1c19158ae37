"""`vista sweep`: real trainings over seeds and settings."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from tests.conftest import small_config
from vista.cli.main import main
from vista.config import SweepConfig
from vista.config.composition import to_yaml
from vista.errors import ConfigError, MissingDependencyError, SweepError
from vista.log.event_log import EventLog
from vista.runs.run_list import RunSummary
from vista.sweep import SweepReport, folder_name, sweep, values_of
from vista.training.trainer import Trainer, train_model

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="needs optuna")
RATES = "optim.learning_rate=tag(log,interval(1e-3,1e-2))"


@pytest.fixture
def train_file(event_log: EventLog, tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(to_yaml(small_config(event_log, tmp_path / "unused", optim__epochs=1)))
    return str(path)


def swept(train_file: str, tmp_path: Path, *words: str, **changes: Any) -> SweepConfig:
    return SweepConfig(train=list(words), train_file=train_file, folder=str(tmp_path / "sweep"), **changes)


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the run folder of each step that is trained from now on."""
    taken: list[str] = []
    make = Trainer._step

    def step(self: Trainer, *arguments: Any) -> dict[str, float]:
        taken.append(self.run_dir.name)
        return make(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)
    return taken


def last_step(run: Path) -> int:
    return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def values(report: SweepReport) -> list[list[float]]:
    return [values_of(trials) for trials in report.trials.values()]


def test_a_grid_names_what_fails_and_trains_the_rest(
    train_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["sweep", f"train_file={train_file}", f"folder={tmp_path}/sweep", "seed=1,2", "model.dim=16,15,8"]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: 2 of 6 trials failed")
    lines = printed.out.splitlines()
    assert lines[0].split() == ["setting", "ndcg@10", "standard", "error", "runs", "seconds"]
    found = {
        dim: [RunSummary.of(tmp_path / "sweep" / f"model.dim-{dim}_seed-{seed}", "").best or 0 for seed in (1, 2)]
        for dim in (16, 8)
    }
    order = sorted(found, key=lambda dim: -fmean(found[dim]))
    for line, dim in zip(lines[1:3], order, strict=True):
        error = stdev(found[dim]) / math.sqrt(2)
        assert line.split()[:4] == [f"model.dim={dim}", f"{fmean(found[dim]):.4f}", f"{error:.4f}", "2"]
    assert lines[3].split()[:4] == ["model.dim=15", "0", "of", "2"]
    reasons = " ".join(printed.out.split())
    assert "model.dim-15_seed-1 failed: model.num_heads: must divide model.dim=15" in reasons
    markdown = (tmp_path / "sweep" / "results.md").read_text()
    assert f"| model.dim={order[0]} | {fmean(found[order[0]]):.4f} |" in markdown and "model.dim-15_seed-2" in markdown
    taken = steps_taken(monkeypatch)
    assert main([word.replace("15,", "") for word in words]) == 0
    assert taken == [] and "0 of 2" not in capsys.readouterr().out
    assert main([*words[:-1], "model.dim=16,8", "optim.epochs=2"]) == 1
    assert "holds a run with another optim.epochs (1 -> 2)" in " ".join(capsys.readouterr().out.split())
    assert taken == []


@pytest.mark.nightly
def test_an_interrupted_sweep_resumes_in_the_middle_of_a_trial(
    event_log: EventLog, train_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = swept(train_file, tmp_path, "seed=1,2,3", "checkpoint_every=1")
    make, taken = Trainer._step, list[str]()

    def step(self: Trainer, *arguments: Any) -> dict[str, float]:
        if len(taken) == 6:
            raise KeyboardInterrupt
        taken.append(self.run_dir.name)
        return make(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            sweep(config)
    first = taken.count("seed-1")
    assert first > 2 and taken == ["seed-1"] * first + ["seed-2"] * (6 - first)
    again = steps_taken(monkeypatch)
    report = sweep(config)
    rest = last_step(tmp_path / "sweep" / "seed-2") - taken.count("seed-2")
    assert again == ["seed-2"] * rest + ["seed-3"] * last_step(tmp_path / "sweep" / "seed-3")
    assert report.failed() == []
    train_model(small_config(event_log, tmp_path / "alone", optim__epochs=1, seed=2), event_log)
    assert RunSummary.of(tmp_path / "alone", "").best == values(report)[0][1]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
@pytest.mark.nightly
def test_what_a_tracker_lacks_of_finished_trials_is_sent_by_a_rerun(
    train_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vista.runs.tracking import TensorboardTracker

    def fail(*_: object) -> None:
        raise ConnectionError("the network is down")

    words = ["sweep", f"train_file={train_file}", f"folder={tmp_path}/sweep", "seed=1,2", "tracking.kind=tensorboard"]
    with monkeypatch.context() as patch:
        patch.setattr(TensorboardTracker, "log", fail)
        assert main(words) == 1
    printed = capsys.readouterr()
    assert "error: 2 finished trials are not complete in the tracker" in printed.err
    assert " ".join(printed.out.split()).count("is finished, but tracking=tensorboard: the tracker lacks") == 2
    taken = steps_taken(monkeypatch)
    assert main(words) == 0 and taken == []
    states = [json.loads((tmp_path / "sweep" / name / "tracking.json").read_text()) for name in ("seed-1", "seed-2")]
    assert all(state["complete"] and state["validation"] > 0 for state in states)


@needs_optuna
@pytest.mark.nightly
def test_sampled_settings_resume_with_the_settings_of_an_uninterrupted_sweep(train_file: str, tmp_path: Path) -> None:
    words = (RATES, "model.num_layers=1,2", "seed=1,2")
    short = swept(train_file, tmp_path, *words, trials=1)
    assert len(sweep(short).trials) == 1
    report = sweep(swept(train_file, tmp_path, *words, trials=2))
    whole = sweep(swept(train_file, tmp_path / "other", *words, trials=2))
    assert list(report.trials) == list(whole.trials) and values(report) == values(whole)
    assert report.num_trials == 4 and report.failed() == []
    rates = [float(dict(setting)["optim.learning_rate"]) for setting in report.trials]
    assert len(set(rates)) == 2 and all(1e-3 <= rate <= 1e-2 for rate in rates)
    with pytest.raises(SweepError, match=r"holds a sweep over other values.*choose another folder"):
        sweep(swept(train_file, tmp_path, RATES, trials=4))


@needs_optuna
def test_a_sampled_setting_that_fails_is_named_and_told(train_file: str, tmp_path: Path) -> None:
    report = sweep(swept(train_file, tmp_path, "model.dim=15,17", trials=2))
    assert len(report.failed()) == report.num_trials >= 1
    assert "model.num_heads: must divide" in str(report.failed()[0].reason)


def test_an_extra_that_is_not_installed_is_named(
    train_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[optuna\]'"):
        sweep(swept(train_file, tmp_path, RATES, trials=4))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["model.dim=16"], "no setting has several values"),
        (["optim.learning_rate=interval(1e-4,1e-2)"], "optim.learning_rate: an interval needs a number of trials"),
        (["optim.learning_rate=interval(1e-2,1e-4)"], "optim.learning_rate: an interval needs two numbers"),
        (["seed=1,2", "trials=3"], "a key other than seed must have several values"),
        (["model.dim=16,32", "seed=interval(1,3)", "trials=3"], "seed: list the seeds"),
        (["model.dmi=16,32"], "unknown key 'model.dmi'; did you mean model.dim"),
        (["seed=1,2", "model.dmi=3"], "unknown key 'model.dmi'; did you mean model.dim"),
        (["seed=1,2", "run_dir=here"], "run_dir: is chosen by the sweep for each trial; set folder instead"),
        (["seed=1,2", "model.dim=16,32", "seed=3,4"], "seed: is set more than once"),
        (["seed=1,2", "model.dim=range(1,10000000000)"], "model.dim: has more than 4096 values"),
        (["model.dim=range(1,200)", "data.chunk_len=range(1,200)"], "make 39,601 settings, but at most 10,000"),
    ],
)
def test_a_wrong_word_is_one_line_before_any_training(
    train_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main(["sweep", f"train_file={train_file}", f"folder={tmp_path}/sweep", *words]) == 2
    line = capsys.readouterr().err
    assert part in line and line.count("\n") == 1
    assert not list(tmp_path.glob("sweep/*/"))


def test_a_sweep_trains_in_one_process(train_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        sweep(swept(train_file, tmp_path, "seed=1,2"))


def test_words_can_be_in_a_file(train_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text(f"train: ['seed=1,2']\ntrain_file: {train_file}\nfolder: {tmp_path}/x\n")
    assert main(["sweep", "--config", str(tmp_path / "sweep.yaml"), "optim.epochs=2", "--cfg"]) == 0
    assert "train:\n- seed=1,2\n- optim.epochs=2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"model.dim": "64", "seed": "1"}, "model.dim-64_seed-1"),
        ({"optim.learning_rate": "1e-05"}, "optim.learning_rate-1e-05"),
        ({"seed": "-1"}, "seed--1"),
    ],
)
def test_a_folder_is_named_after_the_setting(own: dict[str, str], name: str) -> None:
    assert folder_name(own) == name


def test_names_of_different_settings_differ() -> None:
    names = [folder_name({"base": value}) for value in ("a/b", "a-b", "a,b", "x" * 300, "x" * 301, "a b")]
    assert len(set(names)) == len(names) and max(map(len, names)) < 140
    assert not any(set(name) & set("/, '\"=") for name in names)
