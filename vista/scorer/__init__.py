"""The scorer: what ranking code calls (`vista.scorer.scorer`)."""

from vista.model.ranking_model import NEXT_TASK
from vista.scorer.answers import CandidateSet, Explanation, Ranking
from vista.scorer.scorer import Scorer
from vista.scorer.scorer_stats import ScorerStats
from vista.store.stored_batch import Tail

__all__ = ["NEXT_TASK", "CandidateSet", "Explanation", "Ranking", "Scorer", "ScorerStats", "Tail"]
