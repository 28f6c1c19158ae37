"""The unified table: which value reads which row, and how a model over it computes and learns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import NEXT_ONLY, small_config
from vista.log.event_log import EventLog
from vista.log.histories import NUM_GAPS
from vista.model.layers import EmbeddingFeature, hashed_rows, mix64
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.training import optimizers
from vista.training.trainer import Trainer

WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15


def mixed(state: int) -> int:
    """SplitMix64's output function, in unsigned integers."""
    z = (state + GAMMA) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def expected_rows(value: int, feature: EmbeddingFeature, num_hashes: int, num_rows: int) -> list[int]:
    return [1 + (mixed(value ^ mixed(2**32 * feature + i)) >> 1) % num_rows for i in range(num_hashes)]


def rows_of(count: int, feature: EmbeddingFeature, num_hashes: int, num_rows: int) -> Tensor:
    """[count, P] of the values 0 ... count - 1."""
    return hashed_rows(torch.arange(count), feature, num_hashes, num_rows)


def test_the_mix_is_splitmix64() -> None:
    """Against the generator's published outputs from the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor(np.array([(1234567 + k * GAMMA) % WORD for k in range(4)], np.uint64).view(np.int64))
    assert mix64(states).numpy().view(np.uint64).tolist() == published
    words = np.random.default_rng(0).integers(0, WORD, 200, np.uint64)
    mixes = mix64(torch.from_numpy(words.view(np.int64))).numpy().view(np.uint64)
    assert mixes.tolist() == [mixed(word) for word in words.tolist()]


@pytest.mark.parametrize(("num_rows", "num_hashes"), [(7, 2), (23, 1), (50, 4), (1, 3)])
def test_rows_equal_the_definition(num_rows: int, num_hashes: int) -> None:
    for feature in EmbeddingFeature:
        values = torch.tensor([[0, 1], [40, 2**31 - 1]])
        rows = hashed_rows(values, feature, num_hashes, num_rows)
        assert rows.shape == (2, 2, num_hashes) and rows.dtype == torch.int64
        expected = [expected_rows(value, feature, num_hashes, num_rows) for value in values.flatten().tolist()]
        assert rows.flatten(0, 1).tolist() == expected


def test_rows_never_change() -> None:
    """Saved models rely on them."""
    assert rows_of(3, EmbeddingFeature.item, 2, 1000).tolist() == [[936, 633], [872, 328], [647, 527]]
    assert rows_of(3, EmbeddingFeature.action, 2, 1000).tolist() == [[777, 362], [79, 322], [977, 743]]
    assert rows_of(3, EmbeddingFeature.gap, 2, 1000).tolist() == [[373, 35], [643, 11], [42, 814]]


def built(make: SimpleNamespace, architecture: str, **options: object) -> RankingModel:
    """A small model in which every parameter matters, except the unknown item's row."""
    sizes = {"num_seeds": 3, "history_limit": 30}
    model = make.architecture(architecture, dtype=torch.float32, **sizes, **options)
    with torch.no_grad():
        model.item_table[0] = 0
    return model


def with_tables(make: SimpleNamespace, unified: RankingModel) -> RankingModel:
    """The same model with one table row per value, filled from the unified table."""
    plain = built(make, unified.config.architecture.value)
    weights = {name: tensor for name, tensor in unified.state_dict().items() if name != "item_table"}
    missing = plain.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) == {"item_table", "encoder.action.weight", "encoder.gap.weight"}
    with torch.no_grad():
        plain.item_table.copy_(unified.item_vectors(torch.arange(make.num_items + 1)))
        for name in ("action", "gap"):
            table = getattr(plain.encoder, name).weight
            table.copy_(getattr(unified.encoder, name)(torch.arange(len(table))))
    return plain


