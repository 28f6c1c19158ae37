"""Checkpoints of a run, written atomically: tensors in safetensors, everything else in JSON, no pickle.

A checkpoint is a folder `step-00001234` of two files:

- `tensors.safetensors`: every tensor (model, optimizers, random generators), by name;
- `state.json`: format version, step, size and SHA-256 of the tensor file, the caller's state, and a SHA-256 of these.

It is written as `.tmp-step-00001234`; the files and the folder are fsynced, the folder is renamed, and the parent is
fsynced. It is removed in the opposite order: renamed, the parent fsynced, the files removed. So a kill or a power cut
at any time leaves either a complete checkpoint or none. Only one process may write to a folder at a time.

`pack_state` turns nested state (an optimizer's `state_dict`, a NumPy generator's `bit_generator.state`) into these two
forms, and `unpack_state` turns it back, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vista.config.checks import TableKind, TablePrecision
from vista.errors import CheckpointError, ConfigError, VistaError
from vista.files import (
    TABLE,
    FieldRule,
    check_fields,
    either,
    hexadecimal,
    list_of,
    make_folders,
    one_of,
    read_limited,
    remove_folder,
    remove_renamed,
    sync,
    whole,
)
from vista.model.layers import tables_from_file
from vista.model.ranking_model import RankingModel
from vista.ranks import Ranks
from vista.training.run_plan import Progress

if TYPE_CHECKING:
    from vista.model.sharded_table import ShardedTable
    from vista.training.optimizers import Optimizers


# Tensors whose rows are divided among ranks, and a safetensors file that they are written to in pieces.

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors."""


@dataclass(frozen=True, slots=True)
class RowShards:
    """A tensor with a row per row of a sharded table."""

    table: ShardedTable
    own: Tensor
    """[n, ...] rows of this rank."""
    dtype: torch.dtype
    """In the file."""

    @property
    def shape(self) -> list[int]:
        """[N, ...]"""
        return [self.table.shape[0], *self.own.shape[1:]]

    def pieces(self) -> Iterator[Tensor]:
        """All rows in order, some at a time, at rank 0. The other ranks send theirs while they iterate."""
        for piece in self.table.pieces(self.own):
            yield piece.to(self.dtype)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | RowShards]) -> None:
    """Write a safetensors file at rank 0, while the other ranks call `send_rows` with the same names. Only pieces of
    sharded tensors are in memory at once."""
    header, end = {}, 0
    for name, tensor in _in_order(tensors):
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _in_order(tensors):
            for piece in tensor.pieces() if isinstance(tensor, RowShards) else [tensor.detach().cpu()]:
                file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)


def send_rows(tensors: Mapping[str, Tensor | RowShards]) -> None:
    """Send this rank's rows of sharded tensors to rank 0, which calls `write_tensors`."""
    for _, tensor in _in_order(tensors):
        if isinstance(tensor, RowShards):
            for _ in tensor.pieces():
                pass


