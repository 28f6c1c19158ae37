"""The only module that imports TorchRec and FBGEMM."""

from __future__ import annotations

import logging

from vista.errors import MissingDependencyError
from vista.installation import install_command

_before = logging.root.manager.disable
logging.disable(max(_before, logging.INFO))  # FBGEMM logs each of its libraries
try:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from torchrec.distributed.comm_ops import set_gradient_division
    from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv
    from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
    from torchrec.modules.embedding_modules import EmbeddingCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
except (ImportError, OSError) as error:  # OSError: a library of another version or for GPUs
    raise MissingDependencyError(
        f"model.table=torchrec needs TorchRec 1.8 and FBGEMM 1.8, which fit torch 2.13 ({error}); install them in a "
        f"virtual environment of their own with: {install_command('torchrec')}"
    ) from error
finally:
    logging.disable(_before)

# It warns of a function that TorchRec calls.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

__all__ = [
    "DataType",
    "EmbOptimType",
    "EmbeddingCollection",
    "EmbeddingCollectionSharder",
    "EmbeddingConfig",
    "KeyedJaggedTensor",
    "ShardedEmbeddingCollection",
    "ShardingEnv",
    "SparseType",
    "construct_module_sharding_plan",
    "row_wise",
    "set_gradient_division",
]
