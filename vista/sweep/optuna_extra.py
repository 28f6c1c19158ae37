"""The only module that imports Optuna."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
except ImportError as error:
    raise MissingDependencyError(
        f"sampler=tpe needs Optuna ({error}); install it with: {install_command('optuna')}"
    ) from error

__all__ = ["JournalFileBackend", "JournalStorage", "optuna"]
