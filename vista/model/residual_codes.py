"""Vectors become a few codes, one per level of `Codebooks`. N vectors, L levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats
from vista.model.codebooks import Codebooks, distinct_rows


@dataclass(frozen=True, slots=True)
class ResidualCodes:
    """The codes of vectors, and how well they stand for them.

    codes: int32 [N, L]; errors: by level, the mean squared distance between the vectors and the sums of their centroids
    so far, as a share of the variance of the vectors; num_distinct: the number of distinct vectors.
    """

    codes: NDArray[np.int32]
    errors: list[float]
    num_distinct: int

    @classmethod
    def of(cls, vectors: Float32s, codebooks: Codebooks) -> ResidualCodes:
        """The codes of vectors [N, D], finite, N at least 1.

        Raises:
            MissingDependencyError: if faiss is not installed.
        """
        codes, squares = [], []
        scaled = codebooks.scaled(vectors)
        variance = _mean_square(scaled - scaled.mean(axis=0))
        for of_level, residuals in codebooks.assign(vectors):
            codes.append(of_level.astype(np.int32))
            squares.append(_mean_square(residuals))
        errors = [square / variance if variance else 0.0 for square in squares]
        return cls(np.stack(codes, 1), errors, len(distinct_rows(vectors)))

    def usage(self) -> list[tuple[int, float]]:
        """By level, the number of codes that are used and their perplexity, the exponential of their entropy."""
        return [(len(counts), _perplexity(counts)) for counts in map(_counts, self.codes.T)]

    def groups(self) -> NDArray[np.int64]:
        """The number of vectors of each distinct full code."""
        return np.unique(self.codes, axis=0, return_counts=True)[1]


def _counts(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.unique(codes, return_counts=True)[1]


def _perplexity(counts: NDArray[np.int64]) -> float:
    shares: Floats = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _mean_square(vectors: Float32s) -> float:
    """Mean squared length."""
    return float(np.einsum("nd,nd->n", vectors, vectors).mean(dtype=np.float64))
