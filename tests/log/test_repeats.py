"""Whether users return to items: by hand, and the default of data.exclude_seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vista.config import DataConfig, SourceColumns
from vista.log.event_log import EventLog
from vista.log.repeats import leaves_out_seen, repeat_share
from vista.log.splits import visible_counts


def log_of(histories: list[list[int]], folder: Path) -> EventLog:
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    frame = {"user": user, "item": np.concatenate(histories)}
    return EventLog.from_frame(frame, folder / "log", columns=SourceColumns(timestamp=None))


@pytest.mark.parametrize("events_per_batch", [1, 4, 1 << 22])
def test_by_hand(tmp_path: Path, events_per_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that another user had is not a repeat."""
    monkeypatch.setattr("vista.log.repeats.EVENTS_PER_BLOCK", events_per_batch)
    log = log_of([[1, 2, 1, 1], [1, 2], [3, 3, 3, 4]], tmp_path)
    assert repeat_share(log, log.lengths) == pytest.approx(4 / 10)
    assert repeat_share(log, visible_counts(log, "leave-last-two-out")) == pytest.approx(1 / 6)
    assert repeat_share(log, np.zeros(3, np.int64)) == 0


def test_only_the_training_events_decide(tmp_path: Path) -> None:
    """With a hundred events and one repeat, users return; repeats among the held-out events do not count."""
    once = list(range(100))
    assert leaves_out_seen(log_of([[*once, 1, 2]], tmp_path / "a"), DataConfig())
    assert not leaves_out_seen(log_of([[*once[:-1], 1, 101, 102]], tmp_path / "b"), DataConfig())


@pytest.mark.parametrize("chosen", [True, False])
def test_a_choice_is_kept(tmp_path: Path, chosen: bool) -> None:
    assert leaves_out_seen(log_of([[1, 1, 1, 1]], tmp_path), DataConfig(exclude_seen=chosen)) is chosen
