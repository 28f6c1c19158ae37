"""The command line: `vista COMMAND [KEY=VALUE ...]`."""
