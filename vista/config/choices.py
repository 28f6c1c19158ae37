"""Choices of the configuration: the values that a key accepts, spelled as users write them."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from vista.errors import ConfigError, shown

Choice = TypeVar("Choice", bound=Enum)


def choice_of(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    """The choice itself, or the one with that value.

    Raises:
        ConfigError: naming the argument `name` and the allowed values, if the value is not one of them.
    """
    if isinstance(value, kind):
        return value
    values = sorted({choice.value for choice in kind})
    if value not in values:
        raise ConfigError(f"{name}: {shown(value)} is not one of {values}")
    return kind(value)


class Architecture(Enum):
    """Model: vista, or a baseline that reads the raw history at every request."""

    vista = "vista"
    sasrec = "sasrec"
    hstu = "hstu"
    fuxi_linear = "fuxi_linear"
    din = "din"
    sim = "sim"
    twin = "twin"

    @property
    def ranks_only(self) -> bool:
        """Whether it only ranks candidates: no next-item task, and each impression reads its own newest events."""
        return self in (Architecture.din, Architecture.sim, Architecture.twin)


class Shell(Enum):
    """Shells whose words `vista completion` completes."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


class AskedBaselines(Enum):
    """Which baselines `vista evaluate` measures too."""

    none = "none"
    counting = "counting"
    trained = "trained"


class EngineName(Enum):
    """Which processes encode the batches of a full refresh."""

    local = "local"
    """This process."""
    ray = "ray"
    """Actors of Ray, on this machine or in a cluster."""


class WorldName(Enum):
    """What decides a click in the simulation."""

    share = "share"
    """How much of the user's whole history is about the candidate's topic."""
    returns = "returns"
    """Whether the candidate, which the user has had before, is due again."""
    sequence = "sequence"
    """Whether the candidate followed the newest event's item the last time that it occurred."""
    conjunction = "conjunction"
    """Whether the user has been interested in the candidate's topic and in its partner topic."""
    seasons = "seasons"
    """What the user did at this time of earlier years, and on this day of earlier weeks."""
    drift = "drift"
    """The user's events of the candidate's topic, where each reversal turns all earlier tastes around."""


class Stage(Enum):
    """What is trained: everything, or only stage 2 over the summaries of a store."""

    joint = "joint"
    """Everything: item table, stage 1, stage 2, and heads."""
    downstream = "downstream"
    """Stage 2 and heads, over the summaries of a store. The base model that made them stays unchanged."""


class InitFreeze(Enum):
    """What a warm start keeps as it is."""

    none = "none"
    """Nothing: everything trains, and stores need a full refresh."""
    summarizer = "summarizer"
    """Stage 1, the event encoder, and the vectors of the items that summaries know. Stores stay valid. New items train,
    but summaries show them as unknown."""


class Mixing(Enum):
    """How the tokens of stage 1 mix: bidirectional as in the paper, or separable, which allows incremental updates."""

    bidirectional = "bidirectional"
    """History and seeds form one set: all tokens write and read at every layer (the paper)."""
    separable = "separable"
    """Only the history writes and only seeds read, so states can append, merge, and forget."""


class TargetAttentionKind(Enum):
    """Layers of stage 2: softmax attention, or pointwise attention as in HSTU, with or without a read of the state."""

    softmax = "softmax"
    """Softmax attention followed by a feed-forward network (the paper)."""
    pointwise = "pointwise"
    """A normalized and gated sum of SiLU(score) * value, without a feed-forward network (HSTU)."""
    quasi_linear = "quasi_linear"
    """As pointwise. After the first layer, candidates and the retrieval head also read stage 1's state by quasi-linear
    attention (VISTA), not only the summary tokens."""


class Search(Enum):
    """How SIM finds the events that a candidate attends to."""

    soft = "soft"
    """The events with the largest learned inner product."""
    hard = "hard"
    """The newest events of the candidate's category (`data.category_column`)."""


class ItemStart(Enum):
    """What the vectors of items are before training."""

    random = "random"
    """Small normal values."""
    factors = "factors"
    """A factorization of which items lie close together in the training histories; random for items without one."""
    user_factors = "user_factors"
    """A factorization of which users had which items; random for items that fewer than three users had."""


class TableKind(Enum):
    """Where the rows of the item table are while a model trains."""

    plain = "plain"
    """All of them in every process."""
    torchrec = "torchrec"
    """Divided among the ranks of a job by TorchRec (extra torchrec). The exported model is the same."""


class TablePrecision(Enum):
    """Data type of the item table while a model trains."""

    float32 = "float32"
    float16 = "float16"


