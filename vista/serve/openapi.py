"""What the OpenAPI page says about the bodies of requests. A test sends every example."""

from __future__ import annotations

from typing import Any

import msgspec

from vista.serve.request_bodies import JSON, MSGPACK, ExplainBody, RankBody, RetrieveBody, ScoreBody

DESCRIPTION = """
Scores candidates for users from their cached summaries. Users and items have the ids of your log: integers or strings.

Bodies are JSON. With `Content-Type: application/msgpack`, they are MessagePack, and scores come back as the bytes of
float32 numbers in little-endian order, row by row.

The examples have integer ids and an action named `click`. `/v1/model` says what the ids of your log are, and how its
actions are named.

Each answer says which generation of the store (`generation`) and which model (`model_checksum`, as in `/v1/model`) it
was computed from.

An error is `{"error": {"type": ..., "message": ...}}`. Send a request again after a connection error, and after 429 and
503 when the time in `Retry-After` has passed: no request changes anything.
"""
STATUSES = {
    "400": "The body is not valid JSON or MessagePack, or the service has no index of items (`/v1/retrieve`).",
    "401": "The token is missing or wrong.",
    "404": "A user or item is unknown, and the service runs with `on_missing=raise`; or the `model` does not exist.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large, or has too many users or candidates.",
    "422": "A field is missing, unknown, or has a wrong type or value.",
    "429": "Too many requests are waiting. Try again after `Retry-After` seconds.",
    "503": "The server of the store does not answer, or the model is not open yet. Try again after `Retry-After` s.",
    "504": "There was no result within the deadline.",
}
REFERENCE = "#/components/schemas/{name}"


def schemas() -> dict[str, Any]:
    """JSON schemas of the bodies by name."""
    return dict(
        msgspec.json.schema_components([ScoreBody, RankBody, RetrieveBody, ExplainBody], ref_template=REFERENCE)[1]
    )


def operation(name: str, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The part of an operation that FastAPI cannot know: its body, and the statuses of errors."""
    schema = {"$ref": REFERENCE.format(name=kind.__name__)}
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": schema, "examples": _EXAMPLES[name]}, MSGPACK: {"schema": schema}},
        },
        "responses": {
            "200": {
                "description": "Computed from this generation of the store and this model.",
                "content": {JSON: {"example": {**_SOURCE, **ANSWERS[name]}}},
            },
            **{status: {"description": text} for status, text in STATUSES.items()},
        },
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
    "retrieve": {
        "two users": {"value": {"users": [101, 102], "top_k": 5, "num_candidates": 100, "exclude_tail": True}},
        "items in stock": {"value": {"users": [101], "within": [10, 20, 30], "exclude": [20], "now": _NOW}},
    },
    "explain": {"two candidates": {"value": {"user": 101, "candidates": [10, 20]}}},
}
_SOURCE = {"generation": 7, "model_checksum": "93a1c04be1f2d687"}
_RANKING = {"items": [20, 10], "scores": [0.75, 0.5], "num_dropped": 0}
ANSWERS: dict[str, dict[str, Any]] = {
    "score": {"task": "click", "scores": [[0.5, 0.75, 0.25]]},
    "predict": {"scores": {"click": [[0.5, 0.75, 0.25]], "next": [[2.5, 3.0, -1.5]]}},
    "rank": {"task": "click", **_RANKING},
    "retrieve": {"task": "click", "rankings": [_RANKING]},
    "explain": {
        "task": "click",
        "value": [1.0],
        "summary": [[0.25, 0.25]],
        "state": [0.0],
        "tail": [[0.125]],
        "tail_items": [30],
        "own": [0.5],
        "counted": [0.0],
        "counts": [[]],
        "remainder": [-0.125],
    },
}
"""Example answers by endpoint, without `_SOURCE` and `variant`, which services with several models add."""
