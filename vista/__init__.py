"""vista: sequential recommendation from long user histories, with one small cached summary per user.

Public names are imported on first use, so that `import vista` and `import vista.scorer` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vista.installation import __version__ as __version__
from vista.threads import prepare_openmp

prepare_openmp()

if TYPE_CHECKING:
    from vista.config import TrainConfig
    from vista.log.event_log import EventLog
    from vista.model.vista_model import VistaModel
    from vista.scorer import Scorer
    from vista.store.reader import StoreReader
    from vista.training.trainer import train

__all__ = ["EventLog", "Scorer", "StoreReader", "TrainConfig", "VistaModel", "train"]

_MODULE_OF_NAME = {
    "EventLog": "vista.log.event_log",
    "VistaModel": "vista.model.vista_model",
    "Scorer": "vista.scorer",
    "StoreReader": "vista.store.reader",
    "TrainConfig": "vista.config.train_config",
    "train": "vista.training.trainer",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'vista' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_MODULE_OF_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
