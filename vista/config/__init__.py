"""All configurations of vista: plain dataclasses with defaults and units. YAML files list only what differs.

Only `vista.config.composition` uses Hydra: the command line turns its words into these objects once.
"""

from vista.config.compare_config import CompareConfig
from vista.config.completion_config import CompletionConfig
from vista.config.data_config import DataConfig
from vista.config.doctor_config import DoctorConfig
from vista.config.evaluate_config import EvaluateConfig
from vista.config.event_filter_config import EventFilterConfig
from vista.config.explore_config import ExploreConfig
from vista.config.export_config import ExportConfig
from vista.config.feature_table_config import FeatureTableConfig
from vista.config.index_config import IndexConfig
from vista.config.item_table_config import ItemTableConfig
from vista.config.items_add_config import ItemsAddConfig
from vista.config.items_embed_config import ItemsEmbedConfig
from vista.config.items_tokenize_config import ItemsTokenizeConfig
from vista.config.log_configs import (
    LogCompactConfig,
    LogEraseConfig,
    LogForgetConfig,
    LogStatsConfig,
    LogVerifyConfig,
)
from vista.config.model_config import ModelConfig
from vista.config.optim_config import OptimConfig
from vista.config.plan_config import PlanConfig
from vista.config.prepare_config import PrepareConfig, SourceConfig
from vista.config.ray_config import RayConfig
from vista.config.refresh_config import RefreshConfig
from vista.config.refresh_options import RefreshOptions
from vista.config.report_config import ReportConfig
from vista.config.runs_configs import RunsCompareConfig, RunsConfig
from vista.config.score_config import ScoreConfig
from vista.config.serve_config import ServeConfig
from vista.config.simulate_config import SimulateConfig
from vista.config.source_columns import SourceColumns
from vista.config.store_configs import (
    StoreCompactConfig,
    StoreCopyConfig,
    StoreEraseConfig,
    StoreExportConfig,
    StoreGetConfig,
    StoreImportConfig,
    StoreRollbackConfig,
    StoreStatsConfig,
    StoreVerifyConfig,
)
from vista.config.stream_config import StreamConfig
from vista.config.sweep_config import SweepConfig
from vista.config.tracking_config import TrackingConfig
from vista.config.train_config import TrainConfig
from vista.config.user_table_config import UserTableConfig
from vista.config.watch_config import WatchConfig

__all__ = [
    "CompareConfig",
    "CompletionConfig",
    "DataConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "EventFilterConfig",
    "ExploreConfig",
    "ExportConfig",
    "FeatureTableConfig",
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
    "OptimConfig",
    "PlanConfig",
    "PrepareConfig",
    "RayConfig",
    "RefreshConfig",
    "RefreshOptions",
    "ReportConfig",
    "RunsCompareConfig",
    "RunsConfig",
    "ScoreConfig",
    "ServeConfig",
    "SimulateConfig",
    "SourceColumns",
    "SourceConfig",
    "StoreCompactConfig",
    "StoreCopyConfig",
    "StoreEraseConfig",
    "StoreExportConfig",
    "StoreGetConfig",
    "StoreImportConfig",
    "StoreRollbackConfig",
    "StoreStatsConfig",
    "StoreVerifyConfig",
    "StreamConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "UserTableConfig",
    "WatchConfig",
]
