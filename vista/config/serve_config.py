"""Configurations of `vista serve`, `score`, `explore`, `export`, `index`, `items …`, `doctor`, and `monitor`."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vista.config.checks import (
    MAX_THREADS,
    Alias,
    Checked,
    ExportFormat,
    IndexKind,
    Keyed,
    Multiplies,
    NamesUsers,
    OnMissing,
    RunsOn,
    Shell,
    Threads,
    UsesLog,
    UsesModel,
    UsesStore,
    WritesJson,
    check_size,
    check_types,
    require,
    require_counts,
    require_finite,
)
from vista.config.log_config import ItemIds, ItemTableConfig
from vista.errors import ConfigError, shown
from vista.files import read_limited


@dataclass(kw_only=True)
class Scores(RunsOn, Keyed):
    """A command that scores candidates."""

    __slots__ = ()
    on_missing: OnMissing = OnMissing.empty
    """What an unknown user or item gets. empty: the summary of an empty history. nan: a NaN or null score. raise: an
    error, which is a response with status 404."""


@dataclass(kw_only=True, slots=True)
class ServedModel(UsesStore, UsesModel):
    """One model that is served. The keys of a model in a file of several replace those of the command line."""

    index: str | None = None
    """Folder of the index that `vista index` wrote for this model, for /v1/retrieve. null serves without an index."""
    task: str | None = None
    """Task that score and rank use. null uses the first labeled task, or next if there are none."""
    adapter: str | None = None
    """Folder of adapters: the field adapter of requests may name a file NAME.adapter. A file of `vista adapt` is used
    by all requests instead. null serves the model as it is."""


@dataclass(kw_only=True, slots=True)
class ServeConfig(Scores, Multiplies, ServedModel):
    """Answer requests over HTTP from a model and a store, until SIGTERM or Ctrl-C."""

    models: str | None = None
    """YAML file that names several models with their stores, and how users are split among them. It replaces model,
    store, index, and task, and requests compute projections of candidates, which models cannot share."""
    host: str = "127.0.0.1"
    """Address to listen on. The default accepts connections from this machine only; 0.0.0.0 accepts them from
    everywhere."""
    port: int = 8000
    """TCP port to listen on. 0 chooses a free port, which the log names."""
    token_file: str | None = None
    """File with the token that clients must send, as `Authorization: Bearer TOKEN`; each line of the file is a valid
    token. null uses the environment variable VISTA_SERVE_TOKEN, or no token if that is unset."""
    workers: int = 1
    """Number of processes that share the port, at most one per core. A worker that dies is replaced."""
    max_age_s: float | None = None
    """Treat users as unknown if both their record and the last refresh of the store are older than this, in seconds.
    null sets no limit."""
    project_per_request: bool = False
    """Compute projections of candidates in each request instead of mapping the exported ones. This needs less memory,
    but more time."""
    num_threads: int = 1
    """Number of torch's CPU threads per worker."""
    scoring_threads: int = 1
    """Number of requests that a worker computes at the same time. More than one helps if requests wait for a store on
    another machine."""
    reload_s: float = 30.0
    """Number of seconds between checks for a new generation of the store and a new model, which goes into service once
    its summaries are published."""
    deadline_s: float = 1.0
    """Number of seconds after which a request gets status 504. A client can ask for less with the header
    Vista-Timeout-Ms."""
    max_waiting: int = 64
    """Maximum number of requests per worker that are waiting or being computed. Further ones get status 429."""
    max_connections: int = 500
    """Maximum number of open connections per worker. Further ones get status 503. Each connection needs a file
    descriptor; the service does not start if the hard limit (`ulimit -Hn`) allows fewer."""
    max_body_bytes: int = 4 << 20
    """Maximum size of the body of a request. Larger requests get status 413. The bodies of all unanswered requests of a
    worker can take 16 times as much; beyond that, requests get status 429."""
    max_candidates: int = 10_000
    """Maximum number of pairs of a user and a candidate per request, and of items in an answer. Requests that rank the
    whole catalog are limited by their deadline instead; retrieve searches a large one faster."""
    max_users: int = 256
    """Maximum number of users per request."""
    shadow_model: str | None = None
    """Folder of a challenger, which answers copies of live requests to score and rank. Its answers are logged and never
    returned. null has none."""
    shadow_store: str | None = None
    """Folder or URL of the challenger's summary store."""
    shadow_file: str = "shadow.jsonl"
    """File for the comparisons, one JSON object per line. Beyond 256 MB, it is renamed to <file>.1."""

    def __post_init__(self) -> None:
        Scores.__post_init__(self)
        require_counts(self, "", ("port",), least=0, most=65_535)
        require_counts(self, "", ("workers", "scoring_threads"), most=MAX_THREADS)
        require_counts(self, "", ("max_waiting", "max_connections", "max_body_bytes"))
        require_counts(self, "", ("max_candidates", "max_users"))
        require_finite(self, "", ("max_age_s", "reload_s", "deadline_s"), positive=True, most=1e6)
        for of_one in fields(ServedModel):
            require(
                self.models is None or getattr(self, of_one.name) == of_one.default,
                of_one.name,
                f"only applies without models={self.models}; leave it out, or set it in that file",
            )
        both = (self.shadow_model is None) == (self.shadow_store is None)
        require(both, "shadow_model, shadow_store", "name both, or neither")
        require(self.models is None or self.shadow_model is None, "shadow_model", "needs a service of one model")
        require(bool(self.host), "host", "must be an address, such as 127.0.0.1 or 0.0.0.0")

    @property
    def stop_s(self) -> float:
        """Number of seconds that running requests have to finish after SIGTERM."""
        return max(10.0, self.deadline_s)