def _in_order(tensors: Mapping[str, Tensor | RowShards]) -> list[tuple[str, Tensor | RowShards]]:
    """Those of wide dtypes first, so that all are aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


FORMAT_VERSION = 3
TENSOR_FILE = "tensors.safetensors"
STATE_FILE = "state.json"

_STEP_NAME = re.compile(r"step-(\d{8,})")
_MAX_STATE_BYTES = 1 << 26
_UNFINISHED = ".tmp-"
_REPLACED = ".replaced-"


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor | RowShards],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write one checkpoint atomically, then remove those that are no longer needed.

    The newest `keep` checkpoints stay. Later steps are removed too: they belong to a run that was rewound, and would
    otherwise be taken for the newest. Saving a step again replaces it.

    Args:
        folder: parent of all checkpoints of one run; created if absent.
        step: training steps done, at least 0.
        tensors: name -> tensor of any device and dtype; tensors that share memory are stored separately. With sharded
            ones, only rank 0 saves, and the other ranks call `send_rows`.
        state: values that JSON returns unchanged (no tuples, string keys, finite numbers), as `pack_state` makes them.
        keep: checkpoints to keep in the folder, at least 1.

    Returns:
        folder/step-00001234.

    Raises:
        ValueError: if a number is out of range or not finite.
        TypeError: if JSON would change the state, or a value of `tensors` is not a tensor.
        CheckpointError: if the disk is full, read-only or not a folder; earlier checkpoints stay as they were.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be at least 0 and keep at least 1, got step={step}, keep={keep}")
    body: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "state": dict(state)}
    if json.loads(json.dumps(body, allow_nan=False)) != body:
        raise TypeError("state: JSON would change it (a tuple, or a key that is not a string); use pack_state")
    root, final = Path(folder), Path(folder) / f"step-{step:08d}"
    temporary, replaced = root / f"{_UNFINISHED}{final.name}", root / f"{_REPLACED}{final.name}"
    try:
        make_folders(root)
        _recover(root)
        temporary.mkdir()
        tensor_path, state_path = temporary / TENSOR_FILE, temporary / STATE_FILE
        sharded = {name: value for name, value in tensors.items() if isinstance(value, RowShards)}
        storable = _storable({name: value for name, value in tensors.items() if not isinstance(value, RowShards)})
        if sharded:
            write_tensors(tensor_path, {**storable, **sharded})
        else:
            save_file(storable, tensor_path)
        body["tensors"] = {"bytes": tensor_path.stat().st_size, "sha256": _file_digest(tensor_path)}
        body["sha256"] = _body_digest(body)
        state_path.write_text(json.dumps(body, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        for path in (tensor_path, state_path, temporary):
            sync(path)
        if final.exists():  # a folder cannot be renamed over another; `_recover` undoes this half of the swap
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync(root)
        remove_renamed(replaced)
        _prune(root, step, keep)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: the checkpoint could not be written ({error}); free space or make the folder writable, then "
            "rerun the command to resume from the checkpoint before"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(
    path: str | os.PathLike[str], *, mapped: Callable[[str], bool] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one checkpoint, after checking both files against their sizes and SHA-256.

    Args:
        path: a folder from `save_checkpoint` or `latest_checkpoint`.
        mapped: whether a tensor of a name stays mapped from the file; None reads all of them.

    Returns:
        (tensors on the CPU, independent of the file except for mapped ones; the caller's state).

    Raises:
        CheckpointError: if a file is missing, truncated, modified or of another format; names the file and a remedy.
    """
    checkpoint = Path(path)
    body = _read_state(checkpoint / STATE_FILE)
    tensor_path = checkpoint / TENSOR_FILE
    expected = body["tensors"]
    try:
        num_bytes = tensor_path.stat().st_size
        if num_bytes != expected["bytes"]:
            raise _damaged(tensor_path, f"holds {num_bytes} bytes instead of {expected['bytes']}")
        if _file_digest(tensor_path) != expected["sha256"]:
            raise _damaged(tensor_path, "does not match the SHA-256 in its state.json")
        # Cloned, because the loaded tensors are views of a memory map of the file.
        tensors = {
            name: tensor if mapped is not None and mapped(name) else tensor.clone()
            for name, tensor in load_file(tensor_path).items()
        }
    except (OSError, SafetensorError) as error:
        raise _damaged(tensor_path, f"cannot be read ({error})") from error
    state: dict[str, Any] = body["state"]
    return tensors, state


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step, or None. Also removes what a killed save left behind. No process may
    save to the folder at the same time."""
    root = Path(folder)
    if not root.is_dir():
        return None
    _recover(root)
    steps = _steps(root)
    return steps[max(steps)] if steps else None


def remove_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Remove all checkpoints of a folder, complete or not, for a new run in the folder of another."""
    if latest_checkpoint(folder) is not None:
        for path in _steps(Path(folder)).values():
            _remove(path)


