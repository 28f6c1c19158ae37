"""Adapters in service: what they change, which files are refused, and that requests do not see those of others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.conftest import Served
from tests.required_program import require_library
from vista.config import DataConfig
from vista.errors import AdapterError
from vista.model.serving_model import Adapter, ServingModel
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer


def write_adapter(model: VistaModel, path: Path, rng: np.random.Generator | None = None) -> None:
    """An adapter of a model with drawn values, or with zeros."""
    served = ServingModel.of(model, model.empty_summary().numpy())
    values = np.zeros(served.num_adapted) if rng is None else 0.3 * rng.standard_normal(served.num_adapted)
    Adapter(values.astype(np.float32), served.stage2_id, model.data, []).write(path)


@pytest.fixture(scope="module")
def folder(served_tasks: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(served_tasks.model, folder / "zero.adapter")
    for seed, name in enumerate(("de", "fr")):
        write_adapter(served_tasks.model, folder / f"{name}.adapter", np.random.default_rng(seed))
    return folder


@pytest.fixture(scope="module", params=["native", "torch"])
def scorer(request: pytest.FixtureRequest, served_tasks: Served, folder: Path) -> Iterator[Scorer]:
    if request.param == "native":
        require_library()
    with Scorer.open(served_tasks.model_dir, served_tasks.store, adapter=folder, backend=request.param) as opened:
        yield opened


def asked(scorer: Scorer, adapter: str | None, count: int = 4) -> dict[str, Any]:
    users = list(scorer.store.keys())[:count]
    return scorer.predict(users, scorer.served.items.ids(np.arange(30)), adapter=adapter)


def test_an_adapter_changes_all_scores_and_zeros_change_no_bit(scorer: Scorer) -> None:
    plain, zero, de = (asked(scorer, name) for name in (None, "zero", "de"))
    assert set(plain) == {*scorer.served.schema.tasks, "next"}
    for task, scores in plain.items():
        np.testing.assert_array_equal(zero[task], scores)
        assert np.abs(de[task] - scores).min() > 0 and np.abs(de[task] - scores).max() > 1e-3


def test_all_methods_take_an_adapter(scorer: Scorer) -> None:
    users = list(scorer.store.keys())[:3]
    de, items = asked(scorer, "de", 3), scorer.served.items.ids(np.arange(30))
    np.testing.assert_array_equal(scorer.score(users, items, adapter="de"), de[scorer.task])
    ranking = scorer.rank(users[0], top_k=30, candidates=items, adapter="de")
    np.testing.assert_allclose(ranking.scores, np.sort(de[scorer.task][0])[::-1], atol=1e-6)
    vectors, (_, of_items) = scorer.user_vectors(users, adapter="de"), scorer.item_vectors()
    scores = vectors @ of_items.T / scorer.served.temperature
    np.testing.assert_allclose(scorer.catalog_scores(users, adapter="de"), scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores[:, :30], de["next"], rtol=1e-4, atol=1e-4)
    for task in ("next", scorer.task):
        told = scorer.explain(users[0], items, task=task, adapter="de")
        score = 1 / (1 + np.exp(-told.value)) if task != "next" else told.value
        np.testing.assert_allclose(score, de[task][0], rtol=1e-4, atol=1e-5)


def test_threads_do_not_see_the_adapters_of_others(scorer: Scorer) -> None:
    names = [None, "de", "fr", "zero"]
    alone, order = {name: asked(scorer, name) for name in names}, names * 20
    with ThreadPoolExecutor(4) as pool:
        for name, scores in zip(order, pool.map(lambda name: asked(scorer, name), order), strict=True):
            for task, expected in alone[name].items():
                np.testing.assert_array_equal(scores[task], expected)


def test_a_single_file_serves_all_calls(served_tasks: Served, scorer: Scorer, folder: Path) -> None:
    backend = "native" if scorer.backend.startswith("native") else "torch"
    one = Scorer.open(served_tasks.model_dir, served_tasks.store, adapter=folder / "de.adapter", backend=backend)
    two = Scorer.open(served_tasks.model, served_tasks.store, adapter={"x": folder / "de.adapter"}, backend=backend)
    with one, two:
        for task, scores in asked(scorer, "de").items():
            np.testing.assert_array_equal(asked(one, None)[task], scores)
            np.testing.assert_array_equal(asked(two, "x")[task], scores)


def test_an_unknown_name_is_refused(scorer: Scorer, served_tasks: Served) -> None:
    with pytest.raises(ValueError, match=r"adapter: 'dee' is not one of this scorer's adapters \(de, fr, zero\)"):
        asked(scorer, "dee")
    with (
        Scorer.open(served_tasks.model_dir, served_tasks.store) as plain,
        pytest.raises(ValueError, match=r"adapter: 'de' .*none are loaded"),
    ):
        asked(plain, "de")


def test_a_damaged_adapter_does_not_keep_a_reload_from_others(
    served_tasks: Served, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    de, fr = ((folder / f"{name}.adapter").read_bytes() for name in ("de", "fr"))
    (tmp_path / "de.adapter").write_bytes(de)
    with Scorer.open(served_tasks.model_dir, served_tasks.store, adapter=tmp_path) as scorer:
        before = asked(scorer, "de")["next"]
        assert not scorer.reload()
        (tmp_path / "de.adapter").write_bytes(fr[:-5])
        (tmp_path / "new.adapter").write_bytes(fr[:-5])
        (tmp_path / "fr.adapter").write_bytes(fr)
        assert scorer.reload()
        assert re.search(r"de\.adapter.*; the old one stays in service", caplog.text)
        assert re.search(r"new\.adapter.*; requests cannot name it", caplog.text)
        np.testing.assert_array_equal(asked(scorer, "de")["next"], before)
        assert np.abs(asked(scorer, "fr")["next"] - before).max() > 1e-3
        with pytest.raises(ValueError, match=r"'new' is not one of this scorer's adapters \(de, fr\)"):
            asked(scorer, "new")
        (tmp_path / "de.adapter").write_bytes(fr)
        assert scorer.reload()
        np.testing.assert_array_equal(asked(scorer, "de")["next"], asked(scorer, "fr")["next"])


def test_files_that_are_refused(served_tasks: Served, served: Served, folder: Path, tmp_path: Path) -> None:
    good, path = (folder / "de.adapter").read_bytes(), tmp_path / "x.adapter"

    def refused(message: str) -> None:
        with pytest.raises(AdapterError, match=message):
            Scorer.open(served_tasks.model_dir, served_tasks.store, adapter=path)

    refused("No such file")
    for place in range(0, len(good), 61):
        path.write_bytes(good[:place])
        refused("not a readable adapter")
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        refused("not a readable adapter")
    write_adapter(served.model, path)
    refused("was trained for another model")
    head = json.loads(good.partition(b"\n")[0])
    Adapter(np.zeros(3, np.float32), head["base"], DataConfig(), []).write(path)
    refused(r"must hold \d+ finite numbers")
    nan = np.full_like(np.frombuffer(good.partition(b"\n")[2], np.float32), np.nan)
    Adapter(nan, head["base"], DataConfig(), []).write(path)
    refused(r"must hold \d+ finite numbers")


def test_golden_bytes(tmp_path: Path) -> None:
    data = DataConfig(path="x")
    Adapter(np.array([1.0, -2.5], np.float32), "0" * 64, data, ["click"]).write(tmp_path / "a")
    head, _, payload = (tmp_path / "a").read_bytes().partition(b"\n")
    assert payload.hex() == "0000803f000020c0"
    fields = json.loads(head)
    assert fields["data"]["path"] == "x"
    checksum = fields.pop("checksum")
    assert list(fields) == ["format", "version", "base", "data", "examined_tasks"] and fields["version"] == 2
    inner = xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    assert checksum == xxhash.xxh3_64_hexdigest(inner.encode() + payload)


def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(served_tasks: Served, tmp_path: Path) -> None:
    count = ServingModel.of(served_tasks.model, served_tasks.model.empty_summary().numpy()).num_adapted
    adapted = served_tasks.model.with_adapter(np.zeros(count, np.float32))
    with pytest.raises(ValueError, match="is not saved"):
        adapted.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
