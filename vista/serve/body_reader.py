"""Reads the bodies of requests, within limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import fastapi
from starlette.requests import ClientDisconnect

from vista.errors import BodyTooLargeError, OverloadedError, SlowBodyError

NUM_LARGE = 16
"""Bodies of the largest size that a worker holds at the same time; smaller ones are more."""


class BodyReader:
    """Reads bodies, and counts the bytes of those that are not answered yet. For one event loop.

    Args:
        most_bytes: of a body.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._most_held = NUM_LARGE * most_bytes
        self._held = 0

    @asynccontextmanager
    async def body(self, request: fastapi.Request, deadline: float) -> AsyncIterator[bytes]:
        """The body of a request, which counts until the context ends.

        Args:
            request: of which nothing has been read.
            deadline: s of `time.perf_counter`.

        Raises:
            BodyTooLargeError: it is longer than the limit; the rest is not kept.
            OverloadedError: with it, bodies would take more memory than all may take together.
            SlowBodyError: it is not complete at the deadline, or the client has closed the connection.
        """
        most = self._most_bytes
        too_large = BodyTooLargeError(f"the body has more than {most:,} bytes (max_body_bytes); send several requests")
        if (number_of(request.headers.get("content-length", "")) or 0) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(deadline - time.perf_counter()):
                    async for part in request.stream():
                        size += len(part)
                        self._held += len(part)
                        if size > most:
                            raise too_large
                        if self._held > self._most_held:
                            raise OverloadedError(
                                f"the bodies of waiting requests take {self._most_held:,} bytes already; send this one "
                                "again later"
                            )
                        parts.append(part)
            except TimeoutError:
                raise SlowBodyError("the body did not arrive within the deadline of the request") from None
            except ClientDisconnect:
                raise SlowBodyError("the connection was closed before the end of the body") from None
            yield b"".join(parts)
        finally:
            self._held -= size


def number_of(text: str) -> int | None:
    """The number that a header holds; None if it is not a natural number of at most 18 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
