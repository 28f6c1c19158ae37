"""Adapters: a few hundred trained numbers that fit a model in service to another surface, country, or task.

They are a vector per layer of stage 2, which is added to all query tokens after that layer, and a bias per labeled task
(bias-only adaptation, or steering vectors, of language models). Everything else is frozen, so the base's stores stay
valid, and one copy of the base serves hundreds of adapters (`Scorer.open(adapter=…)`). Training reads the summaries of
a store and the labels after its `until`, as that of downstream models does.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vista.config import AdaptConfig, OptimConfig, TrainConfig
from vista.config.checks import Architecture, Precision, Split, planned
from vista.device import autocast, choose_precision, cpu_settings, resolve_device
from vista.errors import ConfigError
from vista.examples.batch_source import BatchPrefetcher, BatchSource, trained_tasks
from vista.files import make_folders, writable_file
from vista.log.event_log import EventLog
from vista.model.saved_model import ModelDescription
from vista.model.serving_model import Adapter, ServingModel
from vista.model.vista_model import VistaModel
from vista.ranks import ALONE
from vista.training.downstream import Downstream
from vista.training.log_schema import model_reads
from vista.training.optimizers import BETAS, WeightAverage
from vista.training.run_plan import plan_run
from vista.training.trainer import AVERAGED_PER_EPOCH
from vista.training.validation import Validation
from vista.training.warm_start import take_item_values, training_vectors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdaptReport:
    """What `vista adapt` wrote."""

    out: str
    size_bytes: int
    epochs: int
    seconds: float
    base: dict[str, float]
    """Validation metrics of the base; empty without validation labels."""
    adapted: dict[str, float]
    """The same with the adapter."""

    def __str__(self) -> str:
        lines = [f"{self.out}: {self.size_bytes} bytes, {self.epochs} epochs in {self.seconds:.1f} s"]
        lines += [f"  {name:<20} {before:.4f} -> {self.adapted[name]:.4f}" for name, before in self.base.items()]
        return "\n".join(lines)


def adapt(config: AdaptConfig, log: EventLog | None = None) -> AdaptReport:
    """Train an adapter and write it to `config.out`: the best one by validation, else the last one.

    Args:
        log: the EventLog; None opens `config.data`.

    Raises:
        ConfigError: `out` cannot be written, or the log does not fit the base.
        LeakageError: the base or the store covers labels.
        SummarizerMismatchError: the store was written by another summarizer.
        CheckpointError, StoreError, LogFormatError: the base, the store, or the log is missing or damaged.
    """
    began, out = time.perf_counter(), Path(config.out)
    make_folders(out.parent)
    writable_file(out, "out")
    log = EventLog.open(config.data) if log is None else log
    if config.verify_log:
        log.verify()
    with cpu_settings(config.num_threads), Downstream.open(_run_config(config, log), log) as origin:
        run, device = plan_run(origin.config, log, origin.summaries.since), resolve_device(config.device)
        torch.manual_seed(config.seed)
        base = origin.base.to(device).requires_grad_(False)
        reads = model_reads(base, log)
        source = BatchSource(log, reads, run, origin.summaries)
        validation = Validation.of(log, reads.item_rows, run, ALONE)
        take_item_values(base, source)  # those that a store serves which is refreshed from this log
        served = ServingModel.of(base, base.empty_summary().cpu().numpy())
        values = torch.zeros(served.num_adapted, device=device, requires_grad=True)
        history, best = _train(base, values, source, validation, run, device)
        Adapter(values.detach().cpu().numpy(), served.stage2_id, run.data, config.examined_tasks).write(out)
    shown = [{name: value for name, value in history[epoch].items() if name != "epoch"} for epoch in (0, best)]
    if validation is not None and not best:
        logger.warning("%s: no epoch improved %s of the base, so the adapter changes nothing", out, validation.metric)
    return AdaptReport(str(out), out.stat().st_size, len(history) - 1, time.perf_counter() - began, *shown)


def _run_config(config: AdaptConfig, log: EventLog) -> TrainConfig:
    """The training run whose batches, losses, and checks are those of the adapter."""
    described = ModelDescription.read(Path(config.base))
    described.require(Architecture.vista, Path(config.base), "vista adapt")
    schema, ranks = described.schema, config.ranks_items or not described.schema.tasks
    data = replace(
        described.data,
        path=config.data,
        split=Split.time,
        validation_from=config.validation_from or described.data.validation_from,
        test_from=config.test_from or described.data.test_from,
        min_item_events=0,
        tokens_per_batch=None,
        num_negatives=None,
    )
    weight = None if ranks and schema.has_retrieval else 0.0
    optim = OptimConfig(
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        next_weight=weight,
        window_weight=weight,
        task_weight=float(bool(schema.tasks)),
        tasks=schema.tasks,
        examined_tasks=config.examined_tasks,
    )
    if schema.tasks and (found := trained_tasks(log, optim)) != schema.tasks:
        raise ConfigError(
            f"data: the tasks of {log.path} are {found}, but those of {config.base} are {schema.tasks}, in this order; "
            "prepare the log with the same order of impressions.labels"
        )
    return TrainConfig(
        model=described.config,
        data=data,
        optim=optim,
        base=config.base,
        store=config.store,
        authentication_key_file=config.authentication_key_file,
        seed=config.seed,
    )


def _train(
    base: VistaModel,
    values: Tensor,
    source: BatchSource,
    validation: Validation | None,
    run: TrainConfig,
    device: torch.device,
) -> tuple[list[dict[str, float]], int]:
    """Train the values of an adapter, and set them to the best ones.

    Returns:
        Validation metrics of each epoch, first of the base, with "epoch"; and the best epoch.
    """
    optimizer = torch.optim.Adam([values], lr=run.optim.learning_rate, betas=BETAS)
    average, precision = WeightAverage({"values": values}), choose_precision(Precision.auto, device)
    history, kept, best = list[dict[str, float]](), values.detach().clone(), 0
    for epoch in range(planned(run.optim.epochs, "optim.epochs") + 1):
        if epoch:
            base.train()
            every = max(source.num_batches(epoch - 1) // AVERAGED_PER_EPOCH, 1)
            with BatchPrefetcher(source, epoch - 1, 0) as batches:
                for step, batch in enumerate(batches, 1):
                    part = batch.to(device)
                    with autocast(precision, device):
                        losses = base.with_adapter(values).losses(part, training_vectors(base, part), run.optim)
                    if losses.total.requires_grad:  # not in a batch without a single label
                        optimizer.zero_grad()
                        torch.autograd.backward(losses.total)
                        optimizer.step()
                    if step % every == 0:
                        average.add()
            base.eval()
        with average.applied():
            measured = {} if validation is None else validation(base.with_adapter(values.detach()))
            history.append({"epoch": epoch, **measured})
            if validation is None or validation.better(measured[validation.metric], history[best][validation.metric]):
                kept, best = values.detach().clone(), epoch
        logger.info("epoch %d: %s", epoch, ", ".join(f"{name} {number:.4f}" for name, number in measured.items()))
        if validation is not None and 0 < run.optim.patience <= validation.since_best(history):
            break
    with torch.no_grad():
        values.copy_(kept)
    return history, best
