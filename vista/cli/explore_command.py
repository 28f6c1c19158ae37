"""The command `vista explore`."""

from __future__ import annotations

from vista.config import ExploreConfig


def run_explore(config: ExploreConfig) -> None:
    """`vista explore`: show a page in the browser until Ctrl-C.

    Raises:
        MissingDependencyError: the extra `explore` is not installed.
        ConfigError: the port cannot be used, or the authentication key cannot be read.
    """
    from vista.explore.explore_server import run_page  # needs the extra `explore`

    run_page(config)
