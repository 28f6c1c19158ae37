"""The inputs of an exported graph: which arrays a model reads, and their dtypes and axes.

They are plain arrays of what a record holds and what a request adds, so any program that decodes records can call
a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vista.model.feature_spec import FeatureSpec
from vista.model.vista_model import VistaModel

USERS, EVENTS, KEYS, CANDIDATES = "users", "events", "keys", "candidates"
"""Names of the axes whose length a caller chooses."""
REQUEST, TAIL, USER = "request", "tail", "user"
"""Prefixes of inputs with features."""
COUNTER_KEYS, COUNTER_CODES = "counter_keys", "counter_codes"
"""Inputs with the counters of items, and prefixes of those with the counters of categories."""


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One array that a graph reads."""

    name: str
    dtype: str
    """float32, int64, or bool."""
    shape: tuple[str | int, ...]
    """Length per axis; the name of the axis if a caller chooses it."""
    meaning: str
    """Description for readers of `export.json`."""


def graph_inputs(model: VistaModel) -> list[GraphInput]:
    """The inputs of a model's graph, in their order. What the model does not read is left out."""
    config, schema, counted = model.config, model.schema, model.counter_spec
    rows, reads_time = config.num_seeds + config.num_state_rows, model.encoder.gap is not None
    inputs = [
        GraphInput("candidates", "int64", (USERS, CANDIDATES), "item rows of the candidates; 0 for an unknown item"),
        GraphInput("found", "bool", (USERS,), "whether the user has a record; if not, the summary is ignored"),
    ]
    if rows:
        inputs.append(GraphInput("summary", "float32", (USERS, rows, config.dim), "the record's rows, decoded"))
    events = USERS, EVENTS
    inputs += [
        GraphInput("tail_lengths", "int64", (USERS,), "events in the tail; the entries after them are ignored"),
        GraphInput("tail_items", "int64", events, "item rows of the newest events, oldest first; 0 if unknown"),
    ]
    if model.encoder.action is not None:
        inputs.append(GraphInput("tail_actions", "int64", events, "codes of their actions"))
    if reads_time or (counted is not None and counted.has_time):
        inputs += [
            GraphInput("tail_times", "int64", events, "their times in ms"),
            GraphInput("now", "int64", (USERS,), "time of the request in ms; -2^63 if it is unknown"),
        ]
    inputs += _features(TAIL, schema.tail_features, events, "feature of the tail's events")
    inputs += _features(USER, schema.user_features, (USERS,), "feature of the user")
    if counted is not None:
        keys = USERS, KEYS
        inputs += [
            GraphInput("tail_is_new", "bool", events, "whether the record's counters do not include the event"),
            GraphInput("event_count", "int64", (USERS,), "events that the record covers"),
            GraphInput("last_event_ts", "int64", (USERS,), "time of the newest of them in ms"),
            GraphInput(COUNTER_KEYS, "int64", keys, "item rows that the record counts; 0 is padding"),
            GraphInput(COUNTER_CODES, "int64", (*keys, counted.num_columns), "their codes, 0 to 63"),
        ]
        for name in counted_names(model)[1:]:
            meaning = f"values of {name[1:]} that the record counts, from 1 on; 0 is padding"
            inputs += [
                GraphInput(f"{COUNTER_KEYS}{name}", "int64", keys, meaning),
                GraphInput(f"{COUNTER_CODES}{name}", "int64", (*keys, counted.num_columns), "their codes, 0 to 63"),
            ]
    if schema.tasks:
        inputs += _features(REQUEST, schema.request_features, (USERS, CANDIDATES), "feature of the request")
    return inputs


def counted_names(model: VistaModel) -> list[str]:
    """What the names of inputs with counters end with, per field: nothing for items, then a dot and the category."""
    spec = model.counter_spec
    return [] if spec is None else ["", *(f".{name}" for name in spec.fields[1:])]


def _features(
    prefix: str, columns: Sequence[FeatureSpec], shape: tuple[str | int, ...], meaning: str
) -> list[GraphInput]:
    values = {
        "category": ("int64", "code (a row of its file of values), -1 if missing"),
        "number": ("float32", "NaN if missing"),
    }
    return [
        GraphInput(f"{prefix}.{column.name}", values[column.kind][0], shape, f"{meaning}: {values[column.kind][1]}")
        for column in columns
    ]
