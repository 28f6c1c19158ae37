"""What an actor of a refresh does: it loads the model and maps the log once, then encodes batches of users."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

import torch

from vista.arrays import Int
from vista.config.choices import Precision
from vista.device import keep_freed_memory, set_threads
from vista.errors import LogFormatError, SummarizerMismatchError, VistaError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh.batch_encoder import BatchEncoder
from vista.refresh.stage_clock import StageClock
from vista.refresh.user_records import UserRecords
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateSpec


@dataclass(frozen=True, slots=True)
class ActorJob:
    """All that an actor needs: a few hundred bytes, since model and log come from files."""

    model: str
    """Folder of the model."""
    device: str
    num_threads: int
    log: str
    """Folder of the log."""
    last_segment: int
    log_digest: str
    """Of `log_digest`."""
    precision: Precision
    tokens_per_batch: int
    spec: RecordSpec
    state_spec: StateSpec | None


@dataclass(frozen=True, slots=True)
class ActorResult:
    """What an actor returns for a batch."""

    process: int
    """Process id of the actor. It changes if the actor is restarted."""
    records: UserRecords | VistaError
    """An error is returned and raised by the caller, because Ray would change its class and message."""


class RefreshActor:
    """Encodes batches of users. A restarted actor opens model and log again, up to the same segment."""

    def __init__(self, job: ActorJob) -> None:
        self._job = job
        self._encoder: BatchEncoder | None = None

    def encode(self, users: Int, counts: Int) -> ActorResult:
        """The records of a batch, as of `BatchEncoder.encode`."""
        try:
            # Not in the constructor, whose errors Ray turns into text.
            self._encoder = self._encoder or _open(self._job)
            records = self._encoder.encode(users, counts, self._job.spec, self._job.state_spec, StageClock())
            return ActorResult(os.getpid(), records)
        except VistaError as error:
            return ActorResult(os.getpid(), error)


def log_digest(log: EventLog) -> str:
    """Digest of what a log's manifests say, which includes the checksums of its files."""
    return hashlib.sha256(json.dumps(log.manifests, sort_keys=True, default=str).encode()).hexdigest()


def _open(job: ActorJob) -> BatchEncoder:
    set_threads(job.num_threads)
    keep_freed_memory()
    log = EventLog.open(job.log, last_segment=job.last_segment)
    if log_digest(log) != job.log_digest:
        raise LogFormatError(
            f"{job.log}: is not the log with which this refresh began, or was compacted since then; run the refresh "
            "again"
        )
    model = VistaModel.from_pretrained(job.model, torch.device(job.device)).eval()
    if model.summarizer_id() != job.spec.summarizer_id:
        raise SummarizerMismatchError(
            f"{job.model}: is not the model with which this refresh began; name the folder of that model, which must "
            "not change, then run the refresh again"
        )
    return BatchEncoder.of(model, log, job.precision, job.tokens_per_batch)
