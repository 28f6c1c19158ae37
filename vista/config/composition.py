"""From `key=value` words to one config object: Hydra's compose API over conf/, typed by the dataclasses.

Hydra parses the words, and composes the groups and experiments of the commands that have any. Values are then set one
at a time, which Hydra cannot do: an error names the word that caused it in one line, text such as the id 1_000 stays as
it was written, and a model has the keys of its architecture. Nothing here changes the working directory or makes a run
folder.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vista.config.checks import MAX_LEVELS, Architecture, check_size, to_dict, without_none
from vista.config.model_config import CONFIGS, RankingConfig, readers_of
from vista.config.train_config import TrainConfig
from vista.errors import ConfigError, shown, without_password
from vista.files import read_limited
from vista.installation import install_command

# Configuration dataclasses as text: every key with its type, default, and docstring; YAML.
#
# It reads the source of the modules that define the dataclasses, so it does not need Hydra. Help texts and error
# messages of the command line are made from it.

_SENTENCE = re.compile(r"(.+?[^.]\.)(\s+[A-Z`]|$)")


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A value that users can set."""

    name: str
    """Dotted name, as on the command line: model.num_seeds."""
    type_text: str
    """Type as shown to users: int, str or null, [float, ...], bidirectional|separable."""
    default: Any
    doc: str
    """Docstring of the field, or else of its enum; empty if both have none."""
    choices: tuple[str, ...] = ()
    """All accepted spellings of an enum's values."""
    readers: tuple[Architecture, ...] = ()
    """Of a key of a model: the architectures that read it."""

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        match = _SENTENCE.match(self.doc)
        return match[1] if match else self.doc

    @property
    def is_text(self) -> bool:
        """Whether it is a str or a list of str."""
        return self.type_text.removesuffix(" or null") in ("str", "[str, ...]")


@dataclass(frozen=True, slots=True)
class ConfigSection:
    """A dataclass within a dataclass: a group of keys with a common prefix."""

    name: str
    schema: type
    optional: bool
    """Whether it is null unless one of its keys is set."""


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """All keys and sections of a schema, in the order of `listed_fields`. A model's are those of all architectures."""

    keys: dict[str, ConfigKey]
    sections: dict[str, ConfigSection]

    @classmethod
    def of(cls, schema: type) -> ConfigKeys:
        """List the keys of a config dataclass, including nested ones with their prefix."""
        listed = cls({}, {})
        listed._add(schema, "")
        return listed

    def _add(self, schema: type, prefix: str) -> None:
        hints = get_type_hints(schema)
        docs = _docs_of_fields(schema)
        for field in listed_fields(schema):
            name, inner, optional = prefix + field.name, *without_none(hints[field.name])
            if dataclasses.is_dataclass(inner):
                assert isinstance(inner, type)
                self.sections[name] = ConfigSection(name, inner, optional)
                for each in CONFIGS.values() if inner is RankingConfig else (inner,):
                    self._add(each, f"{name}.")
            elif name not in self.keys:  # several architectures have it
                is_enum = isinstance(inner, type) and issubclass(inner, Enum)
                choices = tuple(inner.__members__) if is_enum else ()
                doc, readers = docs[field.name], tuple[Architecture, ...]()
                if issubclass(schema, RankingConfig) and len(read := readers_of(field.name)) < len(CONFIGS):
                    readers = tuple(read)
                    doc += f" Only of {', '.join(each.value for each in read)}."
                self.keys[name] = ConfigKey(name, type_text(hints[field.name]), _default(field), doc, choices, readers)

    def matches(self, name: str) -> list[str]:
        """Up to three names that a mistyped name may stand for, best first. The prefix may be missing."""
        names = list(self.keys) if "." in name else [*self.keys, *self.sections]
        matches = get_close_matches(name, names, n=3, cutoff=0.75)
        last = name.rpartition(".")[2]
        by_last: dict[str, list[str]] = {}
        for known in names:
            by_last.setdefault(known.rpartition(".")[2], []).append(known)
        for close in get_close_matches(last, by_last, n=3, cutoff=0.75):
            matches += by_last[close]
        return list(dict.fromkeys(matches))[:3]


def listed_fields(schema: type) -> list[dataclasses.Field[Any]]:
    """The fields in the order in which users see them: what a command reads, its own keys, those that it shares."""
    listed = dataclasses.fields(schema)
    if issubclass(schema, RankingConfig):
        return list(listed)
    own = {name: number for number, name in enumerate(schema.__annotations__)}
    place = {"data": -4, "model": -3, "store": -2, "paths": -1} | own
    return sorted(listed, key=lambda field: place.get(field.name, len(own)))