def pack_state(tree: Any, prefix: str) -> tuple[dict[str, Tensor | RowShards], Any]:
    """Split nested state into tensors by name and a skeleton for JSON. `unpack_state` is the exact inverse.

    Dicts (keys: strings or integers), lists, tuples, tensors, NumPy arrays and scalars, None, bool, int, float
    (including infinities and NaN) and str may nest freely. That covers `state_dict()` of torch's optimizers and
    schedulers, and `Generator.bit_generator.state` of NumPy.

    Args:
        tree: the state.
        prefix: start of every tensor's name, such as "optimizer.dense".

    Raises:
        TypeError: for any other type, naming its place.
    """
    tensors: dict[str, Tensor | RowShards] = {}

    def pack(value: Any, name: str) -> Any:
        while name in tensors:  # {"a.b": …} next to {"a": {"b": …}}
            name += "'"
        match value:
            case Tensor() | RowShards():
                tensors[name] = value
                return {"$tensor": name}
            case np.ndarray():
                tensors[name] = torch.from_numpy(np.array(value))
                return {"$array": name}
            case np.generic():
                return pack(value.item(), name)
            case float() if not math.isfinite(value):
                return {"$float": str(value)}
            case None | bool() | int() | float() | str():
                return value
            case list():
                return [pack(item, f"{name}.{i}") for i, item in enumerate(value)]
            case tuple():
                return {"$tuple": [pack(item, f"{name}.{i}") for i, item in enumerate(value)]}
            case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: pack(item, f"{name}.{key}") for key, item in value.items()}
            case dict() if all(type(key) in (int, str) for key in value):
                return {"$dict": [[key, pack(item, f"{name}.{key}")] for key, item in value.items()]}
        raise TypeError(
            f"{name}: a {type(value).__name__} cannot be saved in a checkpoint; convert it to numbers or tensors"
        )

    return tensors, pack(tree, prefix)


def unpack_state(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild nested state from the skeleton of `pack_state` (after JSON) and the tensors by name. Raises
    CheckpointError if a tensor that the skeleton names is missing."""
    if isinstance(skeleton, list):
        return [unpack_state(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    match skeleton:
        case {"$tensor": name} | {"$array": name}:
            if name not in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is not in the checkpoint, which another version wrote; set resume=false"
                )
            return tensors[name].numpy() if "$array" in skeleton else tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(unpack_state(item, tensors) for item in items)
        case {"$dict": pairs}:
            return {key: unpack_state(item, tensors) for key, item in pairs}
    return {key: unpack_state(item, tensors) for key, item in skeleton.items()}


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, no two of which share memory (safetensors refuses those), copied only if necessary."""
    storable: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}] is a {type(tensor).__name__}; move it to state, or use pack_state")
        own = tensor.detach().contiguous()
        if own.untyped_storage().data_ptr() in taken:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        storable[name] = own
    return storable


def _read_state(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(read_limited(path, _MAX_STATE_BYTES))
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not valid JSON ({error})") from error
    if not isinstance(body, dict) or "format_version" not in body:
        raise _damaged(path, "is not the state of a checkpoint")
    if body["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {body['format_version']}, but this version of vista reads {FORMAT_VERSION}; resume "
            "with the version that wrote it"
        )
    try:
        if body.pop("sha256", None) != _body_digest(body):
            raise _damaged(path, "was modified or damaged: its SHA-256 does not match")
        rules = {"format_version": one_of(FORMAT_VERSION), "step": whole(), "state": TABLE, "tensors": TABLE}
        check_fields(body, rules)
        check_fields(body["tensors"], {"bytes": whole(), "sha256": hexadecimal(64)})
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not the state of a checkpoint ({error})") from error
    return body


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {what}; remove the folder {path.parent} to resume from the checkpoint before it, or to start again"
    )


def _recover(root: Path) -> None:
    """Remove what a killed save left behind, and restore a checkpoint that it was about to replace."""
    for leftover in root.glob(f"{_UNFINISHED}*"):
        remove_renamed(leftover)
    for replaced in root.glob(f"{_REPLACED}*"):
        original = root / replaced.name.removeprefix(_REPLACED)
        if original.exists():
            remove_renamed(replaced)
        else:
            os.rename(replaced, original)


