"""The models that a worker serves, opened at their first use."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

from vista.config import ServeConfig
from vista.config.serve_config import ModelsFile
from vista.errors import (
    ConfigError,
    ItemIndexMismatchError,
    ModelUnavailableError,
    RecordContentsError,
    RecordError,
    SummarizerMismatchError,
    UnknownModelError,
    UnknownUserError,
    VistaError,
    shown,
)
from vista.scorer import Scorer
from vista.serve.scoring_service import ScoringService
from vista.serve.service_metrics import ServiceMetrics
from vista.store.record_encoding import read_key

logger = logging.getLogger(__name__)
MOST_USERS = 3
"""Users to try before the first request, because their records may be damaged or too old."""
ONE_MODEL = "default"
"""Name of the model of a service without a file of models."""
WAITS_FOR: dict[type[Exception], str] = {
    SummarizerMismatchError: "the store has no summaries of this model yet",
    RecordContentsError: "the records of the store lack what this model reads",
    ItemIndexMismatchError: "the index is not of this model yet",
}
"""Why a model waits, by the error: it was replaced, but the rest of the upgrade has not been published yet."""
_DIGITS = 13
"""Hexadecimal digits of a hash that are used: 52 bits, which any language can hold exactly in a double."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a model could not be opened."""

    at: float
    """Time of the monotonic clock, in s."""
    text: str
    """For the log."""
    problem: str
    """For clients."""


class ServedModels:
    """Opens the models of a worker, and keeps them open. Thread-safe.

    Args:
        configs: of each model, by name; the first one answers requests that name none, unless there is a split.
        split: which model answers a user; None without a split.
        metrics: count what the models do.
    """

    def __init__(self, configs: Mapping[str, ServeConfig], split: UserSplit | None, metrics: ServiceMetrics) -> None:
        self.configs = dict(configs)
        self.split = split
        self._metrics = metrics
        self._open: dict[str, ScoringService] = {}
        """By name."""
        self._failures: dict[str, _Failure] = {}
        """By name of a model that could not be opened: the latest attempt."""
        self.waiting: list[str] = []
        """Names of models that `open_first` could not open, because the rest of an upgrade is not published yet."""
        self._has_started = False
        """Whether `open_first` has ended without an error."""
        self._opening = threading.Lock()
        """Held while a model is opened, which takes long."""

    @classmethod
    def of(cls, config: ServeConfig, file: ModelsFile | None, metrics: ServiceMetrics) -> ServedModels:
        """The models of a configuration and of its file of models."""
        if file is None:
            return cls({ONE_MODEL: config}, None, metrics)
        configs = {
            name: replace(
                config,
                models=None,
                model=one.model,
                store=one.store,
                index=one.index,
                task=one.task,
                adapter=one.adapter,
                project_per_request=True,  # models whose stage 2 differs cannot share the exported projections
            )
            for name, one in file.models.items()
        }
        split = UserSplit(file.split, file.experiment) if file.split else None
        return cls(configs, split, metrics)

    @property
    def are_several(self) -> bool:
        """Whether answers name the model that gave them."""
        return len(self.configs) > 1

    @property
    def first(self) -> str:
        """Name of the first model."""
        return next(iter(self.configs))

    def chosen(self, name: str | None, users: list[int | str]) -> str:
        """The model that answers a request.

        Args:
            name: what the request names; None if it names none.
            users: of the request.

        Raises:
            UnknownModelError: there is no such model.
            ValueError: it names none, and has several users, who may belong to different variants.
        """
        if name is not None:
            if name not in self.configs:
                raise UnknownModelError(f"model: {shown(name)} is not one of {', '.join(self.configs)}")
            return name
        if self.split is None or not users:
            return self.first
        if len(users) > 1:
            raise ValueError(
                "users: the service splits users among its models, so a request with several users must name one "
                f"(`model`: {' or '.join(self.configs)}); or send a request per user"
            )
        return self.split.variant(users[0])

    @property
    def all_wait(self) -> bool:
        """Whether none of the models for requests that do not name one can be opened yet."""
        return len(self.waiting) == len(self._firsts())

    def _firsts(self) -> list[str]:
        """Models for requests that do not name one, the one with the largest share last."""
        shares = {self.first: 1.0} if self.split is None else self.split.shares
        return sorted((name for name, share in shares.items() if share), key=shares.__getitem__)

    def open_first(self) -> None:
        """Open the models for requests that do not name one.

        `open_waiting` opens those that wait for the rest of an upgrade (`WAITS_FOR`).

        Raises:
            Exception: from `open_warm_scorer`, if one cannot be opened for another reason.
        """
        for name in self._firsts():
            try:
                self.open(name)
            except ModelUnavailableError as error:
                cause = error.__cause__
                assert cause is not None
                if type(cause) not in WAITS_FOR:
                    raise cause from None
                self.waiting.append(name)
        self._has_started = True

    def open_waiting(self) -> None:
        """Try again to open the models in `waiting`. Those that still cannot be opened stay there; the log says why."""
        for name in self.waiting.copy():
            try:
                self.open(name)
            except ModelUnavailableError:
                continue
            self.waiting.remove(name)

    def is_open(self, name: str) -> bool:
        """Whether a model can be used without waiting."""
        return name in self._open

    def opened(self, name: str) -> ScoringService | None:
        """A model; None if it is not open."""
        return self._open.get(name)

    def open(self, name: str) -> ScoringService:
        """A model, which is opened first if it is not open.

        Raises:
            ModelUnavailableError: it cannot be opened; the log has the cause. A call after `reload_s` tries again.
        """
        with self._opening:
            return self._open.get(name) or self._opened(name)

    def open_services(self) -> dict[str, ScoringService]:
        """All open models by name."""
        return {name: self._open[name] for name in self.configs if name in self._open}

    def overview(self) -> dict[str, Any]:
        """Fields about all models, for an answer about one model; empty if there is only one."""
        if not self.are_several:
            return {}
        shares = {} if self.split is None else self.split.shares
        return {"models": {name: {"share": shares.get(name, 0.0), "open": self.is_open(name)} for name in self.configs}}

    def update_metrics(self, depth: int) -> None:
        """Let the metrics take over what the open models have counted. `depth`: requests that wait or are computed."""
        self._metrics.update({name: service.scorer for name, service in self.open_services().items()}, depth)

    def problem(self, name: str) -> str | None:
        """Why a model could not be opened when it was needed last, without paths; None if it could."""
        failure = self._failures.get(name)
        return None if failure is None else failure.problem

    def close(self) -> None:
        """Close all models, of which no call is running."""
        while self._open:
            self._open.popitem()[1].scorer.close()

    def _opened(self, name: str) -> ScoringService:
        """Open a model."""
        config, began = self.configs[name], time.monotonic()
        last = self._failures.get(name)
        if last is not None and began - last.at < config.reload_s:
            # Each attempt reads files, so frequent attempts would keep a core busy.
            raise _unavailable(name, last.problem, last.at + config.reload_s - began)
        try:
            scorer = open_warm_scorer(config)
        except Exception as error:
            self._metrics.failed(name)
            text, reason = f"{type(error).__name__}: {error}", WAITS_FOR.get(type(error))
            problem = "the model cannot be opened (see the log)"
            if reason is not None:
                problem = f"{reason}; the model waits for the rest of its upgrade (see the log)"
            self._failures[name] = _Failure(time.monotonic(), text, problem)
            if last is None or last.text != text:
                if reason is not None:
                    logger.warning(
                        "model %s waits, and is tried again every %g s, because %s: %s",
                        *(name, config.reload_s, reason, text),
                    )
                elif self._has_started:  # Otherwise, `open_first` raises it.
                    logger.error("model %s cannot be opened: %s", name, text)
            raise _unavailable(name, problem, config.reload_s) from error
        self._failures.pop(name, None)
        self._metrics.opened(name, scorer)
        tables = scorer.served.tables
        shared = tables.bytes_of_others([one.scorer.served.tables for one in self.open_services().values()])
        self._open[name] = opened = ScoringService(scorer, config, name if self.are_several else None)
        if self.are_several or last is not None:
            logger.info(
                "opened model %s in %.0f ms: %.1f MB of arrays, of which other models share %.1f MB",
                name,
                1e3 * (time.monotonic() - began),
                tables.num_bytes / 1e6,
                shared / 1e6,
            )
        return opened


