"""What the OpenAPI page says about the bodies of requests. A test sends every example."""

from __future__ import annotations

from typing import Any

from vista.serve.request_bodies import JSON, MSGPACK, ExplainBody, RankBody, ScoreBody
from vista.serve.serve_extra import msgspec

DESCRIPTION = """
Scores candidates for users from their cached summaries. Users and items have the ids of your log: integers or strings.

Bodies are JSON. With `Content-Type: application/msgpack`, they are MessagePack, and scores come back as the bytes of
float32 numbers in little-endian order, row by row.

An error is `{"error": {"type": ..., "message": ...}}`. Send a request again after a connection error, and after 429 and
503 when the time in `Retry-After` has passed: no request changes anything.
"""
STATUSES = {
    "400": "The body is not valid JSON or MessagePack.",
    "401": "The token is missing or wrong.",
    "404": "A user or item is unknown, and the service runs with `on_missing=raise`.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large, or has too many users or candidates.",
    "422": "A field is missing, unknown, or has a wrong type or value.",
    "429": "Too many requests are waiting. Try again after `Retry-After` seconds.",
    "503": "The server of the store does not answer. Try again after `Retry-After` seconds.",
    "504": "There was no result within the deadline.",
}
REFERENCE = "#/components/schemas/{name}"


def schemas() -> dict[str, Any]:
    """JSON schemas of the bodies by name."""
    return dict(msgspec.json.schema_components([ScoreBody, RankBody, ExplainBody], ref_template=REFERENCE)[1])


def operation(name: str, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The part of an operation that FastAPI cannot know: its body, and the statuses of errors."""
    schema = {"$ref": REFERENCE.format(name=kind.__name__)}
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": schema, "examples": _EXAMPLES[name]}, MSGPACK: {"schema": schema}},
        },
        "responses": {status: {"description": text} for status, text in STATUSES.items()},
    }


_NOW = 1_767_400_000_000
_SCORE = {
    "one user": {"value": {"users": [101], "candidates": [10, 20, 30]}},
    "two users with a list each": {"value": {"users": [101, 102], "candidates": [[10, 20], [30]], "now": _NOW}},
    "events since the refresh": {
        "value": {
            "users": [101],
            "candidates": [10, 20],
            "tail": [[{"item": 30, "time": _NOW - 60_000, "action": "click"}]],
            "now": _NOW,
        }
    },
}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "score": _SCORE,
    "predict": _SCORE,
    "rank": {
        "the whole catalog": {"value": {"user": 101, "top_k": 5, "exclude_tail": True}},
        "some candidates": {"value": {"user": 101, "candidates": [10, 20, 30], "exclude": [20]}},
    },
    "explain": {"two candidates": {"value": {"user": 101, "candidates": [10, 20]}}},
}
