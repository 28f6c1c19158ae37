"""Imports the packages of the extra `explore`, or says which one is missing."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import altair
    import pandas
    import streamlit
except ImportError as error:
    raise MissingDependencyError(
        f"vista explore needs Streamlit ({error}); install it with: {install_command('explore')}"
    ) from error

__all__ = ["altair", "pandas", "streamlit"]
