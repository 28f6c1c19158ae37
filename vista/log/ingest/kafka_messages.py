"""Messages as rows of events: JSON objects with the configured columns, checked by the rules for source files.

A number counts as its text, as in a CSV file, so that 17 and "17" are one id, whatever a producer writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vista.config import SourceConfig
from vista.config.checks import OnBadRows
from vista.errors import ConfigError, DataError, shown
from vista.installation import require_module
from vista.log.ingest.rows import PROBLEM, parse
from vista.log.ingest.source_files import ROW
from vista.log.ingest.sources import ScannedSource, needed_columns, source_of_frame
from vista.log.segment_files import StreamOffset, StreamPartition, offset_entries

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


class StreamMessage(NamedTuple):
    """A message: value None for one without a value (a tombstone); the server's time in ms since 1970, or None."""

    topic: str
    partition: int
    offset: int
    value: bytes | None
    time_ms: int | None

    @property
    def place(self) -> str:
        """Where the message is, for error messages."""
        return f"topic {self.topic}, partition {self.partition}, offset {self.offset}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageBatch:
    """Consecutive messages of all partitions of some topics, in the order of topics, partitions, and offsets.

    source: address of the topics; stored: the log's offsets when it was read; offsets: what the log stores with these
    messages, for every partition of the topics; behind: messages per partition that were not read yet; is_start:
    whether the log must store the offsets even without messages, so that a restart continues from the same place.
    """

    source: str
    messages: Sequence[StreamMessage]
    stored: Mapping[StreamPartition, StreamOffset]
    offsets: Mapping[StreamPartition, StreamOffset]
    behind: Mapping[StreamPartition, int]
    is_start: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the messages' values."""
        return sum(len(message.value) for message in self.messages if message.value is not None)

    @property
    def oldest_ms(self) -> int | None:
        """Time of the oldest message in ms; None if no message has a time."""
        return min((message.time_ms for message in self.messages if message.time_ms is not None), default=None)

    def continues(self, offsets: Mapping[StreamPartition, StreamOffset]) -> bool:
        """Whether a log with these offsets still ends where the batch begins."""
        topics = {partition.topic for partition in self.offsets}

        def of_topics(all_: Mapping[StreamPartition, StreamOffset]) -> dict[StreamPartition, StreamOffset]:
            return {partition: offset for partition, offset in all_.items() if partition.topic in topics}

        return of_topics(offsets) == of_topics(self.stored)


MAX_KEPT_BYTES = 64 << 10
"""A dead letter keeps the first bytes of a longer message."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that is not a valid event, and why: a line of JSON in the segment that covers its offset."""

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


MAX_MESSAGE_BYTES = 1 << 20
"""A larger message is a dead letter. Kafka's own default limit is as large."""
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)


@dataclass(frozen=True, slots=True)
class MessageRows:
    """What a batch of messages adds to a log: valid events (None without any), and dead letters in their order."""

    batch: MessageBatch
    events: ScannedSource | None
    letters: Sequence[DeadLetter]


def message_rows(
    batch: MessageBatch, config: SourceConfig, kinds: Mapping[str, str], on_bad_rows: OnBadRows
) -> MessageRows:
    """Decode and check the messages of a batch.

    Args:
        config: names of the columns, and what times are.
        kinds: kinds of ids, "int" or "str", of "user" and "item".
        on_bad_rows: raise refuses the batch at its first invalid message; quarantine makes such messages dead letters.

    Raises:
        ConfigError: if the configuration does not fit messages.
        DataError: naming topic, partition, offset, column, value, and remedy.
    """
    if config.kind != "table":
        raise ConfigError(f"events.kind={config.kind}: messages are not files of a public data set; omit events.kind")
    columns = needed_columns(config)
    messages, objects, letters = [], [], []
    for message in batch.messages:
        decoded = _decoded(message.value)
        if isinstance(decoded, dict):
            messages.append(message)
            objects.append(decoded)
        else:
            letters.append(DeadLetter(message, decoded))
    values: dict[str, list[Any]] = {}
    wrong: dict[int, str] = {}
    for canonical, own in columns.items():
        values[canonical] = [object_.get(own) for object_ in objects]
        _check_types(values[canonical], canonical, own, wrong)
    frame = pl.DataFrame(values, schema=dict.fromkeys(columns, pl.String)).with_row_index(ROW, 1)
    if wrong:
        frame = frame.filter(~pl.col(ROW).is_in(list(wrong)))
    bad = wrong | _broken_rules(batch.source, frame, columns, config.time_form, kinds)
    letters += [DeadLetter(messages[row - 1], reason) for row, reason in bad.items()]
    letters.sort(key=lambda letter: letter.message[:3])
    if letters and on_bad_rows is OnBadRows.error:
        more = f" (invalid messages: {len(letters)})" if len(letters) > 1 else ""
        raise DataError(f"{letters[0]}; on_bad_rows=quarantine sets invalid messages aside instead{more}")
    good = frame.filter(~pl.col(ROW).is_in(list(bad))).drop(ROW) if bad else frame.drop(ROW)
    return MessageRows(batch, _source(batch, good, columns, config.time_form) if good.height else None, letters)


