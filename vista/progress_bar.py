"""Progress of long work on stderr: what is done, the rate, and the time left.

On a terminal, one line is updated in place. Elsewhere, such as in the log of a batch job, there is a plain line every
ten seconds. Work that ends soon shows nothing. Stdout stays free for the results of a command.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from weakref import WeakSet

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 10.0
"""Between two plain lines."""
PLAIN_DELAY_S, TERMINAL_DELAY_S = 5.0, 0.5
"""Work that ends before shows nothing."""
NARROW_COLUMNS = 60
"""On a narrower terminal there is no bar, so that rate and time left fit."""

_NARROW = "{desc} {percentage:.0f}% {remaining} left {rate_fmt}"
_PLAIN = "{desc}: {n_fmt} of {total_fmt} {unit} ({percentage:.0f}%), {rate_fmt}, {remaining} left{postfix}"
_ENDLESS = "{desc}: {n_fmt} {unit}, {rate_fmt}, {elapsed} so far"
_UNKNOWN = "{desc}: {elapsed} so far"

_is_shown: ContextVar[bool] = ContextVar("is_shown", default=False)


@contextmanager
def progress_shown(is_shown: bool = True) -> Iterator[None]:
    """Show the bars that are made within, or hide them. Commands show them; by default bars are hidden."""
    token = _is_shown.set(is_shown)
    try:
        yield
    finally:
        _is_shown.reset(token)


def progress_bar(
    iterable: Iterable[T] | None = None,
    *,
    desc: str,
    unit: str,
    total: float | None = None,
    initial: int = 0,
    unit_scale: bool = False,
    leave: bool = True,
) -> tqdm[T]:
    """A progress bar over an iterable, or one that is moved with `update`. It is a context manager.

    It is only shown within `progress_shown`.

    Args:
        iterable: what is passed on, element by element.
        desc: what is done, in one or two words.
        unit: what is counted.
        total: number of units; None takes the length of the iterable, if it has one.
        initial: units that were done earlier.
        unit_scale: write 1,200,000 as 1.20M.
        leave: whether the last line stays on the terminal.
    """
    hidden = not _is_shown.get()
    has_total = total is not None or hasattr(iterable, "__len__")
    if sys.stderr is not None and sys.stderr.isatty():
        is_narrow = not hidden and os.get_terminal_size(sys.stderr.fileno()).columns < NARROW_COLUMNS
        place: dict[str, Any] = {"delay": TERMINAL_DELAY_S, "dynamic_ncols": True, "leave": leave}
        place["bar_format"] = _NARROW if is_narrow and has_total else None
    else:
        place = {"file": _Lines(), "delay": PLAIN_DELAY_S, "mininterval": LINE_SECONDS}
        place["bar_format"] = _PLAIN if has_total else _ENDLESS
    bar: tqdm[T] = _bar_class()(
        iterable,
        disable=hidden,
        desc=desc,
        unit=unit,
        total=total,
        initial=initial,
        unit_scale=unit_scale,
        miniters=1,
        **place,
    )
    return bar


@contextmanager
def elapsed_time(desc: str) -> Iterator[None]:
    """Show how long a step has taken whose progress cannot be known, such as a call of another library."""
    with progress_bar(desc=desc, unit="") as bar:
        bar.bar_format = _UNKNOWN
        with ticking(bar):
            yield


@contextmanager
def ticking(bar: tqdm[T]) -> Iterator[None]:
    """Keep the times of a bar up to date while nothing moves it."""
    ended = threading.Event()

    def tick() -> None:
        due = bar.delay
        while not ended.wait(1.0):
            elapsed = bar.format_dict["elapsed"]
            if elapsed >= due:
                due = elapsed + bar.mininterval
                # `close` writes a last line only if there was one after the delay.
                bar.last_print_t = max(bar.last_print_t, bar.start_t + bar.delay)
                bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()


@cache
def _bar_class() -> Any:
    """The class of bars, made when the first bar is: tqdm takes 30 ms to import, and a scorer shows none."""
    from tqdm import tqdm

    class _Bar(tqdm):  # type: ignore[misc]
        """A progress bar whose lock is not shared across processes.

        tqdm shares a lock between a process and its forked children. A child that is killed while it holds that lock
        would block the bars of all the others forever. With tqdm's monitor thread off, bars need `miniters=1`.
        """

        _lock = threading.RLock()
        _instances: ClassVar[WeakSet[Any]] = WeakSet()
        monitor_interval = 0
        disable = True
        """Until the bar is made, so that an interrupt before that leaves nothing to close."""

        def refresh(self, nolock: bool = False, lock_args: Any = None) -> bool | None:
            """Display the bar. Unlike tqdm, it releases the lock if the write fails or is interrupted."""
            with self._lock:
                return super().refresh(nolock=True)  # type: ignore[no-any-return]

    def renew_lock() -> None:
        _Bar._lock = threading.RLock()

    os.register_at_fork(after_in_child=renew_lock)  # another thread of the parent may have held it at the fork
    return _Bar


class _Lines:
    """Stderr that is not a terminal: what a bar would draw in place becomes a line of its own."""

    _ended = ""
    """What the newest line says is done, if that is all: tqdm draws it again when it closes the bar."""

    def write(self, text: str) -> None:
        if text.startswith("\r") and (line := text.strip()):  # without moves of the cursor
            done = line.partition(", ")[0]
            if done != self._ended:
                sys.stderr.write(f"{line}\n")
            self._ended = done if done.endswith("(100%)") else ""

    def flush(self) -> None:
        sys.stderr.flush()
