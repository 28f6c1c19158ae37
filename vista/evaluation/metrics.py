"""Metrics of ranking and calibration, vectorized in NumPy and computed in float64.

Letters: N labeled rows, G groups, B users (rows of a ranking), V items.

A NaN, a label other than 0 or 1, or a probability outside [0, 1] raises a ValueError that names the argument. A metric
that is undefined for valid input (no rows, only one class) is NaN, so that one unusual task does not end an evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vista.arrays import Floats, Int


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well predicted probabilities agree with observed frequencies."""

    ratio: float
    """Mean prediction over mean label; 1 is perfect, NaN if no label is 1."""
    expected_error: float
    """Expected calibration error: |mean prediction - mean label| per bin, weighted by the bins' rows."""
    bin_predictions: Floats
    """[bins] mean prediction of each non-empty bin, ascending."""
    bin_labels: Floats
    """[bins] mean label of each bin."""
    bin_counts: Int
    """[bins] rows of each bin."""


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Exact area under the ROC curve: the chance that a positive outscores a negative, where ties count half.

    Args:
        labels: [N] of 0 and 1 (or bool).
        scores: [N] real numbers on any scale; infinities are allowed.

    Returns:
        A number in [0, 1]; NaN if one class is absent.

    Raises:
        ValueError: on NaN scores, labels other than 0 and 1, or lengths that differ.
    """
    label_N, score_N = _labels_and_scores(labels, scores, "scores")
    value_G, _ = _auc_by_group(np.zeros(len(label_N), dtype=np.int64), 1, label_N, score_N)
    return float(value_G[0])


def gauc(groups: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> float:
    """AUC within each group (user or session), averaged with the groups' rows as weights.

    Groups whose labels are all equal have no AUC and are left out of the mean, which is NaN if no group remains.

    Args:
        groups: [N] group ids, integers or strings, in any order.
        labels: [N] of 0 and 1.
        scores: [N].

    Raises:
        ValueError: as `auc`.
    """
    label_N, score_N = _labels_and_scores(labels, scores, "scores")
    id_N = np.asarray(groups)
    if id_N.shape != label_N.shape:
        raise ValueError(f"groups: has shape {id_N.shape}, labels {label_N.shape}; pass one group id per row")
    unique_ids, group_N = np.unique(id_N, return_inverse=True)
    value_G, count_G = _auc_by_group(group_N, len(unique_ids), label_N, score_N)
    defined_G = ~np.isnan(value_G)
    weight = count_G[defined_G].sum()
    return float((value_G[defined_G] * count_G[defined_G]).sum() / weight) if weight else float("nan")


def _auc_by_group(group_N: Int, num_groups: int, label_N: Floats, score_N: Floats) -> tuple[Floats, Int]:
    """AUC (NaN if undefined) and rows of each group; group_N has values 0..num_groups-1."""
    order = np.lexsort((score_N, group_N))
    group_N, label_N, score_N = group_N[order], label_N[order], score_N[order]
    count_G = np.bincount(group_N, minlength=num_groups)
    group_start_G = np.cumsum(count_G) - count_G
    # Equal scores within a group share the mean of their 1-based ranks.
    is_start_N = np.ones(len(group_N), dtype=bool)
    is_start_N[1:] = (group_N[1:] != group_N[:-1]) | (score_N[1:] != score_N[:-1])
    start_R = np.flatnonzero(is_start_N)
    length_R = np.diff(np.append(start_R, len(group_N)))
    mid_rank_N = np.repeat(start_R + (length_R + 1) / 2, length_R) - group_start_G[group_N]
    positive_G = np.bincount(group_N, weights=label_N, minlength=num_groups)
    rank_sum_G = np.bincount(group_N, weights=mid_rank_N * label_N, minlength=num_groups)
    pairs_G = positive_G * (count_G - positive_G)
    above_G = rank_sum_G - positive_G * (positive_G + 1) / 2
    return np.divide(above_G, pairs_G, out=np.full(num_groups, np.nan), where=pairs_G > 0), count_G


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of `log_losses`; NaN for no rows."""
    losses = log_losses(labels, probabilities)
    return float(losses.mean()) if len(losses) else float("nan")


def log_losses(labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Binary cross-entropy of each row in nats, float64 [N].

    Probabilities are clipped to [eps, 1 - eps], where eps is the resolution of their dtype (as in scikit-learn). So one
    float32 sigmoid rounded to 1 does not make the mean infinite.

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].

    Raises:
        ValueError: on NaN, on values out of range, or lengths that differ.
    """
    label_N, probability_N = _labels_and_probabilities(labels, probabilities)
    return -np.where(label_N == 1, np.log(probability_N), np.log1p(-probability_N))


def normalized_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Log loss over the entropy of the labels' own base rate (He et al., ADKDD 2014).

    The best constant prediction has 1; smaller is better. Arguments and errors as in `log_losses`. NaN if one class is
    absent, because then the entropy is 0.
    """
    loss = log_loss(labels, probabilities)
    label_N = np.asarray(labels).astype(np.float64)
    base_rate = float(label_N.mean()) if len(label_N) else 0.0
    if not 0 < base_rate < 1:
        return float("nan")
    return loss / float(-(base_rate * np.log(base_rate) + (1 - base_rate) * np.log1p(-base_rate)))


