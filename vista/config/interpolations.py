"""What the values of a configuration may refer to: other keys, and nothing outside of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import grammar_parser
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser

from vista.errors import ConfigError, shown


def check_value(key: str, value: Any) -> None:
    """Require that a value calls no resolver, which could read the environment, and that its integers fit 64 bits.

    Raises:
        ConfigError: naming the key.
    """
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            check_value(key, inner)
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{key}: holds an integer of more than 64 bits; put text in quotes")
    elif isinstance(value, str) and "${" in value:
        try:
            tree = grammar_parser.parse(value)
        except (OmegaConfBaseException, RecursionError) as error:
            raise ConfigError(f"{key}: cannot read {shown(value)}: {error}") from error
        references = list(_references(tree))
        for name in filter(None, references):
            raise ConfigError(
                f"{key}: configurations may not call the resolver {name}; write the value, or let the shell fill it in"
            )
        if len(references) > 1:
            raise ConfigError(f"{key}: at most one reference such as ${{run_dir}} is possible, got {len(references)}")


def _references(tree: Any) -> Iterator[str]:
    """For each `${...}` of a parsed text: the name of the resolver that it calls, or "" for a key."""
    if isinstance(tree, OmegaConfGrammarParser.InterpolationContext):
        node: Any = tree
        resolver = node.interpolationResolver()
        yield "" if resolver is None else resolver.resolverName().getText()
    for child in getattr(tree, "children", None) or ():
        yield from _references(child)
