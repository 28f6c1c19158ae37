"""Exported models answer labeled tasks with calibrated probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Served, small_config
from vista.config.checks import Split
from vista.logistic_regression import CALIBRATION_PRIOR, fit_calibration
from vista.model.ranking_model import RankingModel
from vista.training.trainer import Trainer


def test_a_calibration_undoes_a_scale_and_a_shift() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=200_000)
    label = (rng.random(len(true)) < 1 / (1 + np.exp(-true))).astype(np.float32)
    slope, shift = fit_calibration(2.5 * true - 1, label)
    assert (slope, shift) == pytest.approx((0.4, 0.4), abs=0.02)
    estimate = 1 / (1 + np.exp(-(slope * (2.5 * true - 1) + shift)))
    pull = CALIBRATION_PRIOR * np.array([slope - 1, shift])  # where the likelihood and the prior balance
    np.testing.assert_allclose(
        [((label - estimate) * (2.5 * true - 1)).sum(), (label - estimate).sum()], pull, atol=0.05
    )


@pytest.mark.parametrize("label", [np.zeros(0), np.zeros(4), np.ones(4), np.arange(4) % 2])
def test_few_labels_change_little(label: np.ndarray) -> None:
    slope, shift = fit_calibration(np.linspace(-3, 3, len(label)), label)
    assert 0.5 < slope < 1.5 and abs(shift) < 0.5


def test_an_order_is_never_reversed() -> None:
    logit = np.linspace(-3, 3, 1000)
    assert fit_calibration(logit, (logit < 0).astype(np.float32)) == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["vista", "hstu", "sasrec", "din"])
def test_the_best_model_is_exported_with_it(served_tasks: Served, tmp_path: Path, kind: str) -> None:
    config = small_config(served_tasks.log, tmp_path, model__architecture=kind, optim__epochs=1)
    config.data = served_tasks.config.data
    made = Trainer(config, served_tasks.log)
    best = made.run()
    validation = made.validation
    assert validation is not None and validation.calibration.shape == (len(best.schema.tasks), 2)
    slope, shift = torch.from_numpy(validation.calibration).unbind(1)
    assert not torch.equal(slope, torch.ones_like(slope))
    with made.optimizers.average.applied():
        exported, layers = best.task_outputs(), made.model.task_outputs()
        for place, (of_best, own) in enumerate(zip(exported, layers, strict=True)):
            torch.testing.assert_close(of_best.weight.double(), own.weight.double() * slope[:, None])
            if place == 0:
                torch.testing.assert_close(of_best.bias.double(), own.bias.double() * slope + shift)
    assert_restored(made.model)


def assert_restored(model: RankingModel) -> None:
    before, bias = {k: value.clone() for k, value in model.state_dict().items()}, model.task_outputs()[0].bias.clone()
    with model.calibrated(np.array([[0.5, 0.1]] * len(model.schema.tasks))):
        assert not torch.equal(model.task_outputs()[0].bias, bias)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_validated_labels_nothing_is_calibrated(served_tasks: Served, tmp_path: Path) -> None:
    """As in a split by counts, which does not say which impressions are held out."""
    config = small_config(served_tasks.log, tmp_path, optim__epochs=1, data__split=Split.leave_last_out)
    assert Trainer(config, served_tasks.log).run().schema.tasks


def test_what_counters_add_to_logits_of_a_baseline_is_scaled_too(served_tasks: Served, tmp_path: Path) -> None:
    changes = {"model__architecture": "sasrec", "model__counter_keys": ["item"]}
    config = small_config(served_tasks.log, tmp_path, **changes)
    config.data = served_tasks.config.data
    model: Any = Trainer(config, served_tasks.log).model
    assert model.task_outputs()[1] is model.candidate_head.network[-1]
