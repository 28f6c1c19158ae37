"""The bodies of requests, as JSON or MessagePack: what clients send, and the same as arguments of a scorer.

B users, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from vista.arrays import offsets_of
from vista.scorer import Tail

JSON, MSGPACK = "application/json", "application/msgpack"
Id = int | str
Body = TypeVar("Body", bound="msgspec.Struct")


class TailEvent(msgspec.Struct, forbid_unknown_fields=True):
    """An event since the refresh."""

    item: Id
    time: int
    """ms since 1970."""
    action: str | None = None
    """Type of the action, such as "view"; may be left out if the model has only one."""
    features: dict[str, str | float | int | None] = msgspec.field(default_factory=dict)
    """Features of the event by name."""


class ScoreBody(msgspec.Struct, forbid_unknown_fields=True):
    """Users, and the candidates to score for them."""

    users: list[Id]
    """B ids as in the log."""
    candidates: list[Id | list[Id]] | bytes
    """Item ids: one list for all users, or one list per user. In MessagePack also the bytes of int64 ids in
    little-endian order, for all users."""
    tail: list[list[TailEvent]] | None = None
    """Per user, the events since the refresh."""
    now: int | list[int] | None = None
    """Time of the request in ms, one or one per user; by default the server's clock."""
    request: dict[str, Any] = msgspec.field(default_factory=dict)
    """Features of the request by name: one value, one per user, or one list per user with one value per candidate."""
    model: str | None = None
    """Name of the model, if the service has several; by default, the model that the split assigns."""


class RankBody(msgspec.Struct, forbid_unknown_fields=True):
    """A user, for whom the best items are wanted."""

    user: Id
    top_k: int = 10
    """Most items to return."""
    candidates: list[Id] | bytes | None = None
    """Item ids, or null for the whole catalog. In MessagePack also the bytes of int64 ids in little-endian order."""
    exclude: list[Id] = msgspec.field(default_factory=list)
    """Item ids to leave out."""
    exclude_tail: bool = False
    """Leave out the items of the user's newest events."""
    tail: list[TailEvent] | None = None
    """The user's events since the refresh."""
    now: int | None = None
    """Time of the request in ms; by default the server's clock."""
    request: dict[str, Any] = msgspec.field(default_factory=dict)
    """Features of the request by name: one value, or one list with one value per candidate."""
    model: str | None = None
    """Name of the model, if the service has several; by default, the model that the split assigns."""


class RetrieveBody(msgspec.Struct, forbid_unknown_fields=True):
    """Users for whom to retrieve the best items of a large catalog."""

    users: list[Id]
    """B ids as in the log."""
    top_k: int = 10
    """Maximum number of items to return per user."""
    num_candidates: int = 500
    """Number of items that the index returns per user, in addition to the items of the user's counters and tail."""
    within: list[Id] | bytes | None = None
    """Ids of the items that may be returned, or null for all. In MessagePack also the bytes of int64 ids in
    little-endian order."""
    where: dict[str, list[Id]] = msgspec.field(default_factory=dict)
    """By name of an item category: the values of items that may be returned."""
    exclude: list[Id] = msgspec.field(default_factory=list)
    """Item ids to leave out."""
    exclude_tail: bool = False
    """Leave out the items of the users' newest events."""
    tail: list[list[TailEvent]] | None = None
    """Per user, the events since the refresh."""
    now: int | list[int] | None = None
    """Time of the request in ms, one or one per user; by default the server's clock."""
    request: dict[str, Any] = msgspec.field(default_factory=dict)
    """Features of the request by name: one value, or one per user."""
    model: str | None = None
    """Name of the model, if the service has several; by default, the model that the split assigns."""


class ExplainBody(msgspec.Struct, forbid_unknown_fields=True):
    """A user, and the candidates whose scores are to be explained."""

    user: Id
    candidates: list[Id]
    task: str | None = None
    """By default the task of score and rank."""
    tail: list[TailEvent] | None = None
    """The user's events since the refresh."""
    now: int | None = None
    """Time of the request in ms; by default the server's clock."""
    request: dict[str, Any] = msgspec.field(default_factory=dict)
    """Features of the request by name: one value, or one list with one value per candidate."""
    model: str | None = None
    """Name of the model, if the service has several; by default, the model that the split assigns."""


class Addressee(msgspec.Struct):
    """The fields of any body that determine which model answers."""

    user: Id | None = None
    users: list[Id] = msgspec.field(default_factory=list)
    model: str | None = None


def decoded(body: bytes, kind: type[Body], media_type: str) -> Body:
    """A body as its type.

    Raises:
        msgspec.DecodeError: the bytes are not valid JSON or MessagePack.
        msgspec.ValidationError: a field is missing, unknown, or has another type.
    """
    try:
        if media_type == MSGPACK:
            return msgspec.msgpack.decode(body, type=kind)
        held = msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise msgspec.DecodeError("its values are nested too deeply") from None
    for name in ("candidates", "within"):
        if isinstance(getattr(held, name, None), bytes):  # msgspec reads a text as base64 here
            raise msgspec.ValidationError(f"Expected `array`, got `str` - at `$.{name}`")
    return held


def item_ids(given: Sequence[Id] | bytes, name: str) -> Any:
    """Ids [C] as a scorer takes them.

    Raises:
        ValueError: the bytes are not int64.
    """
    if not isinstance(given, bytes):
        return given
    if len(given) % 8:
        raise ValueError(f"{name}: {len(given)} bytes are not a whole number of int64 ids")
    return np.frombuffer(given, "<i8")


def candidate_ids(given: Sequence[Any] | bytes) -> Any:
    """Candidates as a scorer takes them: ids [C], or (values [N], offsets [B + 1]) of one list per user.

    Raises:
        ValueError: the list mixes ids and lists, or its bytes are not int64.
    """
    if isinstance(given, bytes):
        return item_ids(given, "candidates")
    rows = [one for one in given if isinstance(one, list)]
    if not rows:
        return given
    if len(rows) < len(given):
        raise ValueError("candidates: must be ids, or one list of ids per user, not both")
    return [item for row in rows for item in row], offsets_of(np.array([len(row) for row in rows], np.int64))


def tail_of(given: Sequence[Sequence[TailEvent]] | None) -> Tail | None:
    """Events since the refresh, per user, as a scorer takes them.

    Actions stay names, because a reload can put another model into service before the call.
    """
    if given is None:
        return None
    events = [event for own in given for event in own]
    names = dict.fromkeys(name for event in events for name in event.features)
    return Tail(
        [event.item for event in events],  # type: ignore[arg-type]
        np.array([event.time for event in events], object if _has_large(events) else np.int64),
        np.array([event.action for event in events], object),
        offsets_of(np.array([len(own) for own in given], np.int64)),
        {name: [event.features.get(name) for event in events] for name in names},
    )


def _has_large(events: Sequence[TailEvent]) -> bool:
    return any(not -(2**63) <= event.time < 2**63 for event in events)
