"""The trainer: one pass after the other over a log, resumable bit for bit, ending in an exported model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from vista.config import TrainConfig
from vista.config.choices import Architecture, Stage
from vista.config.config_keys import to_yaml
from vista.config.conversion import to_dict
from vista.config.train_config import without_places
from vista.device import announce, autocast, choose_precision, cpu_settings, resolve_device
from vista.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from vista.evaluation.protocol import EVENTS_READ
from vista.examples.batch_source import BatchSource, trained_tasks
from vista.examples.cuts import Batch
from vista.files import remove_leftovers, replace_text, writable_folder
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.model.ranking_model import NEXT_TASK, RankingModel, Schema, class_of
from vista.model.vista_model import VistaModel
from vista.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    pack_state,
    remove_checkpoints,
    save_checkpoint,
    unpack_state,
)
from vista.training.downstream import Downstream
from vista.training.model_card import model_card
from vista.training.run_folder import MetricsWriter, deferred_interrupt, log_file
from vista.training.validation import Validation

logger = logging.getLogger(__name__)
RESERVED = {
    *(NEXT_TASK, "reconstruction", "search_unit", "loss"),
    *("step", "epoch", "learning_rate", "gradient_norm", "tokens_per_s", "validation", "epoch_seconds", "seconds"),
}
"""Names that no task may have: a loss of its name stands beside these in a line of metrics.jsonl."""
METRICS_EVERY = 20
"""Steps between two lines of metrics.jsonl."""
NAMED_USERS = 20
"""Users of a refused batch that the error names at most."""


@dataclass(slots=True)
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    epoch: int = 0
    batch: int = 0
    """Batches done of this epoch."""
    step: int = 0
    best: float | None = None
    bad_validations: int = 0
    stopped: bool = False
    seconds: float = 0.0
    """What was spent on it, validation included, in all processes of a run that was stopped and resumed."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics, one entry a validation."""


def train(config: TrainConfig, log: EventLog | None = None) -> VistaModel:
    """Train VISTA: `train_model` with `model.architecture=vista`.

    Raises:
        ConfigError: if the configuration names a baseline; and all that `train_model` raises.
    """
    if config.model.architecture is not Architecture.vista:
        name = config.model.architecture.value
        raise ConfigError(f"model.architecture={name}: a baseline has no summaries; train it with train_model")
    model = train_model(config, log)
    assert isinstance(model, VistaModel)
    return model


def train_model(config: TrainConfig, log: EventLog | None = None) -> RankingModel:
    """Train a model of any architecture and export the best one to `<run_dir>/best`.

    A run that was stopped or killed goes on from its newest checkpoint and, with the same number of threads, ends in
    the same bits.

    Args:
        config: everything; the defaults alone run.
        log: the EventLog; None opens `config.data.path`.

    Returns:
        The best model by validation (the last one without validation), in eval mode.

    Raises:
        ConfigError: if `run_dir` holds a run of another configuration or log, or cannot be written, or the log lacks
            what the configuration needs.
        LeakageError: stage=downstream, and base or store have seen the labels.
        CheckpointError: if the newest checkpoint is damaged; the message has the remedy.
        NonFiniteLossError: if a loss or gradient is NaN or infinite; the batch is saved and its users are named.
    """
    log = EventLog.open(config.data.path) if log is None else log
    writable_folder(Path(config.run_dir), "run_dir")
    with log_file(Path(config.run_dir) / "train.log"), cpu_settings(config.num_threads):
        if config.stage is Stage.joint:
            return _Trainer(config, log).run()
        with Downstream.open(config, log) as downstream:
            return _Trainer(config, log, downstream).run()


