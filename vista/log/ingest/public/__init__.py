"""The public data sets that `vista prepare` reads: one module per set, with the form of its files and its readers."""
