"""A paired comparison of two models on the same users.

Letters: N users.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vista.arrays import Floats, Int
from vista.config import CompareConfig
from vista.errors import ConfigError, shown
from vista.evaluation.metrics import auc, mean_and_error
from vista.files import read_limited, replace_file
from vista.log.ingest.source_parser import npz_limit
from vista.progress_bar import progress_bar
from vista.text_table import text_table

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PerUserMetrics:
    """Metrics of N users, all of one question."""

    users: NDArray[Any]
    """[N] ids as in the log."""
    values: dict[str, Floats]
    """{metric: float64 [N]}; NaN where a user has no label that the metric needs."""
    question: dict[str, Any]
    """What was asked, as JSON values. Two evaluations can be compared if all of it is equal."""

    def means(self) -> dict[str, float]:
        """{metric: mean over the users that have a value}."""
        return {name: mean_and_error(values)[0] for name, values in self.values.items()}

    def standard_errors(self) -> dict[str, float]:
        """{metric: standard error of its mean over users}."""
        return {name: mean_and_error(values)[1] for name, values in self.values.items()}

    def save(self, path: Path) -> None:
        """Write them as an .npz file of four arrays: users, names, values [metrics, N], and the question as JSON."""
        out = io.BytesIO()
        np.savez(
            out,
            users=np.array(self.users.tolist()),
            names=np.array(list(self.values)),
            values=np.stack(list(self.values.values())),
            question=np.array(json.dumps(self.question)),
        )
        replace_file(path, out.getvalue())

    @classmethod
    def load(cls, path: Path) -> PerUserMetrics:
        """Read what `save` wrote. Raises ConfigError if the file is missing, damaged, or of another kind, or its arrays
        would take too much memory."""
        try:
            content = read_limited(path, MAX_FILE_BYTES)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); run `vista evaluate` with `out`") from None
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                size, limit = sum(member.file_size for member in archive.infolist()), npz_limit(len(content))
            if size > limit:  # checked before anything is decompressed
                raise ValueError(f"its arrays hold {size:,} bytes, but at most {limit:,} are read from such a file")
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                if (damaged := file.zip.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} does not match")
                arrays = [file[name] for name in ("users", "names", "values", "question")]
            if not all(isinstance(array, np.ndarray) for array in arrays):  # np.load returns the bytes of other files
                raise ValueError("a member is not an array")
            users, names, values, question = *arrays[:3], json.loads(str(arrays[3]))
            if values.shape != (len(names), len(users)) or values.dtype != np.float64 or not isinstance(question, dict):
                raise ValueError(f"values of shape {values.shape} for {len(names)} metrics of {len(users)} users")
            if users.ndim != 1 or names.ndim != 1 or names.dtype.kind != "U":
                raise ValueError("users or names of another type")
        # zipfile, its decompressors and NumPy have no common list of errors for damaged bytes: zlib.error is one.
        except Exception as error:
            raise ConfigError(
                f"{path}: does not hold metrics per user ({error}); run `vista evaluate` again"
            ) from error
        return cls(users, dict(zip(names.tolist(), values, strict=True)), question)


def mean_cell(values: Floats) -> str:
    """Mean and standard error over users as a cell of a table."""
    return "{:.4f} ± {:.4f}".format(*mean_and_error(values))


def per_user_path(out: str | Path) -> Path:
    """The file of the metrics per user of an evaluation whose `out` is given."""
    return Path(f"{out}.npz")


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
        """Compare two models. The runs of one model (its seeds) are averaged per user first. Raises ConfigError if the
        runs differ in their question, users or labels, or have no metric in common."""
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
        rows = []
        for name, row in self.differences.items():
            low, high = row.interval
            means = [f"{row.mean_a:.4f}", f"{row.mean_b:.4f}", f"{row.difference:+.4f}"]
            rows.append([name, str(row.num_users), *means, f"{low:+.4f} to {high:+.4f}", f"{row.p:.4f}"])
        return text_table(["metric", "users", "a", "b", "b - a", "95 % interval", "p"], rows)


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


def compare(config: CompareConfig) -> Comparison:
    """Read the metrics of each user and compare them. Raises ConfigError if no file is named for a side, a file is
    missing or damaged, or the evaluations differ in their question, users or labels."""
    for key in ("a", "b"):
        if not getattr(config, key):
            raise ConfigError(
                f"{key}: name at least one file that `vista evaluate` wrote, such as {key}=[metrics.json]"
            )
    a, b = ([PerUserMetrics.load(per_user_path(path)) for path in side] for side in (config.a, config.b))
    return Comparison.of(a, b)


ERRORS_APART = 2
"""Standard errors of a difference that is ahead or behind; a smaller one is level."""
LEVEL = "level: within two standard errors, which does not mean equal"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error, which is NaN where there are too few users."""

    value: float
    error: float = float("nan")

    @classmethod
    def of_users(cls, values: Floats) -> Estimate:
        """Mean of a value per user; NaN stands for users without one."""
        return cls(*mean_and_error(values))

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval."""
        return NORMAL_95 * self.error

    def ends(self) -> tuple[float, float]:
        """Ends of the 95 % interval."""
        return self.value - self.half_width, self.value + self.half_width

    @property
    def standing(self) -> str:
        """Of a difference: ahead or behind by two standard errors, else level; unknown without an error."""
        if not math.isfinite(self.error):
            return "unknown"
        if abs(self.value) <= ERRORS_APART * self.error:
            return "level"
        return "ahead" if self.value > 0 else "behind"

    def text(self, *, signed: bool = False) -> str:
        """As a cell of a table, with the standard error: 0.7863 ± 0.0041; a dash if it is not defined."""
        if not math.isfinite(self.value):
            return "–"
        value = f"{self.value:+.4f}" if signed else f"{self.value:.4f}"
        return f"{value} ± {self.error:.4f}" if math.isfinite(self.error) else value


NUM_DRAWS = 200
"""Draws of users with replacement, for the standard error of an AUC."""


def drawn_aucs(
    user: Int, label: NDArray[np.floating], scores: Mapping[str, NDArray[np.floating]], *, seed: int = 0
) -> dict[str, Floats]:
    """AUC of each predictor in each draw of users with replacement: {name: float64 [D]}; NaN where a class is absent.

    Impressions of one user are not independent, so users are drawn, each with all impressions, and all predictors see
    the same draws. Letters: N impressions, D draws.

    Args:
        user: int64 [N] in any numbering.
        label: [N] of 0 and 1.
        scores: {name: [N]}.
    """
    users, owner = np.unique(user, return_inverse=True)
    rng = np.random.default_rng(seed)
    weight = np.stack(
        [np.bincount(rng.integers(0, len(users), len(users)), minlength=len(users)) for _ in range(NUM_DRAWS)]
    )
    with progress_bar(total=len(scores) * NUM_DRAWS, desc="intervals", unit="draw", leave=False) as bar:
        return {name: _weighted_aucs(owner, label, np.asarray(score), weight, bar) for name, score in scores.items()}


def _weighted_aucs(
    owner: Int, label: NDArray[np.floating], score: NDArray[np.floating], weight: Int, bar: tqdm[Any]
) -> Floats:
    """AUC where the impressions of user u count weight[d, u] times: float64 [D]; the bar moves once per draw."""
    order = np.argsort(score, kind="stable")
    owner, label, score = owner[order], label[order].astype(np.float64), score[order]
    starts = np.flatnonzero(np.append(True, score[1:] != score[:-1]))  # of equal scores
    out = np.full(len(weight), np.nan)
    for draw, own in enumerate(weight):
        count = own[owner].astype(np.float64)
        positive = np.add.reduceat(count * label, starts)
        negative = np.add.reduceat(count, starts) - positive
        below = np.cumsum(negative) - negative / 2  # equal scores count half
        pairs = positive.sum() * negative.sum()
        if pairs > 0:
            out[draw] = (positive * below).sum() / pairs
        bar.update()
    return out


@dataclass(frozen=True)
class AucMeasure:
    """AUC of one task of several predictors over N impressions, with intervals over users."""

    task: str
    user: Int
    """int64 [N] rows of the log."""
    seen: Int
    """int64 [N] events before the impression."""
    item: Int | None
    """int64 [N] candidates, rows of the log."""
    label: NDArray[np.float32]
    """[N] of 0 and 1."""
    probabilities: dict[str, NDArray[np.floating]]
    """{predictor: [N]}; the run of a report comes first."""

    @property
    def title(self) -> str:
        """Name of the metric and of what it is measured on."""
        return f"AUC of {self.task}"

    @property
    def metric(self) -> str:
        """Name of the metric alone, as in tables."""
        return "AUC"

    @property
    def names(self) -> list[str]:
        """The predictors."""
        return list(self.probabilities)

    @cached_property
    def _draws(self) -> dict[str, Floats]:
        """`drawn_aucs` over all impressions, which take seconds."""
        return drawn_aucs(self.user, self.label, self.probabilities)

    def estimates(self, part: NDArray[np.bool_] | None = None) -> dict[str, Estimate]:
        """AUC of each predictor over a part of the impressions, bool [N], or all; NaN where a class is absent."""
        chosen = slice(None) if part is None else part
        label = self.label[chosen]
        if len(np.unique(label)) < 2:
            return dict.fromkeys(self.names, Estimate(float("nan")))
        scores = {name: each[chosen] for name, each in self.probabilities.items()}
        draws = self._draws if part is None else drawn_aucs(self.user[chosen], label, scores)
        return {name: Estimate(auc(label, scores[name]), _spread(draws[name])) for name in scores}

    def gains(self) -> dict[str, Estimate]:
        """Differences of the first predictor, whose errors come from draws of the same users."""
        own, *others = self.names
        return {name: self.difference(own, name) for name in others}

    def difference(self, one: str, other: str) -> Estimate:
        """The AUC of one predictor minus that of another one."""
        value = auc(self.label, self.probabilities[one]) - auc(self.label, self.probabilities[other])
        return Estimate(value, _spread(self._draws[one] - self._draws[other]))


def _spread(draws: Floats) -> float:
    """Standard deviation of the draws, which is the standard error; NaN without draws."""
    known = draws[np.isfinite(draws)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")


@dataclass(frozen=True, slots=True)
class MeanMeasure:
    """Mean of a metric of several predictors over N users. It is used as `AucMeasure` is."""

    title: str
    metric: str
    user: Int
    seen: Int
    item: Int | None
    """int64 [N] labels; None if a user has several."""
    values: dict[str, Floats]
    """{predictor: float64 [N]}; NaN for users without a label."""

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def estimates(self, part: NDArray[np.bool_] | None = None) -> dict[str, Estimate]:
        """Mean of each predictor over users."""
        chosen = slice(None) if part is None else part
        return {name: Estimate.of_users(each[chosen]) for name, each in self.values.items()}

    def gains(self) -> dict[str, Estimate]:
        """Mean difference per user of the first predictor and each other one."""
        own, *others = self.names
        return {name: self.difference(own, name) for name in others}

    def difference(self, one: str, other: str) -> Estimate:
        """Mean difference per user of two predictors."""
        return Estimate.of_users(self.values[one] - self.values[other])


Measure = AucMeasure | MeanMeasure
