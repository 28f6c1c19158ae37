"""Measuring the rows of a table of labels: answers to the impressions of validation and test, as served.

Answers lie in the folder of the row, so that the stack can read those of other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vista.arrays import Float32s
from vista.config import DataConfig
from vista.evaluation.answers import RawHistoryAnswers, RefreshedAnswers
from vista.evaluation.cases import ImpressionCases, impression_cases, with_tasks
from vista.evaluation.label_baselines import LabelFeatures, label_baselines, label_trees
from vista.evaluation.protocol import USERS_PER_BATCH, impression_metrics
from vista.files import make_folders
from vista.log.event_log import EventLog
from vista.log.splits import part_times, split_until
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer

PARTS = ("validation", "test")


def part_cases(log: EventLog, data: DataConfig, part: str, task: str) -> ImpressionCases:
    """The impressions of a part of a split by time."""
    begin, end = part_times(data, part)
    assert begin is not None
    return with_tasks(impression_cases(log, begin, end), [task])


def served_answers(model: VistaModel, log: EventLog, folder: Path, part: str, cases: ImpressionCases) -> Float32s:
    """Probabilities of impressions of a part, from a store that is refreshed on a schedule (`data.refresh_days`).

    Args:
        folder: an existing one, for stores.
    """
    store = folder / f"store-{part}"
    refresh(model, log, store, until=split_until(model.data, part))
    with Scorer.open(model, store) as scorer:
        answers = RefreshedAnswers(scorer, log, part, folder, requests_per_batch=USERS_PER_BATCH)
        return answers.probabilities(cases)


def trained_answers(
    model: RankingModel, log: EventLog, folder: Path, task: str
) -> Iterator[tuple[str, ImpressionCases, Float32s]]:
    """(part, cases, answers) of a model: of vista on both parts, of others, which read raw histories, on test alone."""
    for part in PARTS:
        cases = part_cases(log, model.data, part, task)
        if isinstance(model, VistaModel):
            yield part, cases, served_answers(model, log, folder, part, cases)
        elif part == "test":
            assert isinstance(model, HistoryModel)
            yield part, cases, RawHistoryAnswers(model, log, model.rows_of(log.items)).probabilities(cases)


_ANSWERED: dict[str, Mapping[str, Float32s]] = {}
"""Answers of all baselines by log, split, and task: the rows of a call share them."""


def baseline_answers(log: EventLog, data: DataConfig, task: str) -> Mapping[str, Float32s]:
    """Answers of all baselines to the impressions of the test, by name."""
    key = f"{log.path} {data} {task}"
    if key not in _ANSWERED:
        _ANSWERED[key] = label_baselines(log, data, part_cases(log, data, "test", task), trained=True)
    return _ANSWERED[key]


def baseline_metrics(log: EventLog, data: DataConfig, task: str, name: str) -> dict[str, float]:
    """Metrics of a baseline over the impressions of the test, as tables without errors report them."""
    return impression_metrics(part_cases(log, data, "test", task), baseline_answers(log, data, task)[name])


def stacked_answers(log: EventLog, data: DataConfig, task: str, files: Sequence[Mapping[str, Path]]) -> Float32s:
    """Answers to the test of trees over the answers of other rows, and over all that the trees of the baselines read.

    They are fitted to the validation part, whose labels no row was trained on.

    Args:
        files: {part: file of the answers}, for each of the other rows.
    """
    features, inputs, labels = LabelFeatures(log, data, task), {}, {}
    for part in PARTS:
        cases = part_cases(log, data, part, task)
        own = [features.counters(cases), features.products(cases)]
        inputs[part] = np.column_stack([*own, *(np.load(each[part])[:, 0] for each in files)])
        labels[part] = cases.label[:, 0]
    trees = label_trees(inputs["validation"], labels["validation"])
    return trees(inputs["test"]).astype(np.float32)[:, None]


def answers_file(folder: Path, line: str, part: str) -> Path:
    """Where a row keeps its answers, float32 [N, 1]."""
    return folder / "answers" / f"{line}, {part}.npy"


def save_answers(folder: Path, line: str, part: str, answers: Float32s) -> None:
    """Write the answers of a row."""
    file = answers_file(folder, line, part)
    make_folders(file.parent)
    np.save(file, answers)
