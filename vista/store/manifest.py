"""The manifest of a generation: what its records share, and which part of the log they cover."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import xxhash

from vista.config.choices import Codec, StateDtype
from vista.errors import StoreError, UnfinishedError
from vista.store.format.authentication import key_id
from vista.store.format.keys import COMPLETE_KEY, MANIFEST_KEY, common_kind, kinds_of
from vista.store.format.record import sum_of_checksums
from vista.store.format.record_spec import FORMAT_VERSION, RecordSpec
from vista.store.format.state_record import StateSpec
from vista.store.lmdb.data_file import REMEDY

NOT_IDENTITY = (
    *("generation", "created_at", "refreshed_at", "log_digest", "going_to", "going_to_digest"),
    *("count", "user_kind", "records_digest"),
)
"""Fields of a manifest that may differ between two runs of the same refresh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a generation is, as stored under `!manifest`.

    A refresh describes what it will write with a manifest; `StoreWriter.open` then sets `generation` and `key_id`.
    """

    generation: int = 0
    """Number of the generation; 0 before a writer has assigned one."""
    created_at: int
    """Start of the run, ms."""
    summarizer_id: str
    """SHA-256 in hex."""
    num_tokens: int
    """K."""
    dim: int
    """d."""
    codec: str
    """How summary rows are stored."""
    tail_len: int
    """Most events of a stored tail."""
    until: str | int | None = None
    """Which events the summaries may cover, as given to the refresh."""
    applied_segment: int
    """Newest segment of the log that all records cover; an unfinished incremental refresh is already beyond it."""
    total_users: int
    """Users of the run, in its fixed order; `!cursor` counts them."""
    run_digest: str
    """Digest of the log's content and of the order of the users; a cursor is valid only together with it."""
    key_id: str | None = None
    """Id of the key of the records' authentication codes (`vista.store.format.authentication`); None without codes."""
    format_version: int = FORMAT_VERSION
    state_dtype: str = StateDtype.none.value
    state_shape: tuple[int, int, int] = (0, 0, 0)
    """Layers, heads and head dim of a state."""
    log_digest: str = ""
    """Digest of the log's sources up to `applied_segment` (`EventLog.sources_digest`); another log is refused."""
    going_to: int = 0
    """Segment that an unfinished incremental refresh is bringing records to; 0 if there is none."""
    going_to_digest: str = ""
    """Digest of the log's sources up to `going_to`."""
    refreshed_at: int = 0
    """Start of the last finished refresh, full or incremental, ms: all users were current at that time."""
    count: int = 0
    """Records. Every transaction updates it, like the two below."""
    user_kind: str | None = None
    """Type of the user ids: int, str or mixed; None without records."""
    records_digest: str = f"{0:016x}"
    """Sum mod 2^64 of all records' checksums, in hex."""

    def identity(self) -> dict[str, Any]:
        """The fields that must be equal for an unfinished generation to be resumed."""
        fields = dataclasses.asdict(self)
        for name in NOT_IDENTITY:
            del fields[name]
        return fields

    def spec(self, key: bytes | None = None) -> RecordSpec:
        """What each record of the generation must hold.

        Args:
            key: 32 bytes, if the records are authenticated.

        Raises:
            StoreError: the generation was written without a key or with another one, or `key` is missing.
        """
        given = None if key is None else key_id(key)
        if given != self.key_id:
            raise _key_error(self.generation, self.key_id, given)
        return RecordSpec(
            summarizer_id=bytes.fromhex(self.summarizer_id),
            generation=self.generation,
            num_tokens=self.num_tokens,
            dim=self.dim,
            codec=Codec(self.codec),
            created_at=self.created_at,
            applied_segment=self.applied_segment,
            key=key,
        )

    def state_spec(self) -> StateSpec | None:
        """What each state of the generation must hold; None if it keeps no states."""
        dtype = StateDtype(self.state_dtype)
        if dtype is StateDtype.none:
            return None
        summarizer_id = bytes.fromhex(self.summarizer_id)
        return StateSpec(summarizer_id, self.generation, *self.state_shape, dtype, self.created_at)

    def without_states(self) -> Manifest:
        """Manifest of the same records without states, for copies and imports, which are never refreshed in place."""
        return dataclasses.replace(self, state_dtype=StateDtype.none.value, state_shape=(0, 0, 0))

    def with_records(self, old: Sequence[bytes | memoryview], keys: Sequence[bytes], new: Sequence[bytes]) -> Manifest:
        """The manifest after `old` records were replaced by `new` ones under `keys`."""
        digest = int(self.records_digest, 16) + sum_of_checksums(new) - sum_of_checksums(old)
        return dataclasses.replace(
            self,
            count=self.count + len(new) - len(old),
            user_kind=common_kind([self.user_kind, *kinds_of(keys)]),
            records_digest=f"{digest % (1 << 64):016x}",
        )

    def to_bytes(self) -> bytes:
        """JSON after its own XXH3-64 in hex, so that a flipped bit is detected."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return xxhash.xxh3_64_hexdigest(text).encode() + b"\n" + text

    @staticmethod
    def from_bytes(value: bytes, path: Path) -> Manifest:
        """Parse and check the bytes of `to_bytes`; `path` names the store in errors.

        Raises:
            StoreError: corrupt, or of another format version.
        """
        checksum, _, text = value.partition(b"\n")
        if checksum.decode(errors="replace") != xxhash.xxh3_64_hexdigest(text):
            raise StoreError(f"{path}: the manifest is corrupt; {REMEDY}")
        return Manifest.from_dict(json.loads(text), path)

    @staticmethod
    def from_dict(fields: dict[str, Any], path: Path) -> Manifest:
        """Check the fields of a manifest that is stored outside of a generation, such as in an export.

        Raises:
            StoreError: of another format version, or not a manifest.
        """
        if fields.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{path}: has format version {fields.get('format_version')}, but this version of vista reads "
                f"{FORMAT_VERSION}; use the version that wrote it, or refresh the store again"
            )
        try:
            fields["state_shape"] = tuple(fields["state_shape"])
            manifest = Manifest(**fields)
            Manifest.spec(dataclasses.replace(manifest, key_id=None))
            manifest.state_spec()
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path}: the manifest was written by another version of vista, or is damaged ({error}); {REMEDY}"
            ) from error
        return manifest


def read_manifest(transaction: lmdb.Transaction[memoryview], path: Path) -> Manifest:
    """Read the manifest of a complete generation; `path` names it in errors.

    Raises:
        UnfinishedError: the generation is not complete.
        StoreError: the manifest is corrupt.
    """
    value = transaction.get(MANIFEST_KEY)
    if value is None or transaction.get(COMPLETE_KEY) is None:
        raise UnfinishedError(f"{path} was never finished; {REMEDY}")
    return Manifest.from_bytes(bytes(value), path)


def _key_error(generation: int, written: str | None, given: str | None) -> StoreError:
    name = f"gen-{generation}"
    if written is None:
        return StoreError(
            f"{name} was written without an authentication key, so nothing proves where its records come from; refresh "
            "the store with this key, or open it without one (authentication_key_file=null) if you trust its folder"
        )
    need = f"{name} was written with authentication key {written}"
    if given is None:
        return StoreError(
            f"{need}; pass it: key=… (32 bytes) in Python, authentication_key_file=… or VISTA_AUTHENTICATION_KEY on "
            "the command line"
        )
    return StoreError(f"{need}, but the given key is {given}; pass the key that wrote it, or refresh with this one")
