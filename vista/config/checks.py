"""Checks of configuration values. Every error names the key."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from vista.errors import ConfigError, shown

PLAIN: dict[Any, Any] = {bool: bool, str: str, int: numbers.Integral, float: numbers.Real}
"""Which values a field of these types accepts; NumPy's numbers are among them."""

LARGEST_COUNT = 2**63 - 1
"""What fits into int64, as counts are stored and as torch takes them."""

MAX_THREADS = 1024
MAX_DAYS = 36_500
"""The longest time in days that a setting may name."""
PATHS = re.compile(
    "(authentication_key_|client_|metrics_|report_|shadow_|token_|train_)?file|adapter|base|codebooks|data|events|folder|"
    "index|init_from|models?|other_model|other_store|out|path|registry|results|run|run_dir|shadow_(model|store)|store|vectors"
)
"""Fields that name a file, a folder, or a store. As a path, an empty string would be the current folder."""
Value = TypeVar("Value")


def without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); any other type -> (itself, False)."""
    if get_origin(hint) in (Union, UnionType):
        inner = [arg for arg in get_args(hint) if arg is not NoneType]
        if len(inner) == 1:
            return inner[0], True
    return hint, False


def planned(value: Value | None, key: str) -> Value:
    """The value of a key that may be null in a configuration, but not where it is used. Raises ConfigError if it is
    null."""
    if value is None:
        raise ConfigError(f"{key}: is null, which training resolves from the log; call plan_run, or set a value")
    return value


def require(condition: bool, key: str, message: str) -> None:
    """Raise ConfigError, naming the key, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


def require_only_with(is_set: bool, applies: bool, key: str, setting: str) -> None:
    """Require that a key is set exactly when it applies, which is with a setting such as data.split=time."""
    require(is_set or not applies, key, f"is required with {setting}")
    require(applies or not is_set, key, f"only applies with {setting}; set that, or leave this out")


