"""Damage to files, at random."""

import random


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content with one damage: flipped bits, other bytes or lengths, a cut, a doubled or a moved piece."""
    damaged = bytearray(content)
    # Footers and headers describe the rest, so half of the damage is near an end.
    near_end = len(damaged) - 1 - min(int(chance.expovariate(1 / 200)), len(damaged) - 1)
    at = chance.choice([chance.randrange(len(damaged)), near_end, len(damaged) - 1 - near_end])
    kind = chance.choice(["bit", "byte", "length", "cut", "double", "move", "truncate"])
    if kind == "bit":
        damaged[at] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        damaged[at] = chance.choice([0, 0x7F, 0x80, 0xFF, damaged[at] ^ 1])
    elif kind == "length":
        size = chance.choice([4, 8])
        value = chance.choice([2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63]) % 2 ** (8 * size)
        damaged[at : at + size] = value.to_bytes(size, "little")
    elif kind == "cut":
        del damaged[at : at + chance.randrange(1, 40)]
    elif kind == "double":
        damaged[at:at] = damaged[at : at + chance.randrange(1, 40)]
    elif kind == "move":
        start = chance.randrange(len(damaged))
        piece = damaged[start : start + 16]
        damaged[at : at + len(piece)] = piece
    else:
        del damaged[at:]
    return bytes(damaged)
