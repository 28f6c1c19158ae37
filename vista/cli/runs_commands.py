"""The commands `vista runs` and `vista runs compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vista.config.runs_configs import RunsCompareConfig, RunsConfig
from vista.files import replace_text, writable_file
from vista.runs.run_comparison import RunComparison
from vista.runs.run_list import RunList


def run_runs(config: RunsConfig) -> RunList:
    """`vista runs`; errors as of `RunList.of`.

    Raises:
        ConfigError: `out` cannot be written.
    """
    listed = RunList.of(Path(config.folder), config.sort, config.metric)
    _write(config.out, listed.to_list())
    return listed


def run_runs_compare(config: RunsCompareConfig) -> RunComparison:
    """`vista runs compare`; errors as of `RunComparison.of`.

    Raises:
        ConfigError: `out` cannot be written.
    """
    comparison = RunComparison.of(config.runs)
    _write(config.out, comparison.to_dict())
    return comparison


def _write(out: str | None, values: Any) -> None:
    if out is not None:
        writable_file(Path(out), "out")
        replace_text(Path(out), json.dumps(values, indent=2) + "\n")
