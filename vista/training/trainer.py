"""The trainer: epochs over a log, resumable bit for bit, ending in an exported model."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save

from vista.config import OptimConfig, TrainConfig
from vista.config.checks import Architecture, Precision, TableKind, planned, to_dict
from vista.config.composition import to_yaml
from vista.config.train_config import without_places
from vista.device import announce, autocast, choose_precision, cpu_settings, resolve_device, set_threads
from vista.errors import ConfigError, NonFiniteLossError
from vista.evaluation.metrics import mean_and_error
from vista.evaluation.reference import make_reference
from vista.examples.batch import Batch, BatchImpressions
from vista.examples.batch_source import BatchPrefetcher, BatchSource
from vista.files import replace_file, replace_text, replaced_folder
from vista.installation import __version__
from vista.log.event_log import EventLog, log_digest
from vista.log.splits import split_until
from vista.model.losses import Losses, weighted_losses
from vista.model.ranking_model import RankingModel
from vista.model.registry import load_model
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_bar
from vista.ranks import ALONE, JobRanks, Ranks
from vista.runs.run_list import EPOCH_0
from vista.runs.tracking import MetricsWriter, typed_errors
from vista.training.checkpoint import PLAIN_WEIGHTS, latest_checkpoint, plain_model, restore_run, save_run
from vista.training.downstream import Downstream
from vista.training.log_schema import hash_collisions, model_reads, schema_and_readers
from vista.training.optimizers import HEAD_RATE, DataParallel, Optimizers
from vista.training.run_folder import (
    RunRecord,
    claimed_folder,
    clean_folder,
    deferred_interrupt,
    model_card,
    num_parameters,
)
from vista.training.run_plan import Progress, RunClock, plan_run, warn_of_few_steps
from vista.training.validation import Validation, compare_with_baselines, reference_scores
from vista.training.warm_start import WarmStart, drawn_model, start_model, training_vectors


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


logger = logging.getLogger(__name__)
METRICS_EVERY = 20
AVERAGED_PER_EPOCH = 32
"""About how often per epoch weights are added to their average. It reads whole tables, which steps do not."""
RESERVE = 0.03
"""Share of optim.minutes that checkpoints and the export take."""
WIDE_STEPS, WIDE_PASSES = 200, 4
"""Of epoch 0, for next items: most steps, and most passes over the training histories."""
LABEL_STEPS, LABEL_PASSES, LABELS_PER_STEP = 3000, 16, 4096
"""Of epoch 0, for labels: most steps, most passes over the labels, and impressions per step."""
MOST_LABELED = 1 << 20
"""Most impressions, give or take a batch, that these steps draw from."""
NAMED_USERS = 20
"""Most users of a refused batch that the error names."""


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
    with ExitStack() as stack:
        sharded = config.model.table is TableKind.torchrec
        ranks = stack.enter_context(Ranks.joined(resolve_device(config.device), as_job=sharded))
        if ranks.leads:
            stack.enter_context(claimed_folder(config))
        stack.enter_context(cpu_settings(config.num_threads))
        if config.verify_log and ranks.checks_files:
            log.verify()
        origin: Downstream | WarmStart | None = None
        if config.base is not None:
            origin = stack.enter_context(Downstream.open(config, log))
        elif config.init_from is not None:
            origin = WarmStart.open(config, log)
        config = config if origin is None else origin.config
        return Trainer(config, log, origin, ranks, metrics_every, began=began).run()


class Trainer:
    """One run: its model, data, optimizers and progress."""

    def __init__(
        self,
        config: TrainConfig,
        log: EventLog,
        origin: Downstream | WarmStart | None = None,
        ranks: Ranks = ALONE,
        metrics_every: int = METRICS_EVERY,
        *,
        began: float | None = None,
    ) -> None:
        """
        Args:
            origin: the base model and its store, or the model of a warm start; None draws all weights.
            ranks: the processes that train together.
            metrics_every: steps between two lines of metrics.jsonl.
            began: `time.perf_counter` when the run began, from which optim.minutes counts; None is now.
        """
        self._clock = RunClock(began)
        self._warm = origin if isinstance(origin, WarmStart) else None
        stored = origin.summaries if isinstance(origin, Downstream) else None
        since = None if stored is None else stored.since
        self.config = config = plan_run(config, log, since)
        self.log, self.metrics_every, self.run_dir = log, metrics_every, Path(config.run_dir)
        self._ranks = ranks
        self.device = ranks.own_device(resolve_device(config.device))
        self.precision = choose_precision(config.precision, self.device)
        self._identity = run_identity(config, log, origin, self.precision)
        here = {"run_dir": config.run_dir, "resume": config.resume, "device": self.device.type}
        ranks.agree({"vista": __version__, "torch": torch.__version__} | here | self._identity)

        # The order of the draws from here on decides the result.
        torch.manual_seed(config.seed)
        schema, readers = schema_and_readers(log, config, since)
        self.model: RankingModel = (
            drawn_model(config, log, schema, readers) if origin is None else origin.model(schema, readers)
        )
        self.model.data = config.data  # with all settings that follow from the log
        self.model.to(self.device)
        if planned(config.optim.table_rate, "optim.table_rate") == 0:
            self.model.item_table.requires_grad_(False)
        reads = model_reads(self.model, log)
        self.source = BatchSource(log, reads, config, stored)
        self._collisions = hash_collisions(self.model, log, config, self.source.frequency, since) if ranks.leads else []
        self.validation = Validation.of(log, reads.item_rows, config, ranks)

        self._parallel = (
            DataParallel(ranks, self.model.schema.tasks, config.optim, config.seed)
            if isinstance(ranks, JobRanks)
            else None
        )
        fits_wide = origin is None and isinstance(self.model, VistaModel) and self.model.has_wide
        self._wide = cast(VistaModel, self.model) if fits_wide else None
        """The model, if the run has an epoch 0."""
        self.optimizers = self._new_optimizers(head_rate=1.0 if fits_wide else HEAD_RATE)
        self.progress = Progress()

    def _new_optimizers(self, *, head_rate: float = HEAD_RATE, trains_tables: bool = True) -> Optimizers:
        return Optimizers(
            self.model,
            self.config.optim,
            frozen_rows=0 if self._warm is None else self._warm.frozen_rows,
            head_rate=head_rate,
            trains_tables=trains_tables,
            combine=None if self._parallel is None else self._parallel.combine_gradients,
        )

    def run(self) -> RankingModel:
        """Train to the end, from the newest checkpoint if there is one; returns the exported model."""
        with RunRecord(self.config, self.model, self.validation) as metrics:
            resumes = self._start(metrics)
            if self.validation is not None and not self.progress.baselines:
                self.progress.baselines, self.progress.counted = self.validation.baselines()
            with deferred_interrupt() as interrupted:
                if self._wide is not None and not resumes:
                    self._fit_wide(self._wide, metrics, interrupted)
                while not self.progress.finished(self.config.optim.epochs):
                    self._run_epoch(metrics, interrupted)
            warn_of_few_steps(self.config.optim, self.progress.step)
            if self.progress.best is None:
                wide = None if self.progress.epoch else self._wide  # with optim.epochs=0
                with self.optimizers.average.applied(), nullcontext() if wide is None else wide.wide_alone():
                    self._export(plain_model(self.model, self.run_dir, self._ranks))
            self._ranks.wait()
            if self.validation is not None:
                compare_with_baselines(self.progress, self.validation, counts=self.model.item_keys is not None)
                if self.progress.wide and self.progress.best == self.progress.history[0][self.validation.metric]:
                    logger.info(
                        "%s is the model of epoch 0, which reads counters and pooled vectors: attention has not "
                        "improved validation yet; train longer to give it more time",
                        self.run_dir / "best",
                    )
            best, share = self.run_dir / "best", self._clock.waiting_share
            waited = "" if share is None else f", {share:.1%} of their time spent waiting for batches"
            model = load_model(best, self.device)
            if self._ranks.leads and isinstance(model, VistaModel):
                self._write_reference(model, best)
            logger.info("done: %d steps%s; model in %s", self.progress.step, waited, best)
            return model

    def _write_reference(self, model: VistaModel, folder: Path) -> None:
        """Write what is normal in the windows of the training data, if the log has enough of them."""
        newest = self.log.time_range() if self.log.has_time else None
        if newest is None:
            return
        end, rows = split_until(self.config.data, "train").before, model.rows_of(self.log.items)
        reference = make_reference(
            self.log,
            newest[1] + 1 if end is None else end,
            model.items,
            partial(reference_scores, model, self.log, rows),
        )
        if reference is not None:
            with typed_errors(folder):
                reference.write(folder)

    def _start(self, metrics: MetricsWriter) -> bool:
        """Set the weights and the state of the run, from the newest checkpoint if there is one, and its folder; whether
        there is one.
        """
        config, ranks = self.config, self._ranks
        newest = latest_checkpoint(self.run_dir / "checkpoints") if config.resume and ranks.leads else None
        newest = ranks.from_first(newest)
        if newest is not None:
            validation = self.validation
            measured = ("", "") if validation is None else (validation.metric, validation.ranking_metric)
            self.progress = restore_run(newest, config.run_dir, self.model, self.optimizers, self._identity, measured)
        if newest is None:
            start_model(self.model, self.log, self.source, config, self.precision, self._warm)
            if isinstance(self.model, VistaModel) and not self.model.target_attention.final_norm.weight.any():
                # The earlier model was that of epoch 0.
                torch.nn.init.ones_(self.model.target_attention.final_norm.weight)
        ranks.share(self.model.replicated())
        if ranks.leads:
            # What is left goes, unless it belongs to the run that starts or resumes from `newest`.
            clean_folder(self.run_dir, starts_over=newest is None and not config.resume)
            with typed_errors(self.run_dir / "config.yaml"):
                replace_text(self.run_dir / "config.yaml", to_yaml(config))
            metrics.rewind(self.progress.step, {int(row["step"]) for row in self.progress.history})
        activations = planned(config.data.tokens_per_batch, "data.tokens_per_batch") * config.model.dim
        on_cpu = self.device.type == "cpu"
        announce(self.device, set_threads(config.num_threads, activations if on_cpu else None))
        shape = self.model.table_shape
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
        return newest is not None

    def _fit_wide(self, model: VistaModel, metrics: MetricsWriter, interrupted: list[bool]) -> None:
        """Epoch 0: fit what scores read without attention, then validate and export the model that has nothing else. An
        interrupted epoch 0 starts over."""
        began, progress, optim = time.perf_counter(), self.progress, self.config.optim
        model.train()
        number, shown = self.source.num_batches(0), list[BatchImpressions]()
        steps = min(WIDE_STEPS, WIDE_PASSES * number) if self.config.ranks_items else number
        ranked = replace(optim, task_weight=0.0, tasks=[])
        batch = self._fit_part(self._every_batch(shown), steps, ranked, interrupted)
        if batch is not None and model.schema.tasks and optim.task_weight > 0:
            alone = replace(optim, next_weight=0.0, window_weight=0.0)
            batch = replace(batch, impressions=BatchImpressions.of_batches(shown), anchors=None)
            steps = min(LABEL_STEPS, LABEL_PASSES * -(-len(batch.impressions.item) // LABELS_PER_STEP))
            self._fit_part(self._mixed_batches(batch), steps, alone, interrupted)
        if self.validation is not None:
            with model.wide_alone():
                self._validate(metrics, time.perf_counter() - began)
            progress.wide = self.validation.of_users.tolist()
        self._save()

    def _fit_part(
        self, batches: Generator[Batch], steps: int, optim: OptimConfig, interrupted: list[bool]
    ) -> Batch | None:
        """Fit what scores read without attention by the losses of `optim`; returns the last batch."""
        optimizers, batch = self._new_optimizers(trains_tables=False), None
        with progress_bar(total=steps, desc="epoch 0", unit="batch") as bar, closing(batches):
            for step, batch in enumerate(islice(batches, steps)):
                optimizers.schedule(step, 0)
                self._update(optimizers, batch, wide=optim)
                optimizers.average.add()
                bar.update()
                if self._ranks.any(bool(interrupted)):
                    raise _stopped(self.progress)
                if self._ranks.any(self._time_is_up()):
                    break
        optimizers.average.settle()
        return batch

    def _every_batch(self, shown: list[BatchImpressions]) -> Generator[Batch]:
        """The batches of the source, epoch by epoch. `shown` gets the labeled impressions of those that are taken of
        the first epoch, up to `MOST_LABELED`. Where labels alone are trained, it ends there."""
        total = 0
        for epoch in count():
            with BatchPrefetcher(self.source, epoch, 0) as batches:
                for batch in batches:
                    if epoch == 0 and total < MOST_LABELED:
                        shown.append(BatchImpressions.of_batches([batch.impressions]))
                        total += len(shown[-1].item)
                    elif not self.config.ranks_items:
                        return
                    yield batch

    def _mixed_batches(self, labeled: Batch) -> Generator[Batch]:
        """This rank's parts of batches of LABELS_PER_STEP random impressions. A batch of the source has the impressions
        of a few users, and each step would follow these."""
        shown, draws = labeled.impressions, np.random.default_rng(self.config.seed)
        while len(shown.item):
            order = torch.from_numpy(draws.permutation(len(shown.item)))
            for index in torch.split(order, LABELS_PER_STEP):
                yield replace(labeled, impressions=shown.select(index[self._ranks.rank :: self._ranks.size]))

    def _run_epoch(self, metrics: MetricsWriter, interrupted: list[bool]) -> None:
        """Train the rest of an epoch, then validate."""
        config, progress, clock = self.config, self.progress, self._clock
        total, is_late = self.source.num_batches(progress.epoch), False
        averaged_every = max(total // AVERAGED_PER_EPOCH, 1)
        bar = progress_bar(
            total=total,
            initial=progress.batch,
            desc=f"epoch {progress.epoch + 1}" + (f"/{config.optim.epochs}" if config.optim.epochs else ""),
            unit="batch",
        )
        self.model.train()
        began, tokens = time.perf_counter(), 0
        with bar, BatchPrefetcher(self.source, progress.epoch, progress.batch) as batches:
            while progress.batch < total and not is_late:
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                row = self._step(batch)
                seconds = time.perf_counter() - asked
                clock.add_step(seconds, waited)
                progress.batch += 1
                progress.step += 1
                if progress.step % averaged_every == 0:
                    self.optimizers.average.add()
                tokens += len(batch.events.item)
                bar.update()
                if progress.step % self.metrics_every == 0:
                    row["tokens_per_s"] = tokens / (time.perf_counter() - began)
                    row["waiting_share"] = clock.waiting_share or 0.0
                    metrics.write({"step": progress.step, "epoch": progress.epoch, **row})
                    left = clock.left(self._share_done(total))
                    bar.set_postfix(loss=f"{row['loss']:.3f}", **left, refresh=False)
                # Ranks notice these in different steps, and must stop after the same one.
                if self._ranks.any(bool(interrupted) or self._time_is_up()):
                    is_late = self._ranks.any(self._time_is_up())
                    if not is_late:
                        self._save()
                        raise _stopped(progress)
                if progress.step % config.checkpoint_every == 0:
                    self._save()
        progress.epoch += 1
        progress.batch = 0
        progress.stopped = is_late
        self._validate(metrics, time.perf_counter() - began)
        self._save()
        if self._ranks.any(bool(interrupted)) and not progress.finished(config.optim.epochs):
            raise _stopped(progress)

    def _time_is_up(self) -> bool:
        """Whether no time is left in optim.minutes for another step before the last validation."""
        minutes, progress = self.config.optim.minutes, self.progress
        if minutes is None:
            return False
        return self._spent() + progress.validation_seconds > 60 * minutes * (1 - RESERVE)

    def _spent(self) -> float:
        """Seconds of the run so far."""
        return self.progress.seconds + self._clock.since_lap()

    def _share_done(self, batches: int) -> float:
        """Share of the training that is done at least, in an epoch of this number of batches."""
        optim, progress = self.config.optim, self.progress
        shares = [0.0]
        if optim.epochs is not None:
            shares.append((progress.epoch + progress.batch / batches) / optim.epochs)
        if optim.minutes is not None:
            shares.append(self._spent() / (60 * optim.minutes))
        return max(shares)

    def _step(self, batch: Batch) -> dict[str, float]:
        """One update; returns the losses as numbers."""
        warmup = planned(self.config.optim.warmup_steps, "optim.warmup_steps")
        rate = self.optimizers.schedule(self.progress.step, warmup)
        return self._update(self.optimizers, batch) | {"learning_rate": rate}

    def _update(self, optimizers: Optimizers, batch: Batch, *, wide: OptimConfig | None = None) -> dict[str, float]:
        """An update of the whole model, or of its wide part alone; returns the losses and the norm of the gradient."""
        losses = self._losses(batch, wide=wide)
        objective = losses.total
        if self._parallel is not None:
            losses, objective = self._parallel.combined(losses)
        parts = {name: float(value.detach()) for name, value in losses.parts.items()}
        row = {"loss": float(losses.total.detach()), **parts, "gradient_norm": 0.0}
        if not math.isfinite(row["loss"]):
            raise self._non_finite(batch, "loss", parts)
        if objective.requires_grad:  # not in a batch without a single label
            row["gradient_norm"] = optimizers.backward(objective)
            if not math.isfinite(row["gradient_norm"]):
                raise self._non_finite(batch, "gradient", parts)
            optimizers.step()
        return row

    def _losses(self, batch: Batch, *, wide: OptimConfig | None) -> Losses:
        """The losses of a batch, or of this rank's part of it, which may be empty. Only the rows of the batch take
        part. A trained table's gradient is sparse, so no pass reads the whole table."""
        part: Batch | None = batch
        if self._parallel is not None and (wide is None or not wide.task_weight):  # else from `_mixed_batches`
            part = self._parallel.part(batch, self.progress.step)
        if part is None:
            if self.model.sharded_table is not None and wide is None:  # all ranks read together
                self.model.id_vectors(torch.zeros(0, dtype=torch.int64, device=self.device))
            return weighted_losses({}, self.config.optim)
        part = part.to(self.device)
        with autocast(self.precision, self.device):
            if wide is not None:
                assert self._wide is not None
                return self._wide.wide_losses(part, wide)
            vectors = training_vectors(self.model, part)
            return self.model.losses(part, vectors, self.config.optim)

    def _non_finite(self, batch: Batch, what: str, parts: dict[str, float]) -> NonFiniteLossError:
        """The error about a loss or gradient, which names the batch's users; the batch is saved in the run folder."""
        step = self.progress.step
        if not self._ranks.leads:
            return NonFiniteLossError(f"step {step}: the {what} is not finite; see the message of rank 0")
        path = self.run_dir / f"nonfinite-step-{step}.safetensors"
        try:
            replace_file(path, save({name: tensor.cpu().contiguous() for name, tensor in batch.tensors().items()}))
            saved = f"the batch is saved in {path}"
        except OSError as error:
            saved = f"the batch cannot be saved in {path} ({error.strerror})"
        users = np.unique(batch.user.cpu().numpy())
        named = self.log.users.ids(users[:NAMED_USERS]).tolist()
        losses = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        return NonFiniteLossError(
            f"step {step}: the {what} is not finite ({losses}); {saved}, its {len(users)} users are "
            f"{named}{' …' if len(users) > NAMED_USERS else ''}. Lower optim.learning_rate, or look at the features of "
            f"these users; the last checkpoint is in {self.run_dir / 'checkpoints'}"
        )

    def _validate(self, metrics: MetricsWriter, epoch_seconds: float) -> None:
        """Validate if this epoch asks for it, export the model if it is the best so far, and decide whether to stop."""
        progress, optim = self.progress, self.config.optim
        if self.validation is None or (progress.epoch % optim.validate_every and not progress.finished(optim.epochs)):
            return
        self._ranks.check_weights(self.model.replicated(), progress.step)
        with self.optimizers.average.applied():
            self._validate_average(self.validation, metrics, epoch_seconds)
        since_best = self.validation.since_best(progress.history)
        if 0 < optim.patience <= since_best:
            progress.stopped = True
            logger.info("%s has not improved in %d validations: stopping", self.validation.metric, since_best)
        progress.stopped |= self._ranks.any(self._time_is_up())  # no time for another step and its validation

    def _validate_average(self, validation: Validation, metrics: MetricsWriter, epoch_seconds: float) -> None:
        """Validate the model, and export it if it is the best so far."""
        progress, began = self.progress, time.perf_counter()
        model = plain_model(self.model, self.run_dir, self._ranks)
        measured = validation(model, calibrates=True)
        value = measured[validation.metric]
        is_best, change, error = validation.better(value, progress.best), 0.0, 0.0
        if progress.wide:  # What attention adds must exceed its error: epoch 0 is cheaper, and finds more new items.
            change, error = mean_and_error(validation.of_users - np.array(progress.wide))
            is_best &= validation.better(change, 0.0) and abs(change) > error
        progress.history.append({"epoch": progress.epoch, "step": progress.step, **measured})
        progress.seconds += self._clock.lap()
        progress.validation_seconds = time.perf_counter() - began
        times = {"epoch_seconds": epoch_seconds, "seconds": progress.seconds}
        row = {"step": progress.step, "epoch": progress.epoch, "validation": measured, "is_best": is_best}
        metrics.write({**row, **times})
        numbers = ", ".join(f"{name} {number:.4f}" for name, number in measured.items())
        logger.info("epoch %d (%.1f s), validation: %s", progress.epoch, epoch_seconds, numbers)
        if progress.wide:
            logger.info("attention changes %s by %+.4f ± %.4f from epoch 0", validation.metric, change, error)
        if is_best:
            progress.best = value
            if progress.counted:
                progress.lead = list(mean_and_error(validation.ranked_users - np.array(progress.counted)))
            with self.model.calibrated(validation.calibration):
                if validation.calibration.size and model is not self.model:
                    model = plain_model(self.model, self.run_dir, self._ranks)
                self._export(model, progress.history[-1])
        elif self._ranks.leads:
            (self.run_dir / PLAIN_WEIGHTS).unlink(missing_ok=True)

    def _export(self, model: RankingModel, validated: dict[str, float] | None = None) -> None:
        """Write a model from `plain_model`, with a card, to <run_dir>/best; after epoch 0 to epoch-0 as well."""
        if self._ranks.leads:
            card = model_card(model, self.config, self.log, validated, self._collisions)
            file = None if model is self.model else self.run_dir / PLAIN_WEIGHTS
            model.save_pretrained(self.run_dir / "best", card=card, weights_file=file)
            if validated is not None and validated["epoch"] == 0:
                folder = self.run_dir / EPOCH_0
                with typed_errors(folder), replaced_folder(folder) as partial:
                    shutil.copytree(self.run_dir / "best", partial, dirs_exist_ok=True)

    def _save(self) -> None:
        """Write a checkpoint."""
        self.progress.seconds += self._clock.lap()
        self._ranks.check_weights(self.model.replicated(), self.progress.step)
        if self._ranks.leads or self.model.sharded_table is not None:
            save_run(self.run_dir, self.model, self.optimizers, self.progress, self._identity)


def _stopped(progress: Progress) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"stopped at step {progress.step}; rerun the same command to resume")
