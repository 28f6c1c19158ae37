"""The commands `vista refresh` and `vista watch`."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vista.config import RefreshConfig, ScoreConfig, ServeConfig, WatchConfig
from vista.config.checks import OnMissing
from vista.errors import ConfigError, DataError, LogBusyError, LogWriteError, RecordError, StreamOffsetError, VistaError
from vista.files import replace_text, writable_file

if TYPE_CHECKING:
    import torch

    from vista.refresh import RefreshReport
    from vista.refresh.ray_engine import RayEngine
    from vista.refresh.watch import WatchReport
    from vista.scorer.scorer import Scorer


logger = logging.getLogger(__name__)


def run_refresh(config: RefreshConfig) -> RefreshReport:
    """`vista refresh`; errors as of `refresh` and `refresh_incremental`."""
    from vista.device import announce, cpu_settings, keep_freed_memory, resolve_device
    from vista.log.event_log import EventLog
    from vista.model.vista_model import VistaModel
    from vista.refresh import refresh, refresh_incremental
    from vista.store.layout import Shard
    from vista.store.record_encoding import read_key

    keep_freed_memory()
    with cpu_settings(config.num_threads) as threads:
        device = resolve_device(config.device)
        announce(device, threads)
        model, log = VistaModel.from_pretrained(config.model, device), EventLog.open(config.data)
        shard = None if config.shard is None else Shard.parse(config.shard)
        key = read_key(config.authentication_key_file)
        if config.incremental:
            return refresh_incremental(model, log, config.store, options=config, shard=shard, key=key)
        engine = _engine(config, device)
        return refresh(
            model, log, config.store, until=config.until, options=config, shard=shard, engine=engine, key=key
        )


def _engine(config: RefreshConfig, device: torch.device) -> RayEngine | None:
    """What encodes the batches; None for this process."""
    if config.ray is None:
        return None
    # Ray reads these when it is imported. Without them, it prints warnings, and messages of its services to stdout.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    from vista.refresh.ray_engine import RayEngine  # needs the extra `ray`

    return RayEngine(config.model, config.ray, device=device, num_threads=config.num_threads or 1)


def run_watch(config: WatchConfig) -> WatchReport:
    """`vista watch`: check every `poll_s` seconds until interrupted, or once; while messages wait, without pauses."""
    from vista.device import announce, cpu_settings, keep_freed_memory, resolve_device
    from vista.refresh.watch import Watch

    keep_freed_memory()
    if config.report_file is not None:
        writable_file(Path(config.report_file), "report_file")
    with cpu_settings(config.num_threads) as threads:
        announce(resolve_device(config.device), threads)
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


def run_score(config: ScoreConfig) -> str:
    """`vista score`: a line of items and scores per user, or with `explain` a line per item, as text."""
    from vista.cli.item_commands import INDEX_SUFFIX
    from vista.log.splits import parse_time
    from vista.log.vocabulary import ids_of_words
    from vista.model.serving_model import NEXT_TASK, UNKNOWN_ITEM
    from vista.scorer.request import NOW
    from vista.scorer.scorer import Scorer
    from vista.store.record_encoding import read_key
    from vista.threads import choose_threads, num_threads, set_num_threads, thread_settings

    if not config.users:
        raise ConfigError("users: name at least one user, such as users=[1,2]")
    now = NOW if config.now is None else parse_time(config.now)
    request = _features(config.request, len(config.candidates))
    index = config.index or f"{Path(config.model)}{INDEX_SUFFIX}" if config.retrieve else None
    with (
        thread_settings(config.num_threads),
        Scorer.open(
            config.model,
            config.store,
            on_missing=config.on_missing,
            device=config.device,
            key=read_key(config.authentication_key_file),
            index=index,
            adapter=config.adapter,
        ) as scorer,
    ):
        model, users = scorer.served, ids_of_words(config.users, "users", scorer.store.manifest.user_kind)
        candidates = ids_of_words(config.candidates, "candidates", model.items.kind)
        activations = (len(candidates) or len(model.items)) * model.config.dim
        set_num_threads(choose_threads(config.num_threads, num_threads(), activations).number)
        lines = [f"task {scorer.task}, generation {scorer.store.generation}"]
        if config.explain:
            what = "the score" if scorer.task == NEXT_TASK else "the log-odds"
            lines[0] += f"; what raises {what} above that of the average candidate, and by how much"
        names = _item_names(config, model.items.kind)
        known = (model.item_rows(candidates) != UNKNOWN_ITEM).tolist() if candidates else []
        items = [item if known[i] else f"{item} (unknown)" for i, item in enumerate(names(candidates))]
        for user in users:
            problem = _problem(scorer, user)
            try:
                if candidates:
                    named, scores = items, scorer.score([user], candidates, now=now, request=request)[0].tolist()
                else:
                    asked: dict[str, Any] = {"top_k": config.top_k, "now": now, "request": request}
                    retrieve = config.retrieve
                    ranking = scorer.retrieve([user], **asked)[0] if retrieve else scorer.rank(user, **asked)
                    named, scores = names(ranking.items.tolist()), ranking.scores.tolist()
                name = f"user {user}{_remarks(problem, scorer if config.now is None else None)}"
                pairs = [f"{item} {score:.4f}" for item, score in zip(named, scores, strict=True)]
                if not config.explain:
                    lines.append(f"{name}: {', '.join(pairs)}")
                    continue
                among = candidates if len(candidates) > 1 else None
                asked = {"candidates": among, "now": now, "request": request}
                told = scorer.explain(user, candidates or ranking.items, **asked)
            except ValueError as error:  # The message names the argument, which has the name of the key.
                raise ConfigError(str(error)) from error
            lines += [f"{name}:", *(f"  {pair}: {told.why(place, names)}" for place, pair in enumerate(pairs))]
        return "\n".join(lines)


def _item_names(config: ScoreConfig, kind: str) -> Callable[[Sequence[Any]], list[str]]:
    """Names of items, from the log if it was named or if items are explained, or else their ids. `kind`: of the model's
    item ids; the ids of the log must have it too."""
    from vista.log.event_log import EventLog
    from vista.log.inspection import ItemNames
    from vista.runs.run_list import log_of_run

    path = config.data
    if path is None and config.explain:
        found = log_of_run(Path(config.model).parent)
        path = None if found is None else str(found)
    if path is None:
        return lambda items: list(map(str, items))
    log = EventLog.open(path)
    if log.items.kind != kind:
        raise ConfigError(f"data={path}: item ids are of type {log.items.kind}, but those of the model {kind}")
    return ItemNames.of(log, config.item_name).of_ids


def _features(words: Sequence[str], num_candidates: int) -> dict[str, Any]:
    """Features of the request of one user by name, from words such as device:phone: one value, or one per candidate."""
    given: dict[str, list[str]] = {}
    for word in words:
        name, colon, value = word.partition(":")
        if not colon:
            raise ConfigError(f"request: {word!r} must be name:value, such as device:phone")
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) not in (1, num_candidates):
            raise ConfigError(
                f"request: {name!r} has {len(values)} values, but there are {num_candidates} candidates; give it once, "
                "or once per candidate"
            )
    return {name: values[0] if len(values) == 1 else [values] for name, values in given.items()}


def _problem(scorer: Scorer, user: Any) -> str:
    """What is wrong with a user's record, and what that means for the scores, for the user's line."""
    try:
        if scorer.store.get_many([user]).found[0]:
            return ""
        alike = ", so scored like a new user: by the items alone, such as their popularity"
        return "no record" + alike * (scorer.on_missing is OnMissing.empty)
    except RecordError:
        if scorer.on_missing is not OnMissing.nan:
            raise
        return "damaged record"


def _remarks(problem: str, scorer: Scorer | None) -> str:
    """What a user's line says in parentheses: the problem, and the time of the scorer's last request, if one is given.
    The lines say it if no time was asked for, because it differs between users (`current_times`)."""
    source = None if scorer is None else scorer.answered_from
    time_ms = None if source is None or source.now is None else int(source.now[0])
    remarks = [problem] * bool(problem) + (
        [] if time_ms is None else [f"now {datetime.fromtimestamp(time_ms // 1000, UTC):%Y-%m-%dT%H:%M}"]
    )
    return f" ({'; '.join(remarks)})" if remarks else ""


def run_serve(config: ServeConfig) -> None:
    """`vista serve`: answer requests until SIGTERM or Ctrl-C."""
    from vista.serve.worker_pool import run_server  # needs the extra `serve`

    run_server(config)
