"""Codebooks that are kept: old vectors keep their codes, and damaged files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.model.test_residual_codes import noise
from vista.errors import DataError
from vista.model.codebooks import Codebooks
from vista.model.residual_codes import ResidualCodes

pytest.importorskip("faiss")
VECTORS = noise(600, 24)
LEARNED = Codebooks.learn(VECTORS, levels=3, num_codes=16, seed=0)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_codes_of_a_vector_do_not_depend_on_the_others(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, 599), min_size=1, max_size=40))
    scale = data.draw(st.sampled_from([0.0, 1.0, 1e4, 3e38]))  # of other vectors
    others = scale * noise(data.draw(st.integers(0, 300)), 24, 1).clip(-1, 1)
    mixed = np.concatenate([VECTORS[rows], others.astype(np.float32)])
    whole = ResidualCodes.of(VECTORS, LEARNED).codes
    np.testing.assert_array_equal(ResidualCodes.of(mixed, LEARNED).codes[: len(rows)], whole[rows])


def test_saved_codebooks_give_the_same_codes(tmp_path: Path) -> None:
    LEARNED.save(tmp_path / "x.safetensors")
    loaded = Codebooks.load(str(tmp_path / "x.safetensors"))
    assert (loaded.dim, loaded.num_codes, loaded.exponent) == (24, 16, LEARNED.exponent)
    new = noise(50, 24, 2)
    found, expected = ResidualCodes.of(new, loaded), ResidualCodes.of(new, LEARNED)
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert found.errors == expected.errors and found.errors[0] < 1


GOOD = {"level_1": np.ones((2, 3), np.float32), "exponent": np.array(1), "num_codes": np.array(2)}


@pytest.mark.parametrize(
    "changes",
    [
        {"level_1": np.ones((2, 3))},
        {"level_1": np.ones(3, np.float32)},
        {"level_1": np.ones((3, 3), np.float32)},
        {"level_1": np.full((2, 3), np.nan, np.float32)},
        {"level_1": np.ones((2, 0), np.float32)},
        {"level_1": None},
        {"level_2": np.ones((2, 4), np.float32)},
        {"level_3": np.ones((2, 3), np.float32)},
        {"exponent": np.array(4000)},
        {"exponent": np.array([1, 2])},
        {"num_codes": np.array(0)},
        {"num_codes": None},
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = tmp_path / "x.safetensors"
    save_file(GOOD, file)
    assert Codebooks.load(str(file)).dim == 3
    save_file({name: value for name, value in (GOOD | changes).items() if value is not None}, file)
    with pytest.raises(DataError, match="no readable codebooks"):
        Codebooks.load(str(file))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x" * 100)
    for name in ("text", "none", "."):
        with pytest.raises(DataError, match="name a file that `vista items tokenize` wrote"):
            Codebooks.load(str(tmp_path / name))
