"""Files of a store: generations, each a complete set of records, and CURRENT, which names the served one.

store/CURRENT            "gen-7": the generation that readers open
store/LAST               "gen-8": no number up to this one is used again, though its folder may be gone
store/writer.lock        flock of the one writer; holds its pid
store/tombstones         digests of erased users
store/gen-7/summary/     LMDB environment: data.mdb, lock.mdb
store/gen-7/state/       another, which only refreshes open: the states, where they are kept
store/gen-8/summary/     an unfinished run: no `!complete`; `!cursor` says where it goes on
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from vista.config.choices import Codec, StateDtype
from vista.errors import StoreError
from vista.files import sync
from vista.store.format.authentication import key_id
from vista.store.format.keys import common_kind, kinds_of
from vista.store.format.record import FORMAT_VERSION, RecordSpec, sum_of_checksums
from vista.store.format.state_record import StateSpec
from vista.store.lmdb.data_file import REMEDY
from vista.store.lmdb.permissions import PRIVATE, Modes, is_owner, make_folder, modes_of, set_mode, set_tree_modes

CURRENT = "CURRENT"
LAST = "LAST"
WRITER_LOCK = "writer.lock"
TOMBSTONES = "tombstones"

REMOVED_PREFIX = ".removed-"
PARTIAL_PREFIX = ".partial-"
"""Of a generation that is made of existing records, until it is whole and verified."""

_PREFIX = "gen-"


CHANGING = (
    *("generation", "created_at", "refreshed_at", "log_digest", "going_to", "going_to_digest"),
    *("count", "user_kind", "records_digest"),
)
"""Fields of a manifest that are no part of a run's identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a generation is (`!manifest`)."""

    generation: int
    created_at: int
    """Start of the run, ms."""
    summarizer_id: str
    """SHA-256 in hex."""
    num_tokens: int
    dim: int
    codec: str
    tail_len: int
    until: str | int | None
    """Which events the summaries may have seen, as given to the refresh."""
    applied_segment: int
    """Newest segment of the log that is in all records; an incremental refresh that is under way has gone further."""
    total_users: int
    """Users of the run, in its fixed order; `!cursor` counts them."""
    run_digest: str
    """Digest of the log's content and of the user order."""
    key_id: str | None = None
    """Of the key that the records' codes were made with (`vista.store.format.authentication`); None: they have none."""
    format_version: int = FORMAT_VERSION
    state_dtype: str = StateDtype.none.value
    state_shape: tuple[int, int, int] = (0, 0, 0)
    """Layers, heads and head dim of a state."""
    log_digest: str = ""
    """Of the log's sources up to `applied_segment` (`EventLog.sources_digest`): another log is refused."""
    going_to: int = 0
    """Segment that an incremental refresh which has not ended goes to, up to which some records have seen; 0: none."""
    going_to_digest: str = ""
    """Of the log's sources up to `going_to`."""
    refreshed_at: int = 0
    """Start of the last refresh that ended, full or incremental, ms: as of then all users are current."""
    count: int = 0
    """Records; it follows every transaction, like the two below."""
    user_kind: str | None = None
    """int, str or mixed; None without records."""
    records_digest: str = f"{0:016x}"
    """Sum mod 2^64 of all records' checksums, in hex."""

    def identity(self) -> dict[str, Any]:
        """What must be equal for an unfinished generation to be resumed."""
        fields = dataclasses.asdict(self)
        for name in CHANGING:
            del fields[name]
        return fields

    def spec(self, key: bytes | None = None) -> RecordSpec:
        """What each record of the generation must hold.

        Args:
            key: 32 bytes, where records have codes.

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
        """What each state of the generation must hold; None where none are kept."""
        dtype = StateDtype(self.state_dtype)
        if dtype is StateDtype.none:
            return None
        summarizer_id = bytes.fromhex(self.summarizer_id)
        return StateSpec(summarizer_id, self.generation, *self.state_shape, dtype, self.created_at)

    def without_states(self) -> Manifest:
        """Of the same records where nobody will go on from their states: on serving hosts, and in imports."""
        return dataclasses.replace(self, state_dtype=StateDtype.none.value, state_shape=(0, 0, 0))

    def with_records(self, old: Sequence[bytes | memoryview], keys: Sequence[bytes], new: Sequence[bytes]) -> Manifest:
        """The manifest after `old` records have given way to `new` ones under `keys`."""
        digest = int(self.records_digest, 16) + sum_of_checksums(new) - sum_of_checksums(old)
        return dataclasses.replace(
            self,
            count=self.count + len(new) - len(old),
            user_kind=common_kind([self.user_kind, *kinds_of(keys)]),
            records_digest=f"{digest % (1 << 64):016x}",
        )

    def to_bytes(self) -> bytes:
        """JSON behind its own XXH3-64 in hex, so that a flipped bit is noticed here too."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return xxhash.xxh3_64_hexdigest(text).encode() + b"\n" + text

    @staticmethod
    def from_bytes(value: bytes, path: Path) -> Manifest:
        """Parse and check.

        Raises:
            StoreError: corrupt, or of another format version.
        """
        checksum, _, text = value.partition(b"\n")
        if checksum.decode(errors="replace") != xxhash.xxh3_64_hexdigest(text):
            raise StoreError(f"{path}: the manifest is corrupt; {REMEDY}")
        return Manifest.from_dict(json.loads(text), path)

    @staticmethod
    def from_dict(fields: dict[str, Any], path: Path) -> Manifest:
        """Check the fields of a manifest that lies somewhere else than in a generation, such as in an export.

        Raises:
            StoreError: of another format version, or foreign.
        """
        if fields.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{path}: format version {fields.get('format_version')}, this vista reads {FORMAT_VERSION}; "
                "use the version that wrote it, or refresh the store again"
            )
        try:
            fields["state_shape"] = tuple(fields.get("state_shape", (0, 0, 0)))
            manifest = Manifest(**fields)
            Manifest.spec(dataclasses.replace(manifest, key_id=None))
            manifest.state_spec()
        except (TypeError, ValueError) as error:
            raise StoreError(f"{path}: the manifest is of another vista or foreign ({error}); {REMEDY}") from error
        return manifest