def calibration(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 20) -> Calibration:
    """Ratio of mean prediction to mean label, and the expected calibration error over bins of equal mass.

    Bins end at quantiles of the predictions: clicks are rare, and bins of equal width would put nearly all rows into
    the first. Equal predictions always share a bin, so there may be fewer than num_bins.

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        num_bins: largest number of bins.

    Raises:
        ValueError: as `log_loss`, or if num_bins < 1.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins: must be at least 1, got {num_bins}")
    label_N, _ = _labels_and_probabilities(labels, probabilities)
    probability_N = np.asarray(probabilities).astype(np.float64)
    if not len(label_N):
        return Calibration(float("nan"), float("nan"), np.empty(0), np.empty(0), np.empty(0, dtype=np.int64))
    edges = np.unique(np.quantile(probability_N, np.arange(1, num_bins) / num_bins, method="inverted_cdf"))
    bin_N = np.searchsorted(edges, probability_N, side="left")
    count = np.bincount(bin_N)
    kept = count > 0
    prediction = np.bincount(bin_N, weights=probability_N)[kept] / count[kept]
    label = np.bincount(bin_N, weights=label_N)[kept] / count[kept]
    error = float((np.abs(prediction - label) * count[kept]).sum() / len(label_N))
    mean_label = float(label_N.mean())
    ratio = float(probability_N.mean()) / mean_label if mean_label else float("nan")
    return Calibration(ratio, error, prediction, label, count[kept])


def ranks_of_targets(
    scores: NDArray[np.floating[Any]],
    target: Int,
    excluded: tuple[Int, Int] | None = None,
    *,
    scores_per_chunk: int = 1 << 22,
) -> Int:
    """0-based rank of each row's target among all items of its row: full ranking, no sampling.

    A target ranks in the middle of its ties: of the other items with exactly its score, half (rounded up) count as
    before it. So a constant score gives the middle rank, not the top.

    Args:
        scores: [B, V] of any float dtype; read in chunks of rows, not changed.
        target: int64 [B] columns.
        excluded: (values, offsets): the columns values[offsets[b]:offsets[b+1]] are left out of row b's list. Repeats
            are allowed. The target always stays in, even if it is excluded (a user may interact with an item again).
        scores_per_chunk: number of scores that are compared at once, which bounds the temporary memory.

    Returns:
        [B] int64.

    Raises:
        ValueError: on NaN scores, with the row.
    """
    num_rows, num_items = scores.shape
    excluded_row, excluded_column = _excluded_cells(excluded, target, num_items)
    rank_B = np.empty(num_rows, dtype=np.int64)
    step = max(1, scores_per_chunk // max(num_items, 1))
    for start in range(0, num_rows, step):
        chunk = scores[start : start + step]
        rows = len(chunk)
        invalid = np.flatnonzero(np.isnan(chunk.max(axis=1)))
        if len(invalid):
            raise ValueError(f"scores: row {start + int(invalid[0])} holds NaN and cannot be ranked")
        own = chunk[np.arange(rows), target[start : start + rows]]
        before = np.count_nonzero(chunk > own[:, None], axis=1)
        equal = np.count_nonzero(chunk == own[:, None], axis=1) - 1
        low, high = np.searchsorted(excluded_row, [start, start + rows])
        row = excluded_row[low:high] - start
        cell = chunk[row, excluded_column[low:high]]
        before -= np.bincount(row[cell > own[row]], minlength=rows)
        equal -= np.bincount(row[cell == own[row]], minlength=rows)
        rank_B[start : start + rows] = before + (equal + 1) // 2
    return rank_B


def top_items(
    scores: NDArray[np.floating],
    target: Int,
    k: int,
    excluded: tuple[Int, Int] | None = None,
    *,
    scores_per_chunk: int = 1 << 22,
) -> Int:
    """The first k items of each row's list, in the lists that `ranks_of_targets` uses.

    Args:
        scores: [B, V], without NaN; not changed.
        target: int64 [B] columns, which stay in even if they are excluded; -1 for none.
        k: list length, at least 1.
        excluded: as in `ranks_of_targets`.
        scores_per_chunk: as in `ranks_of_targets`.

    Returns:
        int64 [B, min(k, V)] columns in no order; -1 if a list is shorter. Ties for the last place are broken
        arbitrarily, but the same way every time.
    """
    num_rows, num_items = scores.shape
    excluded_row, excluded_column = _excluded_cells(excluded, target, num_items)
    k = min(k, num_items)
    top_BK = np.empty((num_rows, k), dtype=np.int64)
    step = max(1, scores_per_chunk // max(num_items, 1))
    for start in range(0, num_rows, step):
        chunk = scores[start : start + step].copy()
        low, high = np.searchsorted(excluded_row, [start, start + len(chunk)])
        left_out = np.zeros(chunk.shape, dtype=bool)
        left_out[excluded_row[low:high] - start, excluded_column[low:high]] = True
        chunk[left_out] = -np.inf
        top = np.argpartition(chunk, num_items - k, axis=1)[:, num_items - k :]
        top_BK[start : start + step] = np.where(np.take_along_axis(left_out, top, axis=1), -1, top)
    return top_BK


def _excluded_cells(excluded: tuple[Int, Int] | None, target: Int, num_items: int) -> tuple[Int, Int]:
    """Rows (ascending) and columns of the distinct excluded cells, without the targets' cells."""
    if excluded is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    value, offset = excluded
    row = np.repeat(np.arange(len(target)), np.diff(offset))
    kept = value != target[row]
    return np.divmod(np.unique(row[kept] * num_items + value[kept]), max(num_items, 1))


