"""Fit what `vista plan` assumes of requests to the rows of bench_scorer, and write it where it is used.

    python -m scripts.benchmarks.bench_scorer            # on an idle machine: rows "…: one core"
    python -m scripts.benchmarks.fit_planner
    python -m tests.docs.update_output docs/design/scale.md
    python -m pytest tests/planning tests/docs

A request of one user takes REQUEST_MS + C * CANDIDATE_US + tokens * layers * d² * REQUEST_TOKEN_NS on one core. These
three are fitted by least squares of relative errors, none below 0, and rounded to two digits.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarks.benchmark import RESULTS, read_cases
from vista.config import ModelConfig
from vista.planning import capacity_plan

SCALE = RESULTS.parents[0] / "design" / "scale.md"
CASE = re.compile(r"d=(\d+), K=(\d+), (\d+) candidates: one core")
UNITS = {"REQUEST_MS": "ms", "CANDIDATE_US": "µs", "REQUEST_TOKEN_NS": "ns"}
FORMULA = r"(?m)^request +.*$"


def fitted(rows: Sequence[tuple[int, int, int, float]]) -> tuple[dict[str, float], float]:
    """The constants, and the largest relative error of a row.

    Args:
        rows: (d, K, candidates, ms) of requests on one core.

    Raises:
        SystemExit: there are fewer rows than constants.
    """
    if len(rows) < 4:
        raise SystemExit('error: fewer than four rows "…: one core"; run `python -m scripts.benchmarks.bench_scorer`')
    ms = np.array([row[3] for row in rows])
    terms = []
    for dim, seeds, count, _ in rows:
        model = ModelConfig(dim=dim, num_seeds=seeds)
        tokens = seeds + model.tail_len + count
        terms.append([1.0, count * 1e-3, tokens * model.num_target_layers * dim**2 * 1e-6])
    relative = np.array(terms) / ms[:, None]
    used = list(UNITS)
    while True:  # A constant that would be below 0 is 0.
        columns = [list(UNITS).index(name) for name in used]
        found = dict(zip(used, np.linalg.lstsq(relative[:, columns], np.ones(len(rows)), rcond=None)[0], strict=True))
        if min(found.values()) >= 0:
            break
        used.remove(min(found, key=lambda name: found[name]))
    values = {name: float(f"{found.get(name, 0.0):.2g}") for name in UNITS}
    return values, float(np.abs(relative @ np.array(list(values.values())) - 1).max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, and rewrite the constants in vista/planning/capacity_plan.py and docs/design/scale.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", default="AMD EPYC", help="processor of the rows; its name starts with this")
    options = parser.parse_args(arguments)
    rows = []
    for row in read_cases(RESULTS / "bench_scorer.jsonl"):
        match = CASE.fullmatch(row["case"])
        if match and row["hardware"]["cpu"].startswith(options.cpu):
            rows.append((*map(int, match.groups()), row["value"]))
    values, error = fitted(rows)
    code, page = Path(capacity_plan.__file__), SCALE
    text, doc = code.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    for name, value in values.items():
        text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value:g}", text)
        doc = re.sub(rf"(?m)^(\| `{name}`[^|]*\|)[^|]*\|", rf"\1 {value:g} {UNITS[name]} |", doc)
    formula = (
        f"request               {values['REQUEST_MS']:g} ms  +  C × {values['CANDIDATE_US']:g} µs  +  "
        "(K + n + C) × request token × L' d²"
    )
    doc = re.sub(FORMULA, formula, doc)
    code.write_text(text, encoding="utf-8")
    page.write_text(doc, encoding="utf-8")
    print(f"{values}; each of {len(rows)} rows within {100 * error:.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
