"""The counting baselines of a log, ready to be fitted."""

from __future__ import annotations

from vista.evaluation.baselines.content_neighbors import ContentNeighbors
from vista.evaluation.baselines.counter_trees import CounterTrees
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.baselines.ease import Ease
from vista.evaluation.baselines.item_neighbors import ItemNeighbors
from vista.evaluation.baselines.new_item_trees import NewItemTrees
from vista.evaluation.baselines.own_frequency import OwnFrequency
from vista.evaluation.baselines.pooled_factors import PooledFactors
from vista.evaluation.baselines.pooled_item_vectors import PooledItemVectors
from vista.evaluation.baselines.popularity import Popularity
from vista.evaluation.baselines.tifu_knn import TifuKnn
from vista.evaluation.baselines.transitions import Transitions, TransitionsAndOwn
from vista.evaluation.baselines.tuned import Tuned

LEARNED = (Tuned, PooledFactors, CounterTrees, NewItemTrees)
"""Baselines that are fitted to the length of the windows that are asked."""
TRANSITION_WEIGHTS = (0.03, 0.3, 1.0, 3.0)
RIDGES = (1000.0, 200.0, 5000.0)
OWN_WEIGHTS = (0.3, 0.7, 0.9)
GROUP_DECAYS = (0.7, 0.9)
TEMPERATURES_AND_RATES = ((0.1, 0.001), (0.1, 0.003), (0.2, 0.003))


def counting_baselines(
    *, has_time: bool, horizon_events: int, returns: bool = True, has_features: bool = False
) -> list[CountingBaseline]:
    """Baselines that need no fit beyond counting: seconds for a million events, and at most 3 GB of memory.

    Args:
        has_time: whether the log has times.
        horizon_events: number of next events whose items are predicted; 1 for the next item.
        returns: whether items of the history are ranked. If not, those that count the user's own items are left out.
        has_features: whether the log has features of items, and their neighbors are asked for.
    """
    chosen: list[CountingBaseline] = [Popularity()]
    if returns:
        chosen += [OwnFrequency(), OwnFrequency(last=200), OwnFrequency(events=200)]
        chosen += [OwnFrequency(days=90)] if has_time else []
    chosen += [Transitions(), ItemNeighbors()]
    chosen += [ContentNeighbors()] if has_features else []
    chosen += [Tuned(TransitionsAndOwn(1.0), TRANSITION_WEIGHTS, horizon_events=horizon_events)] if returns else []
    return chosen


def trained_baselines(*, horizon_events: int, at_one_time: bool) -> list[CountingBaseline]:
    """Baselines that take a minute or more for a million events.

    Args:
        horizon_events: number of next events whose items are predicted.
        at_one_time: whether all users are asked at one time (a split by time), or each after an event.

    Raises:
        MissingDependencyError: if scikit-learn is not installed.
    """
    decays_and_weights = [(decay, own) for decay in GROUP_DECAYS for own in OWN_WEIGHTS]
    return [
        Tuned(Ease(), RIDGES, horizon_events=horizon_events),
        Tuned(TifuKnn(), decays_and_weights, horizon_events=horizon_events),
        PooledFactors(horizon_events=horizon_events),
        Tuned(PooledItemVectors(horizon_events=horizon_events), TEMPERATURES_AND_RATES, horizon_events=horizon_events),
        CounterTrees(horizon_events=horizon_events, at_one_time=at_one_time),
        NewItemTrees(horizon_events=horizon_events, at_one_time=at_one_time),
    ]
