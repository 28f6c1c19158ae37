"""Typed errors. Each message says what is wrong, where, and what to do about it."""

from __future__ import annotations


class VistaError(Exception):
    """Base of every error that vista raises on purpose; the command line prints it as one line."""


class ConfigError(VistaError, ValueError):
    """A configuration is contradictory or out of range; the message names the key."""


class DataError(VistaError, ValueError):
    """Source data are bad: the message names file, row, column, value and remedy."""


class TakenError(DataError):
    """A file's content is in the EventLog already."""


class LogBusyError(DataError):
    """Another process writes the EventLog; nothing is wrong with the data, so try again."""


class LogWriteError(DataError):
    """An EventLog's files cannot be written just now; nothing is wrong with the data, so free space and try again."""


class MissingDependencyError(VistaError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class LogFormatError(VistaError):
    """An EventLog on disk is missing, truncated or of another format."""


class UnknownUserError(VistaError, KeyError):
    """A user has no record and the policy is `raise`."""

    __str__ = Exception.__str__


class UnknownItemError(VistaError, KeyError):
    """An item is not in the model's vocabulary and the policy is `raise`."""

    __str__ = Exception.__str__


class CheckpointError(VistaError):
    """A checkpoint or an exported model is missing, truncated or does not fit the configuration."""


class NonFiniteLossError(VistaError):
    """Training met a NaN or infinite loss; the batch was saved and the message names its users."""


class StoreError(VistaError):
    """A summary store is missing, foreign or unreadable."""


class UnfinishedError(StoreError):
    """A generation of a store was never finished: no reader opens it, and the next refresh goes on with it."""


class StoreWriteError(StoreError):
    """A store's files cannot be written or read just now; what it holds is as it was."""


class StoreBusyError(StoreError):
    """A store was written while it was read as a whole; nothing is wrong with it, so try again."""


class RecordError(StoreError):
    """One stored record is truncated, corrupt or of another format; the message names its key."""


class UserKeyError(StoreError, ValueError):
    """A user id cannot be a key: it is too long, beyond int64, or neither an integer nor a string."""


class StoreLockedError(StoreError):
    """Another writer holds the store."""


class SummarizerMismatchError(StoreError):
    """A store was written by another summarizer; the message holds both identities."""


class LeakageError(VistaError):
    """A record has already seen the event that it is asked to predict."""
