"""The model card: README.md of an exported model, for whoever finds the folder.

It holds nothing of when or where a run took place, so that a resumed run exports the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from vista.config import TrainConfig
from vista.config.choices import Architecture, InitFreeze, Split, Stage
from vista.installation import __version__
from vista.log.event_log import EventLog
from vista.log.splits import parse_time
from vista.model.ranking_model import RankingModel
from vista.training.hash_collisions import HashCollisions

_TEMPLATE = """# Model card: {architecture}

Exported by `vista train`, version {version}. `config.json` holds all settings of the model and of its data split.

## Intended use

{use}

## Training data

{data}

{held_out}

## Validation

{validation}

## Model

{model}

## Limits

{limits}
"""


def model_card(
    model: RankingModel,
    config: TrainConfig,
    log: EventLog,
    validated: Mapping[str, float] | None = None,
    collisions: Sequence[HashCollisions] = (),
) -> str:
    """Describe a trained model in Markdown.

    Args:
        model: the model that is exported.
        config: configuration of its run.
        log: the event log that it was trained on.
        validated: metrics of the validation that chose the model, with its `epoch`; None if there was none.
        collisions: of its hashed features.
    """
    return _TEMPLATE.format(
        architecture=config.model.architecture.value,
        version=__version__,
        use=_use(model),
        data=_table(_data(model, config, log)),
        held_out=_held_out(config),
        validation=_validation(validated),
        model=_table([*_model(model, config), *_hashed(collisions)]),
        limits="\n".join(f"- {limit}" for limit in _limits(model, log)),
    )


def _table(rows: Iterable[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _code(values: Iterable[str]) -> str:
    """Names of the log, as code that a cell of a table can hold."""
    return ", ".join("`" + " ".join(value.split()).replace("|", "\\|") + "`" for value in values)


def _day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).date().isoformat()


def _use(model: RankingModel) -> str:
    kinds = []
    if model.schema.tasks:
        kinds.append(f"the probability of {_code(model.schema.tasks)} for a user and a candidate item")
    if model.has_retrieval:
        kinds.append("scores of the next item, which rank items and are not probabilities")
    predicts = f"The model predicts {', and '.join(kinds)}."
    if model.config.architecture is not Architecture.vista:
        return (
            f"{predicts} It is a baseline, which reads the raw history in every request: measure it with "
            "`vista evaluate`."
        )
    return (
        f"{predicts} Make a store of summaries with `vista refresh`, and score with `vista.Scorer.open(model, store)`."
    )


def _data(model: RankingModel, config: TrainConfig, log: EventLog) -> Iterable[tuple[str, object]]:
    yield "users", f"{log.num_users:,}"
    yield "items", f"{log.num_items:,}"
    if least := config.data.min_item_events:
        yield f"items known to the model (`data.min_item_events={least}`)", f"{len(model.items):,}"
    yield "events", f"{log.num_events:,}"
    times = log.time_range() if log.has_time else None
    yield "time of events", "no times" if times is None else " to ".join(map(_day, times))
    if len(log.actions) > 1:
        yield "actions", _code(log.actions)
    if log.impressions is not None:
        yield "impressions", f"{log.impressions.num_impressions:,}"


def _held_out(config: TrainConfig) -> str:
    data = config.data
    if data.split is Split.time:
        assert data.validation_from is not None and data.test_from is not None  # DataConfig has checked
        gap = f" Events of the {data.gap_minutes:g} minutes before are left out." if data.gap_minutes else ""
        if parse_time(data.validation_from) == parse_time(data.test_from):
            return (
                f"Labels from {data.test_from} on are not trained on: all are for the test, and none for "
                f"validation.{gap}"
            )
        return (
            f"Labels from {data.validation_from} on are not trained on: those before {data.test_from} are for "
            f"validation, later ones for the test.{gap}"
        )
    if data.split is Split.share:
        assert data.test_share is not None and data.validation_share is not None  # DataConfig has checked
        validation = f"the {100 * data.validation_share:g} % before them" if data.validation_share else "none"
        return (
            f"The last {100 * data.test_share:g} % of each user's events are held out for the test, and {validation} "
            "for validation."
        )
    return "The last event of each user is held out for the test, and the event before it for validation."


def _validation(validated: Mapping[str, float] | None) -> str:
    if validated is None:
        return "The model was not validated. It is the model after the last step."
    rows = [(name, f"{value:.4f}") for name, value in validated.items() if name not in ("epoch", "step")]
    return (
        f"Epoch {validated['epoch']:.0f} was the best by validation. Its summaries were float32 and came from the log. "
        f"Measure the test with `vista evaluate`, as served from a store.\n\n{_table(rows)}"
    )


def _model(model: RankingModel, config: TrainConfig) -> Iterable[tuple[str, object]]:
    own = config.model
    yield "parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    yield "width (`model.dim`)", own.dim
    if own.architecture is Architecture.vista:
        yield "summary tokens per user (`model.num_seeds`)", own.num_seeds
        yield "newest events read with the summary (`model.tail_len`)", own.tail_len
        yield "mixing (`model.mixing`)", own.mixing.value
    yield "seed", config.seed
    if config.init_from is not None:
        kept = "; stage 1 is unchanged, so stores serve both" if config.init_freeze is InitFreeze.summarizer else ""
        yield "trained", f"from an earlier model (`init_from`){kept}"
    if config.stage is Stage.downstream:
        yield "trained", "stage 2 and heads; items, events, and stage 1 are those of the base, whose stores serve both"


def _hashed(collisions: Sequence[HashCollisions]) -> Iterable[tuple[str, object]]:
    for each in collisions:
        feature, _, what = str(each).partition(": ")
        yield f"hashed {feature}", what


def _limits(model: RankingModel, log: EventLog) -> Iterable[str]:
    yield (
        "Items that the model does not know get a neutral score. `items.ids.npy` lists those that it knows; "
        f"in histories, it knows the first {model.num_trained_items:,}."
    )
    if model.schema.has_time and model.config.use_time:
        yield "The model reads times. Pass the time of the request (`now`)."
    if features := model.schema.request_features:
        yield f"Labeled tasks read features of requests: {_code(one.name for one in features)}. Pass them (`request`)."
    if (features := model.schema.tail_features) and model.config.architecture is Architecture.vista:
        names = _code(one.name for one in features)
        yield f"Stage 2 reads features of events: {names}. Pass those of fresh events (`Tail(features=…)`)."
    if features := model.schema.user_features:
        yield f"The model reads features of users, as of the last refresh: {_code(one.name for one in features)}."
    if len(log.actions) > 1 and model.config.use_action:
        yield "Retrain before refreshing if a new action type appears."
    yield "Events that are deleted from the log after training are not removed from the model's weights."
    yield "How far its rankings follow popularity, or differ between groups of users, was not measured here."
