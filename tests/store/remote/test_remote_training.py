"""Downstream training over the summaries of a store on a server."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Served
from tests.store.remote.valkey_server import ValkeyServer
from vista.config.choices import Stage
from vista.errors import LeakageError
from vista.refresh import refresh
from vista.training.trainer import train


def test_nothing_holds_the_password(
    served_tasks: Served,
    start_server: Callable[..., ValkeyServer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = start_server("--requirepass", "hunter2").url(user=":hunter2@")
    assert served_tasks.log.impressions is not None
    times = np.sort(np.asarray(served_tasks.log.impressions.timestamp))
    refresh(served_tasks.model, served_tasks.log, store)
    run_dir = tmp_path / "run"
    given = served_tasks.config
    config = replace(
        given,
        model=replace(given.model),
        optim=replace(given.optim, tasks=["like"], next_weight=0.0, epochs=1),
        stage=Stage.downstream,
        base=str(served_tasks.model_dir),
        store=store,
        run_dir=str(run_dir),
    )
    with pytest.raises(LeakageError, match=r"store=redis://127.*was refreshed with until=all") as caught:
        train(config, served_tasks.log)
    refresh(served_tasks.model, served_tasks.log, store, until=int(times[len(times) * 2 // 5]))
    with caplog.at_level(logging.INFO):
        train(config, served_tasks.log)
    assert re.search("summaries of generation 2 of redis://127", caplog.text)
    written = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    assert b"store: redis://@127.0.0.1:" in (run_dir / "config.yaml").read_bytes()
    assert not [text for text in (f"{caught.value}".encode(), caplog.text.encode(), *written) if b"hunter2" in text]
