"""Configurations of the commands `vista store …`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types


@dataclass(kw_only=True, slots=True)
class StoreStatsConfig:
    """What a store holds, and who reads it."""

    store: str = "stores/vista"
    """Folder of the summary store."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreVerifyConfig:
    """Check a store's files and every record."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreCompactConfig:
    """Write the served generation anew, without what was removed from it."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreExportConfig:
    """The served generation as a Parquet file."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    out: str = "summaries.parquet"
    """The file; replaced if it is there."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreImportConfig:
    """A generation of a store from an exported file."""

    file: str = "summaries.parquet"
    """Of `vista store export`."""
    store: str = "stores/vista"
    """Folder of the summary store; made if it is not there."""
    authentication_key_file: str | None = None
    """Key of the exported records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    shared_with_group: bool = False
    """Let the group of the store's folder read it (folders 2750, files 0640), instead of this account alone."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreCopyConfig:
    """One generation to the store of a serving host."""

    store: str = "stores/vista"
    """Folder of the summary store that is copied from."""
    to: str = ""
    """Folder of the store that serves; made if it is not there."""
    generation: int | None = None
    """Number of the generation; null takes the one served."""
    publish: bool = True
    """Serve the copy at once; false only brings and verifies it, and the same command with true publishes it later."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    shared_with_group: bool = False
    """Let the group of the other folder read it (folders 2750, files 0640), instead of this account alone."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreRollbackConfig:
    """Serve a kept generation again."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    to: int | None = None
    """Number of the generation; null takes the newest one before the one served."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreGetConfig:
    """One user's record, readably."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    user: str | None = None
    """Id as in the log."""
    model: str | None = None
    """Folder of the exported model, to name the tail's items by their ids in the log; null prints model rows."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class StoreEraseConfig:
    """Users out of a store for good."""

    store: str = "stores/vista"
    """Folder of the summary store."""
    users: list[str] = field(default_factory=list)
    """User ids; at least one."""
    data: str | None = None
    """Folder of the EventLog to erase them from as well; null leaves it."""

    def __post_init__(self) -> None:
        check_types(self)
