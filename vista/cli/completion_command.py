"""The command `vista completion`."""

from __future__ import annotations

from vista.cli.bash_completion import bash_script
from vista.cli.completion_table import CompletionTable
from vista.cli.fish_completion import fish_script
from vista.cli.zsh_completion import zsh_script
from vista.config import CompletionConfig
from vista.config.choices import Shell

_SCRIPTS = {Shell.bash: bash_script, Shell.zsh: zsh_script, Shell.fish: fish_script}


def run_completion(config: CompletionConfig) -> str:
    """`vista completion`: the script, which holds all commands and keys, so that Tab does not start Python."""
    return _SCRIPTS[config.shell](CompletionTable.of_commands())
