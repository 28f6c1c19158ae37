"""Residual k-means: planted codes are found, and hard vectors (few, equal, huge) get codes too."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from vista.arrays import Float32s
from vista.errors import MissingDependencyError
from vista.model.codebooks import Codebooks
from vista.model.residual_codes import ResidualCodes


def learn(vectors: Float32s, levels: int = 2, num_codes: int = 4, seed: int = 0) -> ResidualCodes:
    pytest.importorskip("faiss")
    given = np.asarray(vectors, np.float32)
    return ResidualCodes.of(given, Codebooks.learn(given, levels=levels, num_codes=num_codes, seed=seed))


def noise(count: int, dim: int, seed: int = 0) -> Float32s:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def test_planted_codes_are_found() -> None:
    """Vectors that are a far corner plus a near corner: level 1 finds the first, level 2 the second."""
    rng = np.random.default_rng(0)
    far, near = rng.integers(0, 4, (2, 400))
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    codes = learn(100 * corners[far] + corners[near] + 0.01 * noise(400, 2)).codes
    for planted, found in ((far, codes[:, 0]), (near, codes[:, 1])):
        assert len(np.unique(np.stack([planted, found], 1), axis=0)) == len(np.unique(found)) == 4


def test_errors_are_shares_of_the_variance() -> None:
    vectors = noise(2000, 8) + 5.0
    result = learn(vectors, levels=3, num_codes=16)
    residuals = vectors.astype(np.float64)
    total = np.square(residuals - residuals.mean(axis=0)).sum()
    for level, error in enumerate(result.errors, 1):
        # Centroids are the means of their vectors, up to the last step of k-means.
        _, group = np.unique(result.codes[:, :level], axis=0, return_inverse=True)
        means = np.stack([np.bincount(group, column) for column in vectors.T], 1) / np.bincount(group)[:, None]
        least = np.square(vectors - means[group]).sum() / total
        assert least <= error + 1e-6
        if level == 1:
            assert error == pytest.approx(least, rel=0.01)
    assert sorted(result.errors, reverse=True) == result.errors
    assert result.errors[0] < 0.75 and result.num_distinct == 2000


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_vectors_have_codes_of_their_own(count: int) -> None:
    vectors = np.concatenate([noise(count, 3)] * 2)
    result = learn(vectors)
    assert result.num_distinct == count and result.errors == [0.0, 0.0]
    assert np.array_equal(np.sort(result.codes[:count, 0]), np.arange(count))
    assert (result.codes[:, 1] == 0).all()
    assert np.array_equal(result.codes[:count], result.codes[count:])


def test_equal_vectors_have_equal_codes() -> None:
    vectors = np.repeat(noise(20, 3), 30, axis=0)
    vectors[:15] *= -0.0  # zeros of both signs
    vectors[15:30] *= 0.0
    result = learn(vectors, levels=3)
    assert result.num_distinct == 20
    assert (result.codes.reshape(20, 30, 3) == result.codes[::30, None]).all()


@pytest.mark.parametrize(("count", "dim"), [(5, 1), (5, 2), (6, 40), (60, 60), (300, 1)])
def test_small_shapes(count: int, dim: int) -> None:
    result = learn(noise(count, dim))
    assert result.codes.shape == (count, 2) and result.codes.min() >= 0 and result.codes.max() < 4
    assert 0 <= result.errors[1] <= result.errors[0] < 1


@pytest.mark.parametrize("exponent", [-120, 100, 125])
def test_the_scale_of_vectors_does_not_matter(exponent: int) -> None:
    vectors = noise(500, 4)
    scaled = learn(np.ldexp(vectors, exponent))
    same = learn(vectors)
    assert np.array_equal(scaled.codes, same.codes)
    np.testing.assert_allclose(scaled.errors, same.errors, rtol=1e-6)


def test_the_seed_decides_and_the_number_of_threads_does_not() -> None:
    faiss = pytest.importorskip("faiss")
    vectors = noise(3000, 32)
    before = faiss.omp_get_max_threads()
    try:
        results = []
        for threads in (1, 3):
            faiss.omp_set_num_threads(threads)
            results.append(learn(vectors, num_codes=64).codes)
            assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)
    assert np.array_equal(*results)
    assert not np.array_equal(results[0], learn(vectors, num_codes=64, seed=1).codes)


def test_usage_and_groups() -> None:
    codes = np.array([[0, 2], [0, 2], [3, 2], [3, 1]], np.int32)
    result = ResidualCodes(codes, [0.5, 0.25], 4)
    quarter = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert result.usage() == [(2, pytest.approx(2.0)), (2, pytest.approx(quarter))]
    assert sorted(result.groups().tolist()) == [1, 1, 2]


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "vista.model.faiss_extra", raising=False)
    with pytest.raises(MissingDependencyError, match=r"need faiss .*pip install .*\[faiss\]'"):
        Codebooks.learn(noise(3, 2), levels=1, num_codes=2, seed=0)
