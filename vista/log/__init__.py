"""The EventLog on disk: memory-mapped segments, append-only vocabularies, deletions, and splits."""
