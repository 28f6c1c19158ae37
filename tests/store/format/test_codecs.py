"""Codecs of summary rows: int8 and int4 rows are those of FBGEMM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.record_reference import error_bound
from vista.config.choices import Codec
from vista.store.format.codecs import dequantize_rows, quantize_rows


def test_quantized_rows_are_fbgemm_rows():
    rows = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    packed = quantize_rows(rows, Codec.int8)
    scale, bias = packed[:, 16:].copy().view("<f4").T
    np.testing.assert_array_equal(bias, rows.min(axis=1))
    np.testing.assert_array_equal(scale, np.ptp(rows, axis=1) / np.float32(255))
    np.testing.assert_allclose(dequantize_rows(packed, Codec.int8, 16), rows, atol=float(scale.max()) * 0.501)


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 31])
def test_four_bit_rows_are_fbgemm_rows(dim):
    rows = np.random.default_rng(0).standard_normal((50, dim)).astype(np.float32)
    packed = quantize_rows(rows, Codec.int4)
    width = (dim + 1) // 2
    assert packed.shape == (50, width + 4)
    scale, bias = packed[:, width:].copy().view("<f2").T
    np.testing.assert_array_equal(bias, rows.min(axis=1).astype(np.float16))
    steps = (rows.max(axis=1) - bias.astype(np.float32)) / np.float32(15)
    np.testing.assert_array_equal(scale, np.where(steps == 0, 1, steps).astype(np.float16))
    if dim % 2:  # The unused half of the last byte is zero, so that equal rows have equal bytes.
        assert (packed[:, width - 1] < 16).all()
    else:
        fbgemm = torch.ops.quantized.embedding_bag_4bit_prepack(torch.from_numpy(rows)).numpy()
        np.testing.assert_array_equal(packed, fbgemm)
    bound = error_bound(Codec.int4, rows)
    assert (np.abs(dequantize_rows(packed, Codec.int4, dim) - rows) <= bound).all()
