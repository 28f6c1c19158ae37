"""Write the promises and their outcomes to docs/results/faults.jsonl and faults.md, from the recorded repetitions.

    python -m tests.faults.table

faults.jsonl has one object per promise and fault. Missing repetitions count as not done; a promise without any keeps
its row. The exit code is 1 if a promise failed, is not complete, or was tested with older formats of files, or if there
are fewer repetitions than BARS require.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.experiments.results import describe_hardware
from tests.faults.harness import BROKEN, PROMISES, Promise, formats, missed_shares, read_record, work_folder
from vista.files import replace_text

RESULTS = Path(__file__).parents[2] / "docs" / "results"
HEAD = """# Promises under faults

Made by `make test-faults`. Faults come from outside of vista: signals, a small file system, a preloaded library that
writes down system calls or makes one fail, changed bytes in files, hostile arguments. A repetition passes only if what
was acknowledged is read byte for byte, and everything else is a miss or a typed error.

{bars}

{summary}
All promises; the last column counts what happened:

| promise | fault | repetitions | outcome | what happened |
|---|---|---:|---|---|
"""


SUMMARY = f"""Repetitions that broke a promise, by kind:

| promise | repetitions | {" | ".join(BROKEN)} |
|---|---:|{"---:|" * len(BROKEN)}
"""


class Bar(NamedTuple):
    """How many repetitions all promises about one kind of fault must have together."""

    fault: str
    """How `Promise.fault` begins."""
    least: int


BARS = {
    "power-loss images": Bar("power cut", 10_000),
    "damaged files": Bar("changed bytes in", 20_000),
    "kills of ranks, actors, streams, servers, and their clients": Bar("beyond one machine, kill -9", 200),
}
"""By what a repetition is. None of them may be broken."""


def import_promises() -> list[Promise]:
    """All promises of this folder."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.faults.{path.stem}")
    return sorted(PROMISES, key=lambda promise: (promise.text, promise.fault))


def row_of(promise: Promise, folder: Path, earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The row of a promise, from its recorded repetitions or else from an earlier table."""
    record = read_record(folder / f"{promise.name}.jsonl")
    if record is None or not record.done:
        for row in earlier:
            if (row["promise"], row["fault"]) == (promise.text, promise.fault) and row["repetitions"]:
                return row
    row: dict[str, Any] = {"promise": promise.text, "fault": promise.fault, "wanted": promise.full, "repetitions": 0}
    row["judged"] = promise.judged
    if record is None:
        return row | {"outcome": "not run"}
    done = promise.each * len(record.done)
    missed = missed_shares(promise, record)
    if record.skipped:
        outcome = f"skipped: {record.skipped}"
    elif record.failures:
        outcome = f"FAILED: {len(record.failures)} of {len(record.done)} calls"
    elif missed and done >= promise.full:
        outcome = f"FAILED: {missed}"
    else:
        outcome = "held" if done >= promise.full else "held so far"
    return row | {
        "repetitions": done,
        "outcome": outcome,
        "counts": dict(record.counts.most_common()),
        "failures": list(record.failures.values()),
        "commit": record.header["commit"],
        "formats": record.header["formats"],
        "hardware": record.header["hardware"],
        "seconds": round(record.seconds, 1),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table with the commits and machines of its numbers."""
    lines = []
    for row in rows:
        done, wanted = row["repetitions"], row["wanted"]
        times = f"{done:,}" if done == wanted else f"{done:,} of {wanted:,}"
        counts = ", ".join(f"{what} {number:,}" for what, number in row.get("counts", {}).items())
        outcome = row["outcome"] + (", older formats" if is_old(row) else "")
        cells = [row["promise"], row["fault"], times, outcome, counts]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    ran = [row for row in rows if "commit" in row]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in ran))
    versions = "; ".join(
        dict.fromkeys(", ".join(f"{name} {number}" for name, number in row["formats"].items()) for row in ran)
    )
    machines = "; ".join(dict.fromkeys(describe_hardware(row["hardware"]) for row in ran))
    seconds = sum(row["seconds"] for row in ran)
    origin = (
        f"Commit {commits}; formats: {versions}; {machines}; {seconds / 60:.0f} minutes of all processes together.\n"
        if ran
        else ""
    )
    return HEAD.format(bars=bars(rows), summary=summary(rows)) + "\n".join(lines) + "\n\n" + origin


def is_old(row: dict[str, Any]) -> bool:
    """Whether a row was made with other formats of files than this version of vista writes."""
    return "formats" in row and row["formats"] != formats()


def own_rows(rows: Sequence[dict[str, Any]], bar: Bar) -> list[dict[str, Any]]:
    """The rows that count for a bar."""
    return [row for row in rows if row["fault"].startswith(bar.fault)]


def repetitions(rows: Sequence[dict[str, Any]]) -> int:
    """The number of repetitions of all rows."""
    return sum(row["repetitions"] for row in rows)


def broken(rows: Sequence[dict[str, Any]]) -> int:
    """The number of broken repetitions: each by itself where they are judged, otherwise each failed call."""
    return sum(
        sum(row["counts"].get(what, 0) for what in BROKEN) if row["judged"] else len(row["failures"])
        for row in rows
        if "counts" in row
    )


def bars(rows: Sequence[dict[str, Any]]) -> str:
    """The sentence that compares the repetitions with BARS."""
    sums = [f"{repetitions(own_rows(rows, bar)):,} {what} (at least {bar.least:,})" for what, bar in BARS.items()]
    number = sum(broken(own_rows(rows, bar)) for bar in BARS.values())
    listed = ", ".join(sums[:-1]) + f", and {sums[-1]}"
    return f"Together, there are {listed}; {number:,} of them broke a promise (at most 0)."


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is missing: a line per promise that failed or is not complete, and per bar that is not met.

    A skipped promise is not a problem by itself: its row says why it was skipped.
    """
    found = [
        f"{row['promise']}, {row['fault']}: {row['outcome']}"
        for row in rows
        if row["outcome"] != "held" and not row["outcome"].startswith("skipped")
    ]
    found += [f"{row['promise']}, {row['fault']}: older formats" for row in rows if is_old(row)]
    for what, bar in BARS.items():
        own = own_rows(rows, bar)
        if repetitions(own) < bar.least or broken(own):
            found.append(f"{what}: {repetitions(own):,} of at least {bar.least:,}, {broken(own):,} broken")
    return found


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the promises whose repetitions are judged one by one (`judging`)."""
    lines = []
    for promise in dict.fromkeys(row["promise"] for row in rows if row["judged"]):
        own = [row for row in rows if row["promise"] == promise]
        counts: Counter[str] = sum((Counter(row.get("counts", {})) for row in own), Counter())
        cells = [promise, f"{sum(row['repetitions'] for row in own):,}", *(f"{counts[what]:,}" for what in BROKEN)]
        lines.append("| " + " | ".join(cells) + " |\n")
    return SUMMARY + "".join(lines)


def main() -> int:
    """Write both files and print what is missing; returns 1 if anything is."""
    earlier = [json.loads(line) for line in (RESULTS / "faults.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row_of(promise, work_folder(), earlier) for promise in import_promises()]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_text(RESULTS / "faults.jsonl", lines)
    replace_text(RESULTS / "faults.md", markdown(rows))
    print(markdown(rows))
    missing = problems(rows)
    print("\n".join(missing))
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
