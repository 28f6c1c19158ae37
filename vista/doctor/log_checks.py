"""An event log: whether it opens, and its size."""

from __future__ import annotations

from collections.abc import Iterator

from vista.config.serve_config import DoctorConfig
from vista.doctor.finding import Finding
from vista.doctor.memory_checks import free_bytes
from vista.doctor.verdict import Verdict
from vista.log.event_log import EventLog
from vista.planning.plan_text import size

MANY_SEGMENTS = 100


def check_log(config: DoctorConfig) -> Iterator[Finding]:
    """Segments, users, events, and bytes of the log if one is given.

    Times are left out, because they are spread over all of the file.

    Raises:
        LogFormatError: the log is missing, damaged, or of another format.
    """
    if config.data is None:
        return
    log = EventLog.open(config.data)
    yield Finding("log", config.data)
    yield Finding("content", f"{log.num_users:,} users, {log.num_items:,} items, {log.num_events:,} events")
    yield segments_finding(len(log.segments))
    files = (file for segment in log.segments for file in segment.path.rglob("*") if file.is_file())
    yield log_size_finding(sum(file.stat().st_size for file in files), free_bytes())


def segments_finding(number: int) -> Finding:
    """Judge the number of segments, over which the events of a user are spread."""
    if number < MANY_SEGMENTS:
        return Finding("segments", str(number))
    advice = "each read of a history searches all of them; run `vista log compact`"
    return Finding("segments", str(number), Verdict.limited, advice)


def log_size_finding(num_bytes: int, memory_bytes: int | None) -> Finding:
    """Compare the log with the memory that could cache it."""
    if memory_bytes is None or num_bytes <= memory_bytes:
        return Finding("size", size(num_bytes))
    advice = (
        f"only {size(memory_bytes)} of memory are available to cache it, so training and full refreshes read the disk "
        "in every epoch: add memory, or train on a sample of the users"
    )
    return Finding("size", size(num_bytes), Verdict.limited, advice)
