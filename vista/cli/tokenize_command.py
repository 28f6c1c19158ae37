"""The command `vista items tokenize`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Float32s
from vista.config import ItemsTokenizeConfig
from vista.config.checks import require
from vista.errors import ConfigError, DataError
from vista.files import checked_path, writable_file
from vista.install_command import require_module
from vista.log.ingest.item_values import check_not_a_source, read_vectors, write_values
from vista.log.ingest.source_parser import SourceParser
from vista.model.codebooks import Codebooks
from vista.model.registry import load_model
from vista.model.residual_codes import ResidualCodes

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

CODEBOOKS_SUFFIX = ".codebooks.safetensors"


@dataclass(frozen=True, slots=True)
class ItemsTokenized:
    """What `vista items tokenize` wrote."""

    out: str
    name: str
    num_codes: int
    """Codes per level that were asked for."""
    codebooks: str
    """File of the codebooks, which were learned or read."""
    num_items: int
    codes: ResidualCodes
    """Those of the items with a vector."""
    seconds: float

    def __str__(self) -> str:
        num_coded, levels = self.codes.codes.shape
        groups = self.codes.groups()
        shared = groups[groups > 1]
        lines = [
            f"{self.out}: column {self.name} with {levels} levels of {self.num_codes:,} codes for {self.num_items:,} "
            f"items, {self.num_items - num_coded:,} of them without a vector, in {self.seconds:.1f} s"
        ]
        for level, ((used, perplexity), error) in enumerate(zip(self.codes.usage(), self.codes.errors, strict=True), 1):
            lines.append(
                f"level {level}: {used:,} codes used, perplexity {perplexity:.1f}, error {error:.1%} of variance"
            )
        lines.append(
            f"{len(groups):,} distinct full codes of {self.codes.num_distinct:,} distinct vectors; {shared.sum():,} "
            f"items share theirs with others, at most {groups.max():,} have the same"
        )
        lines.append(f"codebooks: {self.codebooks}")
        return "\n".join(lines)


def run_items_tokenize(config: ItemsTokenizeConfig) -> ItemsTokenized:
    """`vista items tokenize`: write the codes of items, as prefixes in text, and null for items without a vector.

    Codebooks are learned and written too, unless the configuration names some.

    Raises:
        CheckpointError: if the model cannot be read.
        ConfigError: if not exactly one of `vectors` and `model` is set, or `out` cannot be written.
        DataError: if the file of vectors or of codebooks is invalid, or the two have vectors of different lengths.
        MissingDependencyError: if faiss is not installed.
    """
    require((config.vectors is None) != (config.model is None), "vectors", "set either vectors or model")
    out = Path(config.out)
    writable_file(out, "out")
    codebooks = None if config.codebooks is None else Codebooks.load(config.codebooks)
    if config.vectors is not None:
        check_not_a_source(out, [config.vectors])
        with SourceParser() as parser:
            ids, vectors = read_vectors(checked_path(config.vectors, DataError), config.item, config.column, parser)
    else:
        assert config.model is not None
        ids, vectors = _vectors_of_model(config.model)
    start = time.perf_counter()
    is_known = ~np.isnan(vectors[:, 0])
    known, file = vectors[is_known], config.codebooks or str(out.with_suffix(CODEBOOKS_SUFFIX))
    if codebooks is None:
        codebooks = Codebooks.learn(known, levels=config.levels, num_codes=config.codes, seed=config.seed)
    elif codebooks.dim != known.shape[1]:
        raise DataError(
            f"{file}: has codebooks for vectors of {codebooks.dim} numbers, but those of the items have "
            f"{known.shape[1]}; use the encoder that these codebooks were learned with, or omit codebooks"
        )
    codes = ResidualCodes.of(known, codebooks)
    seconds = time.perf_counter() - start
    values = _prefixes(codes.codes, is_known).alias(config.name)
    write_values(pl.DataFrame([ids.alias(config.item), values]), out)
    if config.codebooks is None:
        _write(codebooks, Path(file))
    return ItemsTokenized(str(out), config.name, codebooks.num_codes, file, len(ids), codes, seconds)


def _write(codebooks: Codebooks, file: Path) -> None:
    """Write the codebooks after their codes. If this fails, remove codebooks of earlier codes, which no longer fit."""
    try:
        codebooks.save(file)
    except OSError as error:
        if file.is_file():
            file.unlink()
        raise ConfigError(f"out: {file} cannot be written ({error}); free space, or name another file") from error


@torch.inference_mode()
def _vectors_of_model(folder: str) -> tuple[pl.Series, Float32s]:
    """The ids and the vectors [V, M] of a model's items."""
    model = load_model(folder)
    ids = model.items.ids(np.arange(len(model.items))).tolist()
    return pl.Series(ids), model.catalog_vectors().float().numpy()


def _prefixes(codes: NDArray[np.int32], is_known: NDArray[np.bool_]) -> pl.Series:
    """Lists of the prefixes of each code, such as 17, 17-203, 17-203-5; null for items without one.

    Args:
        codes: int32 [N, L] of the items with a vector; is_known: bool [V], which of all items these are.
    """
    names = [f"level {level}" for level in range(1, codes.shape[1] + 1)]
    of_all = np.zeros((len(is_known), len(names)), np.int32)
    of_all[is_known] = codes
    prefixes = [pl.concat_str(names[:length], separator="-") for length in range(1, len(names) + 1)]
    values = pl.when(pl.Series(is_known)).then(pl.concat_list(prefixes))
    return pl.DataFrame(of_all, schema=names).select(codes=values).to_series()
