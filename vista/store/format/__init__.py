"""Bytes of the store: records, states, codecs, digests, authentication codes, keys."""
