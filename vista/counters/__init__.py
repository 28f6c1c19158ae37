"""Counters: how often and how recently each user had each item, exact in refresh and quantized in the store."""
