"""All worlds by name."""

from __future__ import annotations

from vista.config.choices import WorldName
from vista.simulation.world import World
from vista.simulation.worlds.conjunction import ConjunctionWorld
from vista.simulation.worlds.drift import DriftWorld
from vista.simulation.worlds.returns import ReturnsWorld
from vista.simulation.worlds.seasons import SeasonsWorld
from vista.simulation.worlds.sequence import SequenceWorld
from vista.simulation.worlds.share import ShareWorld

WORLDS: dict[WorldName, World] = {
    WorldName.share: ShareWorld(),
    WorldName.returns: ReturnsWorld(),
    WorldName.sequence: SequenceWorld(),
    WorldName.conjunction: ConjunctionWorld(),
    WorldName.seasons: SeasonsWorld(),
    WorldName.drift: DriftWorld(),
}
