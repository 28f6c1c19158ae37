"""Objects that notice when they become copies in a forked child."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """An object that holds what does not survive a fork, such as a lock or a thread."""

    def after_fork(self) -> None:
        """Make the copy in a forked child usable."""


_registered: weakref.WeakSet[Forkable] = weakref.WeakSet()


def repair_after_fork(held: Forkable) -> None:
    """Call `held.after_fork()` in every child that is forked during the object's life."""
    _registered.add(held)


def _repair() -> None:
    for held in _registered:
        held.after_fork()


os.register_at_fork(after_in_child=_repair)
