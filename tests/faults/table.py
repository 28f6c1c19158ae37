"""Write the promises and their outcomes to docs/results/faults.jsonl and faults.md, from the recorded calls.

    python -m tests.faults.table

faults.jsonl has one object per promise and fault. A promise without recorded calls keeps its row. The exit code is 1 if
a promise failed, is not complete, or was tested with older formats of files, or if there are fewer repetitions than
BARS require.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.experiments.results import describe_hardware
from tests.faults.harness import BROKEN, PROMISES, WORK, Promise, formats, missed_shares, read_record
from vista.files import replace_text

RESULTS = Path(__file__).parents[2] / "docs" / "results"
BARS = {
    "power-loss images": (("power cut",), 5_000),
    "damaged files": (("changed bytes in", "a flipped bit in"), 10_000),
    "kills of streams, servers, and their clients": (("beyond one machine, kill -9",), 75),
    "fuzzed requests": (("fuzzed requests",), 100_000),
}
"""Kind of fault -> how `Promise.fault` begins, and how many repetitions these promises must have together."""
HEAD = """# Promises under faults

Made by `make test-faults`. Faults come from outside of vista: signals, a small file system, a preloaded library that
writes down system calls or makes one fail, changed bytes in files, hostile arguments. A repetition passes only if what
was acknowledged is read back byte for byte, and everything else is a miss or a typed error. Each repetition
strikes at another point, such as another system call of the operation.

"""


def import_promises() -> list[Promise]:
    """All promises of this folder."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.faults.{path.stem}")
    return sorted(PROMISES, key=lambda promise: (promise.text, promise.fault))


def row_of(promise: Promise, folder: Path, earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The row of a promise, from its recorded calls or else from an earlier table."""
    row: dict[str, Any] = {"promise": promise.text, "fault": promise.fault, "wanted": promise.full, "repetitions": 0}
    record = read_record(folder / f"{promise.name}.jsonl")
    if record is None or not record.rows:
        same = [one for one in earlier if (one["promise"], one["fault"]) == (promise.text, promise.fault)]
        if same and same[0]["repetitions"]:
            return same[0]
        return row | {"outcome": f"skipped: {record.skipped}" if record and record.skipped else "not run"}
    done = promise.each * len(record.rows)
    missed = missed_shares(promise, record) if done >= promise.full else ""
    outcome = "held" if done >= promise.full else "held so far"
    if record.failures:
        outcome = f"FAILED: {len(record.failures)} of {len(record.rows)} calls"
    elif missed:
        outcome = f"FAILED: {missed}"
    return row | {
        "repetitions": done,
        "outcome": outcome,
        "counts": dict(record.counts.most_common()),
        "failures": list(record.failures.values()),
        **record.header,
        "seconds": round(sum(one["seconds"] for one in record.rows.values()), 1),
    }


def is_old(row: dict[str, Any]) -> bool:
    """Whether repetitions were made with other formats of files than this version of vista writes, or unknown ones."""
    return row["repetitions"] > 0 and row.get("formats") != formats()


def broken(row: dict[str, Any]) -> int:
    """The number of broken repetitions; failed calls where these are not judged one by one."""
    return max(sum(row.get("counts", {}).get(what, 0) for what in BROKEN), len(row.get("failures", [])))


def bars(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[int, int, int]]:
    """Kind of fault in BARS -> its repetitions, how many there must be, and how many of them are broken."""
    found = {}
    for what, (faults, least) in BARS.items():
        own = [row for row in rows if row["fault"].startswith(faults)]
        found[what] = sum(row["repetitions"] for row in own), least, sum(map(broken, own))
    return found


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is missing: a line per promise that failed, is not complete or old, and per bar that is not met. A skipped
    promise is not a problem by itself: its row says why it was skipped."""
    found = []
    for row in rows:
        name, outcome = f"{row['promise']}, {row['fault']}", row["outcome"]
        if outcome != "held" and not outcome.startswith("skipped"):
            found.append(f"{name}: {outcome}")
        if is_old(row):
            found.append(f"{name}: older formats")
    return found + [
        f"{what}: {number:,} of at least {least:,}, {failed:,} broken"
        for what, (number, least, failed) in bars(rows).items()
        if number < least or failed
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns whose head begins with a `>` are aligned to the right."""
    lines = [[name.removeprefix(">") for name in head], ["---:" if name[0] == ">" else "---" for name in head], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def origins(rows: Sequence[dict[str, Any]]) -> str:
    """A line per commit, formats, and machine with the promises that were tested there."""
    found = Counter(
        f"commit {row['commit']}; formats: {', '.join(f'{name} {number}' for name, number in row['formats'].items())}"
        f"{' (older than the current formats)' if is_old(row) else ''}; {describe_hardware(row['hardware'])}"
        for row in rows
        if "commit" in row
    )
    minutes = sum(row.get("seconds", 0) for row in rows) / 60
    lines = "".join(f"- {number} of {len(rows)} promises: {origin}\n" for origin, number in found.items())
    return f"{lines}- {minutes:.0f} minutes of all processes together\n"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The page."""
    together = [
        [what, f"{number:,}", f"{least:,}", f"{failed:,}"] for what, (number, least, failed) in bars(rows).items()
    ]
    by_kind = []
    for promise in dict.fromkeys(row["promise"] for row in rows):
        own = [row for row in rows if row["promise"] == promise]
        counts: Counter[str] = sum((Counter(row.get("counts", {})) for row in own), Counter())
        numbers = [sum(row["repetitions"] for row in own), sum(map(broken, own)), *(counts[what] for what in BROKEN)]
        by_kind.append([promise, *(f"{number:,}" for number in numbers)])
    cells = []
    for row in rows:
        done, wanted = row["repetitions"], row["wanted"]
        times = f"{done:,}" if done == wanted else f"{done:,} of {wanted:,}"
        counted = ", ".join(f"{what} {number:,}" for what, number in row.get("counts", {}).items())
        outcome = row["outcome"] + (", older formats" if is_old(row) else "")
        cells.append([row["promise"], row["fault"], times, outcome, counted])
    return (
        f"{HEAD}{origins(rows)}\n{table(['fault', '>repetitions', '>at least', '>broken'], together)}\n"
        f"Repetitions that broke a promise, by kind where each repetition is judged by itself:\n\n"
        f"{table(['promise', '>repetitions', '>broken', *(f'>{what}' for what in BROKEN)], by_kind)}\n"
        "All promises; the last column counts what happened:\n\n"
        f"{table(['promise', 'fault', '>repetitions', 'outcome', 'what happened'], cells)}"
    )


def main() -> int:
    """Write both files and print what is missing; returns 1 if anything is."""
    earlier = [json.loads(line) for line in (RESULTS / "faults.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row_of(promise, WORK, earlier) for promise in import_promises()]
    replace_text(RESULTS / "faults.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    replace_text(RESULTS / "faults.md", markdown(rows))
    print(markdown(rows))
    missing = problems(rows)
    print("\n".join(missing))
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
