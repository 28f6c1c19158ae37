"""The bytes of a store: records, states, codecs, digests, authentication codes, keys."""
