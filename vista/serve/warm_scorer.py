"""Opens the scorer of a model in the service, ready for the first request."""

from __future__ import annotations

import logging
from itertools import islice

from vista.config import ServeConfig
from vista.errors import ConfigError, RecordError, UnknownUserError, VistaError
from vista.scorer import Scorer
from vista.store.format.authentication import read_key

logger = logging.getLogger(__name__)

MOST_USERS = 3
"""Users to try before the first request, because their records may be damaged or too old."""


def open_warm_scorer(config: ServeConfig) -> Scorer:
    """A scorer of a configuration, which follows its store and has answered once.

    Raises:
        VistaError: the model or the store cannot be used.
    """
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
        )
    except ValueError as error:
        if isinstance(error, VistaError):
            raise
        raise ConfigError(str(error)) from error  # The message names the argument, which has the name of the key.
    num_items = len(scorer.model.items)
    if num_items > config.max_candidates:
        logger.warning(
            "rank without candidates is refused: %s has %d items, but max_candidates is %d",
            config.model,
            num_items,
            config.max_candidates,
        )
    try:
        _warm_up(scorer, retrieves=config.index is not None)
        scorer.follow(config.reload_s)
    except BaseException:
        scorer.close()
        raise
    return scorer


def _warm_up(scorer: Scorer, *, retrieves: bool) -> None:
    """Pay for page faults and for torch's initialization before the first request: rank all items for any user.

    A user whose record cannot be used fails requests for this user, but must not keep the service from starting.
    """
    for user in islice(scorer.store.keys(), MOST_USERS):
        try:
            scorer.rank(user, top_k=1)
            if retrieves:
                scorer.retrieve([user], top_k=1)
            return
        except (RecordError, UnknownUserError) as error:
            logger.error("the first request was tried with another user, because %s", error)
