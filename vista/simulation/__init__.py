"""Simulated lifelong logs with impressions whose click probabilities are known."""
