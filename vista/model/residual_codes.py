"""Residual k-means: a vector becomes a few codes, one per level (the semantic ids of Rajput et al. 2023, TIGER).

Level 1 assigns each vector to the nearest of K centroids; level l does the same with what is left of the vectors after
subtracting the centroids of the levels before. Letters: N vectors, D their length, L levels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats
from vista.errors import MissingDependencyError

_ITERATIONS = 25
_DIM_STEPS = 10
"""K-means starts with few principal components and adds more in this many steps, as in faiss.ResidualQuantizer. In all
dimensions at once, random starting centroids of residuals attract few vectors but themselves."""


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
    def learn(cls, vectors: Float32s, *, levels: int, num_codes: int, seed: int) -> ResidualCodes:
        """Learn the codes of vectors.

        The result depends on the vectors, the seed, and the processor's vector instructions, but not on the number of
        threads. K-means is trained on at most 256 vectors per code, chosen by the seed.

        Args:
            vectors: [N, D], finite, N at least 1.
            levels: L.
            num_codes: K, the most codes per level. Each of K or fewer different vectors has a code of its own.
            seed: of k-means.

        Raises:
            MissingDependencyError: if faiss is not installed.
        """
        faiss = _faiss()
        # Squares of large numbers must not overflow. A power of two changes no digit.
        residuals = np.ascontiguousarray(np.ldexp(vectors, -np.frexp(np.abs(vectors).max())[1]))
        variance = _mean_square(residuals - residuals.mean(axis=0))
        num_distinct = len(_distinct(residuals)[0])
        codes = np.empty((len(vectors), levels), np.int32)
        errors = []
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            for level in range(levels):
                first, of_row = _distinct(residuals)
                if len(first) <= num_codes:
                    codes[:, level], centroids = of_row, residuals[first]
                else:
                    codes[:, level], centroids = _clusters(faiss, residuals, num_codes, seed)
                residuals -= centroids[codes[:, level]]
                errors.append(_mean_square(residuals) / variance if variance else 0.0)
        finally:
            faiss.omp_set_num_threads(threads)
        return cls(codes, errors, num_distinct)

    def usage(self) -> list[tuple[int, float]]:
        """By level, the number of codes that are used and their perplexity, the exponential of their entropy."""
        return [(len(counts), _perplexity(counts)) for counts in map(_counts, self.codes.T)]

    def groups(self) -> NDArray[np.int64]:
        """The number of vectors of each distinct full code."""
        return np.unique(self.codes, axis=0, return_counts=True)[1]


def _faiss() -> Any:
    """The package faiss."""
    logging.getLogger("faiss").setLevel(logging.WARNING)
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            f"codes of items need faiss ({error}); install it with: pip install 'vista-recsys[tokens]'"
        ) from error
    return faiss


def _distinct(vectors: Float32s) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows [U] of the first of each distinct vector, and for each of the N vectors which of the U it is."""
    # Rows as bytes are sorted faster than rows of numbers. Adding 0 makes -0 the same as 0.
    as_bytes = (vectors + np.float32(0)).view(f"V{vectors.itemsize * vectors.shape[1]}")[:, 0]
    _, first, of_row = np.unique(as_bytes, return_index=True, return_inverse=True)
    return first, of_row


def _clusters(faiss: Any, vectors: Float32s, num_codes: int, seed: int) -> tuple[NDArray[np.int64], Float32s]:
    """The codes int64 [N] of more than K distinct vectors, and the centroids [K, D]."""
    num_vectors, dim = vectors.shape
    # Fewer vectors do not have as many principal components.
    steps = {"progressive_dim_steps": _DIM_STEPS} if num_vectors >= dim else {}
    # With fewer than 39 points per centroid, faiss would warn.
    kmeans = faiss.Kmeans(dim, num_codes, niter=_ITERATIONS, seed=seed, min_points_per_centroid=1, **steps)
    kmeans.train(vectors)
    index = faiss.IndexFlatL2(dim)
    index.add(kmeans.centroids)
    return index.search(vectors, 1)[1][:, 0], kmeans.centroids


def _counts(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.unique(codes, return_counts=True)[1]


def _perplexity(counts: NDArray[np.int64]) -> float:
    shares: Floats = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _mean_square(vectors: Float32s) -> float:
    """Mean squared length."""
    return float(np.einsum("nd,nd->n", vectors, vectors).mean(dtype=np.float64))
