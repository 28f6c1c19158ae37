"""What a deployment would need, computed from the file formats and from figures that the benchmarks measured.

Only `vista plan` uses this package.
"""
