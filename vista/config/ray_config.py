"""Configuration of Ray, for commands that run on it."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require, require_counts

MAX_ACTORS = 100_000


@dataclass(kw_only=True, slots=True)
class RayConfig:
    """Where Ray runs, and how many actors share the work."""

    num_actors: int = 0
    """Number of actors: processes that each load the model and share the work. 0 starts as many as Ray has CPUs for
    (num_threads each), or one per GPU."""
    address: str = "local"
    """local starts Ray on this machine and stops it at the end. Otherwise, the address of a cluster: host:port of
    its head node, or auto on one of its machines."""
    object_store_bytes: int = 256 << 20
    """With address=local: shared memory for results that wait for the writer, in bytes. Results that do not fit spill
    to disk."""

    def __post_init__(self) -> None:
        check_types(self, "ray.")
        is_client = self.address.startswith("ray://")
        require(
            not is_client,
            "ray.address",
            "write host:port of the head node, or auto, and run on a machine of the cluster",
        )
        require_counts(self, "ray.", ("num_actors",), least=0, most=MAX_ACTORS)
        require_counts(self, "ray.", ("object_store_bytes",), least=80_000_000)  # Ray refuses less than 75 MiB.
