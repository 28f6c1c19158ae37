"""The command `vista score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vista.cli.index_command import INDEX_SUFFIX
from vista.config import ScoreConfig
from vista.config.choices import OnMissing
from vista.device import cpu_settings
from vista.errors import ConfigError, RecordError
from vista.log.until import parse_time
from vista.log.vocabulary import ids_of_words
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.scorer.scorer import Scorer
from vista.store.format.authentication import read_key


def run_score(config: ScoreConfig) -> str:
    """`vista score`: a line of items and scores per user, as text.

    Raises:
        ItemIndexError: with `retrieve`, the index is missing, damaged, or of another model.
        ConfigError: no user is named, `now` is not a time in milliseconds, an id is text although the store's or the
            model's ids are integers, or the model does not read a feature of `request` as it is given.
    """
    if not config.users:
        raise ConfigError("users: name at least one user, such as users=[1,2]")
    now = None if config.now is None else parse_time(config.now)
    request = _features(config.request, len(config.candidates))
    index = config.index or f"{Path(config.model)}{INDEX_SUFFIX}" if config.retrieve else None
    with (
        cpu_settings(config.num_threads),
        Scorer.open(
            config.model,
            config.store,
            on_missing=config.on_missing,
            device=config.device,
            key=read_key(config.authentication_key_file),
            index=index,
        ) as scorer,
    ):
        users = ids_of_words(config.users, "users", scorer.store.manifest.user_kind)
        candidates = ids_of_words(config.candidates, "candidates", scorer.model.items.kind)
        lines = [f"task {scorer.task}, generation {scorer.store.generation}"]
        known = (scorer.model.item_rows(candidates) != UNKNOWN_ITEM).tolist() if candidates else []
        items = [str(item) if known[i] else f"{item} (unknown)" for i, item in enumerate(candidates)]
        for user in users:
            name = f"user {user}{_problem(scorer, user)}"
            try:
                if candidates:
                    named, scores = items, scorer.score([user], candidates, now=now, request=request)[0].tolist()
                else:
                    asked: dict[str, Any] = {"top_k": config.top_k, "now": now, "request": request}
                    retrieve = config.retrieve
                    ranking = scorer.retrieve([user], **asked)[0] if retrieve else scorer.rank(user, **asked)
                    named, scores = ranking.items.tolist(), ranking.scores.tolist()
            except ValueError as error:  # The message names the argument, which has the name of the key.
                raise ConfigError(str(error)) from error
            pairs = zip(named, scores, strict=True)
            lines += [f"{name}: " + ", ".join(f"{item} {score:.4f}" for item, score in pairs)]
        return "\n".join(lines)


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
    """What is wrong with a user's record, for the user's line."""
    try:
        return "" if scorer.store.get_many([user]).found[0] else " (no record)"
    except RecordError:
        if scorer.on_missing is not OnMissing.nan:
            raise
        return " (damaged record)"
