"""Configurations of the commands `vista store …`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types


@dataclass(kw_only=True, slots=True)
class StoreStatsConfig:
    """Statistics of a store and its generations."""

    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreVerifyConfig:
    """Check a store's files and every record."""

    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreCompactConfig:
    """Rewrite the published generation without the bytes of removed records."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreExportConfig:
    """Export the published generation to a Parquet file."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    out: str = "summaries.parquet"
    """The file; replaced if it exists."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreImportConfig:
    """Publish an exported file as a new generation of a store."""

    file: str = "summaries.parquet"
    """File written by `vista store export`."""
    store: str = "stores/vista"
    """Folder of the summary store; made if it does not exist."""
    authentication_key_file: str | None = None
    """File with the key that authenticated the exported records: 32 bytes, or 64 hex digits. null uses the environment
    variable VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    shared_with_group: bool = False
    """Let the group of the store's folder read the store (folders 2750, files 0640), not only this account."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreCopyConfig:
    """Copy one generation to the store of a serving host."""

    store: str = "stores/vista"
    """Folder of the summary store to copy from, or its URL, such as redis://host:6379/mine."""
    to: str = ""
    """Folder of the summary store to copy to, made if it does not exist, or its URL, such as redis://host:6379/mine."""
    generation: int | None = None
    """Number of the generation; null copies the published one."""
    publish: bool = True
    """Publish the copy at once; false only copies and verifies it, until the same command with true publishes it."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    shared_with_group: bool = False
    """Let the group of the target folder read the copy (folders 2750, files 0640), not only this account."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreRollbackConfig:
    """Publish an earlier generation again."""

    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    to: int | None = None
    """Number of the generation; null takes the newest one before the published one."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreGetConfig:
    """Print one user's record."""

    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    user: str | None = None
    """Id as in the log."""
    model: str | None = None
    """Folder of the exported model, to print the tail's items by their ids in the log; null prints model rows."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreEraseConfig:
    """Remove users from a store for good."""

    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    users: list[str] = field(default_factory=list)
    """Ids of the users to erase, at least one."""
    data: str | None = None
    """Folder of the EventLog to erase them from too; null erases them from the store only."""

    def __post_init__(self) -> None:
        check_types(self)
