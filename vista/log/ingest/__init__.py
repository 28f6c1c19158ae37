"""Ingest: source tables (Parquet, CSV, public data sets) become segments of an EventLog."""
