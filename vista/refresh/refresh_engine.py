"""Engines of a full refresh: what encodes its batches. One process, which calls the engine, writes the store."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol

from vista.arrays import Int
from vista.refresh.batch_encoder import BatchEncoder
from vista.refresh.stage_clock import StageClock
from vista.refresh.user_records import UserRecords
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateSpec


class RefreshEngine(Protocol):
    """Encodes the batches of a full refresh."""

    def encode(
        self,
        encoder: BatchEncoder,
        batches: Iterable[tuple[Int, Int]],
        spec: RecordSpec,
        state_spec: StateSpec | None,
        clock: StageClock,
    ) -> Generator[UserRecords, None, None]:
        """The records of batches, in their order.

        Args:
            encoder: of this process. An engine of other processes gives each of them an equal one.
            batches: (users, counts) of each, as in `BatchEncoder.encode`. They are taken as they are needed.
            spec: what each record must hold.
            state_spec: what each state must hold; None to make no states.
            clock: gets the time of each stage.
        """


class LocalEngine:
    """Encodes one batch after the other in this process."""

    def encode(
        self,
        encoder: BatchEncoder,
        batches: Iterable[tuple[Int, Int]],
        spec: RecordSpec,
        state_spec: StateSpec | None,
        clock: StageClock,
    ) -> Generator[UserRecords, None, None]:
        """As of `RefreshEngine`."""
        for users, counts in batches:
            yield encoder.encode(users, counts, spec, state_spec, clock)
