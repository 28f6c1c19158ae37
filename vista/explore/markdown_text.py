"""Ids, names, and messages as text in Markdown."""

from __future__ import annotations

import re

_SPECIAL = re.compile(r"[\\`*_\[\]{}$<>&~:#|]")


def escaped(text: object) -> str:
    """A text that the page shows as it is, on one line: no style, link, image, formula, or color of its own."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(str(text).split()))
