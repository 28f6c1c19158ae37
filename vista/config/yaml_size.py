"""The size of a YAML document, measured before it is built."""

from __future__ import annotations

import yaml

MAX_VALUES, MAX_LEVELS = 10_000, 50
"""Of a document, with every alias replaced by what it stands for."""


def check_size(text: str) -> None:
    """Refuse a document that is huge once its aliases are replaced, or that contains itself, without building it.

    Raises:
        yaml.YAMLError: it is, or the text is not YAML.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    """(values, levels) of each anchor; None until its end."""
    document: tuple[str | None, list[int]] = (None, [0, 0])
    open_nodes = [document]
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor, own = None, (1, 1)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, [1, 0]))
            if event.anchor:
                sizes[event.anchor] = None
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, (values, levels) = open_nodes.pop()
            own = values, levels + 1
        elif isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
        elif isinstance(event, yaml.AliasEvent):
            known = sizes.get(event.anchor, own)
            if known is None:
                raise yaml.YAMLError(f"line {event.start_mark.line + 1}: *{event.anchor} contains itself")
            own = known
        else:
            continue
        if anchor:
            sizes[anchor] = own
        total = open_nodes[-1][1]
        if not isinstance(event, yaml.CollectionStartEvent):
            total[:] = total[0] + own[0], max(total[1], own[1])
        if total[0] > MAX_VALUES or len(open_nodes) + total[1] > MAX_LEVELS:
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1}: more than {MAX_VALUES} values or {MAX_LEVELS} levels, counting "
                "each alias as what it stands for"
            )
