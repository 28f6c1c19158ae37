"""Learning rates of the network and the item table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import small_config
from vista.log.event_log import EventLog
from vista.training.trainer import Trainer


def trained(log: EventLog, folder: Path, table_rate: float) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A trainer after one epoch, and the weights that it started from."""
    folder.mkdir(exist_ok=True)
    made = Trainer(small_config(log, folder, optim__table_rate=table_rate, optim__epochs=1), log)
    start = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.run()
    return made, start


def test_a_table_rate_of_zero_keeps_the_table(event_log: EventLog, tmp_path: Path) -> None:
    made, start = trained(event_log, tmp_path, 0.0)
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, start[name])}
    assert "item_table" not in changed and len(changed) > 10
    assert not made.optimizers.table.state


def test_the_table_learns_at_its_own_rate(event_log: EventLog, tmp_path: Path) -> None:
    moved = {}
    for rate in (1.0, 0.1):
        made, start = trained(event_log, tmp_path / str(rate), rate)
        network = made.optimizers.schedule(100, 0.5, 4)
        assert network == pytest.approx(5e-3 * (0.01 + 0.99 * 0.5))
        assert {group["lr"] for group in made.optimizers.dense.param_groups} == {network}
        assert [group["lr"] for group in made.optimizers.table.param_groups] == [network * rate]
        moved[rate] = float((made.model.item_table.detach() - start["item_table"]).abs().mean())
    assert 0 < 5 * moved[0.1] < moved[1.0] < 20 * moved[0.1]
