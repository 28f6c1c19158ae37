"""Which status and which text a client gets for an error."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import fastapi
import msgspec

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

_OF_ARGUMENT = re.compile(
    r"(users?|candidates|tail|now|request|exclude|within|where|top_k|num_candidates|task|item ids|ids)\b"
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