def type_text(hint: Any) -> str:
    """A type as it is shown to users."""
    inner, optional = without_none(hint)
    if get_origin(inner) is list:
        text = f"[{type_text(get_args(inner)[0])}, ...]"
    elif issubclass(inner, Enum):
        text = "|".join(str(member.value) for member in inner)
    else:
        text = inner.__name__
    return f"{text} or null" if optional else text


def value_text(value: Any) -> str:
    """A value as users write it after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return f"[{','.join(value_text(item) for item in value)}]"
    return str(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _docs_of_body(body: list[ast.stmt]) -> dict[str, str]:
    """Docstrings that follow assignments, by the assigned name."""
    docs = {}
    for statement, following in itertools.pairwise(body):
        target = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]  # type: ignore[assignment]
        if (
            isinstance(target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[target.id] = " ".join(following.value.value.split())
    return docs


@cache
def _tree_of_module(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))


def _docs_of_fields(schema: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):  # without object
        for statement in _tree_of_module(cls.__module__).body:
            if isinstance(statement, ast.ClassDef) and statement.name == cls.__name__:
                docs |= _docs_of_body(statement.body)
    return docs


def to_yaml(config: Any) -> str:
    """A config as YAML, from which `vista COMMAND --config FILE` makes an equal one, but without passwords in URLs."""
    values = _without_passwords(to_dict(config))
    ordered = {field.name: values[field.name] for field in listed_fields(type(config))}
    text: str = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)
    return text


def flat_settings(config: Any) -> dict[str, Any]:
    """A configuration as one level of plain JSON values: {"model.dim": 64, …}; passwords in URLs are left out."""
    return flattened(_without_passwords(to_dict(config)))


def flattened(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _without_passwords(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_passwords(inner) for inner in value]
    return without_password(value) if isinstance(value, str) else value


def check_value(key: str, value: Any) -> None:
    """Require that a value calls no resolver, which could read the environment, and that its integers fit 64 bits.
    Raises ConfigError naming the key."""
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            check_value(key, inner)
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{key}: holds an integer of more than 64 bits; put text in quotes")
    elif isinstance(value, str) and "${" in value:
        if (resolver := _RESOLVER.search(value)) is not None:
            raise ConfigError(
                f"{key}: configurations may not call the resolver {resolver[1]}; write the value, or let the shell "
                "fill it in"
            )
        rest, references = _REFERENCE.subn("", value)
        if "${" in rest:
            raise ConfigError(
                f"{key}: cannot read {shown(value)}; write the value, or one reference such as ${{run_dir}}"
            )
        if references > 1:
            raise ConfigError(f"{key}: at most one reference such as ${{run_dir}} is possible, got {references}")


class SweptKey(NamedTuple):
    """A key of `vista train` with several values, of which each trial of a sweep takes one."""

    key: str
    values: tuple[str, ...] = ()
    """As written; empty for an interval."""
    interval: tuple[float, float] | None = None
    log: bool = False
    """Whether values of the interval are drawn on a logarithmic scale."""
    whole: bool = False
    """Whether the values of the interval are whole numbers."""


ConfigT = TypeVar("ConfigT")


MAX_YAML_BYTES = 1 << 20
MAX_WORD = 1 << 17
"""Most characters of a `key=value` word; Linux passes at most this many bytes."""
MAX_COMMAS = 4_096
"""Most commas of a word, because parsing takes time that grows with the square of the number of values."""

_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
_URL = re.compile(r"([a-z_.]+)=([a-z]+://\S+)")
"""A word whose value is a URL. It is read as written: Hydra's grammar would demand quotes around `=` and commas."""


