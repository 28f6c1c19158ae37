"""A short soak test, and the errors that its judge must notice."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from scripts.benchmarks import soak_serve
from scripts.benchmarks.benchmark import read_cases
from scripts.benchmarks.soak import (
    OPERATIONS,
    SHORTER_TAIL,
    SoakAnswer,
    SoakJudge,
    SoakStage,
    append_events,
    copies,
    freeze,
)
from scripts.benchmarks.soak_serve import ServiceQuestion
from vista.model.vista_model import VistaModel
from vista.refresh import erase, refresh
from vista.scorer import Scorer

pytestmark = [pytest.mark.research, pytest.mark.filterwarnings("error")]
NUM_USERS, NUM_ITEMS = 60, 50
PREDICT, TAIL, PACKED = 5, 40, 37
"""Questions: eight users for all tasks, four with their tails, two in MessagePack."""


def asked(scorer: Scorer, question: int) -> list[NDArray[Any]]:
    return ServiceQuestion(question, NUM_USERS, NUM_ITEMS).of_scorer(scorer)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> SoakStage:
    """Operation 1 is a full refresh with a new event per user, operation 2 an erasure of half of the users."""
    stage = SoakStage(tmp_path_factory.mktemp("soak"), NUM_USERS, NUM_ITEMS)
    everyone = 1 + np.arange(NUM_USERS)
    log = append_events(stage, 1, everyone, np.random.default_rng(0))
    refresh(VistaModel.from_pretrained(stage.model), log, stage.store)
    freeze(stage.store, stage.frozen, 1)
    erase(stage.store, everyone[::2].tolist())
    freeze(stage.store, stage.frozen, 2)
    return stage


def answer_of(stage: SoakStage, name: str, question: int, model: VistaModel | None = None) -> SoakAnswer:
    """The answer of a scorer of a copy, as if that copy had been in service during the call."""
    generation, operation = map(int, name.split("-"))
    with Scorer.open(model or stage.model, stage.frozen / name, on_missing="nan", task="click") as scorer:
        arrays, tail_len = asked(scorer, question), scorer.model.config.tail_len
    return SoakAnswer(0, question, operation, operation, (generation,) * 2, (tail_len,) * 2, 0.0, arrays)


@pytest.mark.parametrize("question", [PREDICT, TAIL, PACKED])
def test_the_judge_accepts_only_states_in_service(stage: SoakStage, question: int) -> None:
    assert sorted(copies(stage.frozen)) == [(1, 0), (1, 2), (2, 1), (2, 2)]
    judge = SoakJudge(stage, asked)
    old, new, erased = (answer_of(stage, name, question) for name in ("1-0", "2-1", "2-2"))
    assert all(judge.is_right(answer) for answer in (old, new, erased))
    assert judge.num_changing == 0
    # An answer of a generation that was not open is wrong. With a reload during the call, both generations are right.
    assert not judge.is_right(replace(old, generations=(2, 2), since=1, until=1))
    assert not judge.is_right(replace(new, generations=(1, 1)))
    assert judge.is_right(replace(old, generations=(1, 2), since=0, until=1))
    assert judge.is_right(replace(new, generations=(1, 2), since=0, until=1))
    # An erased user must be missing after the erasure, and may be missing during it.
    assert not judge.is_right(replace(new, since=2, until=2))
    assert judge.is_right(replace(new, since=1, until=2)) and judge.is_right(replace(erased, since=1, until=2))
    assert judge.num_changing == 4
    # Half of one state and half of another is wrong.
    for other in (old, erased):
        halves = zip(new.arrays, other.arrays, strict=True)
        mixed = [np.concatenate([a[: len(a) // 2], b[len(a) // 2 :]]) for a, b in halves]
        assert not judge.is_right(replace(new, arrays=mixed, generations=(1, 2), since=0, until=2))


def test_the_judge_accepts_only_models_in_service(stage: SoakStage) -> None:
    full = VistaModel.from_pretrained(stage.model)
    shorter = full.with_tail(SHORTER_TAIL)
    shorter.save_pretrained(stage.copy_of_model(shorter.summarizer_id(), SHORTER_TAIL))
    judge = SoakJudge(stage, asked)
    old, new = answer_of(stage, "2-1", TAIL, full), answer_of(stage, "2-1", TAIL, shorter)
    assert judge.is_right(old) and judge.is_right(new)
    lengths = full.config.tail_len, SHORTER_TAIL
    assert not judge.is_right(replace(old, tail_lens=new.tail_lens))
    assert not judge.is_right(replace(new, tail_lens=old.tail_lens))
    assert all(judge.is_right(replace(answer, tail_lens=lengths)) for answer in (old, new))
    # There was never a model with this length.
    assert judge.is_right(replace(old, tail_lens=(full.config.tail_len, 1)))
    assert not judge.is_right(replace(old, tail_lens=(1, 1)))


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # On a busy core, each start of a worker takes minutes.
def test_a_short_soak(tmp_path: Path) -> None:
    out, root = tmp_path / "out.jsonl", Path(soak_serve.__file__).parents[2]
    words = ["--minutes=0.2", "--users=300", f"--out={out}", "--pause=0.1", "--rate=10", "--kill=5"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.soak_serve", *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["case"].partition(": ")[2]: row["value"] for row in read_cases(out)}
    assert rows["failed"] == rows["wrong"] == 0
    assert all(
        rows[case] > 0 for case in ["answers", "workers killed", *(f"operations, {kind}" for kind in OPERATIONS)]
    )
    assert len([line for line in done.stdout.splitlines() if "answers, median" in line]) >= 5
