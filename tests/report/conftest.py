"""A model of three tasks next to the same model without a summary, and the report about them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Served
from vista.config import OptimConfig, ReportConfig
from vista.report.report import WrittenReport, write_report
from vista.training.trainer import train


@dataclass(frozen=True)
class Reported:
    """A report and what it is about."""

    served: Served
    without_summary: Path
    """Run folder of the other model."""
    report: WrittenReport
    page: str


@pytest.fixture(scope="session")
def without_summary(served_tasks: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the model of `served_tasks` with K = 0."""
    folder = tmp_path_factory.mktemp("without-summary") / "k0"
    config = served_tasks.config
    optim = {field.name: getattr(config.optim, field.name) for field in dataclasses.fields(config.optim)}
    train(
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, num_seeds=0),
            optim=OptimConfig(**optim | {"reconstruction_weight": 0.0, "epochs": 1}),
            run_dir=str(folder),
        ),
        served_tasks.log,
    )
    return folder


@pytest.fixture(scope="session")
def reported(served_tasks: Served, without_summary: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """The report about `served_tasks`, next to the model without a summary."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    report = write_report(
        ReportConfig(
            run=served_tasks.config.run_dir,
            others=[str(without_summary)],
            store=str(served_tasks.test_store),
            out=str(out),
            num_threads=1,
            progress=False,
        )
    )
    return Reported(served_tasks, without_summary, report, out.read_text())