def test_a_vector_is_the_concatenation_of_the_values_rows(make: SimpleNamespace) -> None:
    model = built(make, "vista", embedding_rows=7)
    table = model.item_table.detach()
    assert table.shape == (8, 8)

    def vector(value: int, feature: EmbeddingFeature) -> Tensor:
        return torch.cat([table[row] for row in expected_rows(value, feature, 2, 7)])

    items = model.item_vectors(torch.arange(41))
    assert torch.equal(items[1:], torch.stack([vector(value, EmbeddingFeature.item) for value in range(1, 41)]))
    assert torch.equal(model.catalog_vectors(), items[1:])
    assert items.shape == (41, 16) and not items[0].any(), "the unknown item"
    codes = torch.tensor([[0, 2], [1, 1]])
    expected = torch.stack([vector(int(code), EmbeddingFeature.action) for code in codes.flatten()]).view(2, 2, 16)
    assert torch.equal(model.encoder.action(codes), expected)  # type: ignore[misc]
    gaps = model.encoder.gap_vectors(torch.arange(NUM_GAPS))
    assert torch.equal(gaps, torch.stack([vector(gap, EmbeddingFeature.gap) for gap in range(NUM_GAPS)]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("architecture", "num_rows"), [("vista", 7), ("sasrec", 100_003)])
def test_losses_and_gradients_equal_those_of_tables_that_share(
    make: SimpleNamespace, architecture: str, num_rows: int
) -> None:
    """The gradient of a row is the sum over all values, hash functions and features that read it."""
    model = built(make, architecture, embedding_rows=num_rows)
    plain = with_tables(make, model)
    chunks, _ = make.chunks(make.histories([9, 4, 14], 3), 3, impressions=12)
    batch = make.batch(chunks, make.plan(model), 3)
    losses = [m.losses(batch, m.item_vectors(batch.rows), NEXT_ONLY) for m in (model, plain)]
    assert losses[0].parts.keys() == losses[1].parts.keys()
    assert torch.equal(losses[0].total, losses[1].total), "the same vectors"
    for each in losses:
        each.total.backward()
    assert model.item_table.grad is not None and model.item_table.grad.is_sparse
    expected = torch.zeros_like(model.item_table)
    tables = {
        EmbeddingFeature.item: plain.item_table.grad.to_dense()[1:],  # type: ignore[union-attr]
        EmbeddingFeature.action: plain.encoder.action.weight.grad,  # type: ignore[union-attr]
        EmbeddingFeature.gap: plain.encoder.gap.weight.grad,  # type: ignore[union-attr]
    }
    for feature, gradient in tables.items():
        first = 1 if feature is EmbeddingFeature.item else 0
        rows = hashed_rows(torch.arange(first, first + len(gradient)), feature, 2, num_rows)
        expected.index_add_(0, rows.flatten(), gradient.reshape(-1, 8))
    assert expected[1:].any() and not expected[0].any()
    close = 1e-5 * float(expected.abs().max())  # sums in another order
    torch.testing.assert_close(model.item_table.grad.to_dense(), expected, rtol=0, atol=close)


def test_summarizer_id_covers_the_table_and_how_it_is_read(make: SimpleNamespace) -> None:
    def identity(model: VistaModel) -> bytes:
        with torch.no_grad():  # the same weights, wherever shapes agree
            for parameter in model.parameters():
                parameter.fill_(0.5)
        return model.summarizer_id()

    options = {"rating_range": None, "has_time": False, "actions": ["view"], "dim": 16}
    plain = identity(make.model(**options))
    assert identity(make.model(**options, embedding_rows=40)) != plain
    model = make.model(embedding_rows=11)
    before = model.summarizer_id()
    with torch.no_grad():
        model.item_table[3, 0] += 1
    assert model.summarizer_id() != before


def trainer_of(log: EventLog, run_dir: Path, **options: object) -> Trainer:
    config = small_config(log, run_dir, model__embedding_rows=4001, **options)
    made = Trainer(config, log)
    made.model.train()
    return made


def test_a_step_changes_only_the_rows_that_its_batch_reads(event_log: EventLog, tmp_path: Path) -> None:
    made = trainer_of(event_log, tmp_path, data__num_negatives=5)
    table = made.model.item_table
    shared = torch.cat(
        [rows_of(NUM_GAPS, EmbeddingFeature.gap, 2, 4001), rows_of(2, EmbeddingFeature.action, 2, 4001)]
    ).flatten()
    for index in range(3):
        before = table.detach().clone()
        batch = made.source.batch(0, index)
        assert len(batch.rows) < 40, "some items are in no batch"
        made._step(batch)
        changed = (table.detach() != before).any(1)
        used = torch.zeros(len(table), dtype=torch.bool)
        read = hashed_rows(batch.rows, EmbeddingFeature.item, 2, 4001).flatten()
        used[read] = used[shared] = True
        assert not changed[~used].any() and not table.detach()[0].any()
        assert changed[read].all() and changed[hashed_rows(batch.events.gap, EmbeddingFeature.gap, 2, 4001)].all()
        assert changed[hashed_rows(batch.events.action, EmbeddingFeature.action, 2, 4001)].all()
        assert table.grad is None


def test_the_clipped_norm_counts_a_row_once(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "GRADIENT_CLIP", 0.01)
    made = trainer_of(event_log, tmp_path)
    batch = made.source.batch(0, 0)
    vectors = made.model.item_vectors(batch.rows)
    loss = made.model.losses(batch, vectors, made.config.optim).total

    def norm() -> float:
        gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
        return float(torch.cat([g.to_dense().flatten() if g.is_sparse else g.flatten() for g in gradients]).norm())

    loss.backward(retain_graph=True)
    unclipped = norm()
    made.model.zero_grad()
    assert made.optimizers.backward(loss) == pytest.approx(unclipped, rel=1e-5) and unclipped > 0.1
    assert norm() == pytest.approx(0.01, rel=1e-3)