def require_counts(config: Any, prefix: str, keys: tuple[str, ...], least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Require whole numbers from `least` to `most`, or null where a key allows it."""
    for key in keys:
        value = getattr(config, key)
        if value is None:
            continue
        require(value >= least, f"{prefix}{key}", f"must be at least {least}, got {shown(value)}")
        require(value <= most, f"{prefix}{key}", f"must be at most {most}, got {shown(value)}")


def require_share(config: Any, prefix: str, keys: tuple[str, ...], *, below_one: bool = False) -> None:
    """Require numbers in [0, 1], or with `below_one` in [0, 1)."""
    for key in keys:
        value = getattr(config, key)
        good = 0 <= value <= 1 and not (below_one and value == 1)
        require(good, f"{prefix}{key}", f"must lie in [0, 1{')' if below_one else ']'}, got {value}")


def require_finite(
    config: Any, prefix: str, keys: tuple[str, ...], *, positive: bool = False, most: float = math.inf
) -> None:
    """Require finite numbers of at least 0, or with `positive` above 0, and of at most `most`; or null."""
    for key in keys:
        value = getattr(config, key)
        if value is None:
            continue
        good = math.isfinite(value) and (value > 0 if positive else value >= 0)
        require(good, f"{prefix}{key}", f"must be {'positive' if positive else 'at least 0'} and finite, got {value}")
        require(value <= most, f"{prefix}{key}", f"must be at most {most:g}, got {value}")


def require_numbers(config: Any, prefix: str, key: str, least: float, most: float) -> None:
    """Require a list of numbers from `least` to `most`."""
    values = getattr(config, key)
    good = isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most for value in values
    )
    require(good, f"{prefix}{key}", f"must be a list of numbers from {least:g} to {most:g}, got {shown(values)}")


def check_types(config: Any, prefix: str = "") -> None:
    """Replace the names of choices by the choices, and plain numbers by those of the field's type. Raises ConfigError
    naming the key, if a value has another type than its field."""
    for name, annotation in get_type_hints(type(config)).items():
        value, key = getattr(config, name), f"{prefix}{name}"
        hint, optional = without_none(annotation)
        if value is None and optional:
            continue
        if isinstance(hint, type) and issubclass(hint, Enum):
            try:
                setattr(config, name, hint(value))
            except ValueError:
                known = ", ".join(str(member.value) for member in hint)
                raise ConfigError(f"{key}: {shown(value)} is not one of {known}") from None
        elif hint in PLAIN:
            fits = isinstance(value, PLAIN[hint]) and (hint is bool or not isinstance(value, bool))
            if not fits:
                raise ConfigError(f"{key}: expected {hint.__name__}, got {shown(value)}")
            require(value != "" or PATHS.fullmatch(name) is None, key, "must not be empty")
            if not isinstance(value, hint):
                setattr(config, name, hint(value))  # an int for a float, or a NumPy number
        elif is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
            raise ConfigError(f"{key}: expected {hint.__name__}, got {shown(value)}")  # type: ignore[union-attr]


# How many values a category of a log may have.

MAX_VALUES = 1_000_000
"""The limit unless the configuration of the table raises it: far more values are likely a mistake, such as a column of
ids or times."""
_MOST = 2**31 - 2
"""Codes are int32."""


def check_max_values(value: int, key: str) -> None:
    """Check the limit of a table. Raises ConfigError."""
    require(1 <= value <= _MOST, key, f"must lie in 1 … {_MOST:,}")


# The size of a YAML document, measured before it is built.

MAX_YAML_VALUES, MAX_LEVELS = 10_000, 50
"""Of a document, with every alias replaced by what it stands for."""
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
MAX_BASE_60 = 100
"""Characters of an integer in base 60, such as 1:30. PyYAML takes time that grows with the square of its length."""


@dataclass(eq=False, slots=True)
class _Node:
    """Values and levels of a list, a mapping or a scalar, including itself."""

    values: int = 1
    levels: int = 1

    def add(self, child: _Node) -> None:
        self.values += child.values
        self.levels = max(self.levels, child.levels + 1)


def check_size(text: str) -> None:
    """Refuse a document that takes long to build, is huge once its aliases are replaced, or contains itself.

    Raises:
        yaml.YAMLError: it is, or the text is not YAML.
    """
    import yaml  # takes a while, and most configurations are built without it

    anchors: dict[str, _Node] = {}
    open_nodes = [_Node()]  # the document, and the lists and mappings that have begun
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            node = _Node()
            open_nodes.append(node)
        elif isinstance(event, yaml.CollectionEndEvent):
            node = open_nodes.pop()
            open_nodes[-1].add(node)
        elif isinstance(event, yaml.ScalarEvent):
            if event.implicit[0] and len(event.value) > MAX_BASE_60 and _BASE_60.fullmatch(event.value):
                raise yaml.YAMLError(
                    f"line {line}: a number in base 60 has {len(event.value)} characters, but at most {MAX_BASE_60} "
                    "are read"
                )
            node = _Node()
            open_nodes[-1].add(node)
        elif isinstance(event, yaml.AliasEvent):
            node = anchors.get(event.anchor, _Node())  # building the document names an anchor that is missing
            if node in open_nodes:
                raise yaml.YAMLError(f"line {line}: *{event.anchor} contains itself")
            open_nodes[-1].add(node)
        else:
            continue
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.anchor:
            anchors[event.anchor] = node
        if open_nodes[-1].values > MAX_YAML_VALUES or len(open_nodes) + open_nodes[-1].levels - 1 > MAX_LEVELS:
            raise yaml.YAMLError(
                f"line {line}: more than {MAX_YAML_VALUES} values or {MAX_LEVELS} levels, counting each alias as what "
                "it stands for"
            )


# Configurations to dictionaries of plain JSON values, and back.

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; enums become their values."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.value
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`. Raises ConfigError if a key is missing or unknown, or a value is not allowed."""
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__}: expected a table of keys, got {values!r}")
    other = {f.name for f in fields(cls)} ^ values.keys()  # type: ignore[arg-type]
    if other:
        keys = ", ".join(sorted(other))
        raise ConfigError(
            f"{keys}: missing or unknown in {cls.__name__}; was this written by another version of vista?"
        )
    arguments = {}
    for key, value in values.items():
        hint = hints[key]
        if is_dataclass(hint) and isinstance(value, dict):
            value = from_dict(hint, value)  # type: ignore[arg-type]
        arguments[key] = value
    return cls(**arguments)


# Choices of the configuration: the values that a key accepts, spelled as users write them.

Choice = TypeVar("Choice", bound=Enum)


