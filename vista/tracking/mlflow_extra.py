"""The only module that imports MLflow."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import sqlalchemy
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
except ImportError as error:
    raise MissingDependencyError(
        f"tracking=mlflow needs MLflow ({error}); install it with: {install_command('mlflow')}"
    ) from error

__all__ = ["Metric", "MlflowClient", "Param", "sqlalchemy"]
