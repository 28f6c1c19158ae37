"""Configuration of a table of user features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vista.config.feature_table_config import FeatureTableConfig


@dataclass(kw_only=True, slots=True)
class UserTableConfig(FeatureTableConfig):
    """Files of a table with one row per user, and which of its columns are features."""

    table: ClassVar[str] = "users"

    user: str = "user"
    """Column of user ids. Users that the log does not contain are left out."""

    @property
    def id_column(self) -> str:
        return self.user
