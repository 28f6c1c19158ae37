"""Baselines that count, or fit few weights to counts. They show what a model must beat."""
