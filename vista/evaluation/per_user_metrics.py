"""Metrics of every user, and the file that keeps them for a paired comparison."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats
from vista.errors import ConfigError
from vista.files import read_limited, replace_file
from vista.log.ingest.source_parser import npz_limit
from vista.text_table import fitted_table

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PerUserMetrics:
    """Metrics of N users, all of one question."""

    users: NDArray[Any]
    """[N] ids as in the log."""
    values: dict[str, Floats]
    """{metric: float64 [N]}; NaN where a user has no label that the metric needs."""
    question: dict[str, Any]
    """What was asked, as JSON values. Two evaluations can be compared if all of it is equal."""

    def means(self) -> dict[str, float]:
        """{metric: mean over the users that have a value}."""
        return {name: mean_and_error(values)[0] for name, values in self.values.items()}

    def standard_errors(self) -> dict[str, float]:
        """{metric: standard error of its mean over users}."""
        return {name: mean_and_error(values)[1] for name, values in self.values.items()}

    def save(self, path: Path) -> None:
        """Write them as an .npz file of four arrays: users, names, values [metrics, N], and the question as JSON."""
        out = io.BytesIO()
        np.savez(
            out,
            users=np.array(self.users.tolist()),
            names=np.array(list(self.values)),
            values=np.stack(list(self.values.values())),
            question=np.array(json.dumps(self.question)),
        )
        replace_file(path, out.getvalue())

    @classmethod
    def load(cls, path: Path) -> PerUserMetrics:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is missing, damaged, or of another kind, or its arrays would take too much memory.
        """
        try:
            content = read_limited(path, MAX_FILE_BYTES)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); run `vista evaluate` with `out`") from None
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                size, limit = sum(member.file_size for member in archive.infolist()), npz_limit(len(content))
            if size > limit:  # checked before anything is decompressed
                raise ValueError(f"its arrays hold {size:,} bytes, but at most {limit:,} are read from such a file")
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                if (damaged := file.zip.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} does not match")
                arrays = [file[name] for name in ("users", "names", "values", "question")]
            if not all(isinstance(array, np.ndarray) for array in arrays):  # np.load returns the bytes of other files
                raise ValueError("a member is not an array")
            users, names, values, question = *arrays[:3], json.loads(str(arrays[3]))
            if values.shape != (len(names), len(users)) or values.dtype != np.float64 or not isinstance(question, dict):
                raise ValueError(f"values of shape {values.shape} for {len(names)} metrics of {len(users)} users")
            if users.ndim != 1 or names.ndim != 1 or names.dtype.kind != "U":
                raise ValueError("users or names of another type")
        # zipfile, its decompressors and NumPy have no common list of errors for damaged bytes: zlib.error is one.
        except Exception as error:
            raise ConfigError(
                f"{path}: does not hold metrics per user ({error}); run `vista evaluate` again"
            ) from error
        return cls(users, dict(zip(names.tolist(), values, strict=True)), question)


def mean_cell(values: Floats) -> str:
    """Mean and standard error over users as a cell of a table."""
    return "{:.4f} ± {:.4f}".format(*mean_and_error(values))


def table_of_means(header: Sequence[str], rows: Sequence[Sequence[str]], first: int) -> str:
    """A table that fits the terminal: a first column of `first` characters, and cells of `mean_cell`.

    Args:
        header: its title, then the names of its columns.
        rows: its cells, the first of which name the rows.
    """
    lines = [f"{header[0]:<{first}}" + "".join(f"{name:>18}" for name in header[1:]).rstrip()]
    lines += [f"  {row[0]:<{first - 2}}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in rows]
    return fitted_table(lines, header, rows)


def per_user_path(out: str | Path) -> Path:
    """The file of the metrics per user of an evaluation whose `out` is given."""
    return Path(f"{out}.npz")


def mean_and_error(values: Floats) -> tuple[float, float]:
    """Mean over the users that have a value, and its standard error; NaN without enough users."""
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else float("nan")
    return mean, float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
