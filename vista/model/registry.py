"""All architectures, and a loader for saved models of any of them."""

from __future__ import annotations

from pathlib import Path

import torch

from vista.config.choices import Architecture
from vista.model.baselines.din import DIN
from vista.model.baselines.fuxi_linear import FuXiLinear
from vista.model.baselines.hstu import HSTU
from vista.model.baselines.sasrec import SASRec
from vista.model.baselines.sim import SIM
from vista.model.baselines.twin import TWIN
from vista.model.model_description import ModelDescription
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel

ARCHITECTURES: dict[Architecture, type[RankingModel]] = {
    model.architecture: model for model in (VistaModel, SASRec, HSTU, FuXiLinear, DIN, SIM, TWIN)
}


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> RankingModel:
    """Read a model of any architecture from a folder of `save_pretrained`, in eval mode.

    Raises:
        CheckpointError: if the folder is missing, truncated or of another format.
    """
    architecture = ModelDescription.read(Path(folder)).config.architecture
    return ARCHITECTURES[architecture].from_pretrained(folder, device)
