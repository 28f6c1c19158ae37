"""The questions of the soak test of the service: every kind notices another model, another store, and an erasure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks.serve_load import Connection, get, serving
from scripts.benchmarks.service_questions import TASK, ServiceQuestion
from scripts.benchmarks.soak_judge import equal
from scripts.benchmarks.soak_load import SoakStage
from vista.refresh import erase
from vista.scorer import Scorer

pytestmark = [pytest.mark.research, pytest.mark.filterwarnings("error")]
NUM_USERS, NUM_ITEMS = 60, 50
QUESTIONS = range(40)
KINDS = ("_score", "_packed", "_ragged", "_tails", "_predict", "_rank", "_user")


def test_questions(tmp_path: Path) -> None:
    stage = SoakStage(tmp_path, NUM_USERS, NUM_ITEMS)
    questions = [ServiceQuestion(number, NUM_USERS, NUM_ITEMS) for number in QUESTIONS]
    assert {question.kind for question in questions} == set(KINDS)
    with Scorer.open(stage.model, stage.store, on_missing="nan", task=TASK) as scorer:
        expected = [question.of_scorer(scorer) for question in questions]
        with serving(stage.model, stage.store, "on_missing=nan", f"task={TASK}", "deadline_s=100") as service:
            connection = Connection(service.port)
            for question, arrays in zip(questions, expected, strict=True):
                assert equal(question.of_answer(*connection.send(question.request)), arrays), question.kind
            with pytest.raises(ValueError, match="status 422"):
                questions[0].of_answer(*connection.send(get("/v1/users/nobody")))
            erase(stage.store, list(range(1, NUM_USERS + 1)))
            for question, arrays in zip(questions, expected, strict=True):
                after = question.of_answer(*connection.send(question.request))
                assert equal(after, question.of_scorer(scorer)), question.kind
                had_none = all(np.isnan(part).all() for part in arrays if part.dtype.kind == "f")  # an unknown user
                assert had_none or not equal(after, arrays), question.kind
            connection.close()
