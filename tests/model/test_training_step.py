"""One training step: the rows of the item table it changes, its cost, its losses, and reconstruction."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.conftest import NEXT_ONLY
from vista.config import DataConfig, ModelConfig, OptimConfig, SourceColumns, TrainConfig
from vista.config.checks import Decay, Mixing, Precision, TargetAttentionKind
from vista.examples.batch_source import BatchSource, ModelReads
from vista.log.event_log import EventLog
from vista.model.losses import reconstruction_loss
from vista.model.vista_model import ReconstructionDecoder, VistaModel
from vista.training.optimizers import Optimizers
from vista.training.trainer import Trainer

DIM, NUM_ITEMS = 16, 500


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    rng = np.random.default_rng(0)
    frame = {"user": np.repeat(np.arange(60), 40), "item": rng.integers(0, NUM_ITEMS, 2400)}
    return EventLog.from_frame(frame, tmp_path_factory.mktemp("step") / "log", columns=SourceColumns(timestamp=None))


def trainer(log: EventLog, run_dir: Path, num_rows: int) -> Trainer:
    """A trainer whose table has `num_rows` rows, over which the log's items are spread."""
    config = TrainConfig(
        model=ModelConfig(
            dim=DIM, num_heads=2, num_seeds=4, num_layers=1, num_target_layers=1, tail_len=8, counter_keys=[]
        ),
        data=DataConfig(exclude_seen=True, tokens_per_batch=256, label_spacing=8, num_negatives=64),
        optim=OptimConfig(validate_every=0, warmup_steps=1),
        run_dir=str(run_dir),
        precision=Precision.float32,
        num_threads=1,
        device="cpu",
    )
    made = Trainer(config, log)
    made.model.item_table = nn.Parameter(torch.randn(num_rows, DIM) * DIM**-0.5)
    made.optimizers = Optimizers(made.model, made.config.optim)
    made.source = BatchSource(log, ModelReads(1 + np.arange(log.num_items) * ((num_rows - 1) // log.num_items)), config)
    made.model.train()
    return made


def test_a_step_changes_only_the_rows_of_its_batch(log: EventLog, tmp_path: Path) -> None:
    made = trainer(log, tmp_path / "run", 10_001)
    table = made.model.item_table
    for index in range(3):
        before = table.detach().clone()
        batch = made.source.batch(0, index)
        made._step(batch)
        changed = (table.detach() != before).any(1)
        used = torch.zeros(len(table), dtype=torch.bool)
        used[batch.rows] = True
        # Rows of earlier batches have momentum, but do not move.
        assert not changed[~used].any()
        learned = torch.zeros_like(used)
        learned[batch.rows[batch.events.item]] = True
        learned[batch.rows[batch.negatives.item]] = True
        assert changed[learned].all()
        assert table.grad is None


def test_the_time_of_a_step_does_not_grow_with_the_table(log: EventLog, tmp_path: Path) -> None:
    made = {rows: trainer(log, tmp_path / str(rows), rows) for rows in (10_001, 500_001)}
    seconds: dict[int, list[float]] = {rows: [] for rows in made}
    for index in range(8):
        for rows, one in made.items():
            batch = one.source.batch(0, index)
            began = time.thread_time()
            one._step(batch)
            seconds[rows].append(time.thread_time() - began)
    # The first step allocates the optimizer's state. A pass over 8M numbers and two moments would take over 10 ms.
    small, large = (min(times[1:]) for times in seconds.values())
    assert large < 1.5 * small + 0.003, (small, large)


@pytest.mark.parametrize("mixing", Mixing)
def test_users_without_events_are_trained_on_their_impressions(make: SimpleNamespace, mixing: Mixing) -> None:
    model = make.model(mixing=mixing, num_layers=1).train()
    chunks, _ = make.chunks(make.histories([0, 0]), 1, impressions=5)
    batch = make.batch(chunks, make.plan(model))
    vectors = model.item_table[batch.rows]
    losses = model.losses(batch, vectors, NEXT_ONLY)
    assert set(losses.parts) == {"next", "click", "like"}
    losses.total.backward()
    assert torch.isfinite(losses.total) and float(losses.parts["next"].detach()) == 0.0
    assert model.summarizer is not None and model.summarizer.seeds.grad is not None
    assert model.summarizer.seeds.grad.any(), "the summary of an empty history is trained"


def test_a_model_without_a_summary_starts_with_the_same_weights(make: SimpleNamespace) -> None:
    made = make.model(counter_keys=["item"], pooled_dim=4)

    def weights(num_seeds: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return VistaModel(replace(made.config, num_seeds=num_seeds), made.schema, made.items, made.data).state_dict()

    with_summary, without = weights(3), weights(0)
    assert without.keys() < with_summary.keys() and without.pop("target_attention.summary_kind").numel() == 0
    assert [name for name, weight in without.items() if not torch.equal(with_summary[name], weight)] == []


def test_the_configuration_selects_the_losses(make: SimpleNamespace) -> None:
    model = make.model(num_seeds=0)
    chunks, _ = make.chunks(make.histories([9, 4]), 1, impressions=5)
    batch = make.batch(chunks, make.plan(model, anchors=make.anchor_plan()))
    optim = OptimConfig(next_weight=2.0, window_weight=0.0, task_weight=3.0, reconstruction_weight=0.5)

    def parts(model: object = model, optim: OptimConfig = optim, batch: object = batch) -> dict[str, float]:
        with torch.no_grad():
            losses = model.losses(batch, model.item_table[batch.rows], optim)
        values = {name: float(value) for name, value in losses.parts.items()}
        weights = {name: getattr(optim, f"{name}_weight") for name in ("next", "window", "reconstruction")}
        expected = sum(value * weights.get(name, optim.task_weight) for name, value in values.items())
        assert float(losses.total) == pytest.approx(expected, rel=1e-6)
        return values

    assert set(parts()) == {"next", "click", "like"}, "no summary, no reconstruction"
    assert set(parts(optim=replace(optim, next_weight=0.0))) == {"click", "like"}
    with_window = parts(optim=replace(optim, window_weight=4.0))
    assert set(with_window) == {"next", "window", "click", "like"}
    assert batch.anchors is not None
    scaled = replace(batch, anchors=replace(batch.anchors, mean_labels=5.0))
    assert parts(optim=replace(optim, window_weight=4.0), batch=scaled)["window"] == pytest.approx(
        with_window["window"] / 5
    )
    assert set(parts(optim=replace(optim, task_weight=0.0))) == {"next"}
    assert set(parts(make.model())) == {"next", "click", "like"}, "no decoder, no reconstruction"
    with_summary = make.model(has_decoder=True)
    assert set(parts(with_summary)) == {"next", "click", "like", "reconstruction"}
    assert set(parts(with_summary, replace(optim, reconstruction_weight=0.0))) == {"next", "click", "like"}
    bare, _ = make.chunks(make.histories([9, 4]), 1)
    assert set(parts(with_summary, batch=make.batch(bare, make.plan(model)))) == {"next", "reconstruction"}


@pytest.mark.parametrize("mixing", Mixing)
def test_an_event_shown_as_unknown_acts_like_an_unknown_item(make: SimpleNamespace, mixing: Mixing) -> None:
    model = make.model(mixing=mixing, has_decoder=True)
    with torch.no_grad():
        model.item_table[0] = 0.0  # as in every real model; here all parameters got noise
    chunks, _ = make.chunks(make.histories([20, 14], 2), 2, impressions=12)
    hidden = torch.rand(len(chunks.item)) < 0.4
    batch = make.batch(chunks, make.plan(model))
    unknown = make.batch(replace(chunks, item=np.where(hidden.numpy(), 0, chunks.item)), make.plan(model))
    shown = replace(batch, events=replace(batch.events, hidden=hidden))
    for one, other in zip(make.outputs(model, shown), make.outputs(model, unknown), strict=True):
        torch.testing.assert_close(one, other)
    # As labels the items are known.
    is_label = batch.labels.item >= 0
    items = F.normalize(model.item_table.detach()[1:], dim=-1)
    scores = make.outputs(model, shown)[0][is_label] @ items.T / model.config.softmax_temperature
    with torch.no_grad():
        losses = model.losses(shown, model.item_vectors(shown.rows), NEXT_ONLY)
    expected = F.cross_entropy(scores, batch.rows[batch.labels.item[is_label]] - 1)
    torch.testing.assert_close(losses.parts["next"], expected)

    def learned(**weights: float) -> torch.Tensor:
        """The items that get a gradient from a batch that shows all its events as unknown."""
        vectors = model.item_vectors(batch.rows).detach().requires_grad_()
        every = replace(batch, events=replace(batch.events, hidden=torch.ones_like(hidden)))
        model.losses(every, vectors, OptimConfig(next_weight=0, window_weight=0, **weights)).total.backward()
        assert vectors.grad is not None
        return vectors.grad.any(1).nonzero().flatten()

    of_tasks, of_reconstruction = learned(), learned(task_weight=0, reconstruction_weight=1)
    assert len(of_tasks) and torch.isin(of_tasks, batch.impressions.item).all(), (
        "hidden items get no gradient from tasks"
    )
    assert torch.isin(of_reconstruction, batch.events.item).sum() > 4, "the decoder reconstructs hidden events too"


@pytest.mark.parametrize("mixing", Mixing)
@pytest.mark.parametrize("kind", TargetAttentionKind)
def test_every_parameter_gets_a_gradient(make: SimpleNamespace, mixing: Mixing, kind: TargetAttentionKind) -> None:
    """Except those that a mixing does not use."""
    decay = {"decay": Decay.time, "decay_horizons": [1.0, 9.0]} if mixing is Mixing.separable else {}
    model = make.model(mixing=mixing, target_attention=kind, has_decoder=True, **decay).train()
    chunks, _ = make.chunks(make.histories([20, 14], 2), 2, impressions=12)
    batch = make.batch(chunks, make.plan(model))
    model.losses(batch, model.item_table[batch.rows], replace(NEXT_ONLY, reconstruction_weight=0.1)).total.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    last = model.config.num_layers - 1
    # Separable mixing: events leave the last layer as keys and values, so its feed-forward of events is never used.
    unused = {name for name in without if name.startswith(f"summarizer.layers.{last}.feed_forward.")}
    assert without == unused
    assert bool(unused) == (mixing is Mixing.separable)


def test_dropout_is_off_in_inference_and_on_in_training(make: SimpleNamespace) -> None:
    model = make.model(dropout=0.5)
    chunks, _ = make.chunks(make.histories([9], 2), 2)
    batch = make.batch(chunks, make.plan(model))
    (one, _), (two, _) = make.outputs(model, batch), make.outputs(model, batch)
    assert torch.equal(one, two)
    model.train()
    (one, _), (two, _) = make.outputs(model, batch), make.outputs(model, batch)
    assert not torch.equal(one, two)


def test_the_targets_get_no_gradient() -> None:
    predicted, target = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = reconstruction_loss(predicted, target)
    assert loss.item() == pytest.approx(((predicted - target) ** 2).sum().item() / 5)
    loss.backward()
    assert target.grad is None and predicted.grad is not None
    assert float(reconstruction_loss(predicted[:0], target[:0]).detach()) == 0.0


def test_a_prediction_sees_the_summary_and_the_events_before_it(make: SimpleNamespace) -> None:
    """Only those of its own window: not its own event, no later one, and no other window."""
    torch.manual_seed(1)
    decoder = ReconstructionDecoder(make.model().config, num_layers=2)
    offsets, age = torch.tensor([0, 4, 5, 9]), torch.tensor([4, 1, 300])
    events = torch.randn(9, 16, requires_grad=True)
    summary = torch.randn(3, 3, 16, requires_grad=True)
    predicted = decoder(summary, events, offsets, age)
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
    model = make.model(seed=2, has_decoder=True)
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
