"""Simulated logs of long histories, with impressions whose label probabilities are known."""
