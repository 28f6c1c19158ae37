"""The commands `vista refresh` and `vista watch`."""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import closing
from pathlib import Path

import torch

from vista.config import RefreshConfig, WatchConfig
from vista.config.choices import EngineName
from vista.device import announce, cpu_settings, keep_freed_memory, resolve_device
from vista.errors import ConfigError, DataError, LogBusyError, LogWriteError, StreamOffsetError, VistaError
from vista.files import replace_text, writable_file
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshReport, refresh, refresh_incremental
from vista.refresh.refresh_engine import LocalEngine, RefreshEngine
from vista.refresh.watch import Watch
from vista.refresh.watch_report import WatchReport
from vista.store.format.authentication import read_key
from vista.store.shards import Shard

logger = logging.getLogger(__name__)


def run_refresh(config: RefreshConfig) -> RefreshReport:
    """`vista refresh`; errors as of `refresh` and `refresh_incremental`."""
    keep_freed_memory()
    with cpu_settings(config.num_threads):
        device = resolve_device(config.device)
        announce(device)
        model, log = VistaModel.from_pretrained(config.model, device), EventLog.open(config.data)
        shard = None if config.shard is None else Shard.parse(config.shard)
        key = read_key(config.authentication_key_file)
        if config.incremental:
            return refresh_incremental(model, log, config.store, options=config, shard=shard, key=key)
        engine = _engine(config, device)
        return refresh(
            model, log, config.store, until=config.until, options=config, shard=shard, engine=engine, key=key
        )


def _engine(config: RefreshConfig, device: torch.device) -> RefreshEngine:
    if config.engine is EngineName.local:
        return LocalEngine()
    # Ray reads these when it is imported. Without them, it prints warnings, and messages of its services to stdout.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from vista.refresh.ray_engine import RayEngine  # needs the extra `ray`

    return RayEngine(config.model, config.ray, device=device, num_threads=config.num_threads or 1)


def run_watch(config: WatchConfig) -> WatchReport:
    """`vista watch`: check every `poll_s` seconds until interrupted, or once. While messages wait, it does not pause.

    Raises:
        ConfigError, CheckpointError: the folder or the model does not exist.
        StreamOffsetError, DataError: the topics do not fit the log, or with on_bad_rows=raise a message is invalid.
        VistaError: with `once`, a check failed. Without it, other errors are logged and the watch continues.
    """
    keep_freed_memory()
    if config.report_file is not None:
        writable_file(Path(config.report_file), "report_file")
    with cpu_settings(config.num_threads):
        announce(resolve_device(config.device))
        with closing(Watch(config)) as watching:
            while True:
                try:
                    report = watching.look()
                    if config.report_file is not None:
                        replace_text(Path(config.report_file), json.dumps(report.as_json(), indent=2) + "\n")
                    if config.once and not report.is_behind:
                        return report
                    if not report.is_empty:
                        logger.info("%s", report)
                    if report.is_behind:
                        continue
                except (VistaError, OSError) as error:
                    if config.once or (config.source is not None and _is_lasting(error)):
                        raise
                    logger.error("%s", error)
                time.sleep(config.poll_s)


def _is_lasting(error: Exception) -> bool:
    """Whether an error of topics persists until someone corrects its cause, so that retries do not help."""
    return isinstance(error, StreamOffsetError | DataError | ConfigError) and not isinstance(
        error, LogBusyError | LogWriteError
    )