class _Written(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that keeps every scalar as written, as text. Merge keys (<<) work as usual."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}


_ELEMENT = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\\.|[^,'"\\])+""")
"""A list element in Hydra's grammar: quoted parts and escaped characters may contain commas."""


def command_name(schema: type) -> str:
    """The command of a schema: the words of its name, so that StoreCopyConfig belongs to `store copy`."""
    return " ".join(re.findall("[A-Z][a-z]+", schema.__name__.removesuffix("Config"))).lower()


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or next to it in a checkout or an editable install. Raises
    ConfigError if neither exists."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"no conf/ folder in {package} or next to it; install vista again: {install_command()}")


def groups_of(name: str) -> list[str]:
    """Words that choose an option of a group, such as experiment and model.kind; commands without a file have none.

    They are the groups in the command's defaults list. That of models is an exception, because `model` names the folder
    of a trained model in all other commands.
    """
    file = conf_dir() / f"{name}.yaml"
    if not file.is_file():
        return []
    defaults = cast(DictConfig, OmegaConf.load(file)).get("defaults", [])
    groups = [str(key).split()[-1] for entry in defaults if not isinstance(entry, str) for key in entry]
    return ["model.kind" if group == "model" else group for group in groups]


def group_dir(group: str) -> Path:
    """The folder of a group's options: conf/model of model.kind."""
    return conf_dir() / group.partition(".")[0]


def options_of(group: str) -> dict[str, str]:
    """Options of a group, each with the comment that describes it."""
    options = {}
    for path in sorted(group_dir(group).glob("*.yaml"), key=lambda path: path.stem):
        comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        options[path.stem] = " ".join(comment for comment in comments if not comment.startswith("@"))
    return options


def compose_config(
    schema: type[ConfigT], overrides: Sequence[str] = (), *, config_file: str | Path | None = None
) -> ConfigT:
    """Make a config object from conf/, a user's file, and `key=value` words. Later values override earlier ones.

    Args:
        schema: the config of a command, such as TrainConfig.
        overrides: words in Hydra's grammar: `model.num_seeds=32`, `model.kind=paper`, `experiment=ml-1m`.
        config_file: YAML with the same keys and groups, such as the output of `--cfg`.

    Raises:
        ConfigError: a key is unknown, unreadable, of the wrong type, or breaks a rule; one line that names the key.
    """
    name = command_name(schema)
    keys, groups = ConfigKeys.of(schema), groups_of(name)
    choices: dict[str, str] = {}
    values: dict[str, Any] = {}
    for key, value, written in [*_words_of_file(config_file), *(_parse(word) for word in overrides)]:
        for leaf, leaf_value in _leaves(key, value, written, keys, name, groups):
            if leaf in groups:
                choices[leaf] = _option(leaf, leaf_value)
            else:
                values.pop(leaf, None)
                values[leaf] = leaf_value
    composed = deepcopy(_compose_groups(name, tuple(choices.items()))) if groups else {}
    config = OmegaConf.structured(schema)
    if "model" in keys.sections:
        architecture = values.get("model.architecture", composed["model"].get("architecture"))
        _choose_model(config, composed["model"], value_text(architecture), values, keys)
    try:
        config.merge_with(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{conf_dir() / name}.yaml: {_cause(error)}") from error
    for key, value in values.items():
        _assign(config, key, value, keys)
    try:
        return cast(ConfigT, OmegaConf.to_object(config))
    except RecursionError as error:
        raise ConfigError(f"{name}: a value refers to itself; write the values instead of ${{...}}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', None) or name}: {_first_line(error)}") from error


def _choose_model(
    config: DictConfig, composed: dict[str, Any], architecture: str, values: dict[str, Any], keys: ConfigKeys
) -> None:
    """Give the section `model` the keys of its architecture. Keys of an experiment that another architecture would read
    are left out of `composed`."""
    chosen = Architecture.__members__.get(architecture, Architecture.vista)  # other text is refused where it is set
    schema = keys.sections["model"].schema
    if schema is not RankingConfig and chosen is not Architecture.vista:
        raise ConfigError(
            f"model.architecture: only vista stores summaries, got {chosen.value}; others read the raw history in each "
            "request"
        )
    others = {key.name for key in keys.keys.values() if key.readers and chosen not in key.readers}
    for key in others & values.keys():
        names = "|".join(each.value for each in keys.keys[key].readers)
        raise ConfigError(f"{key}: is only for model.kind={names}, got model.kind={chosen.value}; leave it out")
    for key in others:
        composed.pop(key.removeprefix("model."), None)
    if schema is RankingConfig:
        OmegaConf.update(config, "model", OmegaConf.structured(CONFIGS[chosen]), merge=False)


@cache
def _compose_groups(name: str, choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Merge the chosen options of groups, which takes Hydra a tenth of a second. Callers must not change the result."""
    outer = get_gh_backup()  # the caller may be a Hydra application
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), job_name="vista", version_base="1.3"):
            words = [f"{group_dir(group).name}={option}" for group, option in choices]
            composed = OmegaConf.to_container(compose(name, overrides=words))
            assert isinstance(composed, dict)
            return cast(dict[str, Any], composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{conf_dir() / name}.yaml: {_cause(error)}") from error
    finally:
        restore_gh_from_backup(outer)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _cause(error: BaseException) -> str:
    """Text of the innermost error: Hydra wraps the error that says what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def _parse(word: str) -> tuple[str, Any, str]:
    """A `key=value` word -> (key, value, the value as written)."""
    key, _, text = word.partition("=")
    if ":/" in word and "@" in word:  # It may hold a password, and quotes and spaces at any place.
        given, quoted = f"{key}=…" if "=" in word and ":/" not in key else "…", "URL"
    else:
        given, quoted = word, text
    if len(word) > MAX_WORD:
        raise ConfigError(
            f"cannot read {shown(given)}: has {len(word)} characters, but at most {MAX_WORD} are read; "
            "put it in a --config file"
        )
    if word.startswith("~"):
        raise ConfigError(f"cannot read '{given}': keys cannot be deleted; set the key to null instead")
    if word.count(",") > MAX_COMMAS or _levels(word) > MAX_LEVELS:
        raise ConfigError(
            f"cannot read {shown(given)}: more than {MAX_COMMAS} values or {MAX_LEVELS} levels; put them in a "
            "--config file"
        )
    if "=" not in word:
        raise ConfigError(f"cannot read '{given}': write it as key=value")
    if (url := _URL.fullmatch(word)) is not None:
        return url[1], url[2], url[2]
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits
        reason = _first_line(error) if given == word else "the URL is not quoted correctly"
        raise ConfigError(
            f"cannot read '{given}': {reason}; quote values with special characters: \"{key}='{quoted}'\""
        ) from error
    if override.package is not None:
        raise ConfigError(f"cannot read '{given}': groups cannot be moved; write it without @")
    if override.is_sweep_override():
        raise ConfigError(
            f"cannot read '{given}': only vista sweep takes several values; write a list as "
            f"{override.key_or_group}=[a,b], and quote text with commas: \"{key}='{quoted}'\""
        )
    return override.key_or_group, override.value(), text


def swept_key(word: str) -> SweptKey | None:
    """The values of a word in Hydra's grammar of sweeps: `seed=1,2,3`, `seed=range(1,4)`, `rate=interval(1e-4,1e-2)`.

    Returns:
        None if the word has a single value, or cannot be read; `compose_config` then says why.

    Raises:
        ConfigError: the key is unknown to `vista train`, or has a kind of sweep that is not supported.
    """
    if _URL.fullmatch(word) is not None or len(word) > MAX_WORD or word.count(",") > MAX_COMMAS:
        return None
    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError, RecursionError):
        return None
    if not override.is_sweep_override():
        return None
    key, value = override.key_or_group, override.value()
    keys, groups = ConfigKeys.of(TrainConfig), groups_of("train")
    if key not in keys.keys and key not in groups:
        raise ConfigError(f"unknown key '{key}'{_hint(keys.matches(key))} (vista train --help all lists them)")
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if low is None or high is None or not low < high:
            raise ConfigError(f"{key}: an interval needs two numbers, the smaller one first")
        whole, log = isinstance(low, int) and isinstance(high, int), "log" in value.tags
        if log and low <= 0:
            raise ConfigError(f"{key}: an interval on a logarithmic scale must be above 0, got {low:g}")
        return SweptKey(key, interval=(low, high), log=log, whole=whole)
    if not isinstance(value, ChoiceSweep | RangeSweep):
        raise ConfigError(f"{key}: list the values, as {key}=a,b,c")
    values = list(islice(override.sweep_string_iterator(), MAX_COMMAS + 1))
    if len(values) > MAX_COMMAS:
        raise ConfigError(f"{key}: has more than {MAX_COMMAS} values")
    return SweptKey(key, values=tuple(dict.fromkeys(values)))


def _levels(word: str) -> int:
    """The most brackets that are open at once."""
    steps = (1 if letter in "[({" else -1 for letter in word if letter in "[](){}")
    return max(accumulate(steps), default=0)


def _words_of_file(path: str | Path | None) -> list[tuple[str, Any, Any]]:
    """(key, value, value with every scalar as written) of each top-level key of a file."""
    if path is None:
        return []
    try:
        text = read_limited(Path(path), MAX_YAML_BYTES).decode("utf-8-sig")
        check_size(text)
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
        written = yaml.load(text, _Written)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}; check the path") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"--config {path}: invalid YAML: {_cause(error)}; `--cfg` prints a valid file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: holds a list or text; write keys and values, as `--cfg` prints them")
    return [(str(key), value, _inner(written, key)) for key, value in content.items()]


def _inner(written: Any, key: Any) -> Any:
    """The value of a key in a dict of `_Written`; None if there is none."""
    return written.get(str(key)) if isinstance(written, dict) else None


def _option(group: str, option: Any) -> str:
    known = list(options_of(group))
    if option not in known:
        text = value_text(option)
        raise ConfigError(
            f"{group}: no option '{text}'{_hint(get_close_matches(text, known))}; use one of {', '.join(known)}"
        )
    return str(option)


def _hint(matches: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(dict.fromkeys(matches))}?" if matches else ""


def _leaves(
    key: str, value: Any, written: Any, keys: ConfigKeys, name: str, groups: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """The single keys, groups and values of a word, whose value may be a dict, or of `data` the path."""
    if key in groups and not isinstance(value, dict):
        yield key, value
    elif key in keys.keys:
        value = _as_written(key, value, written) if keys.keys[key].is_text else value
        check_value(key, value)
        yield key, value
    elif key not in keys.sections:
        shorter = [key.partition(".")[0]] if key.partition(".")[0] in keys.keys else []  # data for data.path
        matches = [*([] if "." in key else get_close_matches(key, groups, n=1)), *keys.matches(key), *shorter]
        raise ConfigError(f"unknown key '{key}'{_hint(matches)} (vista {name} --help all lists them)")
    elif isinstance(value, dict):
        for inner, inner_value in value.items():
            yield from _leaves(f"{key}.{inner}", inner_value, _inner(written, inner), keys, name, groups)
    elif value is None and keys.sections[key].optional:
        yield key, None
    elif f"{key}.path" in keys.keys and not isinstance(value, list):
        yield from _leaves(f"{key}.path", value, written, keys, name, groups)
    else:
        examples = [known for known in (*groups, *keys.keys) if known.startswith(f"{key}.")][:3]
        raise ConfigError(f"{key}: is a group of keys, not a key; set {', '.join(examples)}, ...")


def _as_written(key: str, value: Any, written: Any) -> Any:
    """Text as written: Hydra and YAML would read ids such as 1_000, 1e5, and true as other values."""
    if isinstance(value, list) and not any(isinstance(one, list | dict) for one in value):
        is_list = isinstance(written, str) and written.strip().startswith("[")
        texts = _ELEMENT.findall(written.strip()[1:-1]) if is_list else written
        if not isinstance(texts, list) or len(texts) != len(value):  # a function such as sort([3,1,2])
            texts = [None] * len(value)
        return [_as_written(key, one, text) for one, text in zip(value, texts, strict=True)]
    if not isinstance(value, bool | int | float):
        return value
    if not isinstance(written, str) or "(" in written:  # a Hydra function, or a word of several keys
        raise ConfigError(f"{key}: {value_text(value)} was read as a number or a boolean; put text in quotes")
    return written.strip()


def _assign(config: DictConfig, key: str, value: Any, keys: ConfigKeys) -> None:
    for section in accumulate(key.split(".")[:-1], "{}.{}".format):
        if OmegaConf.select(config, section) is None:
            OmegaConf.update(config, section, OmegaConf.structured(keys.sections[section].schema), merge=False)
    if key in keys.sections:  # null: an optional section is omitted
        OmegaConf.update(config, key, value, merge=False)
        return
    known = keys.keys[key]
    if known.choices and isinstance(value, float) and value != value:
        value = "nan"  # Hydra reads the word as a number, but here it is a choice (on_missing=nan).
    try:
        OmegaConf.update(config, key, value, merge=True)
    except OmegaConfBaseException as error:
        hint = _hint(get_close_matches(str(value), known.choices))
        if known.type_text.startswith("[") and not isinstance(value, list):
            hint = f"; write a list as {key}=[{value_text(value)}]"
        raise ConfigError(f"{key}: expected {known.type_text}, got {value_text(value)}{hint}") from error
    if known.type_text == "[str, ...]" and any(isinstance(one, list | dict) for one in value):  # OmegaConf takes them
        raise ConfigError(f"{key}: expected {known.type_text}, got {value_text(value)}")
