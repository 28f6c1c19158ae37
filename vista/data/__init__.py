"""Event logs: vocabularies, segments on disk, ingest, simulation, splits. Reading needs NumPy alone."""