def _prune(root: Path, step: int, keep: int) -> None:
    steps = _steps(root)
    kept = sorted(s for s in steps if s <= step)[-keep:]
    for other in steps.keys() - kept:
        _remove(steps[other])


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill or a power cut in between leaves all of it, or nothing that looks like one."""
    remove_folder(path, path.with_name(f"{_UNFINISHED}removed-{path.name}"))


def _steps(root: Path) -> dict[int, Path]:
    return {int(match[1]): path for path in root.iterdir() if (match := _STEP_NAME.fullmatch(path.name))}


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The state of a run in its checkpoints.

ITEM_TABLE, TABLE_INDEX = "item_table", 0
"""The item table's name among the weights, and its index in the state of the optimizer of tables."""
_TENSOR = FieldRule("a tensor", lambda value: isinstance(value, Tensor))
_STATE = {
    **dict.fromkeys(("model", "optimizer", "table_optimizer", "average", "progress", "config"), TABLE),
    "adagrad_sums": either(one_of(None), _TENSOR),
    "rng": _TENSOR,
    "cuda_rng": list_of(_TENSOR),
}


def save_run(
    run_dir: Path, model: RankingModel, optimizers: Optimizers, progress: Progress, identity: dict[str, Any]
) -> None:
    """Write a checkpoint of a run. With a sharded table, all ranks call this; else only the one that writes.
    `identity`: `run_identity`."""
    weights, moments, sums = model.state_dict(), optimizers.table.state_dict(), None
    average = dict(optimizers.average.values)
    if (table := model.sharded_table) is not None:
        weights[ITEM_TABLE] = RowShards(table, model.item_table, model.item_table.dtype)
        if (of_rows := moments["state"].get(TABLE_INDEX)) is not None:  # rowwise_adagrad has none
            sharded = {TABLE_INDEX: {k: _shards(table, value) for k, value in of_rows.items()}}
            moments["state"] = moments["state"] | sharded
        sums = _shards(table, table.adagrad_sums)
        average |= {name: _shards(table, value) for name, value in average.items() if name == ITEM_TABLE}
    state = {
        "model": weights,
        "optimizer": optimizers.dense.state_dict(),
        "table_optimizer": moments,
        "adagrad_sums": sums,
        "average": {"count": optimizers.average.count, "values": average},
        "rng": torch.get_rng_state(),
        "cuda_rng": [torch.cuda.get_rng_state(model.device)] if model.device.type == "cuda" else [],
        "progress": {name: getattr(progress, name) for name in Progress.__slots__},
        "config": identity,
    }
    tensors, skeleton = pack_state(state, "state")
    if table is not None and not table.leads:
        send_rows(tensors)
        return
    save_checkpoint(run_dir / "checkpoints", progress.step, tensors, {"run": skeleton})


def restore_run(
    path: Path,
    run_dir: str,
    model: RankingModel,
    optimizers: Optimizers,
    identity: dict[str, Any],
    metrics: tuple[str, str],
) -> Progress:
    """Read the checkpoint `path` of a run. Arguments as in `save_run`.

    Args:
        metrics: `metric` and `ranking_metric` of the validation; both empty without one.

    Raises:
        ConfigError: if it belongs to a run with another identity.
        CheckpointError: if it is damaged, or belongs to another version of the model.
    """
    table = model.sharded_table
    tensors, body = load_checkpoint(path, mapped=None if table is None else _is_sharded)
    with _checked_state(path):
        check_fields(body, {"run": TABLE})
        state = unpack_state(body["run"], tensors)
        check_fields(state, _STATE)
    check_identity(identity, state["config"], run_dir)
    with _checked_state(path):
        progress = Progress.restored(state["progress"], int(path.name.removeprefix("step-")), *metrics)
        if table is not None:
            state["model"][ITEM_TABLE] = table.own(state["model"][ITEM_TABLE])
            moments = state["table_optimizer"]["state"].get(TABLE_INDEX, {})
            moments |= {k: table.own(value).clone() for k, value in moments.items() if isinstance(value, Tensor)}
            table.adagrad_sums.copy_(table.own(state["adagrad_sums"]))
            values = state["average"]["values"]
            values |= {name: table.own(value).clone() for name, value in values.items() if name == ITEM_TABLE}
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: belongs to another version of the model ({error}); remove {run_dir}, or set resume=false"
        ) from error
    with _checked_state(path):
        _restore_optimizer(optimizers.dense, state["optimizer"])
        _restore_optimizer(optimizers.table, state["table_optimizer"])
        optimizers.average.restore(**state["average"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and model.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][0], model.device)
    return progress


