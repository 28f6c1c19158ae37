"""Counters: how often and how recently each user had each item and category, exact in states, quantized in records."""