def schema_of(log: EventLog, config: TrainConfig) -> Schema:
    """What a model may use of a log.

    Raises:
        ConfigError: if the log lacks what the configuration needs, or nothing would be trained.
        DataError: if a rating is infinite.
    """
    if config.model.decay.value == "time" and not log.has_time:
        raise ConfigError(f"model.decay=time: {log.path} has no times; set model.decay=position or none")
    rating_range = None
    if log.has_rating and config.model.use_rating:
        low, high = math.inf, -math.inf
        for users in token_groups(log.lengths, EVENTS_READ):  # not all at once: every column comes along
            ratings = np.asarray(log.gather(np.arange(users.start, users.stop)).rating)
            low = min(low, float(np.nanmin(ratings, initial=np.inf)))
            high = max(high, float(np.nanmax(ratings, initial=-np.inf)))
        rating_range = (low, high) if low < high else None  # of one value alone nothing is to be learnt
        if rating_range is not None and not math.isfinite(high - low):
            raise DataError(
                f"{log.path}: ratings reach from {low} to {high}; prepare it anew from finite ones, or set "
                "model.use_rating=false"
            )
    optim = config.optim
    tasks = trained_tasks(log, optim)
    for name in RESERVED & set(tasks):
        raise ConfigError(
            f"{log.path}: no label may be named {name!r}, which names the retrieval head or what metrics.jsonl holds "
            "beside the tasks' losses; rename it"
        )
    if config.model.architecture.ranks_only and not tasks:
        why = "optim.task_weight=0" if log.impressions is not None else f"{log.path} has none"
        raise ConfigError(
            f"model.architecture={config.model.architecture.value}: learns from labelled impressions alone, and {why}; "
            "prepare the log with impressions.* and set optim.task_weight=1, or train an architecture that ranks next "
            "items, such as model=sasrec"
        )
    if not config.trains_next and not tasks:
        raise ConfigError(
            f"optim.next_weight={optim.next_weight:g}: {log.path} offers no labelled task either, so no head would be "
            "trained; set optim.next_weight=1"
        )
    return Schema(list(log.actions), log.has_time, rating_range, tasks, config.trains_next)