@contextmanager
def _checked_state(path: Path) -> Iterator[None]:
    """Name the file of the checkpoint `path` in errors about its values."""
    try:
        yield
    except (AttributeError, LookupError, OverflowError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, VistaError):
            raise
        raise _damaged(path / STATE_FILE, f"is not the state of this run ({error})") from error


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load moments, and the settings of groups, which must be those of the optimizer except for learning rates."""
    own, groups = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if [group | {"lr": None} for group in groups] != [group | {"lr": None} for group in own]:
        raise ValueError("its optimizer has other groups of parameters, or other settings")
    optimizer.load_state_dict(saved)
    for parameter, moments in optimizer.state.items():
        _check_moments(moments, parameter.shape)


def _check_moments(moments: Mapping[str, Any], shape: torch.Size) -> None:
    """Check an optimizer's state of a parameter with this shape."""
    shapes = {name: value.shape for name, value in moments.items() if name != "step"}
    if shapes != dict.fromkeys(("exp_avg", "exp_avg_sq"), shape):
        raise ValueError(f"its optimizer has moments of other shapes than its parameters: {shapes}")
    totals = [float(moments["step"]), *(float(moments[name].sum(dtype=torch.float64)) for name in shapes)]
    if not all(map(math.isfinite, totals)):
        raise ValueError("its optimizer has moments that are not finite")


def _shards(table: ShardedTable, value: Any) -> Any:
    """What has a row per row of the table, divided like it; other values stay."""
    return RowShards(table, value, value.dtype) if isinstance(value, Tensor) and value.dim() else value


def _is_sharded(name: str) -> bool:
    """Whether a tensor of a checkpoint has a row per row of the item table."""
    whole = f"state.model.{ITEM_TABLE}", f"state.average.values.{ITEM_TABLE}", "state.adagrad_sums"
    return name in whole or name.startswith(f"state.table_optimizer.state.{TABLE_INDEX}.")


def check_identity(here: dict[str, Any], there: dict[str, Any], run_dir: str) -> None:
    """Refuse to resume another run.

    Args:
        here: `run_identity` of this run; there: that of the run in `run_dir`.

    Raises:
        ConfigError: if they differ.
    """
    changed = [f"{k} ({there.get(k)} -> {here.get(k)})" for k in here | there if here.get(k) != there.get(k)]
    if changed:
        raise ConfigError(
            f"run_dir={run_dir} holds a run with another {', '.join(changed)}; choose another run_dir, or set "
            "resume=false to start a new run in it"
        )


# A model with a plain item table, made from one whose table is sharded: for validation and export.

PLAIN_WEIGHTS = ".weights.0.tmp"
"""Name of the file in a run folder; `remove_leftovers` removes it."""


def plain_model(model: RankingModel, run_dir: Path, ranks: Ranks) -> RankingModel:
    """The model, or a copy for inference if its table is sharded. All ranks call this.

    All ranks map the weights of the copy from one file, which rank 0 writes in pieces. So no rank needs memory for the
    whole table.

    Returns:
        The model or the copy, whose file `run_dir / PLAIN_WEIGHTS` may be moved or removed.

    Raises:
        CheckpointError: if the file cannot be written or read.
    """
    if model.sharded_table is None:
        return model
    path = run_dir / PLAIN_WEIGHTS
    weights = model.state_dict() | {ITEM_TABLE: RowShards(model.sharded_table, model.item_table, torch.float32)}
    config = replace(model.config, table=TableKind.plain, table_precision=TablePrecision.float32)
    with torch.random.fork_rng(devices=[]), tables_from_file():
        plain = type(model)(config, model.schema, model.items, model.data)
    try:
        if ranks.leads:
            path.unlink(missing_ok=True)  # another copy may still map it
            write_tensors(path, weights)
        else:
            send_rows(weights)
        ranks.wait()
        plain.take_weights(load_file(path))
    except OSError as error:
        raise CheckpointError(
            f"{path}: the weights could not be written or read ({error}); free space, and give all ranks the same "
            "run_dir"
        ) from error
    plain.take_catalog(model)
    return plain.to(model.device).eval()
