"""Dead letters: messages that are not valid events, as lines of JSON in the segment that covers their offsets."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vista.log.ingest.kafka.message_batch import StreamMessage

MAX_KEPT_BYTES = 64 << 10
"""A dead letter keeps the first bytes of a longer message."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An invalid message and what is wrong with it."""

    message: StreamMessage
    reason: str

    def __str__(self) -> str:
        return f"{self.message.place}: {self.reason}"

    def line(self) -> str:
        """The message as one line of JSON; its value is base64 of at most `MAX_KEPT_BYTES` bytes, or null."""
        value = self.message.value
        entry = {
            "topic": self.message.topic,
            "partition": self.message.partition,
            "offset": self.message.offset,
            "time_ms": self.message.time_ms,
            "reason": self.reason,
            "bytes": 0 if value is None else len(value),
            "value": None if value is None else base64.b64encode(value[:MAX_KEPT_BYTES]).decode(),
        }
        return json.dumps(entry) + "\n"


def write_dead_letters(letters: Iterable[DeadLetter], path: Path) -> None:
    """Write dead letters into a file of a segment that is being written."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(letter.line() for letter in letters)
