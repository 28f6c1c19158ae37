"""The commands `vista refresh` and `vista watch`."""

from __future__ import annotations

import logging
import time

from vista.config import RefreshConfig, WatchConfig
from vista.device import announce, cpu_settings, keep_freed_memory, resolve_device
from vista.errors import VistaError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshReport, refresh, refresh_incremental
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
        return refresh(model, log, config.store, until=config.until, options=config, shard=shard, key=key)


def run_watch(config: WatchConfig) -> WatchReport:
    """`vista watch`: look every `poll_s` seconds until interrupted, or once.

    Raises:
        ConfigError, CheckpointError: the folder or the model does not exist.
        VistaError: with `once`, a look failed. Without it, the error is logged and the watch continues.
    """
    keep_freed_memory()
    with cpu_settings(config.num_threads):
        announce(resolve_device(config.device))
        watching = Watch(config)
        while True:
            try:
                report = watching.look()
                if config.once:
                    return report
                if report.files or report.refused or report.refreshes:
                    logger.info("%s", report)
            except (VistaError, OSError) as error:
                if config.once:
                    raise
                logger.error("%s", error)
            time.sleep(config.poll_s)