def generation_path(root: Path, generation: int) -> Path:
    """Folder of one generation."""
    return root / f"{_PREFIX}{generation}"


def environment_path(root: Path, generation: int) -> Path:
    """Folder of its summaries' LMDB environment."""
    return generation_path(root, generation) / "summary"


def state_path(root: Path, generation: int) -> Path:
    """Folder of its states' LMDB environment."""
    return generation_path(root, generation) / "state"


def environments_of(root: Path, generation: int) -> list[Path]:
    """Folders of all LMDB environments that a generation has."""
    paths = (environment_path(root, generation), state_path(root, generation))
    return [path for path in paths if path.is_dir()]


def list_generations(root: Path) -> list[int]:
    """Numbers of all generation folders, finished or not, ascending."""
    names = [entry.name.removeprefix(_PREFIX) for entry in root.iterdir() if entry.name.startswith(_PREFIX)]
    return sorted(int(name) for name in names if name.isdecimal())


def read_current(root: Path) -> int:
    """Number of the published generation.

    Raises:
        StoreError: nothing is published there, or CURRENT is damaged.
    """
    try:
        text = (root / CURRENT).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError as error:
        raise StoreError(f"{root} {_what_it_is(root)}") from error
    except OSError as error:
        raise StoreError(f"{root / CURRENT}: {error.strerror}; check the path and its permissions") from error
    number = text.removeprefix(_PREFIX)
    if not text.startswith(_PREFIX) or not number.isdecimal():
        raise StoreError(f"{root / CURRENT} holds {text[:40]!r} instead of a generation's name; {_kept(root)}")
    return int(number)


def served_or_none(root: Path) -> int | None:
    """As `read_current`; None where nothing is published, or CURRENT is damaged."""
    try:
        return read_current(root)
    except StoreError:
        return None


def kept_beside_a_new_one(root: Path) -> list[int]:
    """What stays when a new generation is published: the served one; where CURRENT does not say which, all."""
    served = served_or_none(root)
    return list_generations(root) if served is None else [served]


def missing_generation(root: Path, generation: int) -> StoreError:
    """Error for a CURRENT that names nothing."""
    return StoreError(f"{root / CURRENT} names {_PREFIX}{generation}, which is not there; {_kept(root)}")


