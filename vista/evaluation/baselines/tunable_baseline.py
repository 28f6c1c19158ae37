"""A counting baseline with a hyperparameter that `Tuned` chooses."""

from __future__ import annotations

from typing import Protocol, TypeVar

from vista.evaluation.baselines.counting_baseline import CountingBaseline

Value = TypeVar("Value", contravariant=True)


class TunableBaseline(CountingBaseline, Protocol[Value]):
    """It counts once for all values: `fit` does not depend on the chosen one."""

    def choose(self, value: Value) -> None:
        """Set the hyperparameter, before or after `fit`."""
