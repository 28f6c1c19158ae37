"""The trainer: epochs over a log, resumable bit for bit, ending in an exported model."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vista.config import TrainConfig
from vista.config.checks import Architecture, Precision, TableKind, TablePrecision, to_dict
from vista.config.composition import to_yaml
from vista.config.train_config import without_places
from vista.device import announce, autocast, choose_precision, cpu_settings, resolve_device
from vista.errors import CheckpointError, ConfigError, NonFiniteLossError
from vista.examples.batch import Batch
from vista.examples.batch_source import BatchSource
from vista.files import replace_text
from vista.installation import __version__
from vista.log.event_log import EventLog, log_digest
from vista.model.layers import tables_from_file
from vista.model.losses import Losses, weighted_losses
from vista.model.ranking_model import RankingModel
from vista.model.registry import load_model
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_bar
from vista.ranks import Ranks
from vista.training.checkpoint import (
    RowShards,
    latest_checkpoint,
    load_checkpoint,
    pack_state,
    save_checkpoint,
    send_rows,
    unpack_state,
    write_tensors,
)
from vista.training.downstream import Downstream
from vista.training.log_schema import hash_collisions, model_reads, schema_and_readers
from vista.training.optimizers import BatchPrefetcher, DataParallel, Optimizers, non_finite
from vista.training.run_folder import (
    MetricsWriter,
    RunRecord,
    claimed_folder,
    clean_folder,
    deferred_interrupt,
    model_card,
    num_parameters,
)
from vista.training.run_plan import Progress, RunClock, TimeBudget, plan_run, warmup_steps, warn_of_few_steps
from vista.training.validation import Validation, compare_with_baselines, measured_baselines
from vista.training.warm_start import FrozenItems, WarmStart, drawn_model, start_model, training_vectors

if TYPE_CHECKING:
    from vista.model.sharded_table import ShardedTable


# What must not change between a run and its resumption.


def run_identity(
    config: TrainConfig, log: EventLog, origin: Downstream | WarmStart | None, precision: Precision
) -> dict[str, Any]:
    """Settings and data that decide the bits of a run, flat: {"model.dim": 64, …}."""
    values = to_dict(config)
    flat: dict[str, Any] = {"seed": values["seed"], "log": log_digest(log)}
    for group, own in without_places(values).items():
        flat |= {f"{group}.{key}": value for key, value in own.items()}
    flat |= origin.identity() if origin is not None else {}
    return flat | {"precision": precision.value}


def facts_of_rank(config: TrainConfig, identity: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What all ranks of a job must have in common, flat: that of a run and its resumption, versions, and the folder.

    Args:
        identity: `run_identity`.
    """
    versions = {"vista": __version__, "torch": torch.__version__}
    own = {"run_dir": config.run_dir, "resume": config.resume, "device": device.type}
    return versions | own | identity


def check_identity(here: dict[str, Any], there: dict[str, Any], run_dir: str) -> None:
    """Refuse to resume another run.

    Args:
        here: `run_identity` of this run; there: that of the run in `run_dir`.

    Raises:
        ConfigError: if they differ.
    """
    changed = [f"{k} ({there.get(k)} -> {here.get(k)})" for k in here | there if here.get(k) != there.get(k)]
    if changed:
        raise ConfigError(
            f"run_dir={run_dir} holds a run with another {', '.join(changed)}; choose another run_dir, or set "
            "resume=false to start a new run in it"
        )


# The state of a run in its checkpoints.

TABLE, TABLE_INDEX = "item_table", 0
"""The item table's name among the weights, and its index in the state of the optimizer of tables."""


