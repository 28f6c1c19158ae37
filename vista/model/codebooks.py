"""Codebooks of residual k-means, by which vectors become semantic ids (Rajput et al. 2023, TIGER).

Level 1 assigns each vector to the nearest of its centroids; level l does the same with what is left of the vectors
after subtracting the centroids of the levels before. Letters: N vectors, D their length, L levels, K_l centroids of
level l.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vista.arrays import Float32s, Floats
from vista.errors import DataError
from vista.files import checked_path, read_limited, replace_file
from vista.installation import require_module
from vista.progress_bar import progress_bar

MAX_LEVELS, MAX_CODES = 16, 1 << 16
MAX_BYTES = 1 << 30
"""Of a file of codebooks."""
_ITERATIONS = 25
_DIM_STEPS = 10
"""K-means starts with few principal components and adds more in this many steps, as in faiss.ResidualQuantizer. In all
dimensions at once, random starting centroids of residuals attract few vectors but themselves."""
_LARGEST = np.float32(1e15)
_NEVER = 1 << 30


@dataclass(frozen=True, slots=True)
class Codebooks:
    """The centroids of L levels. centroids: by level, float32 [K_l, D], divided by 2^exponent; num_codes: the most
    codes per level that were asked for."""

    centroids: list[Float32s]
    exponent: int
    num_codes: int

    @property
    def dim(self) -> int:
        """D."""
        return int(self.centroids[0].shape[1])

    @classmethod
    def learn(cls, vectors: Float32s, *, levels: int, num_codes: int, seed: int = 0) -> Codebooks:
        """Learn the centroids from vectors.

        The result depends on the vectors, the seed, and the processor's vector instructions, but not on the number of
        threads. K-means is trained on at most 256 vectors per code, chosen by the seed.

        Args:
            vectors: [N, D], finite, N at least 1.
            levels: L.
            num_codes: the most codes per level. Each of as many or fewer different vectors has a code of its own.
            seed: of k-means.

        Raises:
            MissingDependencyError: if faiss is not installed.
        """
        exponent = int(np.frexp(np.abs(vectors).max())[1])  # so that no number is above 1
        residuals, centroids = np.ldexp(vectors, -exponent), []
        with _single_thread() as faiss:
            for _ in progress_bar(range(levels), desc="learn codes", unit="level"):
                first = distinct_rows(residuals)
                few = len(first) <= num_codes
                centroids.append(residuals[first] if few else _clusters(faiss, residuals, num_codes, seed))
                residuals -= centroids[-1][_nearest(faiss, residuals, centroids[-1])]
        return cls(centroids, exponent, num_codes)

    def scaled(self, vectors: Float32s) -> Float32s:
        """Vectors divided as the centroids are, which changes no digit. Numbers that are far larger than those of the
        vectors that the centroids were learned from are clipped, because their squares would overflow."""
        return np.clip(np.ldexp(vectors, -self.exponent), -_LARGEST, _LARGEST)

    def assign(self, vectors: Float32s) -> Iterator[tuple[NDArray[np.int64], Float32s]]:
        """By level, the codes int64 [N] of vectors, and what is left of the `scaled` vectors [N, D].

        The codes of a vector do not depend on the other vectors.

        Args:
            vectors: [N, D], finite.
        """
        residuals = self.scaled(vectors)
        with _single_thread() as faiss:
            for centroids in self.centroids:
                codes = _nearest(faiss, residuals, centroids)
                residuals = residuals - centroids[codes]
                yield codes, residuals

    def save(self, file: Path) -> None:
        """Write them atomically, replacing an older file. Raises OSError."""
        tensors = {f"level_{number}": level for number, level in enumerate(self.centroids, 1)}
        tensors |= {"exponent": np.array(self.exponent), "num_codes": np.array(self.num_codes)}
        replace_file(file, save(tensors))

    @classmethod
    def load(cls, file: str) -> Codebooks:
        """Read a file of `save`. Raises DataError if it is missing, damaged, or not a file of codebooks."""
        path = checked_path(file, DataError)
        try:
            tensors = load(read_limited(path, MAX_BYTES))
            exponent, num_codes = (int(tensors.pop(name)) for name in ("exponent", "num_codes"))
            centroids = [tensors.pop(f"level_{number}") for number in range(1, len(tensors) + 1)]
            if not _fit(centroids, exponent, num_codes):
                raise ValueError("its levels are not centroids of one length")
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise DataError(
                f"{path}: no readable codebooks ({error}); name a file that `vista items tokenize` wrote"
            ) from error
        return cls(centroids, exponent, num_codes)


def distinct_rows(vectors: Float32s) -> NDArray[np.int64]:
    """The row of the first occurrence of each distinct vector [N, D]."""
    # Rows as bytes are sorted faster than rows of numbers. Adding 0 makes -0 the same as 0.
    as_bytes = (vectors + np.float32(0)).view(f"V{vectors.itemsize * vectors.shape[1]}")[:, 0]
    return np.unique(as_bytes, return_index=True)[1]


def _fit(centroids: list[NDArray[Any]], exponent: int, num_codes: int) -> bool:
    return (
        0 < len(centroids) <= MAX_LEVELS
        and abs(exponent) < 256
        and 0 < num_codes <= MAX_CODES
        and all(
            level.dtype == np.float32
            and level.ndim == 2
            and 0 < len(level) <= num_codes
            and level.shape[1] == centroids[0].shape[1] > 0
            and bool(np.isfinite(level).all())
            for level in centroids
        )
    )


def load_faiss() -> Any:
    """The package faiss. Raises MissingDependencyError if it is not installed."""
    logging.getLogger("faiss").setLevel(logging.WARNING)
    return require_module("faiss", "faiss")


@contextmanager
def one_thread(faiss: Any) -> Iterator[None]:
    """Let faiss use one thread in this block, so that its results do not depend on the number of threads. The setting
    belongs to the calling thread, so other threads may call faiss meanwhile."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@contextmanager
def _single_thread() -> Iterator[Any]:
    """The package faiss, whose results then do not depend on the number of threads, or of vectors in a search."""
    faiss = load_faiss()
    blas_from = faiss.cvar.distance_compute_blas_threshold
    try:
        with one_thread(faiss):
            yield faiss
    finally:
        faiss.cvar.distance_compute_blas_threshold = blas_from


def _nearest(faiss: Any, vectors: Float32s, centroids: Float32s) -> NDArray[np.int64]:
    """The nearest centroid of each vector, int64 [N]."""
    # Otherwise, searches for many vectors use matrix products, whose rounding depends on the number of vectors.
    faiss.cvar.distance_compute_blas_threshold = _NEVER
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(np.ascontiguousarray(centroids))
    nearest: NDArray[np.int64] = index.search(np.ascontiguousarray(vectors), 1)[1][:, 0]
    return nearest


def _clusters(faiss: Any, vectors: Float32s, num_codes: int, seed: int) -> Float32s:
    """The centroids [K, D] of more than K distinct vectors."""
    num_vectors, dim = vectors.shape
    # Fewer vectors do not have as many principal components.
    steps = {"progressive_dim_steps": _DIM_STEPS} if num_vectors >= dim else {}
    # With fewer than 39 points per centroid, faiss would warn.
    kmeans = faiss.Kmeans(dim, num_codes, niter=_ITERATIONS, seed=seed, min_points_per_centroid=1, **steps)
    kmeans.train(np.ascontiguousarray(vectors))
    centroids: Float32s = kmeans.centroids
    return centroids


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
        """The codes of vectors [N, D], finite, N at least 1. Raises MissingDependencyError if faiss is not
        installed."""
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