def _unavailable(name: str, problem: str, retry_after_s: float) -> ModelUnavailableError:
    return ModelUnavailableError(f"model {name} is not available: {problem}", retry_after_s)


class UserSplit:
    """Assigns users to variants by a hash of the experiment and the user's id.

    Saved analyses rely on which user gets which variant, so the hash function never changes: the first 13 hexadecimal
    digits of the SHA-256 of "EXPERIMENT:USER", divided by 16^13, give a number in [0, 1). The variants divide this
    interval in their order. If a bound between two variants moves, users move between these two only.

    Args:
        shares: by variant; they sum to 1.
        experiment: salt; different experiments assign users independently.
    """

    def __init__(self, shares: Mapping[str, float], experiment: str) -> None:
        self.shares = dict(shares)
        bounds = accumulate(shares.values())
        self._bounds = [
            (variant, bound) for (variant, share), bound in zip(shares.items(), bounds, strict=True) if share
        ]
        self._prefix = f"{experiment}:"

    def variant(self, user: int | str) -> str:
        """The variant of a user. An integer and its text are the same user."""
        digest = hashlib.sha256(f"{self._prefix}{user}".encode("utf-8", "surrogatepass")).hexdigest()
        point = int(digest[:_DIGITS], 16) / 16**_DIGITS
        return next((variant for variant, bound in self._bounds if point < bound), self._bounds[-1][0])


def open_warm_scorer(config: ServeConfig) -> Scorer:
    """A scorer of a configuration, which follows its store and has answered once. Raises VistaError if the model or the
    store cannot be used."""
    try:
        scorer = Scorer.open(
            config.model,
            config.store,
            on_missing=config.on_missing,
            task=config.task,
            device=config.device,
            key=read_key(config.authentication_key_file),
            max_age_s=config.max_age_s,
            precision=config.precision,
            index=config.index,
            project_per_request=config.project_per_request,
            adapter=config.adapter,
        )
    except ValueError as error:
        if isinstance(error, VistaError):
            raise
        raise ConfigError(str(error)) from error  # The message names the argument, which has the name of the key.
    try:
        _warm_up(scorer, retrieves=config.index is not None)
        scorer.follow(config.reload_s)
    except BaseException:
        scorer.close()
        raise
    return scorer


def _warm_up(scorer: Scorer, *, retrieves: bool) -> None:
    """Pay for page faults and for torch's initialization before the first request: rank all items for any user. A user
    whose record cannot be used fails requests for this user, but must not keep the service from starting."""
    try:
        users = list(islice(scorer.store.keys(), MOST_USERS))
    except RecordError as error:  # of one of the first users, whose key does not belong to the record
        logger.error("the first request was not tried, because %s", error)
        return
    for user in users:
        try:
            scorer.rank(user, top_k=1)
            if retrieves:
                scorer.retrieve([user], top_k=1)
            return
        except (RecordError, UnknownUserError) as error:
            logger.error("the first request was tried with another user, because %s", error)
