"""Machines that do the same work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vista.config.store_config import MachineConfig


@dataclass(frozen=True, slots=True)
class MachineGroup:
    """How many machines of one kind a task needs, and which part of a machine decides it."""

    name: str
    machines: int
    bound_by: str
    """cores, memory, disk, or network."""

    @classmethod
    def of(
        cls,
        name: str,
        machine: MachineConfig,
        *,
        cores: float = 0.0,
        memory_bytes: float = 0.0,
        disk_bytes: float = 0.0,
        network_bytes_per_s: float = 0.0,
    ) -> MachineGroup:
        """The smallest group that has enough of everything.

        Args:
            name: what the machines do.
            machine: what each of them has.
            cores: that are needed.
            memory_bytes: that are needed.
            disk_bytes: that are needed.
            network_bytes_per_s: that are needed.
        """
        needs: Mapping[str, float] = {
            "cores": cores / machine.cores,
            "memory": memory_bytes / (machine.memory_gb * 1e9),
            "disk": disk_bytes / (machine.disk_tb * 1e12),
            "network": network_bytes_per_s / (machine.network_gbit_per_s * 1e9 / 8),
        }
        bound_by = max(needs, key=lambda part: needs[part])
        return cls(name, max(1, math.ceil(needs[bound_by])), bound_by)
