"""The scorer: what ranking code calls (`vista.scorer.scorer`)."""

from vista.model.serving_model import NEXT_TASK
from vista.scorer.explanation import Explanation, Reason
from vista.scorer.ranking import Ranking
from vista.scorer.scorer import AnswerSource, Scorer, ScorerStats
from vista.scorer.serving_snapshot import CandidateSet
from vista.store.record import Tail

__all__ = [
    "NEXT_TASK",
    "AnswerSource",
    "CandidateSet",
    "Explanation",
    "Ranking",
    "Reason",
    "Scorer",
    "ScorerStats",
    "Tail",
]
