"""The decoder sees only what it may, and the stop-gradient keeps embeddings from collapsing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vista.config import OptimConfig
from vista.config.choices import Mixing, ReconstructionTarget
from vista.examples.batch import Batch
from vista.model.losses import reconstruction_loss
from vista.model.vista_model import VistaModel

ALONE = OptimConfig(next_weight=0.0, window_weight=0.0, task_weight=0.0, reconstruction_weight=1.0)
STEPS, LAST_STEPS, LR = 150, 20, 1.5e-2


@dataclass(frozen=True)
class Spread:
    """Over the items that occur: variance summed over dimensions, and mean distance between unit vectors."""

    variance: float
    distance: float


def spread(table: Tensor) -> Spread:
    rows = table.detach()
    unit = torch.nn.functional.normalize(rows, dim=-1)
    count = len(rows)
    return Spread(float(rows.var(0).sum()), float(torch.cdist(unit, unit).sum()) / (count * (count - 1)))


def train_alone(make: SimpleNamespace, mixing: Mixing, stop_gradient: bool, seed: int) -> tuple[Spread, Spread, float]:
    """Spread before and after training on the reconstruction loss only, and the mean loss of the last steps."""
    small = {"num_layers": 1, "num_target_layers": 1, "tail_len": 1, "conv_width": 1}
    model = make.model(
        seed=seed, num_items=12, tasks=[], rating_range=None, mixing=mixing, stop_gradient=stop_gradient, **small
    ).train()
    chunks, _ = make.chunks(make.histories([12] * 8, seed, num_items=12), seed)
    cut = make.plan(model, label_spacing=6, reconstruction_len=12)
    occurring = torch.from_numpy(chunks.item).unique()
    before = spread(model.item_table[occurring])
    trained = ("item_table", "encoder.", "summarizer.", "decoder.")
    parameters = [p for name, p in model.named_parameters() if name.startswith(trained)]
    optimizer = torch.optim.Adam(parameters, lr=LR, betas=(0.9, 0.98))
    results = []
    for step in range(STEPS):
        batch = make.batch(chunks, cut, seed * 1000 + step, num_items=12)
        losses = model.losses(batch, model.item_table[batch.rows], ALONE)
        assert set(losses.parts) == {"reconstruction"}
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        results.append(float(losses.total.detach()))
    return before, spread(model.item_table[occurring]), fmean(results[-LAST_STEPS:])


CASES = [(Mixing.separable, 0), (Mixing.bidirectional, 2)]


@pytest.mark.research
@pytest.mark.parametrize(("mixing", "seed"), CASES)
def test_embeddings_keep_their_spread_with_the_stop_gradient(make: SimpleNamespace, mixing: Mixing, seed: int) -> None:
    before, after, loss = train_alone(make, mixing, True, seed)
    assert after.variance > before.variance and after.distance > 0.9 * before.distance
    assert loss < after.variance, "it learns: a constant prediction would have the variance as its loss"


@pytest.mark.research
@pytest.mark.parametrize(("mixing", "seed"), CASES)
def test_embeddings_collapse_without_the_stop_gradient(make: SimpleNamespace, mixing: Mixing, seed: int) -> None:
    before, after, loss = train_alone(make, mixing, False, seed)
    assert after.variance < 0.05 * before.variance and after.distance < 0.5 * before.distance
    assert loss < 0.01, "the loss vanishes because the embeddings do"


def test_the_targets_get_no_gradient() -> None:
    predicted, target = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = reconstruction_loss(predicted, target, stop_gradient=True)
    assert loss.item() == pytest.approx(((predicted - target) ** 2).sum().item() / 5)
    loss.backward()
    assert target.grad is None and predicted.grad is not None
    reconstruction_loss(predicted, target, stop_gradient=False).backward()
    assert target.grad is not None
    assert float(reconstruction_loss(predicted[:0], target[:0], stop_gradient=True).detach()) == 0.0


ITEMS = {"reconstruction_target": ReconstructionTarget.items, "temperature": 0.3}


def item_batch(make: SimpleNamespace, model: VistaModel, known: float = 0.7) -> Batch:
    """Two histories in which the model does not know a share of the items."""
    packed = make.histories([20, 14], 2)
    is_known = np.random.default_rng(0).random(len(packed.item)) < known
    chunks, _ = make.chunks(replace(packed, item=np.where(is_known, packed.item, 0).astype(np.int32)), 2)
    return make.batch(chunks, make.plan(model))


@pytest.mark.parametrize("popularity", [False, True])
def test_items_are_predicted_by_a_softmax_over_the_catalog(make: SimpleNamespace, popularity: bool) -> None:
    """With all items as negatives, the loss is the cross-entropy of known items, stretch by stretch."""
    model = make.model(seed=3, popularity=popularity, **ITEMS).eval()
    model.set_item_frequency(np.arange(len(model.items) + 1) ** 2)
    batch = item_batch(make, model)
    with torch.no_grad():
        vectors = model.item_vectors(batch.rows)
        losses = model.losses(batch, vectors, ALONE)
        encoded, summaries, _ = model._contexts(batch, vectors)
        every = torch.arange(1, len(model.items) + 1)
        catalog = model.retrieval_items(model.item_vectors(every), every)
        logits, labels, part = [], [], batch.reconstruction
        for cut, start, length in zip(part.cut.tolist(), part.start.tolist(), part.length.tolist(), strict=True):
            offsets, age = torch.tensor([0, length]), batch.cuts.stop[cut] - start
            predicted = model.decoder(summaries[[cut]], encoded[start : start + length], offsets, age[None])
            for step in range(length):
                row = int(batch.rows[batch.events.item[start + step]])
                if row:
                    logits.append(model.retrieval_users(predicted[step]) @ catalog.T / 0.3)
                    labels.append(row - 1)
    assert 0 < len(labels) < int(part.length.sum()), "some items are unknown"
    expected = F.cross_entropy(torch.stack(logits), torch.tensor(labels))
    torch.testing.assert_close(losses.parts["reconstruction"], expected)


def test_predicted_items_train_the_summary(make: SimpleNamespace) -> None:
    model = make.model(seed=3, **ITEMS).train()
    for known in (0.7, 0.0):
        batch = item_batch(make, model, known)
        encoded, summaries, _ = model._contexts(batch, model.item_vectors(batch.rows))
        loss = model._reconstruction(batch, model.item_vectors(batch.rows), encoded, summaries).mean
        (gradient,) = torch.autograd.grad(loss, summaries)
        if known:
            read = torch.arange(len(summaries))[:, None] == batch.reconstruction.cut
            assert torch.equal(gradient.flatten(1).any(1), read.any(1)) and read.any()
        else:
            assert loss.item() == 0 and not gradient.any(), "labels of unknown items are left out"


def test_the_target_has_no_weights_of_its_own(make: SimpleNamespace) -> None:
    vectors, items = make.model(seed=3), make.model(seed=3, reconstruction_target=ReconstructionTarget.items)
    torch.testing.assert_close(vectors.state_dict(), items.state_dict(), rtol=0, atol=0)


def test_a_prediction_sees_the_summary_and_the_events_before_it(make: SimpleNamespace) -> None:
    """Only those of its own window: not its own event, no later one, and no other window."""
    model = make.model(seed=1, num_reconstruction_layers=2)
    assert model.decoder is not None
    offsets, age = torch.tensor([0, 4, 5, 9]), torch.tensor([4, 1, 300])
    events = torch.randn(9, 16, requires_grad=True)
    summary = torch.randn(3, 3, 16, requires_grad=True)
    predicted = model.decoder(summary, events, offsets, age)
    assert predicted.shape == (9, 16)
    for row in range(9):
        window = int(torch.searchsorted(offsets, row, right=True)) - 1
        of_events, of_summary = torch.autograd.grad(predicted[row].sum(), (events, summary), retain_graph=True)
        read = of_events.abs().sum(1) > 0
        expected = torch.zeros(9, dtype=torch.bool)
        expected[offsets[window] : row] = True
        assert torch.equal(read, expected)
        assert torch.equal(of_summary.abs().sum((1, 2)) > 0, torch.arange(3) == window)


def test_windows_of_a_batch_are_reconstructed_as_if_alone(make: SimpleNamespace) -> None:
    model = make.model(seed=2)
    assert model.decoder is not None
    torch.manual_seed(0)
    offsets, age = torch.tensor([0, 4, 5, 9]), torch.tensor([4, 1, 300])
    events, summary = torch.randn(9, 16), torch.randn(3, 3, 16)
    with torch.no_grad():
        together = model.decoder(summary, events, offsets, age)
        for window, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            alone = model.decoder(
                summary[window : window + 1],
                events[begin:end],
                torch.tensor([0, end - begin]),
                age[window : window + 1],
            )
            torch.testing.assert_close(together[begin:end], alone, atol=1e-5, rtol=1e-5)
        older = model.decoder(summary, events, offsets, age * 8)
        assert not torch.allclose(older[0], together[0], atol=1e-3), "predictions depend on the age of the window"
        much_older = model.decoder(summary, events, offsets, torch.full_like(age, 2**40))
        assert torch.isfinite(much_older).all()
