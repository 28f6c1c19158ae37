"""Configuration of `vista watch source=kafka://...`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require_counts, require_finite
from vista.config.choices import StreamStart

_MOST_MESSAGES = 10_000_000
_MOST_BYTES = 1 << 34
_MOST_SECONDS = 86_400


@dataclass(kw_only=True, slots=True)
class StreamConfig:
    """How the messages of Kafka topics are read."""

    client_file: str | None = None
    """File with settings of the Kafka client, one name=value per line, such as security.protocol, sasl.username,
    sasl.password, or ssl.ca.location, as librdkafka names them. Put passwords here; they are never printed."""
    start: StreamStart = StreamStart.oldest
    """Where to start in topics that have no messages in the log: oldest (the oldest messages that the server still has)
    or newest (messages sent after the first check). Later checks continue from the log's offsets."""
    reset_offsets: bool = False
    """Continue at the oldest message if the log's offsets do not fit the topic: the server has deleted the next
    messages, the topic was created again, or it is another topic. Set this for one run only, because it accepts lost
    events."""
    max_messages: int = 100_000
    """Maximum number of messages per check. They become one segment of the log."""
    max_bytes: int = 64 << 20
    """A check stops reading after this many bytes of messages."""
    max_s: float = 10.0
    """Number of seconds that a check waits for messages, and for each reply of the server."""

    def __post_init__(self) -> None:
        check_types(self, "stream.")
        require_counts(self, "stream.", ("max_messages",), most=_MOST_MESSAGES)
        require_counts(self, "stream.", ("max_bytes",), most=_MOST_BYTES)
        require_finite(self, "stream.", ("max_s",), positive=True, most=_MOST_SECONDS)