# The file of `vista serve models=…`: several models for one service, and how users are split among them.

MAX_BYTES = 1 << 20
MAX_MODELS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class ModelsFile:
    """The content of the file."""

    models: dict[str, ServedModel]
    """By name, in the order of the file. Without a split, the first model answers requests that do not name one."""
    split: dict[str, float]
    """Share of the users per model; they sum to 1. Empty without a split."""
    experiment: str
    """Salt of the split: different experiments assign users independently."""

    @classmethod
    def read(cls, path: str) -> ModelsFile:
        """Read a file. Raises ConfigError if it is missing or not YAML, or a key or a value is wrong; the message names
        the file and key."""
        content = _mapping(_content(path), path)
        _require_keys(content, ("models", "split", "experiment"), path)
        given = _mapping(content.get("models"), f"{path}: models")
        require(0 < len(given) <= MAX_MODELS, f"{path}: models", f"must name 1 to {MAX_MODELS} models")
        models = {}
        for name, keys in given.items():
            where = f"{path}: models.{shown(name).strip(chr(39))}"
            if not isinstance(name, str) or _NAME.fullmatch(name) is None:
                raise ConfigError(f"{where}: a name has at most 64 letters, digits, dots, underscores, and hyphens")
            keys = _mapping(keys, where)
            _require_keys(keys, [field.name for field in fields(ServedModel)], where)
            missing = [key for key in ("model", "store") if keys.get(key) is None]
            require(not missing, where, f"needs {' and '.join(missing)}")
            try:
                models[name] = ServedModel(**keys)
            except ConfigError as error:
                raise ConfigError(f"{where}.{error}") from None
        split = _split(content.get("split"), models, f"{path}: split")
        experiment = content.get("experiment")
        require(experiment is None or isinstance(experiment, str), f"{path}: experiment", "must be text")
        return cls(models, split, ",".join(split) if experiment is None else experiment)


