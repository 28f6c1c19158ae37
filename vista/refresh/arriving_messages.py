"""Messages that arrive in topics: each batch becomes one segment of the log, together with the offsets after it."""

from __future__ import annotations

import logging
import time

from vista.config import WatchConfig
from vista.installation import require_module
from vista.log.event_log import EventLog
from vista.log.ingest.kafka_messages import message_rows
from vista.log.ingest.prepare import prepare_messages
from vista.log.segment_files import stream_offsets
from vista.refresh.stream_report import StreamReport

logger = logging.getLogger(__name__)
_TOLERANCE_MS = 60_000
"""An event that is dated this far in the future shows that a producer's clock is wrong."""


class ArrivingMessages:
    """Appends the messages of topics to a log, each once: the log holds the offset of the next message.

    Raises:
        ConfigError: the settings of the topics are wrong.
        MissingDependencyError: the extra `kafka` is not installed.
    """

    def __init__(self, config: WatchConfig) -> None:
        require_module("confluent_kafka", "kafka")  # other watches do not need it
        from vista.log.ingest.kafka_reader import KafkaReader

        assert config.source is not None
        self._config = config
        self._reader = KafkaReader(config.source, config.stream)
        self._has_warned = False

    def append(self, log: EventLog) -> StreamReport:
        """Read the messages after those in the log, and append them as one segment.

        Raises:
            StreamError, StreamOffsetError: see `KafkaReader.read`.
            DataError: with on_bad_rows=raise, a message is invalid; or the events do not fit the log.
            LogBusyError, LogWriteError: the log cannot be written at the moment.
        """
        config = self._config
        batch = self._reader.read(stream_offsets(segment.manifest for segment in log.segments))
        num_letters = 0
        if batch.messages or batch.is_start:
            kinds = {"user": log.users.kind, "item": log.items.kind}
            rows = message_rows(batch, config.events, kinds, config.on_bad_rows)
            report = prepare_messages(rows, config.data, events=config.events)
            self._reader.commit(batch)
            num_letters = len(rows.letters)
            if num_letters:
                logger.warning("%s: the first of %d dead letters: %s", config.data, num_letters, rows.letters[0])
            self._warn_of_clocks(report.last_ms)
        return StreamReport(len(batch.messages), num_letters, batch.behind, batch.oldest_ms)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()

    def _warn_of_clocks(self, newest_ms: int | None) -> None:
        ahead_ms = 0 if newest_ms is None else newest_ms - time.time() * 1000
        if ahead_ms > _TOLERANCE_MS and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: an event is dated %.0f s in the future; correct the clock of its producer, because events are "
                "ordered by their own times",
                self._config.source,
                ahead_ms / 1000,
            )