def write_current(root: Path, generation: int) -> None:
    """Flip: readers that open or reload from now on get this generation (tmp, fsync, replace, directory fsync)."""
    note_complete(root, generation)
    _write_name(root, CURRENT, generation)


def last_complete(root: Path) -> int:
    """The highest number that was ever complete; 0 for none."""
    try:
        number = (root / LAST).read_text(encoding="ascii", errors="replace").strip().removeprefix(_PREFIX)
    except OSError:
        return 0
    return int(number) if number.isdecimal() else 0


def note_complete(root: Path, generation: int) -> None:
    """Have `last_complete` count this generation, durably: before it is published, or removed unpublished."""
    if generation > last_complete(root):
        _write_name(root, LAST, generation)


def remove_leftovers(root: Path, but: str = "") -> None:
    """Remove what killed processes left of generations that were being removed or copied; only under the lock.

    Args:
        but: a name to leave.
    """
    for prefix in (REMOVED_PREFIX, PARTIAL_PREFIX):
        for entry in root.glob(f"{prefix}*"):
            if entry.name != but:
                shutil.rmtree(entry, ignore_errors=True)


def _write_name(root: Path, name: str, generation: int) -> None:
    temporary = root / f"{name}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE.file)
    try:
        os.fchmod(descriptor, modes_of(generation_path(root, generation)).file)
        os.write(descriptor, f"{_PREFIX}{generation}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, root / name)
    sync(root)


def _what_it_is(root: Path) -> str:
    """What a folder is that has no CURRENT, and what to do about it."""
    if is_part_of_a_store(root):
        return f"is a part of the store {root.parent}; name that folder"
    if holds_something_else(root):
        return "is no store, but a log, a model or a run; name the store's folder"
    return f"holds no published generation; run `vista refresh store={root}` first"


def is_part_of_a_store(root: Path) -> bool:
    """Whether this is a generation's folder."""
    return root.name.startswith(_PREFIX) and (root.parent / WRITER_LOCK).exists()


def holds_something_else(root: Path) -> bool:
    """Whether this is the folder of an event log, a model or a run, and no store's."""
    if (root / WRITER_LOCK).exists() or not root.is_dir():
        return False
    return any((root / name).exists() for name in ("config.json", "config.yaml")) or any(root.glob("segment-*"))


def prepare_root(root: Path, modes: Modes) -> None:
    """Make the store's folder if it is not there. One that holds something else and no store keeps its own mode.

    Raises:
        StoreError: it is a generation of another store, or the folder of a log, a model or a run.
        OSError: it cannot be made, or belongs to another account.
    """
    if is_part_of_a_store(root) or holds_something_else(root):
        raise StoreError(f"{root} {_what_it_is(root)}")
    root.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # It was there, or another writer starts at this moment.
        make_folder(root, modes)
    if is_owner(root) and ((root / WRITER_LOCK).exists() or not any(root.iterdir())):
        set_mode(root, modes.folder)


def set_store_modes(root: Path, modes: Modes) -> None:
    """Give what lies in a store its modes; only under the lock.

    Raises:
        OSError: it belongs to another account.
    """
    for name in (CURRENT, LAST):
        if (root / name).exists():
            set_mode(root / name, modes.file)
    for generation in list_generations(root):
        set_tree_modes(generation_path(root, generation), modes)


def remove_generation(root: Path, generation: int) -> None:
    """Remove a generation's folder; a kill on the way leaves a name that nobody takes for a generation.

    Readers that hold it open keep their files until they let go.
    """
    removed = root / f"{REMOVED_PREFIX}{generation}"
    shutil.rmtree(removed, ignore_errors=True)
    os.rename(generation_path(root, generation), removed)
    shutil.rmtree(removed, ignore_errors=True)


def _key_error(generation: int, written: str | None, given: str | None) -> StoreError:
    name = f"{_PREFIX}{generation}"
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
    return StoreError(f"{need}, the one given is {given}; pass the key that wrote it, or refresh with this one")


def _kept(root: Path) -> str:
    kept = ", ".join(f"{_PREFIX}{number}" for number in list_generations(root)) or "none"
    return f"generations there: {kept}. Write the name of one into {CURRENT}, or refresh the store again"