def save_run(
    run_dir: Path, model: RankingModel, optimizers: Optimizers, progress: Progress, identity: dict[str, Any]
) -> None:
    """Write a checkpoint of a run. With a sharded table, all ranks call this; else only the one that writes.

    Args:
        identity: `run_identity`.
    """
    weights, moments, sums = model.state_dict(), optimizers.table.state_dict(), None
    if (table := model.sharded_table) is not None:
        weights[TABLE] = RowShards(table, model.item_table, model.item_table.dtype)
        of_rows = moments["state"].get(TABLE_INDEX, {}).items()
        moments["state"] = moments["state"] | {TABLE_INDEX: {k: _shards(table, value) for k, value in of_rows}}
        sums = _shards(table, table.adagrad_sums)
    state = {
        "model": weights,
        "optimizer": optimizers.dense.state_dict(),
        "table_optimizer": moments,
        "adagrad_sums": sums,
        "rng": torch.get_rng_state(),
        "cuda_rng": [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else [],
        "progress": {name: getattr(progress, name) for name in Progress.__slots__},
        "config": identity,
    }
    tensors, skeleton = pack_state(state, "state")
    if table is not None and not table.leads:
        send_rows(tensors)
        return
    save_checkpoint(run_dir / "checkpoints", progress.step, tensors, {"run": skeleton})


def restore_run(
    path: Path, run_dir: str, model: RankingModel, optimizers: Optimizers, identity: dict[str, Any]
) -> Progress:
    """Read the checkpoint `path` of a run. Arguments as in `save_run`.

    Raises:
        ConfigError: if it belongs to a run with another identity.
        CheckpointError: if it is damaged, or belongs to another version of the model.
    """
    table = model.sharded_table
    tensors, body = load_checkpoint(path, mapped=None if table is None else _is_sharded)
    state = unpack_state(body["run"], tensors)
    check_identity(identity, state["config"], run_dir)
    if table is not None:
        state["model"][TABLE] = table.own(state["model"][TABLE])
        moments = state["table_optimizer"]["state"].get(TABLE_INDEX, {})
        moments |= {k: table.own(value).clone() for k, value in moments.items() if isinstance(value, Tensor)}
        table.adagrad_sums.copy_(table.own(state["adagrad_sums"]))
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: belongs to another version of the model ({error}); remove {run_dir}, or set resume=false"
        ) from error
    optimizers.dense.load_state_dict(state["optimizer"])
    optimizers.table.load_state_dict(state["table_optimizer"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and model.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"][0], model.device)
    return Progress(**state["progress"])


def _shards(table: ShardedTable, value: Any) -> Any:
    """What has a row per row of the table, divided like it; other values stay."""
    return RowShards(table, value, value.dtype) if isinstance(value, Tensor) and value.dim() else value


def _is_sharded(name: str) -> bool:
    """Whether a tensor of a checkpoint has a row per row of the item table."""
    return name in (f"state.model.{TABLE}", "state.adagrad_sums") or name.startswith(
        f"state.table_optimizer.state.{TABLE_INDEX}."
    )


# A model with a plain item table, made from one whose table is sharded: for validation and export.

PLAIN_WEIGHTS = ".weights.0.tmp"
"""Name of the file in a run folder; `remove_leftovers` removes it."""


def plain_model(model: RankingModel, run_dir: Path, ranks: Ranks | None) -> RankingModel:
    """The model, or a copy for inference if its table is sharded. All ranks call this.

    All ranks map the weights of the copy from one file, which rank 0 writes in pieces. So no rank needs memory for the
    whole table.

    Returns:
        The model or the copy, whose file `run_dir / PLAIN_WEIGHTS` may be moved or removed.

    Raises:
        CheckpointError: if the file cannot be written or read.
    """
    if model.sharded_table is None or ranks is None:
        return model
    path = run_dir / PLAIN_WEIGHTS
    weights = model.state_dict() | {TABLE: RowShards(model.sharded_table, model.item_table, torch.float32)}
    config = replace(model.config, table=TableKind.plain, table_precision=TablePrecision.float32)
    with torch.random.fork_rng(devices=[]), tables_from_file():
        plain = type(model)(config, model.schema, model.items, model.data)
    try:
        if ranks.leads:
            path.unlink(missing_ok=True)  # another copy may still map it
            write_tensors(path, weights)
        else:
            send_rows(weights)
        ranks.wait()
        plain.take_weights(load_file(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: the weights could not be written or read ({error}); free space, and give all ranks the same "
            "run_dir"
        ) from error
    plain.take_catalog(model)
    return plain.to(model.device).eval()


logger = logging.getLogger(__name__)
METRICS_EVERY = 20


def train(config: TrainConfig, log: EventLog | None = None, *, metrics_every: int = METRICS_EVERY) -> VistaModel:
    """Train VISTA: `train_model` with `model.architecture=vista`.

    Raises:
        ConfigError: if the configuration names a baseline; and everything that `train_model` raises.
    """
    if config.model.architecture is not Architecture.vista:
        name = config.model.architecture.value
        raise ConfigError(f"model.architecture={name}: a baseline has no summaries; train it with train_model")
    model = train_model(config, log, metrics_every=metrics_every)
    assert isinstance(model, VistaModel)
    return model


def train_model(
    config: TrainConfig, log: EventLog | None = None, *, metrics_every: int = METRICS_EVERY
) -> RankingModel:
    """Train a model of any architecture and export the best one to `<run_dir>/best`.

    A run that was stopped or killed resumes from its newest checkpoint. With the same number of threads the result is
    bit-identical to that of an uninterrupted run. The processes of a torchrun job train one model together.

    Args:
        config: everything; the defaults alone run.
        log: the EventLog; None opens `config.data.path`.
        metrics_every: steps between two lines of metrics.jsonl.

    Returns:
        The best model by validation (the last one without validation), in eval mode.

    Raises:
        ConfigError: if `run_dir` holds a run of another configuration or log, or cannot be written, or the log lacks
            what the configuration needs.
        LogFormatError: if a file of the log is damaged.
        LeakageError: if the base or the store of a downstream model, or the model of init_from, covers the labels.
        CheckpointError: if the newest checkpoint or the model of init_from is damaged; the message has the remedy.
        NonFiniteLossError: if a loss or gradient is NaN or infinite; the batch is saved and its users are named.
        RankError: if another process of the job has ended, or has other weights after the same steps.
        MissingDependencyError, TrackingError: of the tracker; the latter also after the export, if it lacks something.
    """
    began = time.perf_counter()
    log = EventLog.open(config.data.path) if log is None else log
    sharded = config.model.table is TableKind.torchrec
    with Ranks.joined(resolve_device(config.device), alone=sharded) as ranks:
        leads = ranks is None or ranks.leads
        with claimed_folder(config) if leads else nullcontext(), cpu_settings(config.num_threads):
            if config.verify_log and (ranks is None or ranks.checks_files):
                log.verify()
            if config.base is not None:
                with Downstream.open(config, log) as downstream:
                    return Trainer(downstream.config, log, downstream, ranks, metrics_every, began=began).run()
            warm = WarmStart.open(config, log) if config.init_from is not None else None
            config = config if warm is None else warm.config
            return Trainer(config, log, warm, ranks, metrics_every, began=began).run()


class Trainer:
    """One run: its model, data, optimizers and progress."""

    def __init__(
        self,
        config: TrainConfig,
        log: EventLog,
        origin: Downstream | WarmStart | None = None,
        ranks: Ranks | None = None,
        metrics_every: int = METRICS_EVERY,
        *,
        began: float | None = None,
    ) -> None:
        """
        Args:
            origin: the base model and its store, or the model of a warm start; None draws all weights.
            ranks: the processes that train together; None for a single process.
            metrics_every: steps between two lines of metrics.jsonl.
            began: `time.perf_counter` when the run began, from which optim.minutes counts; None is now.
        """
        self._counted_until = time.perf_counter() if began is None else began
        stored = origin.summaries if isinstance(origin, Downstream) else None
        since = None if stored is None else stored.since
        self.config = config = plan_run(config, log, since)
        self.log, self.metrics_every, self.run_dir = log, metrics_every, Path(config.run_dir)
        self._ranks, self._leads = ranks, ranks is None or ranks.leads
        self.device = resolve_device(config.device) if ranks is None else ranks.device
        self.precision = choose_precision(config.precision, self.device)
        self._warm = origin if isinstance(origin, WarmStart) else None
        # The order of the draws from here on decides the result.
        torch.manual_seed(config.seed)
        fields = schema_and_readers(log, config, since)
        self.model: RankingModel = drawn_model(config, log, *fields) if origin is None else origin.model(*fields)
        self.model.to(self.device)
        if config.optim.table_rate == 0:
            self.model.item_table.requires_grad_(False)
        reads = model_reads(self.model, log)
        self.source = BatchSource(log, reads, config, stored)
        self.validation = Validation.of(log, reads.item_rows, config, ranks)
        self._parallel = (
            None if ranks is None else DataParallel(ranks, self.model.schema.tasks, config.optim, config.seed)
        )
        self.optimizers = Optimizers(
            self.model,
            config.optim,
            frozen_rows=0 if self._warm is None else self._warm.frozen_rows,
            combine=None if self._parallel is None else self._parallel.combine_gradients,
        )
        self.progress = Progress()
        self._frozen_items: FrozenItems | None = None
        self._collisions = hash_collisions(self.model, log, config, self.source.frequency, since) if self._leads else []
        self._identity = run_identity(config, log, origin, self.precision)
        if ranks is not None:
            ranks.agree(facts_of_rank(config, self._identity, self.device))
        self._budget = None if config.optim.minutes is None else TimeBudget(config.optim.minutes)
        self._clock = RunClock()
        self._steps_s = 0.0
        """Time that this process has spent on steps."""
        self._waited_s = 0.0
        """The part of it in which they waited for their batches."""

    def run(self) -> RankingModel:
        """Train to the end, from the newest checkpoint if there is one; returns the exported model."""
        config = self.config
        with RunRecord(config, self.model, self.validation) as metrics:
            self._start(metrics)
            if self.validation is not None and not self.progress.baselines:
                self.progress.baselines = measured_baselines(self.validation)
            with deferred_interrupt() as interrupted:
                while not self.progress.finished(config.optim.epochs):
                    self._run_epoch(metrics, interrupted)
            best = self.run_dir / "best"
            if self.progress.best is None:
                self._export(plain_model(self.model, self.run_dir, self._ranks))
            if self._ranks is not None:
                self._ranks.wait()
            if self.validation is not None:
                compare_with_baselines(self.progress, self.validation, counts=self.model.item_keys is not None)
            waited = (
                f", {self._waited_s / self._steps_s:.1%} of their time spent waiting for batches"
                if self._steps_s
                else ""
            )
            logger.info("done: %d steps%s; model in %s", self.progress.step, waited, best)
            return load_model(best, self.device)

    def _start(self, metrics: MetricsWriter) -> None:
        config = self.config
        newest = latest_checkpoint(self.run_dir / "checkpoints") if config.resume and self._leads else None
        if self._ranks is not None:
            newest = self._ranks.from_first(newest)
        if newest is not None:
            self.progress = restore_run(newest, config.run_dir, self.model, self.optimizers, self._identity)
        if not self.progress.finished(config.optim.epochs):
            self._frozen_items = FrozenItems.of(self.model, self.log, self.source.counts, config)
        if newest is None:
            start_model(self.model, self.log, self.source, config, self.precision, self._frozen_items, self._warm)
            if self._warm is not None:
                self._warm.start_optimizers(self.optimizers)
        if self._ranks is not None:
            self._ranks.share(self.model.replicated())
        if self._frozen_items is not None and (newest is not None or self._ranks is not None):
            self._frozen_items.check(newest or self.run_dir)
        if self._leads:
            self._start_folder(newest, metrics)
        shape = self.model.table_shape
        announce(self.device)
        logger.info(
            "%s; %d parameters, %d of them in a table of %d x %d; %s",
            self.log,
            num_parameters(self.model),
            shape.numel(),
            *shape,
            f"resuming at step {self.progress.step} from {newest}" if newest else f"run folder {self.run_dir}",
        )
        if self._parallel is not None:
            self._parallel.log_balance(self.source)
        if config.optim.epochs is not None and config.optim.minutes is None:
            warn_of_few_steps(config.optim, config.optim.epochs * self.source.num_batches(0))

    def _start_folder(self, newest: Path | None, metrics: MetricsWriter) -> None:
        """Remove from the run folder what does not belong to the run that starts or resumes from `newest`."""
        clean_folder(self.run_dir, starts_over=newest is None and not self.config.resume)
        replace_text(self.run_dir / "config.yaml", to_yaml(self.config))
        metrics.rewind(self.progress.step, {int(row["step"]) for row in self.progress.history})

    def _plan_steps(self, budget: TimeBudget) -> None:
        """Fix the number of steps, and save it before it is used: a resumed run must end at the same step."""
        began, seconds = time.perf_counter(), 0.0
        if self.validation is not None:
            self.validation(plain_model(self.model, self.run_dir, self._ranks))
            seconds = time.perf_counter() - began
        self._count_seconds()
        batches = self.source.num_batches(self.progress.epoch)
        planned = budget.planned_steps(self.progress, seconds, batches, self.config.optim)
        self.progress.planned_steps = planned if self._ranks is None else self._ranks.from_first(planned)
        warn_of_few_steps(self.config.optim, self.progress.planned_steps)
        self._save()

    def _run_epoch(self, metrics: MetricsWriter, interrupted: list[bool]) -> None:
        config, progress = self.config, self.progress
        total = self.source.num_batches(progress.epoch)
        bar = progress_bar(
            total=total,
            initial=progress.batch,
            desc=f"epoch {progress.epoch + 1}" + (f"/{config.optim.epochs}" if config.optim.epochs else ""),
            unit="batch",
        )
        self.model.train()
        began, tokens = time.perf_counter(), 0
        with bar, BatchPrefetcher(self.source, progress.epoch, progress.batch) as batches:
            while progress.batch < total and not progress.planned_steps_done:
                step_began = time.perf_counter()
                batch = next(batches)
                self._waited_s += time.perf_counter() - step_began
                row = self._step(batch, progress.share_done(config.optim.epochs, total))
                progress.batch += 1
                progress.step += 1
                step_seconds = time.perf_counter() - step_began
                self._steps_s += step_seconds
                tokens += len(batch.events.item)
                bar.update()
                if progress.step % self.metrics_every == 0:
                    row["tokens_per_s"] = tokens / (time.perf_counter() - began)
                    row["waiting_share"] = self._waited_s / self._steps_s
                    self._write(metrics, {"step": progress.step, "epoch": progress.epoch, **row})
                    left = self._clock.left(progress.share_done(config.optim.epochs, total))
                    bar.set_postfix(loss=f"{row['loss']:.3f}", **left, refresh=False)
                if self._budget and not progress.planned_steps and self._budget.add(step_seconds):
                    self._plan_steps(self._budget)
                if self._is_stopped(interrupted):
                    self._save()
                    raise _stopped(progress)
                if progress.step % config.checkpoint_every == 0:
                    self._save()
        progress.epoch += 1
        progress.batch = 0
        self._validate(metrics, time.perf_counter() - began)
        self._save()
        if self._is_stopped(interrupted) and not self.progress.finished(config.optim.epochs):
            raise _stopped(progress)

    def _is_stopped(self, interrupted: list[bool]) -> bool:
        """Whether Ctrl-C was pressed: ranks notice it in different steps, and must stop after the same one."""
        return bool(interrupted) if self._ranks is None else self._ranks.any(bool(interrupted))

    def _step(self, batch: Batch, share_done: float) -> dict[str, float]:
        """One update; returns the losses as numbers."""
        warmup = warmup_steps(self.config.optim, self.progress.planned_steps)
        rate = self.optimizers.schedule(self.progress.step, share_done, warmup)
        losses = self._losses(batch)
        objective = losses.total
        if self._parallel is not None:
            losses, objective = self._parallel.combined(losses)
        parts = {name: float(value.detach()) for name, value in losses.parts.items()}
        row = {"loss": float(losses.total.detach()), **parts, "learning_rate": rate}
        if not math.isfinite(row["loss"]):
            raise self._non_finite(batch, "loss", parts)
        if not objective.requires_grad:  # a batch without a single label
            return {**row, "gradient_norm": 0.0}
        norm = self.optimizers.backward(objective)
        if not math.isfinite(norm):
            raise self._non_finite(batch, "gradient", parts)
        self.optimizers.step()
        return {**row, "gradient_norm": norm}

    def _losses(self, batch: Batch) -> Losses:
        """The losses of a batch, or of this rank's part of it, which may be empty.

        Only the rows of the batch take part. A trained table's gradient is sparse, so no pass reads the whole table.
        """
        part = batch if self._parallel is None else self._parallel.part(batch, self.progress.step)
        if part is None:
            if self.model.sharded_table is not None:  # all ranks read together
                self.model.id_vectors(torch.zeros(0, dtype=torch.int64, device=self.device))
            return weighted_losses({}, self.config.optim)
        part = part.to(self.device)
        with autocast(self.precision, self.device):
            vectors = training_vectors(self.model, part, self._frozen_items)
            return self.model.losses(part, vectors, self.config.optim)

    def _validate(self, metrics: MetricsWriter, seconds: float) -> None:
        progress, optim = self.progress, self.config.optim
        if self.validation is None or (progress.epoch % optim.validate_every and not progress.finished(optim.epochs)):
            return
        if self._ranks is not None:
            self._ranks.check_weights(self.model.replicated(), progress.step)
        model = plain_model(self.model, self.run_dir, self._ranks)
        measured = self.validation(model)
        value = measured[self.validation.metric]
        is_best = self.validation.better(value, progress.best)
        progress.history.append({"epoch": progress.epoch, "step": progress.step, **measured})
        self._count_seconds()
        times = {"epoch_seconds": seconds, "seconds": progress.seconds}
        row = {"step": progress.step, "epoch": progress.epoch, "validation": measured, "is_best": is_best}
        self._write(metrics, {**row, **times})
        numbers = ", ".join(f"{name} {number:.4f}" for name, number in measured.items())
        logger.info("epoch %d (%.1f s): %s", progress.epoch, seconds, numbers)
        if is_best:
            progress.best, progress.bad_validations = value, 0
            self._export(model, progress.history[-1])
        else:
            progress.bad_validations += 1
            if self._leads:
                (self.run_dir / PLAIN_WEIGHTS).unlink(missing_ok=True)
            progress.stopped = 0 < optim.patience <= progress.bad_validations
            if progress.stopped:
                logger.info("%s has not improved in %d validations: stopping", self.validation.metric, optim.patience)

    def _write(self, metrics: MetricsWriter, row: dict[str, Any]) -> None:
        if self._leads:
            metrics.write(row)

    def _export(self, model: RankingModel, validated: dict[str, float] | None = None) -> None:
        """Write a model from `plain_model`, with a card, to <run_dir>/best."""
        if not self._leads:
            return
        card = model_card(model, self.config, self.log, validated, self._collisions)
        file = None if model is self.model else self.run_dir / PLAIN_WEIGHTS
        model.save_pretrained(self.run_dir / "best", card=card, weights_file=file)

    def _non_finite(self, batch: Batch, what: str, parts: dict[str, float]) -> NonFiniteLossError:
        if not self._leads:
            return NonFiniteLossError(f"step {self.progress.step}: the {what} is not finite; see the message of rank 0")
        return non_finite(batch, what, parts, step=self.progress.step, run_dir=self.run_dir, log=self.log)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._counted_until
        self._counted_until = now

    def _save(self) -> None:
        self._count_seconds()
        if self._ranks is not None:
            self._ranks.check_weights(self.model.replicated(), self.progress.step)
        if not self._leads and self.model.sharded_table is None:
            return
        save_run(self.run_dir, self.model, self.optimizers, self.progress, self._identity)


def _stopped(progress: Progress) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"stopped at step {progress.step}; rerun the same command to resume")