class _Trainer:
    def __init__(self, config: TrainConfig, log: EventLog, downstream: Downstream | None = None) -> None:
        self.config, self.log, self.downstream = config, log, downstream
        self.run_dir = Path(config.run_dir)
        self.device = resolve_device(config.device)
        torch.manual_seed(config.seed)
        schema = schema_of(log, config)
        self.model: RankingModel
        if downstream is None:
            self.model = class_of(config.model.architecture)(config.model, schema, log.items, config.data)
        else:
            self.model = downstream.model(schema)
        self.model.to(self.device)
        item_rows = self.model.rows_of(log.items)
        self.source = BatchSource(log, item_rows, config, downstream.summaries if downstream is not None else None)
        self.validation = _validation(log, item_rows, config)
        optim = config.optim
        learnt = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.dense = [p for name, p in learnt if name != "item_table"]
        # Matrices of linear maps decay; norms, biases, embeddings, seeds and position biases do not.
        linear = (module.weight for module in self.model.modules() if isinstance(module, nn.Linear))
        decayed = [weight for weight in linear if weight.requires_grad]
        known = {id(p) for p in decayed}
        plain = [p for p in self.dense if id(p) not in known]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.learning_rate,
            betas=(0.9, 0.98),
        )
        self.table_optimizer = torch.optim.SparseAdam(
            [self.model.item_table], lr=optim.learning_rate, betas=(0.9, 0.98)
        )
        self.progress = Progress()
        self._counted_until = time.perf_counter()
        self.precision = choose_precision(config.precision, self.device)

    # Running ---------------------------------------------------------------------------------------------------------

    def run(self) -> RankingModel:
        config = self.config
        with MetricsWriter(self.run_dir, tensorboard=config.tensorboard) as metrics:
            self._start(metrics)
            with deferred_interrupt() as interrupted:
                while (progress := self.progress).epoch < config.optim.epochs and not progress.stopped:
                    self._run_epoch(metrics, interrupted)
            best = self.run_dir / "best"
            if progress.best is None:
                self.model.eval()
                self._export()
            logger.info("done: %d steps; model in %s", progress.step, best)
            return RankingModel.from_pretrained(best, self.device)

    def _start(self, metrics: MetricsWriter) -> None:
        config = self.config
        newest = latest_checkpoint(self.run_dir / "checkpoints") if config.resume else None
        if newest is None and self.downstream is None:  # a checkpoint, or a base, has what was read
            self.model.read_item_table(config.data)
        if newest is not None:
            self._restore(newest)
        elif not config.resume:
            # Without this wish an export stays until a better one replaces it: its checkpoints may just be gone.
            remove_checkpoints(self.run_dir / "checkpoints")
            for name in ("best", "best.old"):
                shutil.rmtree(self.run_dir / name, ignore_errors=True)
        remove_leftovers(self.run_dir)
        replace_text(self.run_dir / "config.yaml", to_yaml(config))
        metrics.rewind(self.progress.step, {int(found["step"]) for found in self.progress.history})
        table = self.model.item_table
        announce(self.device)
        logger.info(
            "%s; %d parameters, %d of them in a table of %d x %d; %s",
            self.log,
            sum(p.numel() for p in self.model.parameters()),
            table.numel(),
            *table.shape,
            f"resuming at step {self.progress.step} from {newest}" if newest else f"run folder {self.run_dir}",
        )

        steps = self.config.optim.epochs * self.source.num_batches(0)
        if steps < 2 * self.config.optim.warmup_steps:
            logger.warning(
                "the whole run is about %d steps, of which optim.warmup_steps=%d warm up: too few to learn much; lower "
                "data.tokens_per_batch (to 512, say) and optim.warmup_steps, or raise optim.epochs",
                steps,
                self.config.optim.warmup_steps,
            )

    def _run_epoch(self, metrics: MetricsWriter, interrupted: list[bool]) -> None:
        config, progress = self.config, self.progress
        total = self.source.num_batches(progress.epoch)
        bar = tqdm(
            total=total,
            initial=progress.batch,
            desc=f"epoch {progress.epoch + 1}/{config.optim.epochs}",
            unit="batch",
            disable=not config.progress,
        )
        self.model.train()
        began, tokens = time.perf_counter(), 0
        with bar:
            while progress.batch < total:
                batch = self.source.batch(progress.epoch, progress.batch)
                row = self._step(batch, (progress.epoch + progress.batch / total) / config.optim.epochs)
                progress.batch += 1
                progress.step += 1
                tokens += len(batch.item)
                bar.update()
                if progress.step % METRICS_EVERY == 0:
                    row["tokens_per_s"] = tokens / (time.perf_counter() - began)
                    metrics.write({"step": progress.step, "epoch": progress.epoch, **row})
                    bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if interrupted:
                    self._save()
                    raise _stopped(progress)
                if progress.step % config.checkpoint_every == 0:
                    self._save()
        progress.epoch += 1
        progress.batch = 0
        self._validate(metrics, time.perf_counter() - began)
        self._save()
        if interrupted and progress.epoch < config.optim.epochs:
            raise _stopped(progress)

    def _step(self, batch: Batch, done: float) -> dict[str, float]:
        """One update; returns the losses as numbers."""
        optim = self.config.optim
        batch = batch.to(self.device)
        rate = self._learning_rate(done)
        for group in (*self.optimizer.param_groups, *self.table_optimizer.param_groups):
            group["lr"] = rate
        # Only the rows of this batch take part: the table's gradient is sparse, so no pass over the whole table.
        with autocast(self.precision, self.device):
            losses = self.model.losses(batch, self.model.item_vectors(batch.rows), optim)
        parts = {name: float(value.detach()) for name, value in losses.parts.items()}
        row = {"loss": float(losses.total.detach()), **parts, "learning_rate": rate}
        if not math.isfinite(row["loss"]):
            self._refuse(batch, "loss", parts)
        if not losses.total.requires_grad:  # a batch without a single label
            return {**row, "gradient_norm": 0.0}
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total)
        norm = self._clip_gradient()
        if not math.isfinite(norm):
            self._refuse(batch, "gradient", parts)
        self.optimizer.step()
        self.table_optimizer.step()  # type: ignore[no-untyped-call]
        self.model.item_table.grad = None
        return {**row, "gradient_norm": norm}

    def _clip_gradient(self) -> float:
        """Scale the gradient to `optim.gradient_clip` at most; returns its norm before."""
        used: list[Tensor] = [p for p in self.dense if p.grad is not None]
        table = self.model.item_table
        if table.grad is not None:
            table.grad = table.grad.coalesce()  # a row that was read twice counts once, with the sum
            # Norms are not made for sparse tensors: a stand-in shows the same memory as a dense gradient.
            touched = torch.empty_like(table.grad.values())
            touched.grad = table.grad.values()
            used.append(touched)
        return float(nn.utils.clip_grad_norm_(used, self.config.optim.gradient_clip))

    def _learning_rate(self, done: float) -> float:
        """Linear warm-up, then cosine to 1 % at the end; `done` is the share of training done."""
        optim = self.config.optim
        warm = min(1.0, (self.progress.step + 1) / max(optim.warmup_steps, 1))
        return optim.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def _validate(self, metrics: MetricsWriter, seconds: float) -> None:
        progress, optim = self.progress, self.config.optim
        if self.validation is None or (progress.epoch % optim.validate_every and progress.epoch < optim.epochs):
            return
        found = self.validation(self.model)
        value = found[self.validation.metric]
        progress.history.append({"epoch": progress.epoch, "step": progress.step, **found})
        self._count_seconds()
        times = {"epoch_seconds": seconds, "seconds": progress.seconds}
        metrics.write({"step": progress.step, "epoch": progress.epoch, "validation": found, **times})
        logger.info(
            "epoch %d (%.1f s): %s", progress.epoch, seconds, ", ".join(f"{k} {v:.4f}" for k, v in found.items())
        )
        if self.validation.better(value, progress.best):
            progress.best, progress.bad_validations = value, 0
            self._export(progress.history[-1])
        else:
            progress.bad_validations += 1
            progress.stopped = 0 < optim.patience <= progress.bad_validations
            if progress.stopped:
                logger.info("no better %s in %d validations: stopping", self.validation.metric, optim.patience)

    def _export(self, validated: dict[str, float] | None = None) -> None:
        """Write the model, with a card, to <run_dir>/best."""
        self.model.save_pretrained(self.run_dir / "best", card=model_card(self.model, self.config, self.log, validated))

    def _refuse(self, batch: Batch, what: str, parts: dict[str, float]) -> NoReturn:
        path = self.run_dir / f"nonfinite-step-{self.progress.step}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in batch.tensors().items()}, path)
        users = np.unique(batch.user.cpu().numpy())
        named = self.log.users.ids(users[:NAMED_USERS]).tolist()
        losses = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        raise NonFiniteLossError(
            f"step {self.progress.step}: the {what} is not finite ({losses}); the batch is saved in {path}, its "
            f"{len(users)} users are {named}{' …' if len(users) > NAMED_USERS else ''}. Lower optim.learning_rate, or "
            f"look at these users' features; the last checkpoint is in {self.run_dir / 'checkpoints'}"
        )

    # State -----------------------------------------------------------------------------------------------------------

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._counted_until
        self._counted_until = now

    def _save(self) -> None:
        self._count_seconds()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "table_optimizer": self.table_optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
            "config": self._identity(),
        }
        tensors, skeleton = pack_state(state, "state")
        save_checkpoint(self.run_dir / "checkpoints", self.progress.step, tensors, {"run": skeleton})

    def _restore(self, path: Path) -> None:
        tensors, body = load_checkpoint(path)
        state = unpack_state(body["run"], tensors)
        here, there = self._identity(), state["config"]
        changed = [f"{k} ({there.get(k)} -> {here.get(k)})" for k in here | there if here.get(k) != there.get(k)]
        if changed:
            raise ConfigError(
                f"run_dir={self.run_dir} holds a run with another {', '.join(changed)}; take another run_dir, or "
                "resume=false to start anew in it"
            )
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: is of another version of the model ({error}); remove {self.run_dir}, or use resume=false"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.table_optimizer.load_state_dict(state["table_optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.progress = Progress(**state["progress"])

    def _identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption, flat: {"model.dim": 64, …}."""
        values = to_dict(self.config)
        manifests = json.dumps(self.log.manifests, sort_keys=True, default=str).encode()
        flat: dict[str, Any] = {"seed": values["seed"], "log": hashlib.sha256(manifests).hexdigest()[:12]}
        flat |= _flat(values)
        flat |= self.downstream.identity() if self.downstream is not None else {}
        return flat | {"precision": self.precision.value}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"model.dim": 64, …}, without places."""
    return {f"{group}.{key}": value for group, own in without_places(values).items() for key, value in own.items()}


def _validation(log: EventLog, item_rows: NDArray[np.int64], config: TrainConfig) -> Validation | None:
    if config.optim.validate_every == 0:
        return None
    validation = Validation(log, item_rows, config)
    if not validation.metric:
        logger.warning("%s has no case to validate on: the last model will be exported, not the best", log)
        return None
    return validation


def _stopped(progress: Progress) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"stopped at step {progress.step}; the same command resumes it")
