"""The version of vista."""

__version__ = "0.1.0"