def _decoded(value: bytes | None) -> dict[str, Any] | str:
    """The object in a message, or why there is none."""
    if value is None:
        return "has no value (a tombstone); send events as JSON objects"
    if len(value) > MAX_MESSAGE_BYTES:
        return f"holds {len(value):,} bytes, but at most {MAX_MESSAGE_BYTES:,} are read; send one event per message"
    try:
        decoded = _DECODER.decode(value.decode())
    except UnicodeDecodeError:
        return f"{shown(value[:80])} is not UTF-8; send events as JSON objects in UTF-8"
    except (ValueError, RecursionError):
        return f"{shown(value[:80])} is not JSON; send events as JSON objects"
    if not isinstance(decoded, dict):
        return f"{shown(value[:80])} is not a JSON object; send one object per event"
    return decoded


def _check_types(values: list[Any], canonical: str, own: str, wrong: dict[int, str]) -> None:
    """Make all values of a column text or None; for others note what is wrong, by row."""
    if set(map(type, values)) <= {str, type(None)} and _is_unicode("".join(filter(None, values))):
        return
    for row, value in enumerate(values, 1):
        if isinstance(value, bool) and canonical.startswith("category:"):
            values[row - 1] = str(value).lower()
        elif value is not None and not (isinstance(value, str) and _is_unicode(value)):
            values[row - 1] = None
            wrong[row] = f"column {own!r}: {shown(value)} is not a text or a number; correct the producer"


def _is_unicode(text: str) -> bool:
    """Whether a text can be stored: JSON can escape half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _broken_rules(
    path: str, frame: pl.DataFrame, columns: dict[str, str], time_form: str | None, kinds: Mapping[str, str]
) -> dict[int, str]:
    """By row, the first rule for source files that it breaks."""
    source = ScannedSource(
        path=path, name=path, digest="", size=0, columns=columns, is_text=False, time_form=time_form, frame=frame.lazy()
    )
    parsed, rules = parse(source, kinds, "events")
    broken = parsed.select(ROW, PROBLEM).filter(pl.col(PROBLEM) > 0).collect()
    raw = frame.join(broken, on=ROW, how="inner")
    reasons = {}
    for row, code, *texts in raw.select(ROW, PROBLEM, *columns).iter_rows():
        rule = rules[code - 1]
        value = texts[list(columns).index(rule.column)]
        given = "the value" if value is None else shown(value)
        reasons[row] = f"column {columns[rule.column]!r}: {given} {rule.reason}; {rule.remedy}"
    return reasons


def _source(batch: MessageBatch, frame: pl.DataFrame, columns: dict[str, str], time_form: str | None) -> ScannedSource:
    """The events as a source. Its digest covers their offsets too, because equal messages are different events."""
    source = source_of_frame(frame, columns, "events", time_form)
    place = json.dumps([offset_entries(batch.stored), offset_entries(batch.offsets), source.digest])
    digest = hashlib.sha256(place.encode()).hexdigest()
    return replace(source, path=batch.source, name=batch.source, digest=digest, size=batch.num_bytes)
