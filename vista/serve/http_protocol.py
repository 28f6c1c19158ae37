"""uvicorn's HTTP protocol with limits on what a connection may take, of which uvicorn has none; how many values a body
has; and errors as clients get them."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import fastapi
import msgspec
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from vista.errors import (
    BodyTooLargeError,
    DeadlineError,
    ItemIndexError,
    ModelUnavailableError,
    OverloadedError,
    SlowBodyError,
    StoreUnavailableError,
    UnknownItemError,
    UnknownModelError,
    UnknownUserError,
    UserKeyError,
    VistaError,
    shortened,
)

logger = logging.getLogger(__name__)
REPEAT_S = 1.0
"""Seconds in which a kind of errors of requests is logged once."""


class Unrepeated(logging.Filter):
    """Writes one line per kind and interval: clients that ask for damaged records again and again could fill the disk.
    A kind is a message before its values are filled in, and the type of the error, so that there are few."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[tuple[str, type[BaseException] | None], float] = {}
        """When each kind was last written, s of the monotonic clock."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        kind, now = (record.msg, record.exc_info[0] if record.exc_info else None), time.monotonic()
        if now < self._written.get(kind, -math.inf) + REPEAT_S:
            return False
        self._written[kind] = now
        return True


logger.addFilter(Unrepeated())

_OF_ARGUMENT = re.compile(
    r"(users?|candidates|tail|now|request|adapter|exclude|within|where|top_k|num_candidates|task|items|item ids|ids)\b"
)
"""How error messages begin if the arguments of a request cause them."""
MAX_TEXT = 1000


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as a client gets it."""

    status: int
    name: str
    message: str
    retry_after_s: int | None = None

    def as_json(self) -> bytes:
        """The body."""
        return msgspec.json.encode({"error": {"type": self.name, "message": shortened(self.message, MAX_TEXT)}})

    def as_response(self) -> fastapi.Response:
        """The answer of an endpoint."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return fastapi.Response(self.as_json(), self.status, headers, "application/json")


def answer_of(error: Exception, stores: Iterable[str]) -> ErrorAnswer:
    """The answer to a request that failed. Errors that the request did not cause are logged, and their text is kept
    from the client.

    Args:
        error: what was raised.
        stores: paths of the stores, which clients do not learn.
    """
    name, message = type(error).__name__, str(error)
    match error:
        case BodyTooLargeError():
            return ErrorAnswer(413, name, message)
        case SlowBodyError():
            return ErrorAnswer(408, name, message)
        case msgspec.ValidationError():
            return ErrorAnswer(422, name, f"{message}; see /docs for the fields")
        case msgspec.DecodeError():
            return ErrorAnswer(400, name, f"the body is not valid: {message}")
        case ItemIndexError():
            return ErrorAnswer(400, name, message)
        case UnknownUserError() | UnknownItemError():
            for store in stores:
                message = message.replace(store, "the store")
            return ErrorAnswer(404, name, message)
        case UnknownModelError():
            return ErrorAnswer(404, name, message)
        case OverloadedError():
            return ErrorAnswer(429, name, message, retry_after_s=1)
        case ModelUnavailableError():
            return ErrorAnswer(503, name, message, retry_after_s=max(1, math.ceil(error.retry_after_s)))
        case DeadlineError():
            return ErrorAnswer(504, name, message)
        case UserKeyError():
            return ErrorAnswer(422, name, message)
        case StoreUnavailableError():
            logger.error("%s: %s", name, message)
            return ErrorAnswer(503, name, "the store does not answer; send the request again later", retry_after_s=1)
        case ValueError() | TypeError() if not isinstance(error, VistaError) and _OF_ARGUMENT.match(message):
            return ErrorAnswer(422, name, message)
        case _:
            logger.error("a request failed", exc_info=error)
            return ErrorAnswer(500, name, "internal error; see the log of the service")


def has_few_values(body: bytes, most: int, *, packed: bool) -> bool:
    """Whether a body, as MessagePack or JSON, has at most so many values, without building them. In JSON, punctuation
    is counted instead, also in texts."""
    if not packed:
        return sum(map(body.count, (b"[", b"{", b",", b":"))) <= most
    place, end = 0, len(body)
    for _ in range(most):
        if place >= end:
            return True
        first = body[place]
        if width := _WIDTHS[first]:
            place += int.from_bytes(body[place + 1 : place + 1 + width], "big")
        place += _SIZES[first]
    return place >= end


_SIZES = [1] * 0xA0 + [*range(1, 33)] + [1, 1, 1, 1, 2, 3, 5, 3, 4, 6, 5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18]
_SIZES += [2, 3, 5, 3, 5, 3, 5] + [1] * 32
"""By the first byte of a value in MessagePack: its bytes, without elements and without bytes of a variable length."""
_WIDTHS = [0] * 256
"""The same: bytes of the number of these bytes, in big-endian order."""
for _first, _width in zip((0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xD9, 0xDA, 0xDB), (1, 2, 4) * 3, strict=True):
    _WIDTHS[_first] = _width


MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128
MAX_PIPELINED = 16
"""Requests of a connection that wait for the answer to an earlier one."""
MAX_WAITING_BYTES = 16 << 20
"""Of the requests of all connections of a worker that wait for the answer to an earlier one."""
HEAD_S = 10.0
"""Seconds that a client has to connect and send the first line and the headers."""
WRITE_S = 30.0
"""Seconds that a client has to take an answer that does not fit into the buffers of the connection."""


class _Flow(FlowControl):
    """Does not read while requests of the connection wait for an earlier one. uvicorn reads more after each answer."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses connections beyond a number, and closes those whose requests are too long, too slow, or too many at the
    same time, or whose answers are not taken. All of this is before a request is authorized.

    Args:
        arguments, more: those of uvicorn.
        max_connections: of the worker.
        body_s: seconds that a body may take. The application gives up earlier; this frees the connection.
        on_refused_connection: called for each connection beyond `max_connections`.
        on_refused_request: called with the status of each request that does not reach the application.
    """

    def __init__(
        self,
        *arguments: Any,
        max_connections: int,
        body_s: float,
        on_refused_connection: Callable[[], None],
        on_refused_request: Callable[[int], None],
        **more: Any,
    ) -> None:
        super().__init__(*arguments, **more)
        self._max_connections = max_connections
        self._body_s = body_s
        self._on_refused_connection = on_refused_connection
        self._on_refused_request = on_refused_request
        self._in_head = False
        self._is_full = False
        """Whether what follows is ignored, because the connection will be closed after the requests that wait."""
        self._running: RequestResponseCycle | None = None
        """The latest request that the application got; `cycle` is the latest that was received."""
        self._waiting_bytes = 0
        """Received since requests wait."""
        self._bytes_without_body = 0
        """Received since a head began, or since the last part of a body."""
        self._has_body_part = False
        """Whether the bytes that are being parsed hold a part of a body."""
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection, or start the clock."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        if len(self.connections) > self._max_connections:
            self._on_refused_connection()
            text = f"this worker has {self._max_connections} open connections, the maximum (max_connections)"
            self._close_with(ErrorAnswer(503, "OverloadedError", f"{text}; connect again later", retry_after_s=1))
        else:
            self._require_in(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and forget the requests that wait."""
        self._stop_reading_clock()
        self._stop_writing_clock()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed its side of the connection: answer what it has asked, and close ours then."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        return True

    def data_received(self, data: bytes) -> None:
        """Count the bytes of heads and trailers, and start the clock if the client owes the end of a request."""
        if self._is_full:
            return
        self._has_body_part = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.pipeline:
            self._waiting_bytes += len(data)
            if sum(one._waiting_bytes for one in cast(set[BoundedHttpProtocol], self.connections)) > MAX_WAITING_BYTES:
                self._on_refused_request(429)
                self.transport.abort()
                return
        if self._reading is None:
            if self.cycle is None or self.cycle.response_complete:  # An empty line, or the end of an ignored body.
                self._require_in(HEAD_S)
        elif not self._has_body_part:
            self._bytes_without_body += len(data)
            if self._bytes_without_body > MAX_HEAD_BYTES:
                self._refuse_long_head()

    def on_message_begin(self) -> None:
        """A head begins. If too many requests wait, the connection is closed after them."""
        if len(self.pipeline) == MAX_PIPELINED:
            self._is_full, self._in_head, self.cycle.keep_alive = True, False, False
        if self._is_full:
            return
        super().on_message_begin()
        self._in_head = True
        if self._reading is None:
            self._require_in(HEAD_S)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, but not a trailer, which could replace one that has been checked."""
        if self._in_head:
            super().on_header(name, value)
            if len(self.headers) > MAX_HEADERS:
                self._refuse_long_head()
                self._is_full, self._in_head = True, False

    def on_headers_complete(self) -> None:
        """A head ends."""
        if self._is_full:
            return
        self._in_head = False
        self._stop_reading_clock()
        if self.parser.should_upgrade() and any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        ):  # httptools would skip the body, and take it for the next request.
            self._is_full = True
            text = "the service speaks HTTP/1.1 only; send requests with a body without the header Upgrade"
            self._refuse(ErrorAnswer(400, "InvalidRequestError", text))
            return
        self._require_in(self._body_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body, whose bytes the application counts."""
        if self._is_full:
            return
        self._has_body_part, self._bytes_without_body = True, 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A body ends."""
        if self._is_full:
            return
        self._stop_reading_clock()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer has been written; if the connection closes after it, the client must take it in time."""
        super().on_response_complete()
        if not self.pipeline:
            self._waiting_bytes = 0
        if self.transport.is_closing():
            self.pause_writing()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        """The buffer of the connection is full."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken what was in the buffer."""
        self._stop_writing_clock()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its client has not taken the last answer."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(ErrorAnswer(400, "InvalidRequestError", msg))

    def _refuse_long_head(self) -> None:
        if not self._in_head and self.cycle is not None and self.cycle.response_started:
            self.transport.abort()  # Trailers of a request that has its answer.
        else:
            text = f"the headers or trailers exceed {MAX_HEAD_BYTES:,} bytes, or are more than {MAX_HEADERS}"
            self._refuse(ErrorAnswer(431, "HeadTooLargeError", text))

    def _refuse(self, answer: ErrorAnswer) -> None:
        self._on_refused_request(answer.status)
        cycle = self.cycle
        is_running = cycle is not None and not cycle.response_complete
        if self.pipeline or (is_running and (cycle.response_started or not cycle.more_body)):
            self.transport.abort()  # The client would take this for the answer to the earlier request.
        else:
            self._close_with(answer)

    def _close_with(self, answer: ErrorAnswer) -> None:
        body = answer.as_json()
        retry = "" if answer.retry_after_s is None else f"Retry-After: {answer.retry_after_s}\r\n"
        head = (
            f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n{retry}Connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _require_in(self, seconds: float) -> None:
        """Close the connection unless the client sends the rest of the head or of the body in time."""
        self._bytes_without_body = 0
        self._reading = self.loop.call_later(seconds, self._give_up, seconds)

    def _give_up(self, seconds: float) -> None:
        if self.flow.read_paused:  # The service itself does not read, because an earlier request is not answered.
            self._require_in(seconds)
        else:
            self.transport.abort()

    def _stop_reading_clock(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing_clock(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
