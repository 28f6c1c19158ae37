"""Compares an export with the scorer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.errors import ExportError
from vista.export.export_runner import ExportRunner
from vista.export.request_arrays import Arrays
from vista.export.trial_requests import TrialRequests, trial_requests
from vista.model.ranking_model import NEXT_TASK
from vista.progress_bar import progress_bar
from vista.scorer.serving_snapshot import ServingSnapshot

LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Parity:
    """How an export differs from the scorer."""

    num_requests: int
    """Requests that were compared."""
    max_difference: dict[str, float]
    """Largest absolute difference, by output."""


def compare(
    run: ExportRunner, snapshot: ServingSnapshot, num_requests: int, max_difference: float
) -> tuple[Parity, Arrays]:
    """Differences between the export and the scorer, and the inputs and outputs of one batch as an example.

    Args:
        run: the export.
        snapshot: of the same model.
        num_requests: random requests.
        max_difference: of an output.

    Raises:
        ExportError: a difference is larger.
    """
    trials = progress_bar(trial_requests(snapshot, num_requests), desc="compare", unit="batch")
    worst: dict[str, float] = {}
    example: Arrays = {}
    for trial in trials:
        outputs, expected = run(trial.arrays), scorer_outputs(snapshot, trial)
        for name, values in expected.items():
            difference = float(np.abs(outputs[name] - values).max())
            worst[name] = max(worst.get(name, 0.0), difference)
            if not difference <= max_difference:  # also for NaN
                raise ExportError(
                    f"{name} of the export differ by up to {difference:.3g} from the scorer's, but at most "
                    f"{max_difference:.3g} is allowed (max_difference); nothing was written"
                )
        if not example or 3 <= len(trial.rows) < 10:
            example = trial.arrays | outputs
    return Parity(num_requests, worst), example


def scorer_outputs(snapshot: ServingSnapshot, trial: TrialRequests) -> Arrays:
    """What the scorer gives: logits float32 [B, C, tasks], and scores of `next` float32 [B, C]."""
    outputs: Arrays = {}
    if snapshot.model.schema.tasks:
        outputs[LOGITS] = snapshot.logits(trial.request, trial.rows).numpy()
    if NEXT_TASK in snapshot.tasks:
        outputs[NEXT_TASK] = snapshot.scores(trial.request, trial.rows, [NEXT_TASK])[NEXT_TASK].numpy()
    return outputs
