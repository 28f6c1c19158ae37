"""The only module that imports Matplotlib, for the plots of tracked runs."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    from matplotlib.figure import Figure
    from matplotlib.image import imread
except ImportError as error:
    raise MissingDependencyError(
        f"tracking needs Matplotlib for its plots ({error}); install it with: {install_command('plots')}"
    ) from error

__all__ = ["Figure", "imread"]
