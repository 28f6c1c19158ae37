"""Run all groups of tests, and record when each last passed: `make nightly`, or `python -m scripts.nightly research`.

A group that fails does not stop the others. docs/results/nightly.md has one row per group; a row changes only when its
group was run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vista.files import replace_text
from vista.installation import source_commit
from vista.machine import cpu_name
from vista_kernels.processor import PROFILES

REPOSITORY = Path(__file__).parents[1]
ROWS = REPOSITORY / "docs" / "results" / "nightly.jsonl"
TABLE = ROWS.with_suffix(".md")
LOGS = REPOSITORY / "build" / "nightly"
HEAD = """# Nightly tests

When each group of tests last passed, and how its latest run ended. `make nightly` runs all groups and writes this page.
Groups without a profile compute in float32 with AVX2; the others use what the processor has.

| group | latest run | result | minutes | processor | last passed at |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Group:
    """Tests that one make target runs."""

    target: str
    arguments: str = ""
    """Options for pytest."""
    environment: tuple[tuple[str, str], ...] = ()


GROUPS = {
    "test": Group("test"),
    "nightly": Group("test-nightly"),
    "research and docs": Group("test-research"),
    "site": Group("docs"),
    "torchrec": Group("test-torchrec"),
    "rectools": Group("test-rectools"),
    "browser": Group("test-browser"),
    "recipes": Group("test-recipes"),
    **{f"test, {profile}": Group("test", environment=(("VISTA_PROCESSOR", profile),)) for profile in PROFILES},
    **{
        f"faults, {profile}": Group("test-nightly", "tests/faults", environment=(("VISTA_PROCESSOR", profile),))
        for profile in PROFILES
        if profile != "float32"  # as in `nightly`
    },
}
_CLOSING = re.compile(r"=+ (.*(?:passed|failed|error).*) in [\d.:]+s?.*=+")


def run_group(name: str, group: Group) -> dict[str, Any]:
    """Run a group; its output goes to build/nightly/.

    Returns:
        A row of the table.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"
    started = time.monotonic()
    with log.open("wb") as output:
        command = ["make", group.target, f"PYTEST_ARGS={group.arguments}"]
        environment = {**os.environ, **dict(group.environment), "CI": "true"}
        code = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output).returncode
    closing = _CLOSING.findall(log.read_text(encoding="utf-8", errors="replace"))
    return {
        "group": name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": source_commit(),
        "passed": code == 0,
        "result": "; ".join(closing) or f"exit code {code}",
        "minutes": round((time.monotonic() - started) / 60, 1),
        "processor": cpu_name(),
    }


def read_rows() -> dict[str, dict[str, Any]]:
    """The rows of earlier runs, by group."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return {row["group"]: row for row in map(json.loads, lines)}


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Write nightly.jsonl and nightly.md."""
    kept = [rows[name] for name in GROUPS if name in rows]
    replace_text(ROWS, "".join(json.dumps(row) + "\n" for row in kept))
    lines = [
        f"| {row['group']} | {row['date']} | {'' if row['passed'] else '**failed**: '}{row['result']} "
        f"| {row['minutes']} | {row['processor']} | {row['last_passed'] or 'never'} |\n"
        for row in kept
    ]
    replace_text(TABLE, HEAD + "".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help="all of them, unless named", metavar="group")
    names = parser.parse_args().groups or list(GROUPS)
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"no group is named {unknown[0]!r}; the groups are {', '.join(GROUPS)}")
    rows, failed = read_rows(), []
    for name in names:
        row = run_group(name, GROUPS[name])
        row["last_passed"] = row["commit"] if row["passed"] else rows.get(name, {}).get("last_passed", "")
        rows[name] = row
        write(rows)
        failed += [] if row["passed"] else [name]
        print(f"{name}: {row['result']}, {row['minutes']} minutes", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
