"""All configurations of vista: plain dataclasses with defaults and units. YAML files list only what differs.

Only `vista.config.composition` uses Hydra: the command line turns its words into these objects once. Their modules
are imported one after the other until the name in use is found, so that a scorer does not import those of commands.
"""

# ruff: noqa: F403, F405
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vista.config.log_config import *
    from vista.config.model_config import *
    from vista.config.serve_config import *
    from vista.config.store_config import *
    from vista.config.train_config import *

__all__ = [
    "AdaptConfig",
    "CompareConfig",
    "CompletionConfig",
    "DataConfig",
    "DinConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "EventFilterConfig",
    "ExploreConfig",
    "ExportConfig",
    "FeatureTableConfig",
    "FromEventsConfig",
    "FuxiLinearConfig",
    "HstuConfig",
    "ImpressionsConfig",
    "IndexConfig",
    "ItemTableConfig",
    "ItemsAddConfig",
    "ItemsEmbedConfig",
    "ItemsTokenizeConfig",
    "LogCompactConfig",
    "LogEraseConfig",
    "LogForgetConfig",
    "LogStatsConfig",
    "LogVerifyConfig",
    "ModelConfig",
    "ModelListConfig",
    "ModelPromoteConfig",
    "ModelRollbackConfig",
    "MonitorConfig",
    "OptimConfig",
    "PlanConfig",
    "PrepareConfig",
    "RayConfig",
    "RefreshConfig",
    "RefreshOptions",
    "ReportConfig",
    "RunsCompareConfig",
    "RunsConfig",
    "SasrecConfig",
    "ScoreConfig",
    "ServeConfig",
    "SimConfig",
    "SimulateConfig",
    "SimulateOnlineConfig",
    "SourceColumns",
    "SourceConfig",
    "StoreCompactConfig",
    "StoreCopyConfig",
    "StoreEraseConfig",
    "StoreExportConfig",
    "StoreGetConfig",
    "StoreImportConfig",
    "StoreMergeConfig",
    "StoreRollbackConfig",
    "StoreStatsConfig",
    "StoreVerifyConfig",
    "StreamConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "TwinConfig",
    "UserTableConfig",
    "WatchConfig",
]


def __getattr__(name: str) -> Any:
    """Import a configuration on first use (PEP 562)."""
    if name in __all__:
        for module in ("model_config", "train_config", "log_config", "store_config", "serve_config"):
            if (found := vars(import_module(f"vista.config.{module}")).get(name)) is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module 'vista.config' has no attribute {name!r}")
