"""Named choices of the configuration: what a key may be, in the words that users write."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

Choice = TypeVar("Choice", bound=Enum)


def choice_of(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    """A choice, or the one of that value.

    Raises:
        ValueError: naming the argument `name` and the values, if there is none.
    """
    if isinstance(value, kind):
        return value
    values = sorted({choice.value for choice in kind})
    if value not in values:
        raise ValueError(f"{name}: {value!r} is none of {values}")
    return kind(value)


class Architecture(Enum):
    """Which model: VISTA, or a baseline that reads the raw history at every request (docs/explanation/models.md)."""

    vista = "vista"
    sasrec = "sasrec"
    hstu = "hstu"
    din = "din"
    sim = "sim"
    twin = "twin"

    @property
    def ranks_only(self) -> bool:
        """Whether it only ranks candidates: no next items, and each impression reads its own newest events."""
        return self in (Architecture.din, Architecture.sim, Architecture.twin)


class Stage(Enum):
    """What is trained."""

    joint = "joint"
    """All: item table, stage 1, stage 2 and heads."""
    downstream = "downstream"
    """Stage 2 and heads, over the summaries of a store; the base that made these stays as it is."""


class Mixing(Enum):
    """How tokens of stage 1 mix."""

    bidirectional = "bidirectional"
    """History and seeds form one set; all write and all read at every layer (the paper)."""
    separable = "separable"
    """Only history writes, only seeds read: states append, merge and forget."""


class TargetAttentionKind(Enum):
    """Layers of stage 2."""

    softmax = "softmax"
    """Softmax attention and a feed-forward network (the paper)."""
    pointwise = "pointwise"
    """A sum over tokens of SiLU(score) * value, normed and gated, without a feed-forward network (HSTU)."""


class Search(Enum):
    """How SIM finds the events of a candidate."""

    soft = "soft"
    """Those of the largest inner product, which is learnt."""
    hard = "hard"
    """The newest ones of the candidate's category (`data.item_categories`)."""


class Activation(Enum):
    """phi of stage 1: of its queries and keys, and of the state that is read."""

    silu = "silu"
    """The paper."""
    relu = "relu"
    identity = "identity"
    """Plain linear attention."""


class Normalization(Enum):
    """Scale c of the state before its activation: A = phi2(Z * c)."""

    none = "none"
    """c = 1 (the paper)."""
    length = "length"
    """c = 1 / max(n, 1) ** alpha."""


class Decay(Enum):
    """What older events lose weight by in separable mixing."""

    none = "none"
    time = "time"
    position = "position"


# `raise` and `leave-last-out` are what users write, but no Python names: hence the aliases.
OnMissing = Enum("OnMissing", {"empty": "empty", "nan": "nan", "error": "raise", "raise": "raise"})
"""What an unknown user or item gets: the empty history's summary, NaN scores, or a typed error."""

OnBadRows = Enum("OnBadRows", {"error": "raise", "raise": "raise", "quarantine": "quarantine"})
"""What ingest does with a row that fails validation."""

IdType = Enum("IdType", {"auto": "auto", "integer": "int", "int": "int", "string": "str", "str": "str"})
"""Ids of users or items in a source."""

Split = Enum("Split", {"leave_last_out": "leave-last-out", "leave-last-out": "leave-last-out", "time": "time"})
"""Test labels: a user's last event (validation: the one before it), or what lies after two moments."""


class Counting(Enum):
    """How item frequencies are counted."""

    exact = "exact"
    count_min = "count_min"
    """A count-min sketch of fixed size, learnt in one pass over the events (extra `sketches`)."""


class Precision(Enum):
    """Arithmetic of training's matrix products."""

    auto = "auto"
    """bfloat16 on GPUs and on CPUs with AMX or AMD's avx512_bf16, float32 elsewhere; the choice is logged."""
    float32 = "float32"
    bfloat16 = "bfloat16"


class Codec(Enum):
    """How summary rows are stored."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"
    """FBGEMM byte rows: d uint8 values, then float32 scale and bias."""
    int4 = "int4"
    """FBGEMM 4-bit rows: two values a byte, then float16 scale and bias."""


class StateDtype(Enum):
    """How a refresh keeps the states of separable mixing, which an incremental refresh appends to."""

    none = "none"
    """Not at all: users with new events are recomputed in full."""
    float32 = "float32"
    float16 = "float16"
    """Half the bytes, a scale a matrix."""
