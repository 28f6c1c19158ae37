"""Quality: the protocol, its metrics, evaluation through store and scorer, and counting baselines."""
