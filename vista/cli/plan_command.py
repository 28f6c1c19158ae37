"""The command `vista plan`."""

from __future__ import annotations

import json
from pathlib import Path

from vista.config import PlanConfig
from vista.config.conversion import to_dict
from vista.files import replace_text, writable_file
from vista.planning.capacity_plan import plan_capacity
from vista.planning.plan_report import PlanReport, assumptions


def run_plan(config: PlanConfig) -> PlanReport:
    """`vista plan`; errors as of `plan_capacity`.

    Raises:
        ConfigError: `out` cannot be written.
    """
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
    return PlanReport(plan)
