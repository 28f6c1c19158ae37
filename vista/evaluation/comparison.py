"""A paired comparison of two models on the same users.

Letters: N users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vista.arrays import Floats
from vista.errors import ConfigError, shown
from vista.evaluation.per_user_metrics import PerUserMetrics, mean_and_error
from vista.progress_bar import progress_bar
from vista.text_table import fitted_table

NUM_FLIPS = 9_999
"""Random signs of the differences per test, so that p is a multiple of 1 / 10,000."""
SIGNS_PER_CHUNK = 1 << 24
NORMAL_95 = 1.959964
"""Quantile of the normal distribution for an interval of 95 %."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """One metric of two models, over the users who have a value."""

    num_users: int
    mean_a: float
    mean_b: float
    difference: float
    """Mean over users of the value of b minus that of a."""
    standard_error: float
    """Of the difference."""
    p: float
    """Sign-flip test: the share of random signs with which the mean difference would be at least as far from 0."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference."""
        half = NORMAL_95 * self.standard_error
        return self.difference - half, self.difference + half


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of all metrics that two models have, by name."""

    differences: dict[str, PairedDifference]

    @classmethod
    def of(cls, a: Sequence[PerUserMetrics], b: Sequence[PerUserMetrics], *, seed: int = 0) -> Comparison:
        """Compare two models. The runs of one model (its seeds) are averaged per user first.

        Raises:
            ConfigError: the runs differ in their question, users or labels, or have no metric in common.
        """
        runs = [*a, *b]
        for run in runs[1:]:
            _require_same_question(runs[0], run)
        names = [name for name in a[0].values if all(name in run.values for run in runs)]
        if not names:
            raise ConfigError("a and b: have no metric in common; evaluate both with the same top_k")
        of_a, of_b = (np.mean([[run.values[name] for name in names] for run in side], axis=0) for side in (a, b))
        difference = of_b - of_a  # [metrics, N]
        p = _sign_flip_p(difference, seed)
        rows = {}
        for index, name in enumerate(names):
            mean, error = mean_and_error(difference[index])
            known = ~np.isnan(difference[index])
            mean_a, mean_b = (mean_and_error(side[index][known])[0] for side in (of_a, of_b))
            rows[name] = PairedDifference(int(known.sum()), mean_a, mean_b, mean, error, p[index])
        return cls(rows)

    def __str__(self) -> str:
        width = max(20, *(len(name) + 1 for name in self.differences))
        rows = [["metric", "users", "a", "b", "b - a", "95 % interval", "p"]]
        for name, row in self.differences.items():
            low, high = row.interval
            means = [f"{row.mean_a:.4f}", f"{row.mean_b:.4f}", f"{row.difference:+.4f}"]
            rows.append([name, str(row.num_users), *means, f"{low:+.4f} to {high:+.4f}", f"{row.p:.4f}"])
        lines = ["{:<{width}}{:>7}{:>9}{:>9}{:>10} {:>20}{:>8}".format(*row, width=width) for row in rows]
        return fitted_table(lines, rows[0], rows[1:])


def _require_same_question(one: PerUserMetrics, other: PerUserMetrics) -> None:
    for key in sorted(one.question.keys() | other.question.keys()):
        values = [run.question.get(key) for run in (one, other)]
        if values[0] == values[1]:
            continue
        if key == "cases":
            raise ConfigError(
                "a and b: were evaluated on other users or labels; evaluate both on the same log, with models of the "
                "same data split"
            )
        raise ConfigError(
            f"a and b: {key} is {shown(values[0])} in one evaluation and {shown(values[1])} in another; evaluate both "
            f"with the same {key}"
        )


def _sign_flip_p(difference: Floats, seed: int) -> list[float]:
    """Two-sided p of each row [metrics, N], with the same signs for all rows; NaN counts as no difference."""
    values = np.nan_to_num(difference).T
    observed = np.abs(values.sum(0)) * (1 - 1e-12)  # sums in another order differ in the last bits
    rng = np.random.default_rng(seed)
    extreme = np.zeros(len(observed), np.int64)
    step = max(1, SIGNS_PER_CHUNK // max(len(values), 1))
    for start in progress_bar(range(0, NUM_FLIPS, step), desc="test", unit="batch"):
        signs = rng.integers(0, 2, (min(step, NUM_FLIPS - start), len(values)), np.int8) * 2.0 - 1
        extreme += (np.abs(signs @ values) >= observed).sum(0)
    return ((1 + extreme) / (1 + NUM_FLIPS)).tolist()  # type: ignore[no-any-return]
