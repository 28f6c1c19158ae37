"""What full and incremental refreshes share: which log a model can read, and how users become records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.config import RefreshConfig
from vista.config.choices import Decay, Mixing
from vista.device import announce, cpu_settings, resolve_device
from vista.errors import ConfigError, RecordError
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.model.ranking_model import RankingModel
from vista.model.summary_state import SummaryState
from vista.model.vista_model import VistaModel
from vista.refresh.refresh_report import RefreshProgress, RefreshReport
from vista.store.format.authentication import read_key
from vista.store.format.digest import history_digests, item_keys
from vista.store.format.keys import user_id
from vista.store.format.record import RecordSpec, encode_records
from vista.store.format.state_record import StateArrays, StateSpec, encode_states
from vista.store.shards import Shard
from vista.store.stored_batch import NO_TIMESTAMP, Tail

Int = NDArray[np.int64]


def refresh_from_config(config: RefreshConfig) -> RefreshReport:
    """`vista refresh`."""
    from vista.refresh.full import refresh
    from vista.refresh.incremental import refresh_incremental

    with cpu_settings(config.num_threads):
        device = resolve_device(config.device)
        announce(device)
        model, log = VistaModel.from_pretrained(config.model, device), EventLog.open(config.data)
        key = read_key(config.authentication_key_file)
        shard = None if config.shard is None else Shard.parse(config.shard)
        if config.incremental:
            return refresh_incremental(
                model,
                log,
                config.store,
                tokens_per_batch=config.tokens_per_batch,
                users_per_batch=config.users_per_batch,
                shard=shard,
                progress=config.progress,
                key=key,
            )
        return refresh(
            model,
            log,
            config.store,
            until=config.until,
            codec=config.codec,
            state=config.state,
            tokens_per_batch=config.tokens_per_batch,
            users_per_batch=config.users_per_batch,
            precision=config.precision,
            shard=shard,
            progress=config.progress,
            key=key,
            shared_with_group=config.shared_with_group,
        )


def check_log(model: RankingModel, log: EventLog) -> None:
    """Refuse a log whose events the model would misread.

    Raises:
        ConfigError: its action codes mean something else, or it has no times and the model reads them.
    """
    known = model.schema.actions
    if model.encoder.action is not None and log.actions != known[: len(log.actions)]:
        raise ConfigError(
            f"{log.path}: its actions are {log.actions}, the model was trained on {known}; train anew on this log"
        )
    if model.schema.has_time and not log.has_time and (model.config.use_time or model.config.decay is Decay.time):
        raise ConfigError(f"{log.path}: has no times, which this model reads; train one with model.use_time=false")


def has_states(model: VistaModel) -> bool:
    """Whether new events can be added to what the model keeps of old ones.

    Not in bidirectional mixing, and not under a history limit: an event that comes pushes one out.
    """
    config = model.config
    return model.summarizer is not None and config.mixing is Mixing.separable and config.history_limit == 0


@dataclass(frozen=True, slots=True)
class LogItems:
    """What becomes of each of a log's items: model row int32 [num_items]; key of the history digest uint64."""

    rows: NDArray[np.int32]
    keys: NDArray[np.uint64]

    @classmethod
    def of(cls, model: VistaModel, log: EventLog) -> LogItems:
        ids = log.items.ids(np.arange(log.num_items))
        return cls(model.item_rows(ids).astype(np.int32), item_keys(ids))

    def model_rows(self, histories: Histories) -> Histories:
        """The same histories with items as rows of the model."""
        return dataclasses.replace(histories, item=self.rows[histories.item])

    def digests(self, histories: Histories) -> NDArray[np.uint64]:
        """uint64 [B] of histories whose items are the log's rows."""
        times, actions = np.asarray(histories.timestamp), np.asarray(histories.action)
        return history_digests(self.keys[histories.item], times, actions, histories.offsets)


def stored_tail(newest: Histories, tail_len: int) -> Tail:
    """The last events of histories whose items are model rows, as a record holds them."""
    last = newest.select(np.maximum(newest.lengths - tail_len, 0), newest.lengths)
    return Tail(last.item.astype(np.int32), np.asarray(last.timestamp), np.asarray(last.action), last.offsets)


def last_times(histories: Histories) -> Int:
    """int64 [B] times of the newest events; NO_TIMESTAMP without one."""
    if histories.num_events == 0:
        return np.full(histories.num_users, NO_TIMESTAMP, np.int64)
    times = np.asarray(histories.timestamp)[np.maximum(histories.offsets[1:] - 1, 0)]
    return np.where(histories.lengths > 0, times, NO_TIMESTAMP)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a batch writes: one key, record and, where states are kept, state a user."""

    keys: list[bytes]
    records: list[bytes]
    states: list[bytes]

    def extend(self, other: Encoded) -> None:
        self.keys.extend(other.keys)
        self.records.extend(other.records)
        self.states.extend(other.states)


def encode_users(
    keys: list[bytes],
    summary: NDArray[np.float32],
    newest: Histories,
    event_count: Int,
    digest: NDArray[np.uint64],
    arrays: StateArrays | None,
    *,
    tail_len: int,
    spec: RecordSpec,
    state_spec: StateSpec | None,
    run: RefreshProgress,
) -> Encoded:
    """Records and states of N users. One whose summary cannot be stored is left out, and named in the report.

    Args:
        keys: N.
        summary: [N, K, d].
        newest: N histories, at least their last `tail_len` events, items as model rows.
        event_count, digest: [N] of the whole histories.
        arrays: states of the N users, where `state_spec` says that they are kept.
    """
    try:
        records = encode_records(
            keys,
            summary,
            stored_tail(newest, tail_len),
            spec=spec,
            event_count=event_count,
            last_event_ts=last_times(newest),
            history_digest=digest,
        )
    except RecordError as error:
        if len(keys) == 1:
            run.failed(user_id(keys[0]), str(error))
            return Encoded([], [], [])
        encoded = Encoded([], [], [])
        for row in range(len(keys)):
            one = slice(row, row + 1)
            encoded.extend(
                encode_users(
                    keys[one],
                    summary[one],
                    newest.select_users(row, row + 1),
                    event_count[one],
                    digest[one],
                    None if arrays is None else arrays[one],
                    tail_len=tail_len,
                    spec=spec,
                    state_spec=state_spec,
                    run=run,
                )
            )
        return encoded
    states = [] if state_spec is None or arrays is None else encode_states(keys, arrays, state_spec)
    return Encoded(keys, records, states)


def to_arrays(state: SummaryState, applied_segment: int, history_digest: NDArray[np.uint64]) -> StateArrays:
    """States as the store takes them."""
    z, n, removed, clock, num_events = (
        getattr(state, name).cpu().numpy() for name in ("z", "n", "removed", "clock", "num_events")
    )
    applied = np.full(len(n), applied_segment, np.int64)
    return StateArrays(z, n, removed, clock, num_events, applied, history_digest)


def from_arrays(arrays: StateArrays, device: torch.device) -> SummaryState:
    """States as the model takes them."""
    parts: list[Tensor] = [
        torch.from_numpy(part).to(device)
        for part in (arrays.z, arrays.n, arrays.removed, arrays.clock, arrays.num_events)
    ]
    return SummaryState(*parts)


@torch.inference_mode()
def read_summaries(model: VistaModel, state: SummaryState) -> NDArray[np.float32]:
    """float32 [N, K, d] summaries that the seeds read from states."""
    assert model.summarizer is not None
    summary: NDArray[np.float32] = model.summarizer.read(state.z, state.n).float().cpu().numpy()
    return summary
