"""Baselines, one file each, trained and measured by the same harness as VISTA (docs/design/models.md)."""
