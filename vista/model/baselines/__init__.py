"""Baselines in the same harness: one file each, trained and measured as VISTA is (docs/explanation/models.md)."""
