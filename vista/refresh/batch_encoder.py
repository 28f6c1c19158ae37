"""From the log to the bytes of the store: the part of a full refresh that any number of processes can share."""

from __future__ import annotations

from dataclasses import dataclass

from vista.arrays import Int
from vista.config.choices import Precision
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.model import inference
from vista.model.inference import LogUsers
from vista.model.vista_model import VistaModel
from vista.refresh.counting import count_histories, stored_codes
from vista.refresh.log_items import LogItems
from vista.refresh.stage_clock import StageClock
from vista.refresh.states import read_summaries, state_of, to_arrays
from vista.refresh.user_records import UserRecords, encode_users, last_times, stored_tail
from vista.store.format.keys import user_keys
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateSpec
from vista.store.user_summaries import UserSummaries


@dataclass(frozen=True, slots=True)
class BatchEncoder:
    """Reads the histories of a batch of users and encodes their records and states."""

    model: VistaModel
    """With a frozen summarizer."""
    log: EventLog
    items: LogItems
    features: LogUsers
    precision: Precision
    """Of the summarizer."""
    tokens_per_batch: int
    """Events that are read and summarized at once."""

    @classmethod
    def of(cls, model: VistaModel, log: EventLog, precision: Precision, tokens_per_batch: int) -> BatchEncoder:
        """The encoder of a model and a log that it can read (`vista.refresh.log_items.check_log`)."""
        frozen = model.with_frozen("summarizer", precision)
        users = LogUsers(model.user_features, log)
        return cls(frozen, log, LogItems.of(model, log), users, precision, tokens_per_batch)

    def encode(
        self, users: Int, counts: Int, spec: RecordSpec, state_spec: StateSpec | None, clock: StageClock
    ) -> UserRecords:
        """Summarize users and encode the results. The bytes depend only on the arguments and the number of threads.

        Args:
            users: int64 [N] rows of the log.
            counts: int64 [N], how many of each user's events are summarized, oldest first.
            spec: what each record must hold.
            state_spec: what each state must hold; None to make no states.
            clock: gets the time of each stage.
        """
        encoded = UserRecords.empty()
        for part in token_groups(counts, self.tokens_per_batch):
            summaries = self._summarize(users[part], counts[part], state_spec is not None, clock)
            with clock.stage("encode"):
                encoded.extend(encode_users(summaries, spec, state_spec))
        return encoded

    def _summarize(self, users: Int, counts: Int, with_states: bool, clock: StageClock) -> UserSummaries:
        with clock.stage("read"):
            histories = self.log.gather(users, counts)
            model_rows, digests = self.items.model_rows(histories), self.items.digests(histories)
        arrays = None
        with clock.stage("summarize"):
            tables = count_histories(self.model.item_keys, model_rows)
            if with_states:
                states = state_of(self.model, model_rows)
                summary = read_summaries(self.model, states)
                arrays = to_arrays(states, self.log.last_segment, digests, tables)
            else:
                summary = inference.summarize(self.model, model_rows).cpu().numpy()
        with clock.stage("encode"):
            return UserSummaries(
                keys=user_keys(self.log.users.ids(users)),
                summary=summary,
                tail=stored_tail(self.model, model_rows),
                event_count=histories.lengths,
                last_event_ts=last_times(model_rows),
                history_digest=digests,
                counters=stored_codes(tables),
                features=self.features.features(users).columns,
                states=arrays,
            )