class TableOptimizer(Enum):
    """Optimizer of the item table."""

    adam = "adam"
    """Sparse Adam, whose state is two numbers per weight."""
    rowwise_adagrad = "rowwise_adagrad"
    """FBGEMM's row-wise Adagrad, whose state is one number per row."""


class Activation(Enum):
    """Activation phi of stage 1, applied to its queries, keys, and states."""

    silu = "silu"
    """The paper."""
    relu = "relu"
    identity = "identity"
    """Plain linear attention."""


class Normalization(Enum):
    """Scale c of stage 1's state Z before its activation: none, or by the number of events n."""

    none = "none"
    """c = 1 (the paper)."""
    length = "length"
    """c = 1 / max(n, 1) ** alpha."""


class Decay(Enum):
    """How older events lose weight in separable mixing: not at all, by age in time, or by age in events."""

    none = "none"
    time = "time"
    position = "position"


class StreamStart(Enum):
    """Where a watch starts in a topic that has no messages in the log."""

    oldest = "oldest"
    newest = "newest"


class Arrival(Enum):
    """How a watch tells that a file in its folder is complete."""

    done = "done"
    """There is a file with the suffix .done next to it, such as day.csv.done for day.csv, which is not older."""
    pause = "pause"
    """The file has not changed for `settle_s`. If its writer pauses longer, it is taken twice: first the part that was
    there, then the complete file. The rows of that part then count twice."""


# Users write `raise` and `leave-last-out`, which are not Python names: hence the aliases.
OnMissing = Enum("OnMissing", {"empty": "empty", "nan": "nan", "error": "raise", "raise": "raise"})
"""What an unknown user or item gets: the summary of an empty history, NaN scores, or an error."""

OnBadRows = Enum("OnBadRows", {"error": "raise", "raise": "raise", "quarantine": "quarantine"})
"""What ingest does with an invalid row: raise an error and write nothing, or set the row aside in quarantine.csv."""

IdType = Enum("IdType", {"auto": "auto", "integer": "int", "int": "int", "string": "str", "str": "str"})
"""Type of the ids of users or items in a source."""

Split = Enum(
    "Split", {"leave_last_out": "leave-last-out", "leave-last-out": "leave-last-out", "time": "time", "share": "share"}
)
"""Which labels are test labels: each user's last event (validation: the one before), all after a given time, or the
last share of each user's events (validation: the share before)."""


class Target(Enum):
    """What an evaluation asks about each user."""

    next = "next"
    """The very next event."""
    window = "window"
    """The items of the next events or days."""


class Precision(Enum):
    """Data type of matrix products."""

    auto = "auto"
    """bfloat16 on GPUs and on CPUs with AMX or avx512_bf16, float32 elsewhere. The choice is logged."""
    float32 = "float32"
    bfloat16 = "bfloat16"


class ExportFormat(Enum):
    """What runs an exported model without vista."""

    onnx = "onnx"
    """onnxruntime, in Python, C++, Java, C#, or JavaScript."""
    aotinductor = "aotinductor"
    """PyTorch, in Python or C++."""


class Codec(Enum):
    """How the rows of a summary are stored."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"
    """FBGEMM 8-bit rows: d uint8 values, then a float32 scale and bias."""
    int4 = "int4"
    """FBGEMM 4-bit rows: two values per byte, then a float16 scale and bias."""


class StateDtype(Enum):
    """How a refresh stores the states of separable mixing, to which an incremental refresh appends."""

    none = "none"
    """States are not stored: users with new events are recomputed in full."""
    float32 = "float32"
    float16 = "float16"
    """Half the bytes, with one scale per matrix."""


class IndexKind(Enum):
    """How an index over item vectors finds the nearest ones."""

    flat = "flat"
    """Compare all items: exact, and no files beyond the model's own table."""
    hnsw = "hnsw"
    """Walk a graph of neighbors (HNSW). Slow to build, and larger than the table."""
    ivfpq = "ivfpq"
    """Compare the compressed vectors of the nearest clusters (IVF-PQ). A quarter of the table's size, or less."""


class TrackerKind(Enum):
    """Where the metrics of a training run are sent, in addition to the run's own folder."""

    none = "none"
    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"
    """Weights & Biases."""


class RunOrder(Enum):
    """The order in which runs are listed."""

    best = "best"
    """The best metric first."""
    name = "name"
    newest = "newest"
    """The most recently written run first."""
    seconds = "seconds"
    """The shortest training first."""
    parameters = "parameters"
    """The smallest model first."""


class Sampler(Enum):
    """How a sweep chooses settings."""

    grid = "grid"
    """Every combination of the listed values."""
    tpe = "tpe"
    """Optuna's tree-structured Parzen estimator, based on the validation metrics of previous trials."""
