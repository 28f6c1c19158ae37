"""The definitions of the tables in docs/results; scripts/experiments/reproduce.py runs them."""

from scripts.experiments.tables import label_tables, movielens_tables, public_tables, simulation_tables, window_tables

TABLES = (
    movielens_tables.TABLES
    | public_tables.TABLES
    | simulation_tables.TABLES
    | window_tables.TABLES
    | label_tables.TABLES
)
"""Name -> table; results are in docs/results/<name>.jsonl and <name>.md."""
