"""Checks whether a machine has what vista needs, and what will be slow, with a fix for each problem.

Only `vista doctor` uses this package. Each module checks one subject with functions that yield findings.
"""