def _labels_and_scores(labels: ArrayLike, scores: ArrayLike, name: str) -> tuple[Floats, Floats]:
    label_N, score_N = np.asarray(labels).astype(np.float64), np.asarray(scores).astype(np.float64)
    if label_N.ndim != 1 or label_N.shape != score_N.shape:
        raise ValueError(
            f"{name}: has shape {score_N.shape}, labels {label_N.shape}; both need one dimension and the same length"
        )
    odd = np.flatnonzero((label_N != 0) & (label_N != 1))
    if len(odd):
        raise ValueError(
            f"labels: row {odd[0]} is {label_N[odd[0]]}, but labels are 0 or 1; leave out rows with unknown labels"
        )
    missing = np.flatnonzero(np.isnan(score_N))
    if len(missing):
        raise ValueError(
            f"{name}: row {missing[0]} is NaN ({len(missing)} in all); leave out such rows, or fix what makes them NaN"
        )
    return label_N, score_N


def _labels_and_probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats]:
    """Checked labels, and probabilities clipped away from 0 and 1 by the resolution of their dtype."""
    given = np.asarray(probabilities)
    label_N, probability_N = _labels_and_scores(labels, given, "probabilities")
    outside = np.flatnonzero((probability_N < 0) | (probability_N > 1))
    if len(outside):
        raise ValueError(
            f"probabilities: row {outside[0]} is {probability_N[outside[0]]}, outside [0, 1]; apply a sigmoid to logits"
        )
    eps = float(np.finfo(given.dtype if given.dtype.kind == "f" else np.float64).eps)
    return label_N, np.clip(probability_N, eps, 1 - eps)


# Errors over users of metrics of all rows: the rows of a user are not independent, and users have different numbers of
# them. Each of G users gets a value whose mean is the metric, and whose spread is what the user's rows do to the metric
# (the linear term of its expansion). So the mean, its standard error, and paired differences of models are those of any
# other metric per user. For AUC these are the errors for clustered data of Obuchowski (Biometrics 1997).


def log_loss_values(users: Int, labels: ArrayLike, probabilities: ArrayLike) -> Floats:
    """Values float64 [G] per user whose mean is `log_loss` over all rows.

    Args:
        users: [N] of 0 … G-1, each at least once.
        labels, probabilities: as in `log_loss`.
    """
    loss_N = log_losses(labels, probabilities)
    mean, count_G = loss_N.mean(), np.bincount(users)
    values: Floats = mean + (np.bincount(users, loss_N) - count_G * mean) * (len(count_G) / len(loss_N))
    return values


def auc_values(users: Int, labels: ArrayLike, scores: ArrayLike) -> Floats:
    """Values float64 [G] per user whose mean is `auc` over all rows; NaN if one class is absent.

    Args:
        users: [N] of 0 … G-1, each at least once.
        labels, scores: as in `auc`.
    """
    label_N, score_N = _labels_and_scores(labels, scores, "scores")
    is_true = label_N == 1
    true, false = np.sort(score_N[is_true]), np.sort(score_N[~is_true])
    num_users = int(users.max()) + 1
    if not len(true) or not len(false):
        return np.full(num_users, np.nan)

    def share_below(ranked: Floats, own: Floats) -> Floats:
        """Of each of `own`, the share of `ranked` below it; equal scores count half."""
        places = np.searchsorted(ranked, own, "left") + np.searchsorted(ranked, own, "right")
        return np.asarray(places / (2 * len(ranked)))

    wins = np.empty(len(score_N))  # of each row over all rows of the other class
    wins[is_true], wins[~is_true] = share_below(false, score_N[is_true]), 1 - share_below(true, score_N[~is_true])
    mean = wins[is_true].mean()
    weight = np.where(is_true, 1 / len(true), 1 / len(false))
    values: Floats = mean + num_users * np.bincount(users, (wins - mean) * weight)
    return values


def mean_and_error(values: Floats) -> tuple[float, float]:
    """Mean over the users that have a value, and its standard error; NaN without enough users."""
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else float("nan")
    return mean, float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
