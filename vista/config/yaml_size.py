"""The size of a YAML document, measured before it is built."""

from __future__ import annotations

from dataclasses import dataclass

MAX_VALUES, MAX_LEVELS = 10_000, 50
"""Of a document, with every alias replaced by what it stands for."""


@dataclass(eq=False, slots=True)
class _Node:
    """Values and levels of a list, a mapping or a scalar, including itself."""

    values: int = 1
    levels: int = 1

    def add(self, child: _Node) -> None:
        self.values += child.values
        self.levels = max(self.levels, child.levels + 1)


def check_size(text: str) -> None:
    """Refuse a document that is huge once its aliases are replaced, or that contains itself, without building it.

    Raises:
        yaml.YAMLError: it is, or the text is not YAML.
    """
    import yaml  # takes a while, and most configurations are built without it

    anchors: dict[str, _Node] = {}
    open_nodes = [_Node()]  # the document, and the lists and mappings that have begun
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            node = _Node()
            open_nodes.append(node)
        elif isinstance(event, yaml.CollectionEndEvent):
            node = open_nodes.pop()
            open_nodes[-1].add(node)
        elif isinstance(event, yaml.ScalarEvent):
            node = _Node()
            open_nodes[-1].add(node)
        elif isinstance(event, yaml.AliasEvent):
            node = anchors.get(event.anchor, _Node())  # building the document names an anchor that is missing
            if node in open_nodes:
                raise yaml.YAMLError(f"line {line}: *{event.anchor} contains itself")
            open_nodes[-1].add(node)
        else:
            continue
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.anchor:
            anchors[event.anchor] = node
        if open_nodes[-1].values > MAX_VALUES or len(open_nodes) + open_nodes[-1].levels - 1 > MAX_LEVELS:
            raise yaml.YAMLError(
                f"line {line}: more than {MAX_VALUES} values or {MAX_LEVELS} levels, counting each alias as what it "
                "stands for"
            )