def _content(path: str) -> Any:
    # They take a while to load, and a scorer does not need them.
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = read_limited(Path(path), MAX_BYTES).decode("utf-8-sig")
        check_size(text)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))  # refuses a key that occurs twice
    except OSError as error:
        raise ConfigError(f"models={path}: {error.strerror or error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from error


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must hold keys and values, got {shown(value)}")
    return value


def _require_keys(given: dict[Any, Any], known: list[str] | tuple[str, ...], where: str) -> None:
    unknown = [str(key) for key in given if key not in known]
    require(not unknown, where, f"unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")


def _split(given: Any, models: dict[str, ServedModel], where: str) -> dict[str, float]:
    if given is None:
        return {}
    shares = _mapping(given, where)
    for name, share in shares.items():
        require(name in models, where, f"{shown(name)} is not one of the models, {', '.join(models)}")
        good = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
        require(good, f"{where}.{name}", f"must lie in [0, 1], got {shown(share)}")
    total = math.fsum(shares.values())
    require(abs(total - 1) < 1e-9, where, f"the shares must sum to 1, but sum to {total:g}")
    return {name: float(share) for name, share in shares.items()}


@dataclass(kw_only=True)
class NamesItems(Checked):
    """A command that shows items to people."""

    __slots__ = ()
    data: str | None = None
    """Folder of the EventLog. null uses the log that the model was trained on, if it still exists."""
    item_name: str | None = None
    """Column of the items table with their names. null takes the first category with title, name, or description in its
    name; without one, items are shown by their ids."""


@dataclass(kw_only=True, slots=True)
class ScoreConfig(Scores, NamesUsers, UsesStore, UsesModel, NamesItems):
    """Score candidates for users, rank the whole catalog for them, or retrieve from it."""

    candidates: list[str] = field(default_factory=list)
    """Ids of the items to score. Empty ranks the whole catalog."""
    retrieve: bool = False
    """Rank the candidates that an index finds, instead of the whole catalog."""
    index: str | None = None
    """Folder of the index. null uses the default of `vista index`: the model's folder with .index appended."""
    top_k: int = 10
    """Number of items to list per user if no candidates are given."""
    adapter: str | None = None
    """File of `vista adapt` to score with. null scores with the model as it is."""
    explain: bool = False
    """Say of each item what raises it above the average candidate, with names of items from `data`."""
    now: str | None = None
    """Time of the request: ISO date or time (UTC), or integer milliseconds. null takes the current time, but at most 30
    days after the user's newest event."""
    request: list[str] = field(default_factory=list)
    """Features of the request or of the users, each written as name:value, such as [device:phone,hour:14]. If a value
    differs between candidates, give the name once per candidate, in their order, such as [price:2.99,price:3.49].
    Request features that you leave out are treated as missing."""

    def __post_init__(self) -> None:
        Scores.__post_init__(self)
        require_counts(self, "", ("top_k",))
        require(not self.retrieve or not self.candidates, "candidates", "must be empty with retrieve=true")
        require(self.retrieve or self.index is None, "index", "needs retrieve=true")
        named = self.item_name is None or self.explain or self.data is not None
        require(named, "item_name", "needs explain=true, or data=... with the log that has the column")


@dataclass(kw_only=True, slots=True)
class ExploreConfig(NamesItems, Keyed):
    """A web page that shows users, rankings with explanations, the store, and whether summaries help."""

    model: str | None = None
    """Folder of the exported model. If model and store are null, the page shows the output of `make demo` in demo/."""
    store: str | None = None
    """Folder of the model's summary store, or its URL, such as redis://host:6379/mine."""
    other_model: str | None = None
    """A second model, to compare with the first one. null compares stores of the same model."""
    other_store: str | None = None
    """The store of the second model, or another store of the first one, such as one that ends before the test labels.
    null reads the second model's summaries from `store`."""
    port: int = 8501
    """TCP port to listen on, for connections from this machine only. 0 chooses a free port, which the log names."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("port",), least=0, most=65_535)
        both = (self.model is None) == (self.store is None)
        require(both, "model, store", "name both, since a store belongs to the model that wrote it, or neither")


@dataclass(kw_only=True, slots=True)
class ExportConfig(Threads, Keyed, UsesModel):
    """Export stage 2 with its tables, to score without vista, and compare it with the scorer."""

    format: ExportFormat = ExportFormat.onnx
    """onnx, for onnxruntime in any language, or aotinductor, for PyTorch in Python or C++. aotinductor compiles for the
    processor of this machine, and needs a C++ compiler."""
    out: str = "exports/vista"
    """Folder to write; an earlier export there is replaced."""
    adapter: str | None = None
    """File of `vista adapt` to export the model with. null exports the model as it is."""
    store: str | None = None
    """Folder or URL of a store of the model's summaries, whose users make the requests of the comparison. null makes
    random users."""


@dataclass(kw_only=True, slots=True)
class IndexConfig(UsesModel):
    """Nearest-neighbor index over a model's item vectors, from which `Scorer.retrieve` takes candidates."""

    out: str | None = None
    """Folder to write; an earlier index there is replaced. null takes the model's folder with .index appended, such as
    runs/vista/best.index."""
    kind: IndexKind | None = None
    """flat (exact), hnsw (a graph), or ivfpq (clusters of compressed vectors). null chooses flat up to 50,000 items,
    and ivfpq above."""


@dataclass(kw_only=True, slots=True)
class ItemsAddConfig(UsesModel):
    """Items that a trained model is to rank by their features, without training."""

    items: ItemTableConfig = field(default_factory=ItemTableConfig)
    """Table of items. The columns are those of the model. Items that the model knows already are left out."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.items.is_inferred,
            "items",
            "do not set categories, numbers, or vectors; the model's own columns are read",
        )


@dataclass(kw_only=True, slots=True)
class ItemsEmbedConfig(RunsOn):
    """Vectors of the texts of items, from a sentence encoder that needs no network."""

    kind: str = "table"
    """Format of the files: table is Parquet, CSV, or TSV with the columns named below. Others are public data sets
    (ml-1m, ml-latest-small, ml-100k, complete-journey, ...). auto recognizes the folder of a data set."""
    items: ItemTableConfig = field(default_factory=ItemTableConfig)
    """Table of items. Of a public data set only the paths are read."""
    columns: list[str] = field(default_factory=list)
    """Columns of text, which are joined in this order to one text per item. MovieLens and Complete Journey have
    defaults: title and genres, and department, product_category, and product_type."""
    name: str = "text"
    """Name of the new column of vectors."""
    out: str = "vectors.parquet"
    """Parquet file to write, with the item ids and the vectors; replaced if it exists."""

    def __post_init__(self) -> None:
        RunsOn.__post_init__(self)
        require(
            self.items.is_inferred,
            "items",
            "do not set categories, numbers, or vectors; name the columns of text with columns=[...]",
        )
        require(self.name not in ("", self.items.item), "name", "must be a name other than that of the column of ids")


@dataclass(kw_only=True, slots=True)
class ItemsTokenizeConfig(ItemIds):
    """Semantic ids: residual k-means codes of the vectors of items."""

    vectors: str | None = None
    """Parquet file with a column of item ids and a column of vectors, or folder of an exported model, whose item
    vectors get codes."""
    column: str = "text"
    """Column of vectors in the file: lists of numbers, all of one length."""
    codebooks: str | None = None
    """File of codebooks from an earlier run. Old items keep their codes, and the codes of new items have the same
    meaning. levels and codes are then those of the earlier run. null learns new codebooks and writes them
    alongside `out`, such as codes.codebooks.safetensors for codes.parquet."""
    levels: int = 3
    """Number of levels, which is how many codes an item has. Each level encodes what the levels before it leave."""
    codes: int = 256
    """Number of different codes per level."""
    name: str = "codes"
    """Name of the new column of codes."""
    out: str = "codes.parquet"
    """Parquet file to write, with the item ids and the codes; replaced if it exists."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.name not in ("", self.item), "name", "must be a name other than that of the column of ids")
        require_counts(self, "", ("levels",), most=16)
        require_counts(self, "", ("codes",), least=2, most=1 << 16)


@dataclass(kw_only=True, slots=True)
class DoctorConfig(WritesJson):
    """What to check in addition to this machine."""

    model: str | None = None
    """Folder of an exported model to check; null checks none."""
    store: str | None = None
    """Folder or URL of a summary store to check, and to compare with the model; null checks none."""
    data: str | None = None
    """Folder of an EventLog to check; null checks none."""


@dataclass(kw_only=True, slots=True)
class MonitorConfig(Threads, Keyed, UsesModel, UsesLog):
    """The newest window of a log, to compare with the training data of a model."""

    store: str | None = None
    """Folder or URL of the model's summary store, to check its records, the scores of its users, and predicted against
    observed labels; null checks none of these."""
    now: str | None = None
    """End of the window: ISO date or time (UTC), or integer milliseconds. null takes the current time."""
    out: str | None = "monitor.html"
    """HTML page to write; an existing file is replaced. null writes none."""
    metrics_file: str | None = None
    """File for gauges in Prometheus' text format, such as one in the folder of the node exporter's textfile collector;
    an existing file is replaced. null writes none."""


@dataclass(kw_only=True)
class UsesRegistry(Checked):
    """A command on a folder of models."""

    __slots__ = ()
    registry: str = "registry"
    """Folder of the registry, which is made if it does not exist."""


@dataclass(kw_only=True, slots=True)
class ModelPromoteConfig(Threads, UsesRegistry):
    """Copy a model into a registry, and let an alias name it."""

    alias: Alias = Alias.champion
    """champion, which needs all gates to pass, or challenger, which needs none."""
    model: str | None = None
    """Folder of the exported model. null takes the challenger."""
    name: str | None = None
    """Name of the model in the registry. null takes that of its run folder."""
    data: str | None = None
    """Folder of the EventLog on whose validation labels the gates are measured."""
    max_latency_ms: float | None = None
    """Maximum median time of a request for 200 candidates, in ms. null allows 1.25 times that of the champion."""
    force: bool = False
    """Do not measure the gates. The audit file records it."""

    def __post_init__(self) -> None:
        Threads.__post_init__(self)
        require_finite(self, "", ("max_latency_ms",), positive=True, most=1e6)
        good = self.name is None or _NAME.fullmatch(self.name) is not None
        require(good, "name", "has at most 64 letters, digits, dots, underscores, and hyphens")


@dataclass(kw_only=True, slots=True)
class ModelRollbackConfig(UsesRegistry):
    """Point the alias back to the previous model."""

    alias: Alias = Alias.champion
    """champion or challenger."""


@dataclass(kw_only=True, slots=True)
class ModelListConfig(UsesRegistry):
    """The models of a registry."""


@dataclass(kw_only=True, slots=True)
class CompletionConfig(Checked):
    """The shell that the script is for."""

    shell: Shell = Shell.bash
    """The shell; `vista completion zsh` is short for `vista completion shell=zsh`."""