def choice_of(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    """The choice itself, or the one with that value. Raises ConfigError naming the argument `name` and the allowed
    values, if the value is not one of them."""
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


class Alias(Enum):
    """Names that a registry gives to models."""

    champion = "champion"
    challenger = "challenger"


class AskedBaselines(Enum):
    """Which baselines `vista evaluate` measures too."""

    none = "none"
    counting = "counting"
    trained = "trained"


class WorldName(Enum):
    """What decides a click in the simulation."""

    share = "share"
    """How much of the user's whole history is about the candidate's topic."""
    mixed = "mixed"
    """How often and how recently the user had the candidate, for half of them; conjunction for the others."""
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
    positions = "positions"
    """As share, but users look at lower places of a list less often, and popular items are at the top."""


class OnlinePolicy(Enum):
    """What chooses the lists that simulated users see."""

    model = "model"
    """A trained model, served from a store that is refreshed before each round."""
    popular = "popular"
    """The items with the most events in the last four weeks."""
    random = "random"
    """Any items."""
    oracle = "oracle"
    """The items with the highest true probabilities."""


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
    """Layers of stage 2: softmax attention, or pointwise attention as in HSTU."""

    softmax = "softmax"
    """Softmax attention followed by a feed-forward network (the paper)."""
    pointwise = "pointwise"
    """A normalized and gated sum of SiLU(score) * value, without a feed-forward network (HSTU)."""


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


class Decay(Enum):
    """How older events lose weight in separable mixing: not at all, by age in time, or by age in events."""

    none = "none"
    time = "time"
    position = "position"


class StreamStart(Enum):
    """Where a watch starts in a topic that has no messages in the log."""

    oldest = "oldest"
    newest = "newest"


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


class ScoringBackend(Enum):
    """What computes the scores of requests."""

    auto = "auto"
    """The C++ library if it was built and can score the model, else torch."""
    native = "native"
    """The C++ library, which is for CPUs and float32."""
    torch = "torch"
    """PyTorch, which is the reference, and slower on CPUs."""


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


# Keys that several commands share. The classes have no slots, so that one with slots can inherit from several of them.
# The order of the bases is from the last keys of the command to the first.


class Checked:
    """Base of configurations whose values need no check beyond their types."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True)
class UsesLog(Checked):
    """A command that reads or changes a log."""

    __slots__ = ()
    data: str = "data/log"
    """Folder of the EventLog."""


@dataclass(kw_only=True)
class UsesModel(Checked):
    """A command that reads a trained model."""

    __slots__ = ()
    model: str = "runs/vista/best"
    """Folder of the exported model."""


@dataclass(kw_only=True)
class UsesStore(Checked):
    """A command that reads or changes a store."""

    __slots__ = ()
    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""


@dataclass(kw_only=True)
class Keyed(Checked):
    """A command that reads or writes records, which may be authenticated."""

    __slots__ = ()
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""


@dataclass(kw_only=True)
class NamesUsers(Checked):
    """A command for single users."""

    __slots__ = ()
    users: list[str] = field(default_factory=list)
    """Ids of the users, at least one."""


@dataclass(kw_only=True)
class VerifiesLog(Checked):
    """A command that can check the log's files first."""

    __slots__ = ()
    verify_log: bool = True
    """Check first that no byte of the log's files has changed since it was written. An incremental refresh checks those
    of the new segments."""


@dataclass(kw_only=True)
class SharesWithGroup(Checked):
    """A command that writes a store."""

    __slots__ = ()
    shared_with_group: bool = False
    """Let the group of the written store's folder read the store (folders 2750, files 0640), not only this account."""


@dataclass(kw_only=True)
class WritesJson(Checked):
    """A command that prints a result."""

    __slots__ = ()
    out: str | None = None
    """JSON file for the result. An existing file is replaced. null only prints it."""


@dataclass(kw_only=True)
class Threads(Checked):
    """A command that computes on the CPU."""

    __slots__ = ()
    num_threads: int = 0
    """Number of CPU threads. 0 uses OMP_NUM_THREADS if it is set; else one per core, at most the quota of the control
    group (container), and one for small batches or requests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)


@dataclass(kw_only=True)
class RunsOn(Threads):
    """A command that computes on a device."""

    __slots__ = ()
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""


@dataclass(kw_only=True)
class SummaryFormat(Checked):
    """How a store holds summaries and states."""

    __slots__ = ()
    codec: Codec = Codec.int8
    """How the values of a summary are stored: float32, float16, or as quantized rows of 8 bits (int8) or 4 bits
    (int4)."""
    state: StateDtype | None = None
    """How states are stored for incremental refreshes: float32, float16, or none. null stores them as float32 in a
    folder if the model and `until` permit, and not at all on a server, whose memory they would fill."""


@dataclass(kw_only=True)
class Multiplies(Checked):
    """A command that multiplies matrices in float32 unless another type is asked for."""

    __slots__ = ()
    precision: Precision = Precision.float32
    """Precision of matrix products: float32, bfloat16, or auto, which uses bfloat16 where the device multiplies it
    fast. bfloat16 changes summaries by about 0.3 %."""


@dataclass(kw_only=True)
class Seeded(Checked):
    """A command that draws random numbers."""

    __slots__ = ()
    seed: int = 1
    """Seed of all random numbers. The same seed gives the same result on the same kind of processor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "", ("seed",), least=0)
