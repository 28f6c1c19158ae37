"""From a Kafka topic into a store on a server: nothing of the store lies on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.refresh import conftest as growing
from tests.refresh.mock_kafka import MockKafka
from tests.refresh.streams import TOPIC, watch_of
from tests.store.remote.valkey_server import ValkeyServer
from vista.cli.refresh_commands import run_watch
from vista.config import RefreshOptions
from vista.config.choices import Codec
from vista.log.event_log import EventLog
from vista.refresh import refresh
from vista.scorer import Scorer


def test_events_reach_a_store_on_a_server(tmp_path: Path, server: ValkeyServer) -> None:
    pytest.importorskip("confluent_kafka", reason="the extra `kafka` is not installed")
    grow = SimpleNamespace(**{name: getattr(growing, name) for name in ("model", "events", "append")})
    with MockKafka() as kafka:
        config = replace(watch_of(tmp_path, kafka.create(TOPIC), grow), store=server.url())
        options = RefreshOptions(codec=Codec.float32)
        refresh(grow.model(), EventLog.open(config.data), config.store, options=options)
        kafka.send_events(TOPIC, grow.events({1: 5, 3: 4}, growing.START + 500 * growing.HOUR))
        report = run_watch(config)
    assert report.stream is not None and report.stream.messages == 9 and report.refreshes[0].num_users == 2
    refresh(grow.model(), EventLog.open(config.data), tmp_path / "expected", options=options)
    with Scorer.open(config.model, config.store) as scorer, Scorer.open(config.model, tmp_path / "expected") as local:
        scores, expected = (one.score([1, 2, 3], [10, 20, 30]) for one in (scorer, local))
    np.testing.assert_allclose(scores, expected, atol=1e-4)
