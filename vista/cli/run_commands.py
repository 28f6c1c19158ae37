"""The commands `vista train`, `sweep`, `runs`, `export`, `plan`, and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vista.config import AdaptConfig, DoctorConfig, ExportConfig, PlanConfig, SweepConfig, TrainConfig
from vista.config.checks import to_dict
from vista.config.train_config import RunsCompareConfig, RunsConfig
from vista.errors import LogFormatError, SweepError, UnfitSetupError
from vista.files import checked_path, replace_text, require_log_folder, writable_file
from vista.text_table import hanging, two_columns

if TYPE_CHECKING:
    from vista.doctor import Diagnosis, Finding
    from vista.export.export import ExportReport
    from vista.planning.capacity_plan import CapacityPlan
    from vista.runs.run_list import RunComparison, RunList
    from vista.sweep import SweepReport
    from vista.training.adapter import AdaptReport


def run_train(config: TrainConfig) -> None:
    """`vista train`; errors as of `train_model`."""
    # A wrong path fails before numpy is loaded, and another folder before torch, which takes a second.
    require_log_folder(checked_path(config.data.path, LogFormatError))
    from vista.log.event_log import EventLog

    log = EventLog.open(config.data.path)
    from vista.device import keep_freed_memory
    from vista.training.trainer import train_model

    keep_freed_memory()
    train_model(config, log)


def run_adapt(config: AdaptConfig) -> AdaptReport:
    """`vista adapt`; errors as of `adapt`."""
    from vista.device import keep_freed_memory
    from vista.training.adapter import adapt

    keep_freed_memory()
    return adapt(config)


def run_sweep(config: SweepConfig) -> SweepReport:
    """`vista sweep`; errors as of `sweep`."""
    from vista.device import keep_freed_memory
    from vista.sweep import sweep

    keep_freed_memory()
    report = sweep(config)
    failed, not_tracked = len(report.failed()), len(report.not_tracked())
    if failed or not_tracked:
        print(report)
        counts = [f"{failed} of {report.num_trials} trials failed"] if failed else []
        counts += [f"{not_tracked} finished trials are not complete in the tracker"] if not_tracked else []
        raise SweepError(
            f"{', '.join(counts)}; they are listed above and in {report.folder}/results.md. Rerun the command to try "
            "these trials again"
        )
    return report


def run_runs(config: RunsConfig) -> RunList:
    """`vista runs`; errors as of `RunList.of`."""
    from vista.runs.run_list import RunList

    listed = RunList.of(Path(config.folder), config.sort, config.metric)
    _write(config.out, listed.to_list())
    return listed


def run_runs_compare(config: RunsCompareConfig) -> RunComparison:
    """`vista runs compare`; errors as of `RunComparison.of`."""
    from vista.runs.run_list import RunComparison

    comparison = RunComparison.of(config.runs)
    _write(config.out, comparison.to_dict())
    return comparison


def _write(out: str | None, values: Any) -> None:
    if out is not None:
        writable_file(Path(out), "out")
        replace_text(Path(out), json.dumps(values, indent=2) + "\n")


def run_export(config: ExportConfig) -> ExportReport:
    """`vista export`: an ONNX or AOTInductor export of stage 2, which was compared with the scorer."""
    from vista.device import cpu_settings
    from vista.export.export import export
    from vista.store.record_encoding import read_key

    with cpu_settings(config.num_threads):
        return export(
            config.model,
            config.out,
            config.format,
            store=config.store,
            key=read_key(config.authentication_key_file),
            adapter=config.adapter,
        )


def run_plan(config: PlanConfig) -> CapacityPlan:
    """`vista plan`; errors as of `plan_capacity`."""
    from vista.planning.capacity_plan import assumptions, plan_capacity

    if config.out is not None:
        writable_file(Path(config.out), "out")
    plan = plan_capacity(config)
    if config.out is not None:
        values = to_dict(plan) | {
            "mean_lag_s": plan.mean_lag_s,
            "longest_lag_s": plan.longest_lag_s,
            "stores_on_servers": plan.stores_on_servers,
            "assumptions": assumptions(plan),
        }
        replace_text(Path(config.out), json.dumps(values, indent=2) + "\n")
    return plan


def run_doctor(config: DoctorConfig) -> None:
    """`vista doctor`: print the diagnosis, and write it to `out`."""
    from vista.doctor import Verdict, diagnose

    if config.out is not None:
        writable_file(Path(config.out), "out")
    diagnosis = diagnose(config)
    print(diagnosis_text(diagnosis))
    if config.out is not None:
        replace_text(Path(config.out), json.dumps(to_dict(diagnosis), indent=2) + "\n")
    if broken := diagnosis.having(Verdict.broken):
        names = ", ".join(finding.name for finding in broken)
        raise UnfitSetupError(f"broken: {names}; fix this as described above, then run vista doctor again")


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """All findings in a table, then what is slow and what is broken, each with what to do."""
    from vista.doctor import Verdict

    marks = {Verdict.fine: " ", Verdict.limited: "!", Verdict.broken: "x"}
    lists = {Verdict.limited: "! Slow or limited here, and why:", Verdict.broken: "x Broken:"}
    parts = []
    for section in diagnosis.sections:
        rows = [(f"{marks[finding.verdict]} {finding.name}", finding.value) for finding in section.findings]
        parts += [section.title, two_columns(rows, 24), ""]
    for verdict, title in lists.items():
        if findings := diagnosis.having(verdict):
            parts += [hanging(title, 2), *(hanging(_line(finding), 4) for finding in findings), ""]
    if not diagnosis.having(Verdict.broken):
        parts.append("Nothing is broken.")
    return "\n".join(parts).rstrip()


def _line(finding: Finding) -> str:
    value, _, _ = finding.value.partition(";")
    return f"  - {finding.name} ({value}): {finding.advice}"
