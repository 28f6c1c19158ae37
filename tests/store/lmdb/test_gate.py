"""The gate of transactions, after a Ctrl-C while a thread enters or leaves a section."""

from __future__ import annotations

import threading

import pytest

from vista.store.lmdb.environment import _Gate


class _Interrupted(_Gate):
    """Its condition raises KeyboardInterrupt at its n-th use."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.uses, inner = 0, self._condition
        outer = self

        class Condition:
            wait, notify_all = inner.wait, inner.notify_all

            def __enter__(self) -> None:
                outer.uses += 1
                if outer.uses == at:
                    raise KeyboardInterrupt
                inner.__enter__()

            def __exit__(self, *error: object) -> None:
                inner.__exit__(None, None, None)

        self._condition = Condition()  # type: ignore[assignment]


@pytest.mark.parametrize("section", ["shared", "exclusive"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_while_entering_or_leaving_blocks_nobody(section: str, at: int) -> None:
    gate = _Interrupted(at)
    with pytest.raises(KeyboardInterrupt), getattr(gate, section)():
        pass
    with gate.shared():  # The thread's next sections end, and then other threads can enter.
        pass
    with gate.exclusive():
        pass
    done = threading.Event()

    def other() -> None:
        with gate.exclusive():
            done.set()

    threading.Thread(target=other, daemon=True).start()
    assert done.wait(30)
